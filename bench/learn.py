"""Demonstrations of learning: `python -m bench.learn --what points24`.

Runs `turbo.train` once per variant and seed, one after the other, with the settings below; then
gathers what the runs recorded into docs/results/<what>.csv, sums it up in <what>.md and draws
<what>.png. Nothing in these files comes from elsewhere. It can be stopped and started again:
complete runs are kept, unfinished ones are resumed. The name of a run's folder holds a hash of its
settings and of the model it starts from, so other settings make other runs. Code is not in it:
after a change of the program, remove the folders that it makes obsolete. A run whose folder is gone
is taken from the CSV file, if its settings in settings.json are those of today: remove its line
there to train it anew.

Left out: reading the runs (`bench.records`), drawing (`bench.plot`), speed (`bench.train_step`).
"""

import hashlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from bench.harness import read_settings
from bench.plot import draw
from bench.records import (
    Recorded,
    by_label,
    differing,
    is_complete,
    on_record,
    pooled,
    recorded,
    write_csv,
    write_settings,
)
from turbo import checkpoint
from turbo.config import TrainConfig
from turbo.envs.alfworld_games import GamesConfig
from turbo.envs.alfworld_games import run as make_games
from turbo.envs.alfworld_scene import TASKS
from turbo.hub import model_sha256
from turbo.saved import INDIFFERENT
from turbo.train import parse

# About 24,000 steps; the coefficient multiplies a mean over some 40 thought tokens.
HARSH = (
    "--temperature 1.0 --learning-rate 2e-3 --final-learning-rate 2e-3 --epochs 2 --minibatch 64 "
    "--baseline loo --updates 8 --steps-per-update 1536 --eval-temperature 1.0 --eval-episodes 300"
)
EASY_TASKS = ("pick_and_place_simple", "look_at_obj_in_light")
EASY_GAMES = GamesConfig("runs/games/alfworld-easy", games=2000, held_out=300, tasks=EASY_TASKS)
# Four attempts at a game: twice as many games in an update as with eight.
EASIER = f"--games {EASY_GAMES.out} --group-size 4 --updates 64 --eval-every 16 --eval-episodes 600"
# What is shown -> its variants: a label, and the arguments of turbo.train.
DEMONSTRATIONS: dict[str, list[tuple[str, str]]] = {
    "points24": [("GTR-Turbo", "points24"), ("plain PPO", "points24 --guidance none")],
    "ezpoints": [("GTR-Turbo", "ezpoints")],
    "alfworld": [
        ("GTR-Turbo", f"alfworld {EASIER}"),
        ("plain PPO", f"alfworld {EASIER} --guidance none"),
    ],
    "collapse": [
        ("plain PPO", f"points24 {HARSH} --guidance none"),
        ("GTR-Turbo", f"points24 {HARSH} --guidance kl --kl-coef 80"),
    ],
}
TITLES = {
    "points24": "Points24",
    "ezpoints": "EZPoints",
    "alfworld": "ALFWorld, the easier tasks in small rooms",
    "collapse": "Points24 under a harsh learning rate",
}


@dataclass
class LearnConfig:
    """Train what a demonstration needs, gather what the runs recorded, and draw it."""

    what: Literal["points24", "ezpoints", "alfworld", "collapse"]
    """which demonstration"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """one run per variant and seed"""
    out: str = "docs/results"
    """folder of the CSV file, the summary and the plot"""
    runs: str = "runs/learn"
    """folder of the run directories"""
    train: bool = True
    """train what is missing; --no-train gathers and draws the complete runs alone"""


def settings(flags: str, seed: int) -> TrainConfig:
    """The settings that `turbo.train` makes of these arguments."""
    c = parse([*flags.split(), "--seed", str(seed)])
    if c.eval_episodes == 0:
        raise ValueError(f"a demonstration needs evaluations: leave --eval-episodes 0 out: {flags}")
    return c


def decisive(c: TrainConfig) -> dict:
    """The settings on which a run's outcome depends."""
    return {k: v for k, v in asdict(c).items() if k not in INDIFFERENT}


