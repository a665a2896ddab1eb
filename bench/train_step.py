"""The speed of whole training updates: `python -m bench.train_step`.

Real updates of Points24, through the same functions that `turbo.train` runs. Runs without guidance
and with each kind of it take turns (A B A B) in one crew of workers; the external corrector is the
one of examples/, on the same cores, which answers in milliseconds. The first update of each is
thrown away: caches are cold, and there is no teacher yet. Rows go into
bench/results/<processor>.csv; `--profile` prints instead where the time of one update on one worker
goes.

    seconds of an update = rollout + score + write + train + merge + other

Left out: evaluation, log files and checkpoints, which `turbo.train` writes between the updates.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from bench.endpoint import URL, corrector
from bench.harness import (
    ROOT,
    Spread,
    alternate,
    append_rows,
    environment,
    measurement,
    results_file,
    spread,
)
from turbo.config import TrainConfig, check, defaults
from turbo.hub import model_sha256
from turbo.log import METRICS
from turbo.model import pick_dtype
from turbo.parallel import Crew, cores, run_crew
from turbo.run import Run
from turbo.train import train_update

VARIANTS = {
    "none": dict(guidance="none"),
    "kl": dict(guidance="kl", kl_placement="loss"),
    "sft": dict(guidance="sft"),
    "sft, all steps": dict(guidance="sft", sft_rows=0),  # as the paper does
    "gtr": dict(guidance="gtr", teacher_url=URL, teacher_model="expert"),
}
PHASES = ("rollout", "score", "write", "train", "merge", "other")
REPORTED = (
    "steps_per_second",
    *(f"seconds_{phase}" for phase in PHASES),
    "tokens_per_second",
    "trained_rows",
    "draft_accept_rate",
)


@dataclass
class BenchConfig:
    """Time whole training updates, without guidance and with each kind of it, in turn."""

    updates: int = 6
    """updates of each variant; the first is thrown away"""
    workers: int = 0
    """processes (0: one a core, at most 4)"""
    model: str = "tiny"
    """`tiny` for the built-in warm start, or a folder written by `turbo.sft`"""
    steps: int = 0
    """environment steps of an update (0: the default of training)"""
    envs: int = 0
    """environments that play at once (0: the default of training)"""
    profile: bool = False
    """print the operations that take most time in one update on one worker; nothing is recorded"""
    save: bool = True
    """append the rows to bench/results/"""


def settings(c: BenchConfig) -> dict[str, TrainConfig]:
    """The settings of training, per variant."""
    base = defaults("points24", "tiny")
    base = replace(
        base,
        model=c.model,
        steps_per_update=c.steps or base.steps_per_update,
        envs=c.envs or base.envs,
    )
    return {name: replace(base, **changes) for name, changes in VARIANTS.items()}


def updates(crew: Crew, c: BenchConfig) -> dict[str, list[dict]]:
    """The metrics of every timed update, per variant; what every worker runs."""
    runs = {name: Run(config, Path("."), crew) for name, config in settings(c).items()}
    calls = {name: lambda run=run: train_update(run)[0] for name, run in runs.items()}
    timed = alternate(calls, repeats=c.updates - 1)
    return {name: [metrics for _, metrics in results] for name, results in timed.items()}


def summaries(measured: dict[str, list[dict]]) -> dict[str, dict[str, Spread]]:
    """Median and spread per variant and metric."""
    return {
        variant: {name: spread([m[name] for m in metrics]) for name in REPORTED}
        for variant, metrics in measured.items()
    }


def table(summary: dict[str, dict[str, Spread]], title: str) -> Table:
    """Metrics down, variants across: median, p20 to p80."""
    headers = (f"guidance {name}" for name in summary)
    out = Table("median (p20-p80)", "unit", *headers, title=title)
    for column in out.columns[2:]:
        column.justify = "right"
    for name in REPORTED:
        spreads = [figures[name] for figures in summary.values()]
        cells = [f"{number(s.median)} ({number(s.p20)}-{number(s.p80)})" for s in spreads]
        out.add_row(name, METRICS[name].unit, *cells)
    return out


def number(value: float) -> str:
    """Three figures, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def profile(crew: Crew, c: BenchConfig, rows: int = 25) -> None:
    """Print the operations that take most time in the second update, with guidance."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    run = Run(settings(c)["kl"], Path("."), crew)
    train_update(run)
    with profiler(activities=[ProfilerActivity.CPU]) as trace:
        train_update(run)
    print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows))


def main(argv: list[str] | None = None) -> int:
    """Measure, show and record; returns the exit status."""
    c = tyro.cli(BenchConfig, args=argv, prog="bench.train_step")
    try:
        if c.updates < 2:
            raise ValueError(f"--updates must be at least 2 (one warms up), got {c.updates}")
        for config in settings(c).values():
            check(config)
            model_sha256(config)  # says how to make a model that is missing
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if c.profile:
        profile(Crew(), c)
        return 0
    workers = c.workers or cores()
    with corrector():
        summary = summaries(run_crew(workers, updates, c))
    config = settings(c)["kl"]
    dtype = str(pick_dtype(config.dtype)).removeprefix("torch.")
    model = c.model if c.model == "tiny" else Path(c.model).name
    shape = (
        f"{config.env} model={model} workers={workers} envs={config.envs} "
        f"steps={config.steps_per_update} dtype={dtype}"
    )
    where = environment()
    Console().print(table(summary, f"{shape}\n{where['processor']}, torch {where['torch']}"))
    if c.save:
        path = results_file()
        rows = [
            where | measurement("train_step", f"guidance={variant}", shape, name, unit, s)
            for variant, figures in summary.items()
            for name, s in figures.items()
            for unit in (METRICS[name].unit,)
        ]
        append_rows(path, rows)
        print(f"appended {len(rows)} rows to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
