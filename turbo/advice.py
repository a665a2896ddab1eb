"""Warnings that teach: what a run's metrics say is going wrong, what it means and what to try.

Each check is a pure function of the records of a run, oldest first, as metrics.jsonl has them, and
of its settings. It compares means over WINDOW updates or more: a single update has few deals, and
its figures jump. The bounds are such that the runs of docs/study that collapsed are found and the
healthy ones are left alone.

Left out: where a warning is shown and written (`turbo.scribe`); faults that stop a run
(`turbo.faults`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from turbo.config import TrainConfig

Records = Sequence[Mapping[str, int | float | None]]

WINDOW = 3  # updates
FALLEN = 2 / 3  # of its best level: right thoughts that are decaying
LOST = 0.1  # least fall of a share that is no noise
ALIKE = 1 / 3  # of their best level: thoughts that no longer differ
CERTAIN = 0.2  # of its highest level: entropy that is about to vanish
SOLVED = 0.9  # success of a policy that may be certain
OLD = 5  # checkpoints that a teacher may miss
LARGE_CLIP, LARGE_KL = 0.3, 0.3  # share of the steps; nats of a step
APART = 0.02  # nats of a step: ratios that begin 0.2 off 1
DIVERGED = 5.0  # times its lowest level: the critic's loss
IDLE = 1e-4  # nats of guidance: nothing beside advantages of spread 1
STILL = 1e-3  # nats a step: a policy that hardly moves leaves its teacher nothing to do


@dataclass(frozen=True)
class Advice:
    """A warning: its name, what was seen and means, and what to try."""

    name: str
    meaning: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.meaning}; try this: {self.remedy}"


def advise(records: Records, c: TrainConfig) -> list[Advice]:
    """All warnings that hold after the last of the records."""
    checks = (collapse, template, certainty, failure, large_steps, mismatch, divergence)
    checks += (old_teacher, idle)
    return [found for check in checks if (found := check(records, c)) is not None]


def levels(records: Records, name: str, window: int = WINDOW) -> list[float]:
    """Means of a metric over `window` updates in a row, oldest first.

    Updates without it are left out; nothing is told where it is missing in one of the latest.
    """
    values = [math.nan if (v := r.get(name)) is None else v for r in records]
    if not all(map(math.isfinite, values[-window:])):
        return []
    known = [v for v in values if math.isfinite(v)]
    return [sum(known[i : i + window]) / window for i in range(len(known) - window + 1)]


def collapse(records: Records, c: TrainConfig) -> Advice | None:
    """Thoughts that were right and no longer are.

    A long run has some updates of lucky deals and some of hard ones: its best third is compared
    with its latest sixth, since a decay lasts and luck does not.
    """
    thirds, sixths = (
        levels(records, "reasoning_score", max(WINDOW, len(records) // part)) for part in (3, 6)
    )
    if not thirds:
        return None
    best, now = max(thirds), sixths[-1]
    if now >= FALLEN * best or best - now < LOST:
        return None
    if c.guidance == "none":
        remedy = "guide the thoughts (--guidance kl), or lower --learning-rate"
    else:
        remedy = "lower --learning-rate, or raise --kl-coef (--sft-coef with imitation)"
    return Advice(
        "collapse suspected",
        f"right thoughts fell from {best:.1%} to {now:.1%} of the steps, and success follows",
        remedy,
    )


def template(records: Records, c: TrainConfig) -> Advice | None:
    """Thoughts that all say the same, as in the paper's collapse."""
    distinct, bleu = levels(records, "distinct_thoughts"), levels(records, "self_bleu")
    if not distinct or len(bleu) != len(distinct):
        return None
    best = max(range(len(distinct)), key=distinct.__getitem__)
    if distinct[-1] >= ALIKE * distinct[best] or bleu[-1] <= bleu[best]:
        return None
    return Advice(
        "thoughts repeat one template",
        f"different thoughts fell from {distinct[best]:.1%} to {distinct[-1]:.1%}, self-BLEU rose "
        f"from {bleu[best]:.2f} to {bleu[-1]:.2f}: what is thought no longer depends on the state",
        "raise --kl-coef or --temperature, or lower --learning-rate",
    )


def certainty(records: Records, c: TrainConfig) -> Advice | None:
    """Thoughts without entropy, before the game is solved: nothing new is tried any more."""
    entropy, success = levels(records, "thought_entropy"), levels(records, "success_solvable")
    known = entropy and success
    if not known or entropy[-1] >= CERTAIN * max(entropy) or success[-1] >= SOLVED:
        return None
    return Advice(
        "entropy near zero",
        f"the entropy of a thought token fell from {max(entropy):.2g} to {entropy[-1]:.2g} nats at "
        f"{success[-1]:.0%} success: nothing new is tried, so nothing more is learnt",
        "raise --temperature, or lower --learning-rate",
    )


