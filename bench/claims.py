"""What the study's runs say about the paper's claims: differences between methods, seed by seed.

A claim "A beats B" compares final success of the two on the same seeds (the same deals in training
and in evaluation) and gives the mean difference with its 95 % interval (Student's t over seeds):

    holds          the whole interval lies above 0
    contradicted   it lies below 0
    not separated  it contains 0: with these seeds and steps nothing can be said

Of more than two methods that should rise in an order, it is the slope over them, seed by seed.

Left out: where the runs come from (`bench.study`), plots and page (`bench.study_page`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.study_runs import StudyRun
from turbo.measure import mean_interval

SUCCESS, TEACHER = "eval_success_rate", "eval_teacher_success_rate"


@dataclass(frozen=True)
class Comparison:
    """Two methods of one regime, and the figure in which the first should be higher."""

    regime: str
    better: str
    worse: str
    figure: str = SUCCESS
    against: str = ""  # the figure of `worse` where it is another one
    words: str = ""  # what is compared, where it is not final success
    order: tuple[str, ...] = ()  # more methods than two, the worst first: the slope over them


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, or one of ours, and the comparisons that it stands on here."""

    letter: str
    statement: str
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class Finding:
    """Mean difference over `seeds` seeds with its 95 % interval, in the figure's unit."""

    seeds: int
    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if not self.seeds:
            return "not run yet"
        if math.isnan(self.low):
            return "one seed: no interval"
        return "holds" if self.low > 0 else "contradicted" if self.high < 0 else "not separated"


def pairs(regime: str, better: str, *worse: str) -> tuple[Comparison, ...]:
    """`better` against each of the others."""
    return tuple(Comparison(regime, better, other) for other in worse)


def teacher_over_policy(regime: str, method: str) -> Comparison:
    """Final success of the merged teacher less that of the policy."""
    return Comparison(regime, method, method, TEACHER, SUCCESS, f"{method}: teacher over policy")


def steadier(regime: str, method: str) -> Comparison:
    """How much more success changes between evaluations for the policy than for its teacher."""
    words = f"{method}: change from one evaluation to the next, policy less teacher"
    return Comparison(regime, method, method, f"change {SUCCESS}", f"change {TEACHER}", words)


def right_thoughts(regime: str, better: str, worse: str) -> Comparison:
    """Final share of right thoughts."""
    words = f"{better} over {worse}, right thoughts"
    return Comparison(regime, better, worse, "eval_reasoning_score", words=words)


def rising(regime: str, *order: str) -> Comparison:
    """How much final success rises from each of some methods to the next, by least squares."""
    words = f"{', '.join(order)}: rise from each to the next"
    return Comparison(regime, order[-1], order[0], words=words, order=order)


