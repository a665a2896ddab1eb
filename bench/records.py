"""What the runs of a demonstration recorded: read from their folders, gathered into one CSV file.

Left out: running them (`bench.learn`), drawing (`bench.plot`).
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from turbo import checkpoint
from turbo.config import TrainConfig
from turbo.envs.alfworld_scene import TASKS
from turbo.log import read_jsonl
from turbo.measure import interval
from turbo.scribe import EVAL_KEYS

TASK_FIGURES = ("episodes", "success", "goal_rate")
CURVE = [
    *("update", "env_steps", "elapsed", "episodes"),
    *("success_rate", "success_solvable", "episode_return", "reasoning_score"),
    *("thought_entropy", "distinct_thoughts", "teacher_kl", "steps_per_second"),
]
EVALUATION = [f"eval_{who}{name}" for who in ("", "teacher_") for name in EVAL_KEYS]
TASK_COLUMNS = [  # of games with several kinds of tasks
    f"eval_{who}{name}"
    for who in ("", "teacher_")
    for name in ("goal_rate", *(f"{k}_{t}" for t in TASKS for k in TASK_FIGURES))
]
TEXTS = ("label", "seed", "commit", "eval_episodes", "eval_temperature")  # of a run, not a record
COLUMNS = [*TEXTS, *CURVE, *EVALUATION]


@dataclass(frozen=True)
class Recorded:
    """One run: what it was told to do, and the metrics that it recorded."""

    label: str
    config: TrainConfig
    path: Path
    records: list[dict]
    versions: dict

    @property
    def before(self) -> dict:
        """The evaluation of the warm start."""
        return self.records[0]

    @property
    def after(self) -> dict:
        """The evaluation at the end."""
        return self.records[-1]

    @property
    def curve(self) -> list[dict]:
        """The updates."""
        return updates(self.records)


def updates(records: Sequence[dict]) -> list[dict]:
    """The records of updates in which episodes ended, without the evaluations."""
    return [r for r in records if r.get("success_rate") is not None]


def is_complete(path: Path, c: TrainConfig) -> bool:
    """Whether the run came to its end, by updates or by minutes, and was evaluated there."""
    if not (path / checkpoint.METRICS).is_file():
        return False
    records = read_jsonl(path / checkpoint.METRICS)
    if not records or (c.eval_start and "eval_success_rate" not in records[0]):
        return False
    last = records[-1]
    ended = last["update"] >= c.updates or 0 < 60 * c.minutes <= last["elapsed"]
    # An evaluation along the way stands in the record of its update; the last one stands alone.
    return ended and "eval_success_rate" in last and "success_rate" not in last


def recorded(path: Path, label: str, c: TrainConfig) -> Recorded:
    """Read a complete run."""
    known = checkpoint.read_run(path)["versions"]
    return Recorded(label, c, path, read_jsonl(path / checkpoint.METRICS), known)


def differing(own: dict, recorded: dict) -> list[str]:
    """In what recorded settings are not these, settings that are newer than them aside."""
    plain = asdict(TrainConfig())
    theirs = {k: recorded.get(k, plain.get(k)) for k in own}
    return [f"{k} {theirs[k]}, now {v}" for k, v in own.items() if theirs[k] != v]


def write_settings(file: Path, settings: dict[str, dict]) -> None:
    """The settings of runs by their names, one line a run."""
    lines = (f"{json.dumps(name)}: {json.dumps(own)}" for name, own in settings.items())
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def on_record(path: Path, label: str, c: TrainConfig) -> Recorded:
    """The run of this label and seed in a file of `write_csv`."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if (r["label"], r["seed"]) == (label, str(c.seed))]
    records = [{k: _number(v) for k, v in row.items() if v and k not in TEXTS} for row in rows]
    return Recorded(label, c, path, records, {"commit": rows[0]["commit"]})


def _number(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


def write_csv(path: Path, runs: Sequence[Recorded]) -> None:
    """One row per recorded line: the updates, and the evaluations before and after."""

    def text(value) -> str:
        return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        several = any(
            name in record for run in runs for record in run.records for name in TASK_COLUMNS
        )
        columns = [*COLUMNS, *(TASK_COLUMNS if several else [])]
        writer.writerow(columns)
        for run in runs:
            c = run.config
            commit = run.versions.get("commit", "")[:12]
            first = [run.label, c.seed, commit, c.eval_episodes, c.eval_temperature]
            for record in run.records:
                writer.writerow([*first, *(text(record.get(k)) for k in columns[len(TEXTS) :])])


def pooled(runs: Sequence[Recorded], when: str, who: str = "") -> tuple[float, float, float] | None:
    """Success rate over all runs' evaluation episodes, with its 95 % interval, if all have one."""
    ends = [getattr(run, when) for run in runs]
    counts = [run.config.eval_episodes for run in runs]
    rates = [e.get(f"eval_{who}success_rate") for e in ends]
    if any(r is None for r in rates):
        return None
    wins = sum(round(r * n) for r, n in zip(rates, counts, strict=True))
    return (wins / sum(counts), *interval(wins, sum(counts)))


def by_label(runs: Sequence[Recorded]) -> dict[str, list[Recorded]]:
    """The runs of each variant, in the order of the table."""
    return {label: [r for r in runs if r.label == label] for label in {r.label: 0 for r in runs}}
