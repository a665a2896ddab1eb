"""The study's data: its table, and what its complete runs recorded, as files under docs/study.

    runs.csv        one row a record: the updates, and the evaluation at the end
    settings.json   the settings on which each run's outcome depends

Left out: training (`bench.study`), statistics (`bench.claims`), the page (`bench.study_page`).
"""

import csv
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.records import updates, write_settings
from turbo.log import METRICS

TABLE = Path(__file__).with_name("study.toml")
KEYS = ("regime", "method", "seed", "commit")
LEFT_OUT = ("tokens_per_second", "draft_accept_rate", "explained_variance", "value_loss")
COLUMNS = [name for name in METRICS if name not in LEFT_OUT]


@dataclass
class StudyRun:
    """What a complete run recorded: one record an update, and the evaluation at the end."""

    regime: str
    method: str
    seed: int
    commit: str
    settings: dict
    records: list[dict] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.regime}/{self.method}/{self.seed}"

    @property
    def curve(self) -> list[dict]:
        """The updates."""
        return updates(self.records)

    @property
    def after(self) -> dict:
        """The evaluation at the end."""
        return self.records[-1]


def read_table(path: Path = TABLE) -> dict:
    """The committed table: regimes, methods, and the order in which they are run."""
    with path.open("rb") as file:
        return tomllib.load(file)


def read_runs(folder: Path) -> dict[str, StudyRun]:
    """The complete runs that were written before, by name."""
    if not (folder / "runs.csv").is_file():
        return {}
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    runs: dict[str, StudyRun] = {}
    with (folder / "runs.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            regime, method, seed, commit = (row.pop(k) for k in KEYS)
            name = f"{regime}/{method}/{seed}"
            if name not in runs:
                runs[name] = StudyRun(regime, method, int(seed), commit, settings[name])
            runs[name].records.append({k: float(v) for k, v in row.items() if v})
    return runs


def write_runs(folder: Path, runs: Sequence[StudyRun]) -> None:
    """runs.csv: one row a record, numbers to six digits; settings.json: one line a run."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*KEYS, *COLUMNS])
        for run in runs:
            first = [run.regime, run.method, run.seed, run.commit]
            for record in run.records:
                values = (record.get(name) for name in COLUMNS)
                writer.writerow([*first, *("" if v is None else f"{v:.6g}" for v in values)])
    write_settings(folder / "settings.json", {run.name: run.settings for run in runs})
