"""Evaluation on fresh deals: `python -m turbo.eval RUN`, or `turbo.eval MODEL --env points24`.

RUN_OR_MODEL is a run directory of `turbo.train`, a model folder of `turbo.sft`, or `tiny` for the
built-in warm start. Success comes with its 95 % interval (Wilson), and says which deals it is on:
all, those whose multiset the warm start saw, those it did not, or the pool that a run was
restricted to. With `--against` another one plays the same deals, and the difference is told.

Left out: evaluation during training (`turbo.scribe`), plots.
"""

import gc
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from turbo import checkpoint
from turbo.config import TrainConfig
from turbo.console import counting, evaluated, when
from turbo.envs.make import check_env, is_name
from turbo.flags import conclude, flag, read_flags
from turbo.hub import is_hub_id, model_sha256, open_model, own_workers, preset_of
from turbo.lora import new_lora
from turbo.measure import evaluate, paired_interval
from turbo.model import VisionLanguageModel, Weights
from turbo.parallel import Crew, run_crew
from turbo.phases import Phases
from turbo.presets import defaults
from turbo.run import env_maker, find_alfworld, held_out, prompt_style
from turbo.saved import from_saved
from turbo.teacher import saved_teacher

JSON_KEYS = [
    "success_rate",
    "success_low",
    "success_high",
    "success_solvable",
    "episode_return",
    "legal_rate",
    "card_rate",
    "reasoning_score",
    "episodes",
    "samples",
    "pass_at_k",
    "seed",
    "temperature",
    "split",
    "source",
    "env",
    "who",
    "update",
]


@dataclass
class EvalConfig:
    """Play fresh deals with a policy, its merged teacher or a warm start; report how it does."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_MODEL")]
    """run directory, of which the newest checkpoint plays, RUN/checkpoints/N for another; model
    folder, id of a model on the Hub, or `tiny`"""
    env: Annotated[str, tyro.conf.arg(metavar="ENV")] = ""
    """which environment to play: a name as in training, or module:Class (empty: the run's;
    points24 for a model)"""
    episodes: int = 500
    """deals, each of its own seed"""
    samples: int = 1
    """episodes of each deal; pass_at_k is the share of the deals that one of them solved"""
    envs: int = 0
    """environments that play at once (0: as many as in training; 64 for a large model)"""
    seed: int = 0
    """seed of the deals and of sampling; never one that training draws"""
    teacher: bool = False
    """evaluate the run's merged teacher instead of its policy (of --against it is the policy)"""
    against: Annotated[str, tyro.conf.arg(metavar="RUN_OR_MODEL")] = ""
    """another run's policy, or a model, that plays the same deals: how much better the first one
    is, with the interval of paired deals, which is narrower than those of the two suggest"""
    temperature: float = 0.2
    """sampling temperature"""
    split: Literal["", "all", "seen", "unseen", "pool"] = ""
    """Points24: all hands; those the warm start saw; those it did not; a run's pool (--hands).
    ALFWorld: training games, new games of known rooms, games of new rooms. Empty: all hands, and
    ALFWorld's new rooms"""
    games: str = ""
    """ALFWorld: folder of games (empty: the run's; else $ALFWORLD_DATA, or small ones made once)"""
    tasks: str = ""
    """ALFWorld: task types to play, separated by commas (empty: the run's)"""
    max_new_tokens: int = 0
    """longest answer in tokens (0: as in training)"""
    json: bool = False
    """print one line of JSON and nothing else"""
    workers: int = 0
    """processes (0: one a core, at most 4)"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of the matrix products"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the model runs; auto is the GPU where there is one"""
    quantize: Literal["auto", "none", "nf4"] = "auto"
    """nf4: the base in 4 bits; auto: as the run was trained, none for a model"""


