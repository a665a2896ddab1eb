"""The study: which parts of the method work, on the tiny model: `python -m bench.study`.

Every run of the table bench/study.toml (regime x method x seed) is one `turbo.train` of one worker;
as many run at once as there are cores. Complete runs are kept, in the folder of runs and in
docs/study/runs.csv with their settings beside it; unfinished ones are resumed. So the grid can be
done in pieces (`--minutes`), most telling runs first, and on any machine that has the data so far.
A setting that the program gained since a run was made must stand at its default for it to count.

Left out: the page and the plots (`bench.study_page`), the claims (`bench.claims`).
"""

import csv
import json
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro

from bench.learn import command, decisive, digest, settings
from bench.records import is_complete
from turbo import checkpoint
from turbo.config import TrainConfig
from turbo.log import METRICS, read_jsonl
from turbo.parallel import cores
from turbo.run import model_sha256

TABLE = Path(__file__).with_suffix(".toml")
KEYS = ("regime", "method", "seed", "commit")
LEFT_OUT = ("tokens_per_second", "draft_accept_rate", "explained_variance", "value_loss")
COLUMNS = [name for name in METRICS if name not in LEFT_OUT]


@dataclass
class StudyConfig:
    """Train what the study's table asks for, in pieces; then write its page."""

    jobs: int = 0
    """runs at once (0: one a core)"""
    minutes: float = 0.0
    """stop after so many minutes, to go on later (0: until all runs are complete)"""
    only: str = ""
    """regimes or regime/method to train, separated by commas (empty: all)"""
    runs: str = "runs/study"
    """folder of the run directories"""
    out: str = "docs/study"
    """folder of the data, the plots and the page"""
    train: bool = True
    """train what is missing; --no-train gathers the complete runs and writes the page"""
    list: bool = False
    """print the runs and whether they are complete, and do nothing"""


@dataclass(frozen=True)
class Planned:
    """One run of the table."""

    regime: str
    method: str
    seed: int
    flags: str
    config: TrainConfig
    model: str  # hash of the model that it starts from

    @property
    def name(self) -> str:
        return f"{self.regime}/{self.method}/{self.seed}"

    @property
    def settings(self) -> dict:
        """What decides its outcome."""
        return {**decisive(self.config), "model": self.model}

    def folder(self, runs: Path) -> Path:
        known = digest(self.config, self.model)
        return runs / f"{self.regime}-{self.method}-seed{self.seed}-{known}"

    def is_like(self, recorded: dict) -> bool:
        """Whether recorded settings are this run's, settings that are newer than it aside."""
        plain = asdict(TrainConfig())
        return all(recorded.get(k, plain.get(k)) == v for k, v in self.settings.items())


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
        return [r for r in self.records if r.get("success_rate") is not None]

    @property
    def after(self) -> dict:
        """The evaluation at the end."""
        return self.records[-1]


def read_table(path: Path = TABLE) -> dict:
    """The committed table: regimes, methods, and the order in which they are run."""
    with path.open("rb") as file:
        return tomllib.load(file)


def plan(table: dict) -> list[Planned]:
    """All runs in order: first the groups as they stand, within a group seed after seed."""
    planned, models = [], {}
    for group in table["groups"]:
        regime = table["regimes"][group["regime"]]
        for seed in range(group.get("first_seed", 0), group["seeds"]):
            for method in group["methods"]:
                flags = " ".join([regime["flags"], table["common"], table["methods"][method]])
                config = settings(flags, seed)
                if config.env not in models:
                    models[config.env] = model_sha256(config)
                model = models[config.env]
                planned.append(Planned(group["regime"], method, seed, flags, config, model))
    return list({p.name: p for p in planned}.values())


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
    lines = (f"{json.dumps(run.name)}: {json.dumps(run.settings)}" for run in runs)
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    (folder / "settings.json").write_text(text, encoding="utf-8")


