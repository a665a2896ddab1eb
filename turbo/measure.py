"""What a set of episodes shows: success with its interval, return, legality, right thoughts.

The games have exact solvers, so thoughts are judged exactly (`env.judge`), not by another model.
Collapse shows as falling reasoning score, and as thoughts that no longer differ.

Left out: measurements over the vocabulary (entropy, KL), which need the model (`turbo.score`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from turbo.model import TextWeights, VisionLanguageModel
from turbo.parallel import Crew
from turbo.rollout import Episode, Rollout, RolloutOptions, Step, Table


def interval(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (Wilson 1927); (0, 1) when nothing was counted."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def rate(steps: Sequence[Step], part: str) -> float:
    """Share of the steps whose verdict on `part` is true, among those that have one.

    An illegal answer counts as wrong.
    """
    marks = [getattr(s.verdict, part) for s in steps]
    if all(m is None for m in marks):
        return math.nan
    illegal = [s.answer.action is None for s in steps]
    known = [m is True for m, bad in zip(marks, illegal, strict=True) if m is not None or bad]
    return mean(known)


def thought(step: Step) -> str:
    """The thought of a step: the `thoughts` field, or the raw answer where it cannot be read."""
    return str(step.answer.fields.get("thoughts", step.answer.text))


def distinct(values: Sequence[str]) -> float:
    """Different thoughts divided by thoughts."""
    return len(set(values)) / len(values) if values else math.nan


def outcomes(episodes: Sequence[Episode]) -> dict[str, float]:
    """The figures of a set of episodes, by their names in `turbo.log.METRICS`."""
    steps = [s for e in episodes for s in e.steps]
    solvable = [e for e in episodes if e.solvable]
    # A thought about a hand that cannot be solved is wrong whatever it says; those are left out.
    reasoned = [s for e in solvable for s in e.steps]
    return {
        "episodes": len(episodes),
        "success_rate": mean([e.success for e in episodes]),
        "success_solvable": mean([e.success for e in solvable]),
        "episode_return": mean([e.episode_return for e in episodes]),
        "episode_length": len(steps) / max(1, len(episodes)),
        "legal_rate": mean([s.answer.action is not None for s in steps]),
        "card_rate": rate(steps, "perception"),
        "reasoning_score": mean([s.verdict.right for s in reasoned]),
        "thought_length": mean([s.thought for s in steps]),
        "distinct_thoughts": distinct([thought(s) for s in steps]),
    }


def certainty(steps: Sequence[Step]) -> dict[str, float]:
    """Mean surprise -log p of the sampled tokens: unbiased for the policy's entropy per token."""
    thoughts = [-p for s in steps for p in s.logprobs[: s.thought]]
    actions = [-p for s in steps for p in s.logprobs[s.thought :]]
    return {"thought_entropy": mean(thoughts), "action_entropy": mean(actions)}


def evaluate(
    vlm: VisionLanguageModel,
    weights: TextWeights,
    make_env: Callable,
    *,
    episodes: int,
    seed: int,
    temperature: float,
    max_new_tokens: int,
    crew: Crew,
    envs: int = 256,
) -> dict[str, float]:
    """Play `episodes` fresh deals once each; the figures, with success's 95 % interval.

    Evaluation seeds start at 2**31, above every seed that training draws.
    """
    envs = max(crew.size, min(envs, episodes))
    options = RolloutOptions(envs, 1, temperature, max_new_tokens)
    deals = [{"seed": 2**31 + seed * 1_000_003 + i} for i in range(episodes)]
    rollout = Table(vlm, make_env, options, crew).collect(weights, (seed, 2**31), deals=deals)
    played = all_episodes(rollout, crew)
    steps = [s for e in played for s in e.steps]
    low, high = interval(sum(e.success for e in played), episodes)
    return {**outcomes(played), **certainty(steps), "success_low": low, "success_high": high}


def all_episodes(rollout: Rollout, crew: Crew) -> list[Episode]:
    """Every worker's episodes, on every worker, without the hidden states."""
    light = [
        replace(e, steps=[replace(s, hidden=None, suffix=[]) for s in e.steps])
        for e in rollout.episodes
    ]
    return [e for part in crew.share(light) for e in part]
