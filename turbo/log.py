"""What a run records: the one list of metrics, and where they are written.

Every number that the program logs is defined in METRICS, once, with its meaning and its unit. A
name that is not there is refused, so a plot of last year still means what it says. The file of JSON
lines is the record of a run; what else takes a copy is a sink (`turbo.sinks`).

Left out: what the user sees (`turbo.console`) and showing a run (`turbo.view_data`).
"""

import difflib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from torch import Tensor

from turbo.envs.alfworld_scene import TASKS


@dataclass(frozen=True)
class Metric:
    """The definition of one logged number."""

    meaning: str
    unit: str


METRICS: dict[str, Metric] = {
    # Where the run stands
    "update": Metric(
        "optimisation phases finished, each one rollout and its PPO epochs", "updates"
    ),
    "env_steps": Metric("environment steps played since the start of the run", "steps"),
    "episodes": Metric("episodes that ended in this update's rollout", "episodes"),
    "elapsed": Metric(
        "time that the updates took since the start of the run, without evaluations and saving", "s"
    ),
    # What the agent achieves
    "episode_return": Metric("mean undiscounted sum of the environment's rewards", "reward"),
    "success_rate": Metric("share of the episodes that reached the goal", "0..1"),
    "success_solvable": Metric("success rate among the episodes that can be solved at all", "0..1"),
    "goal_rate": Metric(
        "mean share of the goal's conditions that hold at the end of an episode, in games whose "
        "tasks are of several kinds",
        "0..1",
    ),
    "legal_rate": Metric("share of the steps whose answer parsed into a legal action", "0..1"),
    "card_rate": Metric("share of the steps that named what the image shows correctly", "0..1"),
    "reasoning_score": Metric(
        "share of the steps, on deals that can be won, whose thought the exact solver finds right",
        "0..1",
    ),
    "episode_length": Metric("mean number of environment steps of an episode", "steps"),
    "aim_rate": Metric(
        "share of the steps, on deals that can be won, whose thought aims at a correct plan", "0..1"
    ),
    "follow_rate": Metric(
        "share of the steps, on deals that can be won, whose action is what the thought aims at",
        "0..1",
    ),
    # Signs of thought collapse
    "thought_length": Metric("mean number of thought tokens of a step", "tokens"),
    "thought_entropy": Metric("mean entropy of the policy at thought tokens", "nats"),
    "action_entropy": Metric("mean entropy of the policy at action tokens", "nats"),
    "distinct_thoughts": Metric("different thoughts divided by thoughts in the rollout", "0..1"),
    "self_bleu": Metric("mean BLEU-4 of 64 thoughts, each against the others", "0..1"),
    # The optimisation
    "policy_loss": Metric("clipped PPO objective, mean over the steps trained on", "1"),
    "value_loss": Metric("half the squared error of the critic, mean over the steps", "reward^2"),
    "explained_variance": Metric(
        "1 - Var(returns - values) / Var(returns), of the first worker's steps", "<= 1"
    ),
    "approx_kl": Metric(
        "k3 estimate of KL(rollout policy || current policy) of a step, from log-probabilities in "
        "which a thought counts --thought-coef, as in the ratio that is clipped",
        "nats",
    ),
    "sampling_kl": Metric(
        "approx_kl before the first step, of its minibatch, or with --rescore of all steps: what "
        "sampling and training disagree by",
        "nats",
    ),
    "clip_fraction": Metric("share of the steps whose ratio lies outside the clip range", "0..1"),
    "grad_norm": Metric("norm of the gradient before clipping, mean over optimiser steps", "1"),
    "critic_grad_norm": Metric("the same of the critic's gradient, with --advantage gae", "1"),
    "skipped_batches": Metric(
        "minibatches skipped since their loss or gradient was not finite", "minibatches"
    ),
    "faulty_steps": Metric(
        "environment steps left out since a log-probability, KL or advantage was not finite",
        "steps",
    ),
    "learning_rate": Metric("learning rate of the update's last optimiser step", "1"),
    "trained_rows": Metric("environment steps that entered the PPO epochs", "steps"),
    "dropped_rows": Metric(
        "environment steps left out: without an advantage, sure (--skip-certain), or not finite",
        "steps",
    ),
    # Evaluation on fresh deals, where it was run
    **{
        f"eval_{who}{name}": Metric(f"{meaning}, of the {label} in evaluation", unit)
        for who, label in (("", "policy"), ("teacher_", "merged teacher"))
        for name, meaning, unit in (
            ("success_rate", "success rate", "0..1"),
            ("success_low", "lower end of the success rate's 95 % interval", "0..1"),
            ("success_high", "upper end of the success rate's 95 % interval", "0..1"),
            ("episode_return", "mean return", "reward"),
            ("reasoning_score", "share of thoughts that are right", "0..1"),
            ("goal_rate", "mean share of the goal's conditions that hold at the end", "0..1"),
            *((f"episodes_{task}", f"episodes of {task}", "episodes") for task in TASKS),
            *((f"success_{task}", f"success rate in {task}", "0..1") for task in TASKS),
            *((f"goal_rate_{task}", f"conditions that hold in {task}", "0..1") for task in TASKS),
        )
    },
    # The guidance
    "teacher_kl": Metric(
        "mean KL estimate between policy and teacher at guided tokens (--guidance-range), of the "
        "steps trained on where it is in the loss, else of all",
        "nats",
    ),
    "teacher_kl_coef": Metric("coefficient beta with which the teacher's KL was applied", "1"),
    "teacher_age": Metric("checkpoints taken since the teacher was merged", "checkpoints"),
    **{
        f"teacher_{name}": Metric(f"{meaning}, in the answers that the teacher wrote", unit)
        for name, meaning, unit in (
            ("legal_rate", "share of legal answers", "0..1"),
            ("card_rate", "share that named what the image shows correctly", "0..1"),
            ("reasoning_score", "share of right thoughts, on deals that can be won", "0..1"),
            ("aim_rate", "share of correct plans, on deals that can be won", "0..1"),
            ("follow_rate", "share of actions that the thought aims at, likewise", "0..1"),
            ("thought_length", "mean number of thought tokens", "tokens"),
            ("thought_entropy", "mean surprise of the teacher at its thought tokens", "nats"),
            ("distinct_thoughts", "different thoughts divided by thoughts", "0..1"),
            ("self_bleu", "mean BLEU-4 of 64 thoughts, each against the others", "0..1"),
        )
    },
    "sft_loss": Metric("cross-entropy of a thought token in the dataset, mean", "nats"),
    "sft_examples": Metric("thoughts in the dataset", "thoughts"),
    "teacher_requests": Metric("requests sent to the external teacher so far", "requests"),
    "teacher_failed": Metric("questions that it left unanswered so far, retries included", "1"),
    "teacher_unreadable": Metric("answers of it that could not be read so far", "1"),
    "teacher_prompt_tokens": Metric("prompt tokens that it counted so far", "tokens"),
    "teacher_completion_tokens": Metric("answer tokens that it counted so far", "tokens"),
    "teacher_cost": Metric("their price at --teacher-price-in and -out", "dollars"),
    # Speed
    "tokens_per_second": Metric("tokens sampled per second of rollout", "tokens/s"),
    "steps_per_second": Metric("environment steps per second of the whole update", "steps/s"),
    "seconds_rollout": Metric("time spent playing", "s"),
    "seconds_score": Metric("time spent scoring the rollout under policy and teacher", "s"),
    "seconds_write": Metric("time spent by the teacher writing thoughts", "s"),
    "seconds_train": Metric("time spent in PPO epochs", "s"),
    "seconds_merge": Metric("time spent merging checkpoints and rebuilding weights", "s"),
    "seconds_other": Metric("the rest of the update", "s"),
    "peak_memory_gb": Metric("most memory held so far: of the GPU, or of worker 0", "GB"),
    "draft_accept_rate": Metric("share of the drafted tokens that decoding accepted", "0..1"),
}