CLAIMS = (
    Claim(
        "a",
        "KL guidance ends higher than SFT guidance, and both end higher than none.",
        (
            *pairs("harsh", "kl", "sft", "none"),
            *pairs("harsh", "sft", "none"),
            *pairs("calm", "kl", "sft", "none"),
            *pairs("calm", "sft", "none"),
        ),
    ),
    Claim(
        "b",
        "The merged teacher is at least as good as the current policy, and steadier.",
        (
            teacher_over_policy("harsh", "kl"),
            teacher_over_policy("harsh", "linear-sma"),
            teacher_over_policy("calm", "kl"),
            steadier("harsh", "kl"),
            steadier("harsh", "linear-sma"),
        ),
    ),
    Claim(
        "c",
        "A merged teacher is better than a static one, the warm start.",
        (
            *pairs("harsh", "kl", "initial"),
            *pairs("harsh", "linear-sma", "initial"),
            *pairs("calm", "kl", "initial"),
        ),
    ),
    Claim(
        "d",
        "TIES is at least as good as linear merging.",
        (*pairs("harsh", "kl", "linear"), *pairs("harsh", "sma", "linear-sma")),
    ),
    Claim(
        "e",
        "Equal weights and EMA with alpha 0.5 are alike; alpha 0.1 and 0.9 are worse.",
        pairs("harsh", "kl", "sma", "ema-0.1", "ema-0.9", "score"),
    ),
    Claim("f", "Guiding thoughts beats guiding thoughts and actions.", pairs("harsh", "kl", "all")),
    Claim(
        "g",
        "Estimators: clip beats abs and k3, these beat forward KL, that beats none.",
        (
            *pairs("calm", "clip", "abs", "k1", "k3", "none"),
            *pairs("calm", "kl", "clip"),
            *pairs("harsh", "kl", "forward"),
            *pairs("harsh", "forward", "none"),
        ),
    ),
    Claim(
        "h",
        "Merging after every update, every 5 or every 10 makes no difference.",
        pairs("harsh", "kl", "every-5", "every-10"),
    ),
    Claim(
        "i",
        "Without guidance thoughts collapse; guidance keeps them right.",
        (
            right_thoughts("harsh", "kl", "none"),
            right_thoughts("calm", "kl", "none"),
        ),
    ),
    Claim(
        "merging",
        "Ours, not the paper's: is it merging that matters? Against the last checkpoint alone as "
        "the teacher, a trust region (epochs end at an approximate KL), and the calm rate.",
        (
            *pairs("harsh", "kl", "last", "trust", "slow"),
            *pairs("harsh", "linear-sma", "last", "trust", "slow"),
        ),
    ),
    Claim(
        "memory",
        "Ours, asked after the runs had been seen: the longer the teacher's memory, the better it "
        "holds. The last checkpoint alone (its merge is linear, that of the others TIES), EMA with "
        "alpha 0.9, 0.5 (kl), 0.1, equal weights (sma).",
        (
            rising("harsh", "last", "ema-0.9", "kl", "ema-0.1", "sma"),
            *pairs("harsh", "ema-0.1", "ema-0.9", "last"),
            *pairs("harsh", "sma", "ema-0.9", "last"),
        ),
    ),
    Claim(
        "default",
        "Ours: the simplest teacher, the mean of all checkpoints (linear, equal weights), beats "
        "that of the paper (TIES, EMA with alpha 0.5).",
        tuple(Comparison(r, "linear-sma", "kl") for r in ("harsh", "calm", "long")),
    ),
    Claim(
        "long",
        "Ours: over a long run a fixed teacher holds the policy back and a merged one does not.",
        (
            *pairs("long", "kl", "initial", "last", "none"),
            *pairs("long", "linear-sma", "initial", "last", "none"),
        ),
    ),
    Claim(
        "far",
        "Ours: where the policy has far to go, a fixed teacher holds it back and a merged one does "
        "not; the longer the teacher's memory, the more.",
        (
            *pairs("far", "kl", "initial"),
            *pairs("far", "linear-sma", "initial"),
            *pairs("far", "last", "kl"),
            *pairs("far", "kl", "linear-sma", "none"),
            *pairs("far", "none", "initial"),
            rising("far", "linear-sma", "kl", "last"),
        ),
    ),
    Claim(
        "gtr",
        "The free teacher does as well as an external corrector, which here is always right: an "
        "endpoint that answers from the exact solver.",
        (*pairs("calm", "kl", "gtr"), *pairs("calm", "sft", "gtr"), *pairs("calm", "gtr", "none")),
    ),
    Claim(
        "rejection",
        "Reinforcement beats fine-tuning on one's own successes.",
        (*pairs("calm", "kl", "rejection"), *pairs("calm", "none", "rejection")),
    ),
)


def final(runs: Sequence[StudyRun], regime: str, method: str, figure: str) -> dict[int, float]:
    """Seed -> the figure in the evaluation at the end."""
    of_method = [r for r in runs if (r.regime, r.method) == (regime, method)]
    found = {run.seed: value_of(run, figure) for run in of_method}
    return {seed: value for seed, value in found.items() if value is not None}


def value_of(run: StudyRun, figure: str) -> float | None:
    """A figure at the end; "change X" is the mean size of X's changes between evaluations."""
    if not figure.startswith("change "):
        return run.after.get(figure)
    name = figure.removeprefix("change ")
    values = [r[name] for r in run.records if r.get(name) is not None]
    return float(np.mean(np.abs(np.diff(values)))) if len(values) > 2 else None


def finding(values: Sequence[float]) -> Finding:
    """Mean of some values with its 95 % interval; no interval for one value."""
    return Finding(len(values), *mean_interval([float(v) for v in values]))


def compare(runs: Sequence[StudyRun], c: Comparison) -> Finding:
    """The difference better - worse on the seeds that both have; the slope over an order."""
    if c.order:
        found = [final(runs, c.regime, method, c.figure) for method in c.order]
        seeds = sorted(set.intersection(*map(set, found)))
        x = np.arange(len(found)) - (len(found) - 1) / 2
        values = np.array([[of_method[s] for of_method in found] for s in seeds])
        return finding([float(x @ row / (x @ x)) for row in values])
    first = final(runs, c.regime, c.better, c.figure)
    second = final(runs, c.regime, c.worse, c.against or c.figure)
    return finding([first[s] - second[s] for s in sorted(first.keys() & second.keys())])


def compare_passes(
    warm: list[int], trained: list[int], samples: int, solvable: list[bool]
) -> dict[str, float]:
    """What the trained policy wins that the warm start does not, of the hands that can be won."""
    every = zip(warm, trained, solvable, strict=True)
    pairs = [(w, n / samples) for w, n, possible in every if possible]
    return {
        "hands that can be won": len(pairs),
        "warm start, pass@32": sum(w > 0 for w, _ in pairs) / len(pairs),
        "trained, pass@1": sum(r for _, r in pairs) / len(pairs),
        "never won by 32 samples": sum(w == 0 for w, _ in pairs),
        "of these won at least every second time": sum(w == 0 and r >= 0.5 for w, r in pairs),
        "won by some of 32 samples": sum(w > 0 for w, _ in pairs),
        "of these never won any more": sum(w > 0 and r == 0 for w, r in pairs),
    }