def gather(planned: Sequence[Planned], runs: Path, known: dict[str, StudyRun]) -> list[StudyRun]:
    """The complete runs of the table, from the folder of runs or from the data already there."""
    found = []
    for p in planned:
        path = p.folder(runs)
        if is_complete(path, p.config):
            commit = checkpoint.read_run(path)["versions"].get("commit", "")[:12]
            run = StudyRun(p.regime, p.method, p.seed, commit, p.settings)
            run.records = read_jsonl(path / checkpoint.METRICS)
            found.append(run)
        elif p.name in known and p.is_like(known[p.name].settings):
            found.append(known[p.name])
    return found


class Workshop:
    """Trains planned runs, some at once, until all are complete or the time is over."""

    def __init__(self, runs: Path, jobs: int, minutes: float):
        self.runs, self.jobs = runs, jobs
        self.until = time.monotonic() + 60 * minutes if minutes else float("inf")
        self.busy: dict[str, tuple[subprocess.Popen, float]] = {}
        self.failed: list[str] = []
        self.asked = False

    def train(self, todo: Iterator[Planned]) -> None:
        """Run what is to do; on a signal or at the end of the time, running ones save and stop."""
        old = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            more = True
            while self.busy or more:
                while more and len(self.busy) < self.jobs and not self._over():
                    planned = next(todo, None)
                    more = planned is not None
                    if more:
                        self._start(planned)
                if self._over():
                    more = False
                    for process, _ in self.busy.values():
                        process.terminate()
                        process.wait()
                time.sleep(0.5)
                self._reap()
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame) -> None:
        self.asked = True

    def _over(self) -> bool:
        return self.asked or time.monotonic() > self.until

    def _start(self, planned: Planned) -> None:
        path = planned.folder(self.runs)
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"training {planned.name}: {path}", flush=True)
        with Path(f"{path}.log").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                command(path, planned.flags, planned.seed),
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is passed on once, as a request to save
            )
        self.busy[planned.name] = process, time.monotonic()

    def _reap(self) -> None:
        for name, (process, since) in list(self.busy.items()):
            if process.poll() is not None:
                del self.busy[name]
                minutes = (time.monotonic() - since) / 60
                state = {0: "complete", 130: "saved, to be resumed"}.get(process.returncode)
                print(f"{name}: {state or 'FAILED'} after {minutes:.1f} minutes", flush=True)
                if state is None:
                    self.failed.append(name)


def chosen(p: Planned, only: str) -> bool:
    """Whether `--only` names the run's regime, or its regime/method."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    return not names or p.regime in names or f"{p.regime}/{p.method}" in names


def main(argv: list[str] | None = None) -> int:
    """Train what is missing, gather, write the page; returns the exit status."""
    c = tyro.cli(StudyConfig, args=argv, prog="bench.study")
    out, runs = Path(c.out), Path(c.runs)
    planned = plan(read_table())
    names = {p.regime for p in planned} | {f"{p.regime}/{p.method}" for p in planned}
    if odd := {n.strip() for n in c.only.split(",") if n.strip()} - names:
        known = ", ".join(sorted(names))
        print(f"error: --only {sorted(odd)[0]!r} is not in the table: {known}", file=sys.stderr)
        return 2
    found = gather(planned, runs, read_runs(out))
    done = {run.name for run in found}
    if c.list:
        for p in planned:
            print(f"{'complete' if p.name in done else '        '} {p.name}: {p.flags}")
        print(f"{len(done)} of {len(planned)} complete")
        return 0
    status = 0
    if c.train:
        todo = (p for p in planned if chosen(p, c.only) and p.name not in done)
        workshop = Workshop(runs, c.jobs or cores(), c.minutes)
        workshop.train(todo)
        found = gather(planned, runs, read_runs(out))
        status = 130 if workshop.asked else 1 if workshop.failed else 0
        for name in workshop.failed:
            print(f"error: {name} failed: see its log in {runs}", file=sys.stderr)
    if not found:
        print("error: no run is complete: leave --no-train out", file=sys.stderr)
        return 1
    write_runs(out, found)
    from bench.study_page import write_page  # draws: matplotlib is needed here alone

    write_page(out, found, len(planned))
    print(
        f"{len(found)} of {len(planned)} runs are complete; written: {out}/README.md and its data"
    )
    return status


if __name__ == "__main__":
    sys.exit(main())