class Sink(Protocol):
    """Somewhere else to copy a record to."""

    name: str

    def write(self, update: int, record: Mapping[str, int | float]) -> None:
        """Copy the numbers of one update."""

    def close(self) -> None:
        """Flush, and release what the sink holds."""


class JsonlLogger:
    """Append records to a file of JSON lines, flushed line by line, and copy them to the sinks.

    Opening an existing file goes on at its end; a last line that a crash left unfinished is
    removed. Records that cannot be written, on a full disk, wait for the next attempt; `problem`
    says why. A sink that fails is told of by `warn`, once until it works again, and stops nothing.
    """

    def __init__(
        self,
        path: str | Path,
        sinks: Sequence[Sink] = (),
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.path = Path(path)
        self.sinks, self._warn = tuple(sinks), warn
        self._failing: set[str] = set()  # sinks by name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_unfinished_line(self.path)
        self._file = self.path.open("ab", buffering=0)
        self._waiting: list[str] = []
        self.problem = ""

    def write(self, metrics: Mapping[str, Any]) -> dict[str, int | float | None]:
        """Record one update: numbers, or tensors of one element; NaN and inf become null.

        Returns the record as it is written.
        """
        check_names(metrics)
        record = {name: _plain_number(name, value) for name, value in metrics.items()}
        self._waiting.append(json.dumps(record, allow_nan=False) + "\n")
        self._write_waiting()
        numbers = {name: value for name, value in record.items() if value is not None}
        for sink in self.sinks:
            self._attempt(sink, lambda s=sink: s.write(int(numbers.get("update", 0)), numbers))
        return record

    def _attempt(self, sink: Sink, action: Callable[[], None]) -> None:
        try:
            action()
            self._failing.discard(sink.name)
        except Exception as error:  # of a foreign package, which may raise anything
            if sink.name not in self._failing:
                self._warn(f"{sink.name} misses records that {self.path} has: {error}")
            self._failing.add(sink.name)

    def _write_waiting(self) -> None:
        """Append the lines that wait, all of them or none."""
        try:
            append_whole(self._file, "".join(self._waiting).encode())
            self._waiting, self.problem = [], ""
        except OSError as error:
            self.problem = f"{len(self._waiting)} records wait to be written: {error}"

    def close(self) -> None:
        """Close the file and the sinks."""
        if self._waiting:
            self._write_waiting()
        self._file.close()
        for sink in self.sinks:
            self._attempt(sink, sink.close)

    def __enter__(self) -> "JsonlLogger":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def append_whole(file: BinaryIO, data: bytes) -> None:
    """Write behind what a file holds, all of it or nothing (OSError)."""
    size = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        file.truncate(size)  # no half line is left
        raise


def read_jsonl(path: str | Path) -> list[dict[str, int | float | None]]:
    """The records of a run, oldest first; a line still being written is left out.

    ValueError names the line that is no record.
    """
    *lines, _ = Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} cannot be read: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} is no record: remove it")
        records.append(record)
    return records


def check_names(metrics: Mapping[str, Any]) -> None:
    """Refuse names that METRICS does not define."""
    for name in metrics:
        if name not in METRICS:
            close = difflib.get_close_matches(name, METRICS, n=1)
            hint = f"did you mean {close[0]!r}? Otherwise " if close else ""
            raise ValueError(f"unknown metric {name!r}: {hint}define it in METRICS (turbo/log.py)")


def _plain_number(name: str, value: Any) -> int | float | None:
    """An int as it is, anything else as a float; None, NaN and inf as None."""
    if value is None or type(value) is int:
        return value
    try:
        number = float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"metric {name!r} is a {type(value).__name__}: log a number or a tensor of one element"
        ) from error
    return number if math.isfinite(number) else None


def _drop_unfinished_line(path: Path) -> None:
    """Cut the file after its last newline, so that the next record starts a line of its own."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            path.write_bytes(content[: content.rfind(b"\n") + 1])