def failure(records: Records, c: TrainConfig) -> Advice | None:
    """No success in several updates: there is nothing to reinforce."""
    success = levels(records, "success_rate")
    if not success or success[-1] > 0:
        return None
    legal = levels(records, "legal_rate")
    if legal and legal[-1] < 0.5:
        remedy = f"only {legal[-1]:.0%} of the answers are legal: lower --learning-rate if they "
        remedy += "once were, else make a warm start that knows the format (turbo.sft)"
    else:
        remedy = "start from a policy that wins sometimes (turbo.sft), or make the game easier "
        remedy += "(--hands with points24)"
    return Advice(
        "no success",
        f"no episode of the last {WINDOW} updates reached the goal: no advantage tells a good "
        "answer from a bad one",
        remedy,
    )


def large_steps(records: Records, c: TrainConfig) -> Advice | None:
    """Updates that leave the region in which PPO's objective means anything.

    The first one may, since the optimizer knows no gradients yet: it is left out.
    """
    clipped, kl = (levels(records[1:], name) for name in ("clip_fraction", "approx_kl"))
    if not clipped or not kl or (clipped[-1] <= LARGE_CLIP and kl[-1] <= LARGE_KL):
        return None
    return Advice(
        "updates too large",
        f"{clipped[-1]:.0%} of the steps are clipped, and an update moves the policy by "
        f"{kl[-1]:.2g} nats a step: the rollout says little about the policy that results",
        "lower --learning-rate or --epochs, or raise --minibatch",
    )


def mismatch(records: Records, c: TrainConfig) -> Advice | None:
    """Answers that were sampled with other probabilities than training gives them."""
    apart = levels(records, "sampling_kl")
    if c.rescore or not apart or apart[-1] <= APART:
        return None
    merged = "; --play unmerged plays with the products of training" * (c.play == "merged")
    return Advice(
        "sampling and training disagree",
        f"before an update's first step its answers are {apart[-1]:.2g} nats off what they were "
        "sampled with: PPO's ratios do not begin at 1",
        "--rescore, or --dtype float32, in which rounding differs less" + merged,
    )


def divergence(records: Records, c: TrainConfig) -> Advice | None:
    """A critic whose loss grows though returns do not."""
    loss, returns = levels(records, "value_loss"), levels(records, "episode_return")
    if c.advantage != "gae" or not loss or len(loss) != len(returns):
        return None
    least = min(range(len(loss)), key=loss.__getitem__)
    if loss[-1] <= DIVERGED * loss[least] or returns[-1] > returns[least]:
        return None
    return Advice(
        "value loss diverges",
        f"the critic's loss rose from {loss[least]:.3g} to {loss[-1]:.3g}, and returns did not: "
        "advantages are noise",
        "lower --learning-rate, or use --advantage group, which needs no critic",
    )


def old_teacher(records: Records, c: TrainConfig) -> Advice | None:
    """A merged teacher that has not seen the latest checkpoints."""
    age = records[-1].get("teacher_age") if records else None
    if age is None or age <= OLD:
        return None
    return Advice(
        "teacher is old",
        f"the teacher does not know the last {age:.0f} checkpoints, so it holds the policy back "
        "to where it was",
        f"lower --merge-every (it is {c.merge_every})",
    )


def idle(records: Records, c: TrainConfig) -> Advice | None:
    """A KL coefficient under which the guidance is too weak to be felt."""
    kl, beta = levels(records, "teacher_kl"), levels(records, "teacher_kl_coef")
    moved = levels(records, "approx_kl")
    if c.guidance != "kl" or not (kl and beta and moved):
        return None
    recent = [r["teacher_kl_coef"] for r in records[-WINDOW:]]
    if min(recent) <= 0 or moved[-1] < STILL or kl[-1] * beta[-1] >= IDLE:
        return None
    return Advice(
        "guidance without effect",
        f"the policy moves, and coefficient times KL is {kl[-1] * beta[-1]:.1g} (the KL is "
        f"{kl[-1]:.2g} nats): this is plain PPO at the price of a teacher",
        f"raise --kl-coef (it is {c.kl_coef}), or let it be steered: --kl-coef auto",
    )


class Watch:
    """Which warnings are on, update after update: those that held in one of the last WINDOW.

    So a warning that comes and goes is told once. What is on follows from the records alone, and a
    resumed run knows it again.
    """

    def __init__(self, c: TrainConfig, records: Records = ()):
        self.config, self.records = c, list(records[:-WINDOW])
        self.held: list[dict[str, Advice]] = []  # of the last updates, by name
        for record in records[-WINDOW:]:
            self.note(record)

    @property
    def active(self) -> dict[str, Advice]:
        """The warnings that are on, in their latest words."""
        return {name: advice for held in self.held for name, advice in held.items()}

    def note(self, record: Mapping) -> tuple[list[Advice], list[Advice]]:
        """Take the record of an update; the warnings that begin with it, and those that end."""
        before = self.active
        self.records.append(record)
        holding = {a.name: a for a in advise(self.records, self.config)}
        self.held = [*self.held[1 - WINDOW :], holding]
        now = self.active
        begun = [advice for name, advice in now.items() if name not in before]
        return begun, [advice for name, advice in before.items() if name not in now]
