"""What a set of episodes shows: success with its interval, return, legality, right thoughts.

The games have exact solvers, so thoughts are judged exactly (`env.judge`), not by another model.
Collapse shows as falling reasoning score, and as thoughts that no longer differ.

Left out: measurements over the vocabulary (entropy, KL), which need the model (`turbo.score`).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from turbo.batch import evenly
from turbo.model import VisionLanguageModel, Weights
from turbo.parallel import Crew
from turbo.phases import Phases
from turbo.rollout import Episode, RolloutOptions, Step, Table

Z = 1.959964  # of the normal distribution, 97.5 %
# The same of Student's t, for 1, 2, ... degrees of freedom
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_WORD = re.compile(r"\w+|[^\w\s]")


def interval(successes: float, n: float, z: float = Z) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (Wilson 1927); (0, 1) when nothing was counted."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def interval_of_deals(solved: Sequence[int], samples: int) -> tuple[float, float]:
    """95 % interval of a success rate, where each deal was played `samples` times.

    Samples of a deal resemble each other: Wilson's interval for as many independent episodes as
    have the variance that the deals' own rates show (the design effect, Kish 1965), between the
    number of deals and that of episodes.
    """
    deals, rates = len(solved), [count / samples for count in solved]
    p = mean(rates)
    n = float(deals)
    if samples > 1 and deals > 1 and 0 < p < 1:
        spread = sum((rate - p) ** 2 for rate in rates) / (deals - 1)
        n = min(max(n, p * (1 - p) * deals / spread), n * samples) if spread else n * samples
    return interval(p * n, n)


def paired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Mean of `first` less `second`, success rates on the same deals, with its 95 % interval.

    That of Wald for matched pairs, half a deal added to each of the four ways in which two can come
    out (Agresti and Min 2005): without that, two that agree on all would have no interval at all.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    n, total = len(differences), sum(differences)
    squares = sum(d * d for d in differences) + 1
    half = Z * math.sqrt(squares - total * total / (n + 2)) / (n + 2)
    centre = total / (n + 2)
    return total / n, max(-1.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of independent values, such as seeds', with its 95 % interval by Student's t.

    One value has no interval, nothing not even a mean: NaN.
    """
    n, middle = len(values), mean(values)
    if n < 2:
        return middle, math.nan, math.nan
    spread = math.sqrt(sum((v - middle) ** 2 for v in values) / (n - 1))
    half = student(n - 1) * spread / math.sqrt(n)
    return middle, middle - half, middle + half