def check(c: EvalConfig) -> TrainConfig:
    """Refuse what cannot be evaluated; the settings of the run, or the defaults for a model."""
    for name in ("episodes", "samples", "temperature"):
        if not 0 < getattr(c, name) < math.inf:
            raise ValueError(f"{flag(name)} must be more than 0, got {getattr(c, name)}")
    for name in ("seed", "max_new_tokens"):
        if getattr(c, name) < 0:
            raise ValueError(f"{flag(name)} must be zero or more, got {getattr(c, name)}")
    path = Path(c.source)
    trained = checkpoint.run_of(path)
    if trained and not checkpoint.checkpoints(trained[0]):
        raise ValueError(f"{c.source} has no checkpoint yet: train it first")
    if c.source != "tiny" and not trained and not path.is_dir() and not is_hub_id(c.source):
        if is_name(c.source):
            raise ValueError(f"{c.source} is an environment: `turbo.eval tiny --env {c.source}`")
        raise ValueError(
            f"{c.source!r} is neither a folder nor `tiny`: give a run, a model, or tiny"
        )
    if trained:
        saved = checkpoint.read_run(trained[0])
        run = from_saved(saved["config"], c.source)
        if c.env not in ("", run.env):
            raise ValueError(f"{c.source} was trained on {run.env}: name that, not {c.env}")
    else:
        run = TrainConfig(c.env or "points24", model=c.source)
        run = replace(defaults(run.env, preset_of(run)), model=c.source)
    check_env(run.env)
    if c.split and run.env not in ("points24", "alfworld"):
        raise ValueError(f"--split {c.split} is for points24 and alfworld: leave it out")
    if (c.games or c.tasks) and run.env != "alfworld":
        raise ValueError("--games and --tasks are for alfworld alone: leave them out")
    if trained:
        if saved["model_sha256"] != model_sha256(run):
            raise ValueError(f"{c.source} was trained from another model than {run.model!r} is now")
        checkpoint.load(*trained, history=c.teacher)
        if c.teacher and not run.teaches:
            raise ValueError(
                f"{c.source} has no teacher: it was trained with --guidance {run.guidance}"
            )
    else:
        if c.teacher:
            raise ValueError(f"--teacher needs a run directory; {c.source!r} is a model")
        model_sha256(run)
    if c.split == "pool" and c.against:
        raise ValueError("--split pool is of one run: leave it out, or --against")
    if c.split == "pool" and not run.hands:
        raise ValueError("--split pool needs a run that was trained with --hands")
    own = {"dtype": c.dtype, "device": c.device, "workers": c.workers}
    own["quantize"] = run.quantize if c.quantize == "auto" else c.quantize
    own |= {name: getattr(c, name) or getattr(run, name) for name in ("games", "tasks")}
    own["max_new_tokens"] = c.max_new_tokens or run.max_new_tokens
    return replace(run, **own)


def open_source(c: EvalConfig, run: TrainConfig) -> tuple[VisionLanguageModel, Weights, int | None]:
    """The model, and the weights that are to play: a policy's, its merged teacher's, its own; of a
    run the update too."""
    vlm = open_model(run)
    lora = update = None
    if trained := checkpoint.run_of(c.source):
        saved = checkpoint.load(*trained, history=c.teacher)
        lora = new_lora(vlm.matrices, run.lora_rank, run.lora_alpha, 0)
        lora.load_state_dict(saved.adapter)
        update = saved.meta.get("update")
    with torch.no_grad():
        weights = vlm.weights(lora)
    if c.teacher:
        weights = saved_teacher(vlm, lora, run, saved).weights
    return vlm, weights, update


def play(crew: Crew, c: EvalConfig, run: TrainConfig) -> dict | None:
    """Load, play, and gather the figures; what every worker runs."""
    vlm, weights, update = open_source(c, run)
    if c.split == "pool":
        make_env = env_maker(run)
    else:
        make_env = env_maker(replace(run, hands=0), c.split or held_out(run.env))
    phases = Phases()
    phases.begin("episodes")
    with counting(phases, crew.leads and not c.json, stderr=True):
        figures = evaluate(
            vlm,
            weights,
            make_env,
            episodes=c.episodes,
            seed=c.seed,
            temperature=c.temperature,
            max_new_tokens=run.max_new_tokens,
            crew=crew,
            envs=c.envs or (run.envs if vlm.text.small else min(run.envs, 64)),
            prompt_style=prompt_style(run),
            samples=c.samples,
            phases=phases,
        )
    asked = {key: getattr(c, key) for key in ("samples", "seed", "temperature")}
    split, who = c.split or held_out(run.env), "teacher" if c.teacher else "policy"
    told = dict(split=split, source=c.source, env=run.env, who=who, update=update)
    return {**figures, **asked, **told}


