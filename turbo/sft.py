"""Warm start: supervised fine-tuning on expert traces, of the tiny model from scratch.

    loss = - mean over answer tokens of log p(token | picture, prompt, answer so far)

First a linear read-out of the cards is trained on the vision tower alone (without it the cards stay
unread for hundreds of steps), then the whole model on states of expert episodes. Hands are split by
multiset: the warm start sees only `seen` hands, so that memory and generalisation can be told
apart. In Points24 most exercises ask for another target than 24: too many to learn by heart, so
that more is learned than hands. Run as `python -m turbo.sft points24 --out DIR`.

Left out: reinforcement learning (`turbo.train`).
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from turbo import tiny
from turbo.checkpoint import checkpoints, try_folder, write_json, writing
from turbo.console import counting, success
from turbo.demos import (
    Demonstration,
    backward_demos,
    demonstrate,
    longest_answer,
    pictures_of,
)
from turbo.envs.make import make
from turbo.families import without_bars
from turbo.finetune import UNFINISHED, fine_tune, settings
from turbo.flags import conclude, flag, read_flags
from turbo.hub import model_folder, own_workers
from turbo.measure import evaluate
from turbo.model import VisionLanguageModel, Weights, pick_dtype
from turbo.parallel import Crew, cores, run_crew
from turbo.phases import Phases
from turbo.run import alfworld_options, find_alfworld
from turbo.sft_config import (
    SftConfig,
    check_sft,
    expert_options,
    sft_defaults,
    too_long,
    warm_cosine,
    written,
)
from turbo.versions import versions

SPLIT_GAMES = ("points24", "alfworld")  # some deals are kept from the warm start
IGNORED = -100  # a target that costs nothing
TOLD = {"legal": "legal_rate", "cards": "card_rate", "thoughts right": "reasoning_score"}


def backward_all(vlm, weights: Weights, demos: list[Demonstration]) -> tuple[list, float, int]:
    """Accumulate the summed cross-entropy's gradient in the leaves `weights`.

    Returns the gradients of the vision tower's parameters, the summed loss and the number of
    answer tokens.
    """
    vision = [p for p in vlm.module.model.visual.parameters()]
    features, grid = vlm.see(pictures_of(demos))
    seen = features.detach().requires_grad_()
    total, count = backward_demos(vlm, weights, demos, seen, grid)
    return list(torch.autograd.grad(features, vision, seen.grad)), total, count


def train_read_out(
    vlm: VisionLanguageModel,
    env,
    crew: Crew,
    *,
    steps: int,
    seed: int,
    stray: float = 0.0,
    pictures: int = 64,
    phases: Phases | None = None,
) -> float:
    """Train the vision tower to name what is in the picture through a linear read-out.

    Returns the last accuracy on what has a name; NaN, and nothing is trained, where the first
    answers do not always name as many things. What no picture of the first 64 demonstrations shows
    is left out.
    """
    rng = np.random.default_rng([seed, 1, crew.rank])
    first = [demonstrate(env, vlm, i, stray=stray) for i in range(64)]
    names = names_of(first)
    slots, classes = len(first[0].labels[0]), max(24, len(names))
    if slots == 0 or any(len(d.labels[0]) != slots for d in first):
        return math.nan

    def numbers(labels: list[str]) -> list[int]:
        return [names.get(n, IGNORED) for n in (labels if len(labels) == slots else [""] * slots)]

    size = vlm.see(first[0].pictures[:1])[0].numel()
    torch.manual_seed(seed)
    head = nn.Linear(size, slots * classes)
    parameters = [*vlm.module.model.visual.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    accuracy, phases = 0.0, phases or Phases()
    phases.begin("read-out")
    phases.expect(steps)
    for step in range(steps):
        phases.done = step
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        demos = [
            demonstrate(env, vlm, int(s), states=1, stray=stray)
            for s in rng.integers(2**31, size=pictures // crew.size)
        ]
        target = torch.tensor([numbers(labels) for d in demos for labels in d.labels])
        features = vlm.see(pictures_of(demos))[0]
        logits = head(features.flatten(1)).view(-1, slots, classes)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        crew.sum_([p.grad for p in parameters])
        optimizer.step()  # Adam does not mind the scale
        right = (logits.argmax(-1) == target)[target != IGNORED].float().mean().item()
        accuracy = 0.9 * accuracy + 0.1 * right
    return accuracy


def names_of(demos: list[Demonstration]) -> dict[str, int]:
    """A number for everything that any picture of these demonstrations shows."""
    found = {name for d in demos for labels in d.labels for name in labels}
    return {name: number for number, name in enumerate(sorted(found))}


def warm_start(
    crew: Crew, c: SftConfig, say: Callable[[str], None] = print, phases: Phases | None = None
) -> dict | None:
    """The whole of it: read-out, language model, evaluation, files. Figures on worker 0."""
    phases = phases or Phases()
    started = time.perf_counter()
    make_env = env_maker(c)
    env = make_env("seen")
    tokenizer = tiny.tokenizer_of(c.env, env)
    size = c.size or tiny.SIZE_OF_GAME.get(c.env, "small")
    module = tiny.new_model(size, tokenizer, c.seed, tiny.positions_of(c.env))
    vlm = VisionLanguageModel(module, tokenizer, tiny.image_processor(), pick_dtype(c.dtype))
    options = dict(steps=c.read_out_steps, seed=c.seed, stray=c.stray, phases=phases)
    read = train_read_out(vlm, env, crew, **options)
    if crew.leads:
        say(f"{parameter_count(module):,} parameters; read-out of the picture {read:.1%}")
        if told := too_long(longest_answer(env, vlm), c.max_new_tokens):
            say(told)
    losses = train_language(vlm, env, crew, c, say if crew.leads else lambda _: None, phases)
    minutes = (time.perf_counter() - started) / 60
    module.to(torch.bfloat16).to(torch.float32)  # evaluated as it will be saved
    figures = {"minutes": round(minutes, 1), "loss": losses, "read_out": read}
    for split in ("seen", "unseen") if c.env in SPLIT_GAMES else ("all",):
        for temperature in (0.2, 1.0):
            with torch.no_grad():
                weights = vlm.weights()
            phases.begin("evaluation")
            e = evaluate(
                vlm,
                weights,
                lambda s=split: make_env(s),
                episodes=c.eval_episodes,
                seed=c.seed,
                temperature=temperature,
                max_new_tokens=c.max_new_tokens,
                crew=crew,
                envs=64 if c.env == "alfworld" else 256,
                phases=phases,
            )
            told = {name: value for name, value in e.items() if name != "solved"}
            figures[f"{split}, temperature {temperature}"] = told
            if crew.leads:
                parts = [f"{what} {e[key]:.1%}" for what, key in TOLD.items() if e[key] == e[key]]
                say(f"{split} deals, T {temperature}: {success(e)}, {', '.join(parts)}")
    if crew.leads:
        with writing(c.out):
            save(vlm, c, figures)
        legal = [e["legal_rate"] for e in figures.values() if isinstance(e, dict)]
        say(written(c, max(legal)))
    return figures


def train_language(
    vlm,
    env,
    crew: Crew,
    c: SftConfig,
    say: Callable[[str], None],
    phases: Phases | None = None,
) -> float:
    """Cross-entropy on expert answers, cosine; the mean loss of the last 50 steps."""
    phases = phases or Phases()
    phases.begin("language")
    phases.expect(c.steps)
    parameters = [p for p in vlm.module.parameters() if p.requires_grad]
    visual = list(vlm.module.model.visual.parameters())
    optimizers = language_optimizers(vlm.module, c)
    rng = np.random.default_rng([c.seed, 2, crew.rank])
    started, recent = time.perf_counter(), []
    for step in range(c.steps):
        phases.done = step
        rate = warm_cosine(step, c.steps, warm=50)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
        deals = rng.integers(2**31, size=c.deals // crew.size)
        demos = [
            demonstrate(env, vlm, int(s), c.states, c.other_targets, stray=c.stray) for s in deals
        ]
        vlm.module.zero_grad(set_to_none=True)
        weights = vlm.weights()
        local = weights.cut()
        vision, loss, count = backward_all(vlm, local, demos)
        weights.backward(local)
        for parameter, grad in zip(visual, vision, strict=True):
            parameter.grad = grad
        loss, count = crew.total(loss, count)
        crew.sum_([p.grad for p in parameters])
        torch._foreach_div_([p.grad for p in parameters], count)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        recent = [*recent[-49:], loss / count]
        if step % 100 == 99:
            speed = (step + 1) / (time.perf_counter() - started)
            say(
                f"step {step + 1}/{c.steps} loss {np.mean(recent):.4f} "
                f"{(c.steps - step - 1) / speed / 60:.1f} minutes left"
            )
    return float(np.mean(recent))


def language_optimizers(module: nn.Module, c: SftConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the text layers, AdamW for all else.

    Muon orthogonalises the momentum of a matrix (Jordan et al. 2024), scaled as Liu et al. (2025)
    do to match the size of AdamW's steps.
    """
    muon, matrices, others = [], [], []
    for name, p in module.named_parameters():
        layer = p.dim() == 2 and "language_model.layers." in name
        (muon if layer else matrices if p.dim() >= 2 else others).append(p)
    groups = [dict(params=matrices, weight_decay=0.01), dict(params=others, weight_decay=0.0)]
    found = [
        torch.optim.AdamW(groups, lr=c.learning_rate, betas=(0.9, 0.98)),
        torch.optim.Muon(
            muon,
            lr=c.muon_learning_rate,
            weight_decay=0.01,
            adjust_lr_fn="match_rms_adamw",
        ),
    ]
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return found


