"""The study: which parts of the method work, on the tiny model: `python -m bench.study`.

Every run of the table bench/study.toml (regime x method x seed) is one `turbo.train` of one worker;
as many run at once as there are cores. Complete runs are kept, in the folder of runs and in
docs/study/runs.csv with their settings beside it; unfinished ones are resumed. So the grid can be
done in pieces (`--minutes`), most telling runs first, and on any machine that has the data so far.
A setting that the program gained since a run was made must stand at its default for it to count.

Left out: the data (`bench.study_runs`), the claims (`bench.claims`), the page (`bench.study_page`).
"""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.endpoint import corrector
from bench.harness import read_settings
from bench.learn import command, decisive, digest, settings
from bench.records import differing, is_complete
from bench.study_page import write_page
from bench.study_runs import StudyRun, read_runs, read_table, write_runs
from turbo import checkpoint
from turbo.config import TrainConfig
from turbo.hub import model_sha256
from turbo.log import read_jsonl
from turbo.parallel import cores

# What a training's exit status means; -SIGTERM: it was stopped before it listened to signals.
SAVED = "saved, to be resumed"
ENDS = {0: "complete", 130: SAVED, 143: SAVED, -signal.SIGTERM: "stopped, to be begun again"}


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

    def differs(self, recorded: dict) -> list[str]:
        """In what recorded settings are not this run's."""
        return differing(self.settings, recorded)


def plan(table: dict) -> list[Planned]:
    """All runs in order: first the groups as they stand, within a group seed after seed."""
    planned, models, read = [], {}, {}
    for group in table["groups"]:
        regime = table["regimes"][group["regime"]]
        for seed in range(group.get("first_seed", 0), group["seeds"]):
            for method in group["methods"]:
                parts = [regime["flags"], table["common"], table["methods"][method]]
                if method in regime.get("watched", []):
                    parts.append(table["watch"])
                flags = " ".join(part for part in parts if part)
                if flags not in read:
                    read[flags] = settings(flags, seed)
                config = replace(read[flags], seed=seed)
                if config.env not in models:
                    models[config.env] = model_sha256(config)
                model = models[config.env]
                planned.append(Planned(group["regime"], method, seed, flags, config, model))
    return list({p.name: p for p in planned}.values())


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
        elif p.name in known and not p.differs(known[p.name].settings):
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
                    self._stop()
                time.sleep(0.5)
                self._reap()
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _stop(self) -> None:
        """Let the running ones finish their update and save."""
        for process, _ in self.busy.values():
            process.terminate()
        for process, _ in self.busy.values():
            process.wait()

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
                state = ENDS.get(process.returncode)
                print(f"{name}: {state or 'FAILED'} after {minutes:.1f} minutes", flush=True)
                if state is None:
                    self.failed.append(name)


def chosen(p: Planned, only: str) -> bool:
    """Whether `--only` names the run's regime, or its regime/method."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    return not names or p.regime in names or f"{p.regime}/{p.method}" in names


def main(argv: list[str] | None = None) -> int:
    """Train what is missing, gather, write the page; returns the exit status."""
    c = read_settings(StudyConfig, argv, "bench.study")
    out, runs = Path(c.out), Path(c.runs)
    planned = plan(read_table())
    names = {p.regime for p in planned} | {f"{p.regime}/{p.method}" for p in planned}
    if odd := {n.strip() for n in c.only.split(",") if n.strip()} - names:
        known = ", ".join(sorted(names))
        print(f"error: --only {sorted(odd)[0]!r} is not in the table: {known}", file=sys.stderr)
        return 2
    known = read_runs(out)
    found = gather(planned, runs, known)
    done = {run.name for run in found}
    if c.list:
        for p in planned:
            print(f"{'complete' if p.name in done else '        '} {p.name}: {p.flags}")
        print(f"{len(done)} of {len(planned)} complete")
        return 0
    todo = [p for p in planned if chosen(p, c.only) and p.name not in done] if c.train else []
    if lost := known.keys() - done - {p.name for p in todo}:
        name = min(lost)
        now = next((p.differs(known[name].settings)[0] for p in planned if p.name == name), "gone")
        print(
            f"error: {len(lost)} runs of {out} are not of the table any more, such as {name} "
            f"({now}): train them, or remove them from runs.csv and settings.json",
            file=sys.stderr,
        )
        return 1
    status = 0
    if c.train:
        workshop = Workshop(runs, c.jobs or cores(), c.minutes)
        with corrector(any(p.config.guidance == "gtr" for p in todo)):
            workshop.train(iter(todo))
        found = gather(planned, runs, known)
        status = 130 if workshop.asked else 1 if workshop.failed else 0
        for name in workshop.failed:
            print(f"error: {name} failed: see its log in {runs}", file=sys.stderr)
    if not found:
        print("error: no run is complete: leave --no-train out", file=sys.stderr)
        return 1
    if left := known.keys() - {run.name for run in found}:
        print(f"nothing is written yet: {len(left)} runs of {out} are to be trained anew")
        return status
    write_runs(out, found)
    write_page(out, found, len(planned))
    print(
        f"{len(found)} of {len(planned)} runs are complete; written: {out}/README.md and its data"
    )
    return status


if __name__ == "__main__":
    sys.exit(main())