def student(freedom: int) -> float:
    """Student's t, 97.5 %; beyond the table by its expansion about the normal (Fisher 1926)."""
    if freedom <= len(T975):
        return T975[freedom - 1]
    first, second = (Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / freedom + second / freedom**2 + third / freedom**3


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def rate(steps: Sequence[Step], part: str) -> float:
    """Share of the steps whose verdict on `part` is true, among those that have one.

    An illegal answer that has none counts as wrong.
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


def self_bleu(texts: Sequence[str], size: int = 64) -> float:
    """Mean BLEU-4 of each of `size` texts, at even distances, against the others (Zhu et al. 2018).

    1 where all say the same, near 0 where nothing is shared. Words are numbers, words and signs;
    n-grams that match nowhere count 0.1.
    """
    words = [_WORD.findall(texts[i]) for i in evenly(len(texts), size)]
    if len(words) < 2:
        return math.nan
    logs = [0.0] * len(words)
    for n in range(1, 5):
        counts = [Counter(zip(*(w[i:] for i in range(n)), strict=False)) for w in words]
        best: dict[tuple, tuple[int, int, int]] = {}  # n-gram -> most, its text, most elsewhere
        for i, grams in enumerate(counts):
            for gram, k in grams.items():
                most, who, second = best.get(gram, (0, -1, 0))
                best[gram] = (k, i, most) if k > most else (most, who, max(second, k))
        for i, grams in enumerate(counts):
            shared = 0
            for gram, k in grams.items():
                most, who, second = best[gram]
                shared += min(k, second if who == i else most)
            logs[i] += math.log(max(shared, 0.1) / max(1, grams.total())) / 4
    lengths = [len(w) for w in words]
    for i, own in enumerate(lengths):
        near = min((abs(n - own), n) for j, n in enumerate(lengths) if j != i)[1]
        logs[i] += min(0.0, 1 - near / max(1, own))  # brevity
    return mean([math.exp(x) for x in logs])


def thoughts(episodes: Sequence[Episode]) -> dict[str, float]:
    """What the thoughts of a set of episodes are like: right, and different from each other."""
    steps = [s for e in episodes for s in e.steps]
    # A thought about a hand that cannot be solved is wrong whatever it says; those are left out.
    reasoned = [s for e in episodes if e.solvable for s in e.steps]
    texts = [thought(s) for s in steps]
    return {
        "legal_rate": mean([s.answer.action is not None for s in steps]),
        "card_rate": rate(steps, "perception"),
        "reasoning_score": mean([s.verdict.right for s in reasoned if s.verdict.judged]),
        "aim_rate": rate(reasoned, "aim"),
        "follow_rate": rate(reasoned, "follows"),
        "thought_length": mean([s.thought for s in steps]),
        "distinct_thoughts": distinct(texts),
        "self_bleu": self_bleu(texts),
    }


def outcomes(episodes: Sequence[Episode]) -> dict[str, float]:
    """The figures of a set of episodes, by their names in `turbo.log.METRICS`."""
    steps = [s for e in episodes for s in e.steps]
    solvable = [e for e in episodes if e.solvable]
    tasks = {e.task for e in episodes if e.task}
    return {
        "episodes": len(episodes),
        "success_rate": mean([e.success for e in episodes]),
        "success_solvable": mean([e.success for e in solvable]),
        "episode_return": mean([e.episode_return for e in episodes]),
        "episode_length": len(steps) / max(1, len(episodes)),
        **({"goal_rate": mean([e.goal_rate for e in episodes])} if tasks else {}),
        **thoughts(episodes),
    }


def by_task(
    episodes: Sequence[Episode], deals: Sequence[int], samples: int
) -> dict[str, dict[str, float]]:
    """Success and goal conditions for each kind of task; empty in games that have but one.

    `deals` tells the deal of each episode, of which there are `samples`.
    """
    found = {}
    for task in sorted({e.task for e in episodes if e.task}):
        own, solved = [e for e in episodes if e.task == task], Counter()
        for episode, deal in zip(episodes, deals, strict=True):
            if episode.task == task:
                solved[deal] += episode.success
        low, high = interval_of_deals(list(solved.values()), samples)
        found[task] = {
            "episodes": len(own),
            "success_rate": mean([e.success for e in own]),
            "success_low": low,
            "success_high": high,
            "goal_rate": mean([e.goal_rate for e in own]),
        }
    return found


def task_figures(tasks: dict[str, dict[str, float]]) -> dict[str, float]:
    """What `by_task` found, by the names in `turbo.log.METRICS`, and the mean goal rate."""
    if not tasks:
        return {}
    found: dict[str, float] = {}
    for task, t in tasks.items():
        found |= {f"episodes_{task}": t["episodes"], f"success_{task}": t["success_rate"]}
        found[f"goal_rate_{task}"] = t["goal_rate"]
    total = sum(t["episodes"] for t in tasks.values())
    goal_rate = sum(t["goal_rate"] * t["episodes"] for t in tasks.values()) / total
    return found | {"goal_rate": goal_rate}


def certainty(steps: Sequence[Step]) -> dict[str, float]:
    """Mean surprise -log p of the sampled tokens: unbiased for the policy's entropy per token."""
    thoughts = [-p for s in steps for p in s.logprobs[: s.thought]]
    actions = [-p for s in steps for p in s.logprobs[s.thought :]]
    return {"thought_entropy": mean(thoughts), "action_entropy": mean(actions)}


def fresh_deals(count: int, seed: int) -> list[dict]:
    """The deals of an evaluation, as arguments of `reset`; training draws none of them."""
    return [{"seed": 2**31 + seed * 1_000_003 + i} for i in range(count)]


def evaluate(
    vlm: VisionLanguageModel,
    weights: Weights,
    make_env: Callable,
    *,
    episodes: int,
    seed: int,
    temperature: float,
    max_new_tokens: int,
    crew: Crew,
    prompt_style: str = "short",
    envs: int = 256,
    samples: int = 1,
    patient: bool = False,
    phases: Phases | None = None,
) -> dict:
    """Play `episodes` fresh deals, `samples` times each; figures, success's 95 % interval.

    `solved` lists how many samples of each deal succeeded, `pass_at_k` is the share of the deals
    with at least one. Evaluation seeds start at 2**31, above every seed that training draws. Unless
    it is `patient`, it is abandoned when a worker is asked to stop. `phases` hears how far it is.
    """
    envs = max(crew.size * samples, min(envs, episodes * samples))
    options = RolloutOptions(envs, samples, temperature, max_new_tokens, prompt_style)
    deals = fresh_deals(episodes, seed)
    table = Table(vlm, make_env, options, crew, phases)
    rollout = table.collect(vlm.merged(weights), (seed, 2**31), deals=deals, patient=patient)
    played = all_episodes(rollout.episodes, crew)
    steps = [s for e in played for s in e.steps]
    own = [crew.rank + e.group * crew.size for e in rollout.episodes]
    numbers = [deal for part in crew.share(own) for deal in part]  # in the order of `played`
    solved = [0] * episodes
    for deal, episode in zip(numbers, played, strict=True):
        solved[deal] += episode.success
    low, high = interval_of_deals(solved, samples)
    return {
        **outcomes(played),
        **certainty(steps),
        "success_low": low,
        "success_high": high,
        "pass_at_k": mean([n > 0 for n in solved]),
        "solved": solved,
        "tasks": by_task(played, numbers, samples),
    }


def all_episodes(episodes: Sequence[Episode], crew: Crew) -> list[Episode]:
    """Every worker's episodes, on every worker, as far as figures need them."""
    own = [replace(e, steps=[light(s) for s in e.steps], final=None) for e in episodes]
    return [e for part in crew.share(own) for e in part]


def light(step: Step) -> Step:
    """A step without what only the worker that played it can use."""
    return replace(step, hidden=None, suffix=[], asked=None)