def opponent(c: EvalConfig, run: TrainConfig) -> tuple[EvalConfig, TrainConfig]:
    """What plays against it, by the same rules; ValueError where there can be no such game."""
    env = "" if checkpoint.run_of(Path(c.against)) else run.env  # a run has its own
    other = replace(c, source=c.against, against="", teacher=False, env=env)
    try:
        settings = check(other)
    except ValueError as error:
        raise ValueError(f"--against: {error}") from error
    if settings.env != run.env:
        raise ValueError(
            f"--against: {c.source} plays {run.env}, {c.against} {settings.env}: give two that "
            "play the same"
        )
    return other, settings


def same_deals(settings: TrainConfig, run: TrainConfig) -> TrainConfig:
    """The settings of one, with the deals, their rules and the share of the card of the other."""
    rules = ("games", "tasks", "early_truncation", "gpu")
    return replace(settings, **{name: getattr(run, name) for name in rules})


def compared(first: dict, second: dict) -> dict[str, float]:
    """The difference in success on the same deals, and its 95 % interval."""
    names = ("difference", "difference_low", "difference_high")
    rates = [[n / f["samples"] for n in f["solved"]] for f in (first, second)]
    return dict(zip(names, paired_interval(*rates), strict=True))


def as_json(figures: dict) -> dict:
    """The figures of one that played, for JSON."""
    values = {k: figures[k] for k in JSON_KEYS}
    if figures["tasks"]:
        values["goal_rate"], values["tasks"] = figures["goal_rate"], figures["tasks"]
    if figures["samples"] > 1:
        values["solved"] = figures["solved"]  # samples of each deal that succeeded
    return {k: None if v != v else v for k, v in values.items()}  # NaN: does not apply


def tell(figures: dict) -> None:
    """Print how one did that played."""
    samples = figures["samples"]
    who = "merged teacher" if figures["who"] == "teacher" else "policy"
    if figures["update"] is not None:
        who += f" {when(figures['update'])}"
    game = f"{figures['env']}, {figures['split']} deals, seed {figures['seed']}"
    print(f"{figures['source']} ({who}) on {game}")
    print(evaluated(figures, f"episodes at T {figures['temperature']}"))
    details = {
        "success_solvable": "of the episodes that can be won",
        "card_rate": "of the steps name what the picture shows",
        "pass_at_k": f"of the deals are won by one of {samples} samples",
    }
    for name, of in details.items():
        if figures[name] == figures[name] and (samples > 1 or name != "pass_at_k"):
            print(f"  {figures[name]:6.1%} {of}")
    for task, found in figures["tasks"].items():
        low, high = found["success_low"], found["success_high"]
        print(
            f"  {task:31} success {found['success_rate']:6.1%} [{low:.1%}, {high:.1%}], goal "
            f"conditions {found['goal_rate']:.1%} of {found['episodes']} episodes"
        )


def tell_difference(first: dict, second: dict) -> None:
    """Print how much better the first one did on the same deals, and on how many."""
    d, low, high = (round(100 * x, 1) + 0.0 for x in compared(first, second).values())  # no -0.0
    pairs = list(zip(first["solved"], second["solved"], strict=True))
    more, less = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    print(
        f"difference: {d:+.1f} points [{low:+.1f}, {high:+.1f}] on the same {len(pairs)} deals; "
        f"{more} are won {'more often' if first['samples'] > 1 else 'only'} by the first, {less} "
        "by the second"
    )


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        c = read_flags(EvalConfig, argv, "turbo.eval")
        run = check(c)
        sides = [(c, run), *([opponent(c, run)] if c.against else [])]
        find_alfworld(run, c.split or held_out(run.env))
        played = []
        for own, settings in sides:
            workers = own_workers(settings, max(1, c.episodes // 16))
            played.append(run_crew(workers, play, own, same_deals(settings, run)))
            gc.collect()  # a model refers to itself: the card is for the next one
            if not c.json:
                tell(played[-1])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if c.json:
        told = as_json(played[0])
        if c.against:
            told |= {"against": as_json(played[1]), **compared(*played)}
        print(json.dumps(told))
    elif c.against:
        tell_difference(*played)
    return 0


if __name__ == "__main__":
    sys.exit(conclude(main))