def digest(c: TrainConfig, model: str) -> str:
    """A short hash of the settings and of the model's hash."""
    return hashlib.sha256(json.dumps([decisive(c), model], sort_keys=True).encode()).hexdigest()[:8]


def run_folder(runs: Path, what: str, label: str, c: TrainConfig, model: str) -> Path:
    """Where the run of these settings, from the model of this hash, is kept."""
    words = "-".join([what, *label.lower().split(), f"seed{c.seed}"])
    return runs / f"{words}-{digest(c, model)}"


def command(path: Path, flags: str, seed: int) -> list[str]:
    """The command that starts the run, or goes on with it where there is a checkpoint."""
    program = [sys.executable, "-m", "turbo.train"]
    if checkpoint.checkpoints(path):
        return [*program, flags.split()[0], "--resume", str(path)]
    # A folder without a checkpoint is a run that was stopped before its first one.
    again = ["--overwrite"] if path.exists() else []
    return [*program, *flags.split(), "--seed", str(seed), "--out", str(path), *again]


def call(arguments: list[str]) -> int:
    """Run a command to its end; on a signal, after the training process has saved itself."""
    asked = []
    with subprocess.Popen(arguments) as process:

        def stop(number: int, frame) -> None:
            asked.append(number)
            if number == signal.SIGTERM:  # Ctrl-C reaches the training process by itself
                process.terminate()

        old = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            status = process.wait()
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
    return 130 if asked else status


def machines(run: Recorded, earlier: str) -> list[str]:
    """Where a run was made, with what; of one that is on record, as the page before had it."""
    v = run.versions
    if "processor" in v:
        named = [f"{name} {v.get(name)}" for name in ("torch", "transformers")]
        parts = [v["processor"], f"Python {v.get('python')}", *named, f"commit {v['commit'][:12]}"]
        return [", ".join(parts)]
    found = re.search(r"^Made on (.*)\.$", earlier, re.MULTILINE)
    told = found[1].split("; ") if found else []
    named = [machine for machine in told if machine.endswith(f"commit {v['commit']}")]
    return named or [f"commit {v['commit']}"]


