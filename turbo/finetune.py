"""Warm start of any vision-language model: LoRA on expert traces, written merged.

    theta_0 = base + s B A,   A, B trained by AdamW on the cross-entropy of the expert's answers

The vision tower stays as it is. Reached by `python -m turbo.sft points24 --model NAME --out DIR`.
Factors and moments are saved along the way, in DIR/unfinished; every random number of a step
derives from (seed, step), so a fine-tuning that was killed goes on bit for bit.

Left out: the demonstrations (`turbo.demos`), the tiny model from scratch (`turbo.sft`).
"""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from turbo import checkpoint
from turbo.batch import fits
from turbo.checkpoint import write_json, writing
from turbo.config import TrainConfig
from turbo.console import success
from turbo.demos import (
    Demonstration,
    backward_demos,
    demonstrate,
    longest_answer,
    pictures_of,
)
from turbo.flags import flag
from turbo.formats import (
    Kept,
    copy_processor_files,
    generation_config,
    is_far_from_all,
    loss_of_rounding,
    policy_matrices,
    save_model,
)
from turbo.hub import model_folder, model_sha256, observation, open_model
from turbo.lora import Lora, new_lora
from turbo.measure import evaluate
from turbo.model import VisionLanguageModel
from turbo.optimizer import load_optimizer, optimizer_tensors
from turbo.parallel import Crew, fail
from turbo.phases import Phases
from turbo.run import env_maker, held_out, prompt_style
from turbo.sft_config import SftConfig, expert_options, too_long, warm_cosine, written
from turbo.versions import versions

ENVS = 64  # that the evaluation plays at once
PICTURES = 16  # that the vision tower sees together
UNFINISHED = "unfinished"  # folder, beside the model, of a fine-tuning that goes on
# What may be another when it does
FREE = ("out", "overwrite", "resume", "save_every", "workers", "eval_episodes", "device", "model")
FREE += ("max_new_tokens", "micro_tokens")


def settings(c: SftConfig) -> TrainConfig:
    """The settings that opening a model and making its games need."""
    shared = ("env", "model", "device", "dtype", "quantize", "observation", "micro_tokens", "seed")
    shared += ("games", "tasks", "history_length", "max_new_tokens")
    own = {name: getattr(c, name) for name in shared}
    return TrainConfig(engine="modules", lora_rank=c.lora_rank, envs=ENVS, **own)


def fine_tune(
    crew: Crew, c: SftConfig, say: Callable[[str], None] = print, phases: Phases | None = None
) -> int:
    """Train, evaluate, write; the exit status."""
    run, started, phases = settings(c), time.perf_counter(), phases or Phases()
    phases.begin("model")
    say = say if crew.leads else lambda text: None
    vlm, problem = None, ""
    try:
        vlm = open_model(run)
    except (ValueError, OSError) as error:
        problem = str(error)
    if problem := crew.problem(problem):  # maybe of one worker alone
        return fail(crew, problem, 2)
    lora = new_lora(vlm.matrices, c.lora_rank, 2.0 * c.lora_rank, c.seed)
    trained = sum(p.numel() for p in lora.parameters())
    say(f"{c.model}: {trained:,} parameters in factors of rank {c.lora_rank}")
    try:
        loss, is_whole = train_factors(vlm, lora, run, crew, c, say, phases)
    except ValueError as error:  # in all workers: what was saved is of something else
        return fail(crew, error, 2)
    figures = {"minutes": round((time.perf_counter() - started) / 60, 1), "loss": loss}
    phases.begin("evaluation")
    e = evaluate(
        vlm,
        vlm.weights(lora),
        env_maker(run, held_out(c.env)),
        episodes=c.eval_episodes,
        seed=c.seed,
        temperature=run.eval_temperature,
        max_new_tokens=c.max_new_tokens,
        crew=crew,
        envs=ENVS,
        prompt_style=prompt_style(run),
        phases=phases,
    )
    say(f"T {run.eval_temperature}: {success(e)}, legal {e['legal_rate']:.1%}")
    figures |= {k: v for k, v in e.items() if k != "solved"}
    if crew.leads:
        with writing(c.out):
            save(vlm, lora, c, run, figures)
            if is_whole:
                shutil.rmtree(Path(c.out) / UNFINISHED, ignore_errors=True)
            if is_far_from_all(figures["kept"]):
                say(f"{loss_of_rounding(figures['kept'])}: --dtype float32 keeps all")
        say(written(c, e["legal_rate"]))
    return 0


def expert_maker(run: TrainConfig, c: SftConfig) -> Callable:
    """Makes the environment of the demonstrations: where deals are told apart, those to be seen."""
    return env_maker(run, "seen" if c.env == "points24" else "all", **expert_options(c))