def parameter_count(module: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in module.parameters())


def env_maker(c: SftConfig) -> Callable:
    """A function of the split that makes one environment."""
    options = tiny.tiny_kwargs(c.env) | expert_options(c)

    def build(split: str):
        extra = {"split": split} if c.env == "points24" else {}
        if c.env == "alfworld":
            extra = alfworld_options(c, "train" if split == "seen" else "valid_unseen")
        return make(c.env, **options, **extra)

    return build


def save(vlm: VisionLanguageModel, c: SftConfig, figures: dict) -> None:
    """Write model (bfloat16 safetensors), tokenizer, image processor, and how they were made."""
    out = Path(c.out)
    without_bars()
    vlm.module.to(torch.bfloat16).save_pretrained(out)
    vlm.tokenizer.save_pretrained(out)
    vlm.processor.save_pretrained(out)
    config = {k: v for k, v in asdict(c).items() if k not in ("out", "overwrite")}
    plain = asdict(sft_defaults(c.env))
    flags = [f"{flag(k)} {v}" for k, v in config.items() if v != plain[k]]
    short_name = c.env.rpartition(":")[2]
    record = {
        "command": " ".join([f"python -m turbo.sft {c.env} --out {short_name}", *flags]),
        "parameters": parameter_count(vlm.module),
        "config": config,
        "versions": versions(),
        "figures": figures,
    }
    write_json(out / "warm_start.json", record)