def summary(what: str, runs: Sequence[Recorded], earlier: str = "") -> str:
    """What came out, as a page of Markdown; `earlier` is the page before."""
    seeds = " ".join(str(s) for s in dict.fromkeys(r.config.seed for r in runs))
    flags = dict(DEMONSTRATIONS[what])
    c = runs[0].config
    lines = [
        f"# {TITLES[what]}",
        "",
        f"Written by `python -m bench.learn --what {what} --seeds {seeds}`; data in "
        f"[{what}.csv]({what}.csv).",
        "",
        *(f"* {label}: `python -m turbo.train {flags.get(label, '')}`" for label in by_label(runs)),
        *([f"* the games: `{games_command(EASY_GAMES)}`"] if what == "alfworld" else []),
        "",
        f"Success on {c.eval_episodes} fresh episodes a run at temperature {c.eval_temperature}, "
        "with 95 % intervals (Wilson). The interval of all seeds together counts episodes; it does "
        "not know the spread between training runs. Minutes are those of training alone.",
        "",
        "| variant | seed | before | after | merged teacher after | thoughts right before | after "
        "| environment steps | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for label, group in by_label(runs).items():
        lines += [_row(label, str(run.config.seed), [run]) for run in group]
        if len(group) > 1:
            lines.append(_row(label, "all", group))
    lines += task_table(runs)
    made = {machine for run in runs for machine in machines(run, earlier)}
    return "\n".join([*lines, "", "Made on " + "; ".join(sorted(made)) + ".", ""])


def games_command(c: GamesConfig) -> str:
    """The command that makes these games."""
    return (
        f"python -m turbo.envs.alfworld_games --out {c.out} --games {c.games} "
        f"--held-out {c.held_out} --tasks {' '.join(c.tasks)}"
    )


def task_table(runs: Sequence[Recorded]) -> list[str]:
    """Success and goal conditions by type of task, before and after, over all seeds; as the paper's
    Table 3 has them. Empty for games that have but one."""

    def mean(group: list[Recorded], when: str, kind: str, task: str) -> str:
        ends = [getattr(run, when) for run in group]
        counts = [e.get(f"eval_episodes_{task}", 0) for e in ends]
        values = [e.get(f"eval_{kind}_{task}", 0.0) for e in ends]
        return f"{np.average(values, weights=counts):.1%}" if any(counts) else ""

    if "eval_goal_rate" not in runs[0].after:
        return []
    lines = [
        "",
        "By type of task: success, and the share of the goal's conditions that are met.",
        "",
    ]
    lines += ["| variant | task | episodes | success before | after | conditions before | after |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for label, group in by_label(runs).items():
        for task in TASKS:
            count = sum(run.after.get(f"eval_episodes_{task}", 0) for run in group)
            if not count:  # not played
                continue
            cells = [label, task, str(count)]
            for kind in ("success", "goal_rate"):
                cells += [mean(group, when, kind, task) for when in ("before", "after")]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _row(label: str, seed: str, runs: Sequence[Recorded]) -> str:
    def success(value: tuple[float, float, float] | None) -> str:
        return "" if value is None else f"{value[0]:.1%} [{value[1]:.1%}, {value[2]:.1%}]"

    def right(when: str) -> str:
        values = [getattr(run, when).get("eval_reasoning_score") for run in runs]
        return "" if None in values else f"{np.mean(values):.1%}"

    steps = np.mean([run.after["env_steps"] for run in runs])
    minutes = np.mean([run.after["elapsed"] for run in runs]) / 60
    cells = [
        *(label, seed),
        *(success(pooled(runs, when)) for when in ("before", "after")),
        success(pooled(runs, "after", "teacher_")),
        *(right(when) for when in ("before", "after")),
        *(f"{steps:,.0f}", f"{minutes:.1f}"),
    ]
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str] | None = None) -> int:
    """Train what is missing, gather, draw; returns the exit status."""
    c = read_settings(LearnConfig, argv, "bench.learn")
    out, runs = Path(c.out), {}
    file, known = out / "settings.json", {}
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
    if c.what == "alfworld" and c.train:
        print(make_games(EASY_GAMES))  # those that are there are kept
    for label, flags in DEMONSTRATIONS[c.what]:
        stem = f"{c.what}/{label}/"
        seeds = {*c.seeds, *(int(n.removeprefix(stem)) for n in known if n.startswith(stem))}
        for seed in sorted(seeds):
            try:
                config = settings(flags, seed)
                model = model_sha256(config)
            except (ValueError, OSError) as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            own, name = decisive(config) | {"model": model}, f"{stem}{seed}"
            path = run_folder(Path(c.runs), c.what, label, config, model)
            is_known = name in known and not path.exists() and not differing(own, known[name])
            if is_known:
                print(f"on record: {label}, seed {seed}")
                runs[name] = on_record(out / f"{c.what}.csv", label, config)
                continue
            if is_complete(path, config):
                print(f"complete: {path}")
            elif c.train and seed in c.seeds:
                print(f"training: {path}", flush=True)
                status = call(command(path, flags, seed))
                if status:
                    return status
            if is_complete(path, config):
                runs[name], known[name] = recorded(path, label, config), own
            else:
                print(f"incomplete, left out: {path}", file=sys.stderr)
    if not runs:
        print("error: no run is complete: leave --no-train out", file=sys.stderr)
        return 1
    if lost := {n for n in known if n.startswith(f"{c.what}/")} - runs.keys():
        print(
            f"error: nothing is written: {min(lost)} of {out} has other settings today, or its "
            f"folder is incomplete: train it, or remove its line from {file}",
            file=sys.stderr,
        )
        return 1
    runs = list(runs.values())
    out.mkdir(parents=True, exist_ok=True)
    write_settings(file, known)
    write_csv(out / f"{c.what}.csv", runs)
    page_file = out / f"{c.what}.md"
    before = page_file.read_text(encoding="utf-8") if page_file.is_file() else ""
    page = summary(c.what, runs, before)
    page_file.write_text(page, encoding="utf-8")
    draw(TITLES[c.what], runs, out / f"{c.what}.png")
    print("\n" + "\n".join(line for line in page.splitlines() if line.startswith("|")))
    print(f"\nwritten: {out}/{c.what}.csv, .md and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