@contextmanager
def noticed() -> Iterator[list[int]]:
    """Inside, the first Ctrl-C is only noted in the list; a second one interrupts as ever."""
    asked: list[int] = []

    def note(number: int, frame) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def train_factors(
    vlm: VisionLanguageModel,
    lora: Lora,
    run: TrainConfig,
    crew: Crew,
    c: SftConfig,
    say: Callable[[str], None],
    phases: Phases,
) -> tuple[float, bool]:
    """Cross-entropy on expert answers, warm-up and cosine; the mean loss of the last 50 steps, and
    whether all were done.

    Ctrl-C ends it early, with what was learned so far.
    """
    env, style = expert_maker(run, c)(), prompt_style(run)
    if told := too_long(longest_answer(env, vlm, style, deals=16), c.max_new_tokens):
        say(told)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=c.lora_learning_rate, weight_decay=0.0)
    saved = Progress(Path(c.out) / UNFINISHED, decisive(c, run, crew), lora, optimizer)
    first, recent = saved.begin(crew, c.resume)
    if first:
        say(f"going on after step {first}")
    started, done = time.perf_counter(), first
    phases.begin("steps")
    phases.expect(c.steps)
    with noticed() if crew.leads else nullcontext([]) as asked:
        for step in range(first, c.steps):
            phases.done = step
            optimizer.param_groups[0]["lr"] = c.lora_learning_rate * warm_cosine(
                step, c.steps, warm=20
            )
            rng = np.random.default_rng([c.seed, 2, crew.rank, step])
            seeds = rng.integers(2**31, size=c.deals // crew.size)
            demos = [
                demonstrate(env, vlm, int(s), c.states, c.other_targets, style, c.stray)
                for s in seeds
            ]
            loss, count = factor_gradients(vlm, lora, demos)
            crew.sum_([p.grad for p in lora.parameters()])
            loss, count, stopped = crew.total(loss, count, len(asked))
            norm = torch.nn.utils.clip_grad_norm_(lora.parameters(), float(crew.size))
            if norm.isfinite():
                optimizer.step()
            recent, done = [*recent[-49:], loss / count], step + 1
            if done % 10 == 0:
                left = (time.perf_counter() - started) / (done - first) * (c.steps - done) / 60
                say(f"step {done}/{c.steps} loss {np.mean(recent):.4f} {left:.1f} minutes left")
            is_due = c.save_every and (stopped or done == c.steps or done % c.save_every == 0)
            if crew.leads and is_due:
                saved.save(done, recent, say)
            if stopped and done < c.steps:
                more = "; --resume goes on" if c.save_every else ""
                say(f"stopped after step {done}: what was learned is evaluated and written{more}")
                break
    return float(np.mean(recent)), done == c.steps


def decisive(c: SftConfig, run: TrainConfig, crew: Crew) -> dict:
    """What makes two fine-tunings the same: the settings that matter, the base, who shares it."""
    own = {k: v for k, v in asdict(c).items() if k not in FREE}
    return own | {"workers": crew.size, "base": model_sha256(run)}


@dataclass
class Progress:
    """A fine-tuning under way, as it is saved."""

    folder: Path
    about: dict  # what it must agree with to go on
    lora: Lora
    optimizer: torch.optim.Optimizer

    def begin(self, crew: Crew, resume: bool) -> tuple[int, list[float]]:
        """Steps done and their last losses: those that were saved, or none.

        ValueError in every worker where they are those of something else, or cannot be read.
        """
        step, recent, problem = 0, [], ""
        if resume:
            try:
                step, recent = self._load()
            except (KeyError, TypeError, RuntimeError, ValueError) as error:
                problem = f"--resume: {error}"
        if problem := crew.problem(problem):
            raise ValueError(problem)
        if crew.leads and not resume:
            shutil.rmtree(self.folder, ignore_errors=True)  # with --overwrite
        return step, recent

    def _load(self) -> tuple[int, list[float]]:
        found = checkpoint.load(self.folder)
        theirs = found.meta["about"]
        for name, own in self.about.items():
            if theirs.get(name) != own:
                other = f"{flag(name)} {theirs.get(name)}, now {own}"
                told = "another model" if name == "base" else other
                raise ValueError(f"it was begun with {told}: give the same, or --overwrite")
        self.lora.load_state_dict(found.adapter)
        load_optimizer(self.optimizer, found.state)
        return found.meta["step"], found.meta["recent"]

    def save(self, step: int, recent: list[float], say: Callable[[str], None]) -> None:
        """Save; where that fails it is said, and what was saved before stays."""
        meta = {"about": self.about, "step": step, "recent": recent}
        state = optimizer_tensors(self.optimizer)
        try:
            checkpoint.save(self.folder, step, self.lora.state_dict(), state, meta, keep=1)
        except OSError as error:
            say(f"step {step} could not be saved: {error}")


def factor_gradients(
    vlm: VisionLanguageModel, lora: Lora, demos: list[Demonstration]
) -> tuple[float, int]:
    """Set the gradient of the mean cross-entropy of these answers; its sum, and their tokens."""
    with torch.no_grad():
        shown = pictures_of(demos)
        pieces = [vlm.see(shown[i : i + PICTURES]) for i in range(0, len(shown), PICTURES)]
    features, grid = torch.cat([f for f, _ in pieces]), pieces[0][1]
    tokens, found = sum(len(a) for d in demos for a in d.answers), (0.0, 0)

    def accumulate() -> None:
        nonlocal found
        for p in lora.parameters():
            p.grad = torch.zeros_like(p)
        whole = vlm.weights(lora)
        weights = whole.cut()
        found = backward_demos(vlm, weights, demos, features, grid, scale=1 / tokens)
        whole.backward(weights)

    while not fits(accumulate):  # in smaller pieces, from the start
        vlm.batches.halve("train", vlm.batches.train)
    return found


def save(
    vlm: VisionLanguageModel, lora: Lora, c: SftConfig, run: TrainConfig, figures: dict
) -> None:
    """Write the merged model and the record of how it was made."""
    kept = Kept()
    dense = policy_matrices(vlm, lora, vlm.text.dtype, kept)
    figures["kept"] = kept.share
    out = Path(c.out)
    # transformers refuses to save some bases' own settings
    temperature = run.eval_temperature
    vlm.module.generation_config = generation_config(vlm, temperature, c.max_new_tokens)
    save_model(out, vlm.module, dense, vlm.text.dtype)
    vlm.tokenizer.save_pretrained(out)
    vlm.processor.save_pretrained(out)
    copy_processor_files(model_folder(run), out)
    config = {k: v for k, v in asdict(c).items() if k not in ("out", "overwrite", "resume")}
    record = {
        "config": config,
        "observation": observation(run),
        "versions": versions(),
        "figures": figures,
    }
    write_json(out / "warm_start.json", record)