def check_out(out: Path, c: SftConfig) -> None:
    """ValueError where the folder holds what would be lost, or nothing to go on with."""
    begun = bool(checkpoints(out / UNFINISHED))
    if c.resume and not begun:
        raise ValueError(f"--resume: nothing was begun in --out {out}: leave --resume out")
    if c.resume or c.overwrite:
        return
    if begun:
        raise ValueError(
            f"--out {out} holds a fine-tuning that did not come to its end: go on with --resume, "
            "or begin anew with --overwrite"
        )
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty: choose another folder, or add --overwrite")


def main(argv: list[str] | None = None) -> int:
    """Make a warm start; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        names = [a for a in argv[:1] if not a.startswith("-")]
        base = sft_defaults(names[0] if names else "points24")
        c = read_flags(SftConfig, argv, "turbo.sft", default=base)
        if c.env != base.env or c.model:  # whose defaults are others
            default = sft_defaults(c.env, bool(c.model))
            c = read_flags(SftConfig, argv, "turbo.sft", default=default)
        check_sft(c)
        out = Path(c.out)
        check_out(out, c)
        with writing(out):
            try_folder(out)
        find_alfworld(c)
        if c.model:
            model_folder(settings(c))  # what is to be fetched has bars of its own
        if c.deals < (c.workers or cores()):
            raise ValueError(f"--deals {c.deals} is less than the number of workers")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if c.model:
        return run_crew(own_workers(c, 4), watched, fine_tune, c)
    run_crew(c.workers or cores(), watched, warm_start, c, board=1 << 22)
    return 0


def watched(crew: Crew, work: Callable, c: SftConfig) -> object:
    """A fine-tuning or a warm start, with a bar where that is of use."""
    phases = Phases()
    with counting(phases, crew.leads):
        return work(crew, c, print, phases)


if __name__ == "__main__":
    sys.exit(conclude(main))
