"""The speed of whole training updates, phase by phase: `python -m bench.train_step`.

Real updates of Points24, through the same functions that `turbo.train` runs. Runs without guidance
and with each kind of it take turns (A B A B) in one crew of workers, and with them the published
recipe (`bench.recipe`), which has the first worker's process for itself while the others wait, and
plays fewer steps: rates are compared. The external corrector is the one of examples/, on the same
cores, which answers in milliseconds. The first update of each is thrown away: caches are cold, and
there is no teacher yet. Rows go into bench/results/<processor>.csv, anew after every update, so
that a run that is killed leaves what it had; `--profile` prints instead where the time of one
update on one worker goes.

    seconds of an update = rollout (decode) + score + write + train + merge (of the teacher)
                         + checkpoint + other
    utilisation          = model arithmetic (`bench.flops`) / seconds / rate of a matrix product
    share of the floor   = seconds that reading the weights takes, once for a token of every
                           environment, at the rate of a copy / seconds of the rollout

The rates are those of a product of square matrices in the dtype of the run and of a copy, all
workers at once, measured first in every turn. The floor is told of large models alone: the weights
of a small one stay in the processor's cache. Peak memory is the most that a variant's processes
hold, summed, in two updates of their own (what one variant has freed may stay resident and would
count for the next). A single variant on a GPU is asked in the timed updates, beside what the memory
planner expects.

Left out: evaluation and log files, which `turbo.train` writes between the updates.
"""

import importlib.util
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from bench.endpoint import PORT, corrector
from bench.flops import Tally
from bench.harness import (
    Spread,
    alternate,
    environment,
    measurement,
    read_settings,
    renew_rows,
    results_file,
    slug,
    spread,
)
from bench.race import copy_rate, device_name, product_rate
from bench.recipe import Recipe, fastest
from turbo import hub
from turbo.config import TrainConfig, check
from turbo.envs.points24 import Points24
from turbo.footprint import CUDA_CONTEXT
from turbo.kernels.nf4 import Nf4Matrix
from turbo.log import METRICS, Metric
from turbo.machine import peak_bytes
from turbo.model import VisionLanguageModel, pick_dtype
from turbo.parallel import Crew, cores, run_crew
from turbo.presets import defaults
from turbo.run import Run
from turbo.train import train_update

VARIANTS = {
    "none": dict(guidance="none"),
    "kl": dict(guidance="kl", kl_placement="loss"),
    "sft": dict(guidance="sft"),
    "sft, all steps": dict(guidance="sft", sft_rows=0),  # as the paper does
    "gtr": dict(guidance="gtr", teacher_model="expert"),
}
RECIPE, PRODUCT = "published recipe", "square product"
PHASES = ("rollout", "score", "write", "train", "merge", "checkpoint", "other")
# What only this benchmark measures
OWN = {
    "times_the_recipe": Metric("environment steps/s as a multiple of the recipe's", "1"),
    "seconds_checkpoint": Metric("time spent writing a checkpoint of the update", "s"),
    "model_flops": Metric("arithmetic that the update asks of the model", "FLOP"),
    "flops_per_second": Metric("that arithmetic per second of the whole update", "FLOP/s"),
    "utilisation": Metric("its share of what a matrix product reaches on this device", "0..1"),
    "decode_floor_share": Metric("share of the rate that reading the weights allows", "0..1"),
    "peak_bytes": Metric("most memory that the processes hold, summed", "bytes"),
    "planned_bytes": Metric("what the memory planner expects of a run on a GPU", "bytes"),
}
REPORTED = (
    "steps_per_second",
    "times_the_recipe",
    *(f"seconds_{phase}" for phase in PHASES),
    "tokens_per_second",
    "trained_rows",
    "draft_accept_rate",
    "decode_floor_share",
    "model_flops",
    "flops_per_second",
    "utilisation",
    "peak_bytes",
    "planned_bytes",
)
UNITS = {name: (OWN | METRICS)[name].unit for name in REPORTED}
Turns = dict[str, list[dict[str, float]]]  # figures of every timed update, per variant


@dataclass
class BenchConfig:
    """Time whole training updates, without guidance and with each kind of it, in turn."""

    updates: int = 6
    """updates of each variant; the first is thrown away"""
    workers: int = 0
    """processes (0: one a core, at most 4)"""
    model: str = "tiny"
    """`tiny` for the built-in warm start, a folder written by `turbo.sft`, or with --random-weights
    a published shape such as qwen2.5-vl-7b"""
    random_weights: bool = False
    """build --model with random weights; the recipe holds two more models beside it"""
    only: str = ""
    """one variant, such as kl (empty: all of them; each holds a model of its own in memory)"""
    quantize: Literal["none", "nf4"] = "none"
    """keep the base in 4 bits"""
    decode_graphs: bool = False
    """GPU: record decode steps as CUDA graphs"""
    play: Literal["auto", "merged", "unmerged"] = "auto"
    """large models: whether the policy plays merged, or with base and LoRA apart"""
    max_new_tokens: int = 0
    """tokens of the longest answer (0: the default of training)"""
    steps: int = 0
    """environment steps of an update (0: the default of training)"""
    envs: int = 0
    """environments that play at once (0: the default of training)"""
    epochs: int = 0
    """passes over an update's steps (0: the default of training)"""
    micro_tokens: int = 0
    """large models: tokens that run at once (0: the default of training)"""
    recipe_steps: int = 64
    """environment steps of an update of the published recipe (0: leave it out; it needs peft)"""
    memory: bool = True
    """measure the peak memory too: two more updates of each variant, in processes of their own"""
    port: int = PORT
    """port where the external corrector of guidance gtr listens, another one if that is taken"""
    profile: bool = False
    """print the operations that take most time in one update on one worker; nothing is recorded"""
    save: bool = True
    """append the rows to bench/results/"""


class RandomActions(Points24):
    """Points24 for a model that cannot play: an illegal answer takes an action at random.

    All would lose at once and alike otherwise, and nothing would be left to train on. An episode
    has two steps at most, so that an update of some hundred ends with all environments at work, as
    one of thousands is nearly always.
    """

    def __init__(self, **options):
        super().__init__(max_tokens=1, **options)

    def step_illegal(self) -> tuple:
        """A step with an action of the game's own random numbers."""
        return self.step(int(self.np_random.integers(len(self.actions))))


@dataclass(frozen=True)
class Setting:
    """How the published recipe runs."""

    dtype: torch.dtype
    threads: int
    device: str

    def __str__(self) -> str:
        return f"dtype={str(self.dtype).removeprefix('torch.')} threads={self.threads}"


@dataclass(frozen=True)
class Measured:
    """What the workers found."""

    turns: Turns
    setting: Setting | None  # of the recipe, where it took part
    micro: int  # tokens that a large model took at once when it began


@dataclass
class Record:
    """The rows of a run in a file."""

    path: Path
    where: dict[str, str | int]
    rows: list[dict] = field(default_factory=list)  # that are in the file

    def renew(self, summary: dict[str, dict[str, Spread]], shapes: dict[str, str]) -> None:
        """Write the rows of all figures in place of the earlier ones."""
        rows = [
            self.where
            | measurement("train_step", label(variant), shapes[variant], name, UNITS[name], s)
            for variant, figures in summary.items()
            for name, s in figures.items()
        ]
        renew_rows(self.path, self.rows, rows)
        self.rows = rows


def settings(c: BenchConfig) -> dict[str, TrainConfig]:
    """The settings of training, per variant; ValueError where the one that is asked for is none."""
    if c.only and c.only not in VARIANTS:
        raise ValueError(f"--only must be one of {'; '.join(VARIANTS)}, got {c.only!r}")
    base = defaults("points24", "paper" if c.random_weights else "tiny")
    base = replace(
        base,
        env="bench.train_step:RandomActions" if c.random_weights else base.env,
        model=c.model,
        random_weights=c.random_weights,
        quantize=c.quantize,
        decode_graphs=c.decode_graphs,
        play=c.play,
        max_new_tokens=c.max_new_tokens or base.max_new_tokens,
        steps_per_update=c.steps or base.steps_per_update,
        envs=c.envs or base.envs,
        epochs=c.epochs or base.epochs,
        micro_tokens=c.micro_tokens,
        teacher_url=f"http://127.0.0.1:{c.port}/v1",
    )
    names = [c.only] if c.only else VARIANTS
    return {name: replace(base, **VARIANTS[name]) for name in names}


def common(c: BenchConfig) -> TrainConfig:
    """What all variants share, and the recipe runs with: the guided variant, where it is there."""
    found = settings(c)
    return found.get("kl") or next(iter(found.values()))


def one_update(run: Run, tally: Tally, alone: bool = False) -> dict[str, float]:
    """An update and a checkpoint of it; its figures. `alone`: it has a GPU for itself."""
    if alone:
        torch.cuda.reset_peak_memory_stats()
    start, before = time.perf_counter(), run.env_steps
    figures, _ = train_update(run)
    trained = time.perf_counter()
    run.save()
    run.crew.wait()
    end = time.perf_counter()
    (flops,) = run.crew.total(tally.take())
    if alone:
        figures |= {"peak_bytes": peak_bytes(run.vlm.device), **planned(run)}
    if not run.vlm.text.small:
        read = weight_bytes(run.vlm) * run.crew.size / run.config.envs
        figures["read_per_second"] = read * figures["tokens_per_second"]
    return figures | {
        "steps_per_second": (run.env_steps - before) / (end - start),
        "seconds_checkpoint": end - trained,
        "model_flops": flops,
        "flops_per_second": flops / (end - start),
    }


def weight_bytes(vlm: VisionLanguageModel) -> int:
    """What a pass that predicts tokens reads of the pristine model: its matrices and its head."""
    parts = [
        tensor
        for matrix in (*vlm.matrices.values(), vlm.weights().head)
        for tensor in ([matrix.codes, matrix.absmax] if isinstance(matrix, Nf4Matrix) else [matrix])
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in parts)


def one_recipe_update(crew: Crew, recipe: Recipe | None, steps: int) -> dict[str, float]:
    """An update of the recipe, in the first worker; the others, who have none, wait."""
    crew.wait()
    start = time.perf_counter()
    done = None if recipe is None else recipe.update(steps)
    seconds = time.perf_counter() - start
    crew.wait()
    if done is None:
        return {}
    return {
        "steps_per_second": done.steps / seconds,
        "tokens_per_second": done.tokens / done.seconds["rollout"],
        **{f"seconds_{phase}": value for phase, value in done.seconds.items()},
        "seconds_other": seconds - sum(done.seconds.values()),
        "trained_rows": done.steps,
        "model_flops": done.flops,
        "flops_per_second": done.flops / seconds,
    }


def new_run(crew: Crew, c: BenchConfig, name: str, folder: Path) -> tuple[Run, Tally]:
    """A run of one variant, and the count of what it asks of the model."""
    run = Run(settings(c)[name], folder / slug(name), crew)
    return run, Tally(run)


def device_of(run: Run) -> str:
    """Where the model is: cpu or cuda."""
    return run.vlm.device.type


def pick_setting(config: TrainConfig, folder: Path, device: str) -> Setting:
    """What suits the recipe best here: the dtype of the run or float32, one core or all of them.

    On a GPU the dtype of the run, which is faster by its design, and threads are not the question.
    """
    if device == "cuda":
        return Setting(pick_dtype(config.dtype, device), 1, device)
    dtypes = [torch.float32, pick_dtype(config.dtype)]
    return Setting(*fastest(config, dtypes, cores(), folder / "trials", device), device)


def new_recipe(c: BenchConfig, s: Setting, folder: Path) -> Recipe:
    """The recipe, with the settings of the guided variant."""
    return Recipe(common(c), folder / "recipe", s.dtype, s.threads, s.device)


def updates(crew: Crew, c: BenchConfig, folder: Path, record: Record | None = None) -> Measured:
    """Figures of every timed update, per variant; what every worker runs."""
    start = time.perf_counter()
    runs = {name: new_run(crew, c, name, folder) for name in settings(c)}
    if crew.leads:
        print(f"models and runs are made: {time.perf_counter() - start:.0f} s", flush=True)
    first = next(iter(runs.values()))[0]
    config, device, micro = common(c), device_of(first), first.vlm.batches.tokens
    alone = device == "cuda" and len(runs) == 1 and not c.recipe_steps
    calls = {name: lambda own=own: one_update(*own, alone) for name, own in runs.items()}
    dtype = pick_dtype(config.dtype, device)
    setting = None
    if c.recipe_steps:
        recipe = None
        if crew.leads:
            setting = pick_setting(config, folder, device)
            recipe = new_recipe(c, setting, folder)
        calls[RECIPE] = lambda: one_recipe_update(crew, recipe, c.recipe_steps)

    def product() -> dict[str, float]:
        crew.wait()
        flops = crew.total(product_rate(dtype, device))[0]
        crew.wait()
        read = crew.total(copy_rate(device))[0]
        if device == "cuda":
            torch.cuda.empty_cache()  # what the rates took counts for no variant
        return {"flops_per_second": flops, "read_per_second": read}

    calls = {name: lambda n=name, call=call: told(crew, n, call()) for name, call in calls.items()}
    shapes = describe(c, crew.size, setting, micro)

    def keep(timed: dict) -> None:
        if crew.leads and record is not None:
            record.renew(summaries(compare(figures_of(timed))), shapes)

    turns = figures_of(alternate({PRODUCT: product} | calls, c.updates - 1, keep=keep))
    return Measured(compare(turns) if crew.leads else turns, setting, micro)


def figures_of(timed: dict[str, list[tuple[float, dict[str, float]]]]) -> Turns:
    """What was measured, less the seconds of the calls."""
    return {name: [figures for _, figures in results] for name, results in timed.items()}


def planned(run: Run) -> dict[str, float]:
    """The bytes that the memory planner expects, where it knows the model.

    Without the context of CUDA, which PyTorch's allocator does not see.
    """
    return {"planned_bytes": run.plan.total - CUDA_CONTEXT} if run.plan else {}


def told(crew: Crew, name: str, figures: dict[str, float]) -> dict[str, float]:
    """The figures of an update, which takes a while, after a line about it."""
    if crew.leads:
        phases = {p: figures[f"seconds_{p}"] for p in PHASES if f"seconds_{p}" in figures}
        seconds = ", ".join(f"{phase} {value:.2f} s" for phase, value in phases.items())
        rate = number(figures["steps_per_second"])
        print(f"{label(name)}: {rate} steps/s: {seconds}", flush=True)
    return figures


def compare(turns: Turns) -> Turns:
    """Adds, turn by turn, shares of what the device can do, and how many times as fast as the
    recipe a variant is, where the recipe has had its turn."""
    rates = turns[PRODUCT]
    recipe = [figures["steps_per_second"] for figures in turns.get(RECIPE, [])]
    out: Turns = {}
    for name, measured in turns.items():
        out[name] = [dict(figures) for figures in measured]
        for turn, figures in enumerate(out[name] if name != PRODUCT else []):
            figures["utilisation"] = figures["flops_per_second"] / rates[turn]["flops_per_second"]
            if "read_per_second" in figures:
                share = figures["read_per_second"] / rates[turn]["read_per_second"]
                figures["decode_floor_share"] = share
            if turn < len(recipe) and name != RECIPE:
                figures["times_the_recipe"] = figures["steps_per_second"] / recipe[turn]
    return out


def most_held(crew: Crew, c: BenchConfig, name: str, setting: Setting | None, folder: Path) -> int:
    """The most bytes that the processes of one variant hold in two updates, summed."""
    if name == RECIPE:
        recipe = new_recipe(c, setting, folder / "held")
        for _ in range(2):
            recipe.update(c.recipe_steps)
        return peak_bytes(torch.device(setting.device))
    run, tally = new_run(crew, c, name, folder / "held")
    for _ in range(2):
        one_update(run, tally)
    return int(crew.total(peak_bytes(run.vlm.device))[0])


def memory(c: BenchConfig, workers: int, measured: Measured, folder: Path) -> dict[str, int]:
    """Peak memory per variant, each in fresh processes."""
    out, spawn = {}, multiprocessing.get_context("spawn")
    for name in (n for n in measured.turns if n != PRODUCT):
        size = 1 if name == RECIPE else workers
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            work = pool.submit(run_crew, size, most_held, c, name, measured.setting, folder)
            out[name] = work.result()
    return out


def summaries(measured: Turns) -> dict[str, dict[str, Spread]]:
    """Median and spread per variant and metric, of the updates in which it was measured."""
    return {
        variant: {
            name: spread([f[name] for f in figures if name in f])
            for name in REPORTED
            if any(name in f for f in figures)
        }
        for variant, figures in measured.items()
    }


def table(summary: dict[str, dict[str, Spread]], title: str) -> Table:
    """Metrics down, variants across: median, p20 to p80."""
    out = Table("median (p20-p80)", "unit", *map(label, summary), title=title)
    for column in out.columns:
        column.no_wrap = True
        column.justify = "left" if column in out.columns[:2] else "right"
    for name in REPORTED:
        cells = []
        for figures in summary.values():
            s = figures.get(name)
            cells.append(f"{number(s.median)} ({number(s.p20)}-{number(s.p80)})" if s else "")
        out.add_row(name, UNITS[name], *cells)
    return out


def label(variant: str) -> str:
    """What a variant is called in table and file."""
    return f"guidance={variant}" if variant in VARIANTS else variant


def number(value: float) -> str:
    """Three figures, or four below one; large numbers by their letters."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return number(value / size) + letter
    return f"{value:,.0f}" if value >= 100 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def profile(crew: Crew, c: BenchConfig, rows: int = 25) -> None:
    """Print the operations that take most time in the second update, with guidance."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    run = Run(common(c), Path("."), crew)
    train_update(run)
    with profiler(activities=[ProfilerActivity.CPU]) as trace:
        train_update(run)
    print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows))


def describe(
    c: BenchConfig, workers: int, setting: Setting | None, micro: int = 0
) -> dict[str, str]:
    """What each variant ran, as the rows of the file say it."""
    config = common(c)
    dtype = str(pick_dtype(config.dtype, hub.device_of(config))).removeprefix("torch.")
    game = f"{config.env} model={c.model if c.model == 'tiny' else Path(c.model).name}"
    ours = (
        f"{game} workers={workers} envs={config.envs} steps={config.steps_per_update} "
        f"dtype={dtype} checkpoint=each"
    )
    ours += f" base={c.quantize}" * (c.quantize != "none") + " graphs" * c.decode_graphs
    ours += f" play={c.play}" * (c.play != "auto")
    ours += f" answers={c.max_new_tokens}" * bool(c.max_new_tokens)
    ours += f" epochs={c.epochs}" * bool(c.epochs)
    ours += f" micro={micro}" * bool(micro)
    return dict.fromkeys(settings(c), ours) | {
        RECIPE: f"{game} workers=1 envs=1 steps={c.recipe_steps} {setting} checkpoint=each",
        PRODUCT: f"workers={workers} dtype={dtype}",
    }


def impossible(c: BenchConfig) -> str:
    """Why these settings cannot be measured; empty where they can."""
    try:
        if c.updates < 2:
            raise ValueError(f"--updates must be at least 2 (one warms up), got {c.updates}")
        if c.recipe_steps < 0:
            raise ValueError(f"--recipe-steps must be 0 or more, got {c.recipe_steps}")
        if c.recipe_steps and importlib.util.find_spec("peft") is None:
            raise ValueError("the recipe needs peft: pip install peft, or --recipe-steps 0")
        for config in settings(c).values():
            check(config)
            hub.check_nf4(config)
            hub.model_sha256(config)  # says how to make a model that is missing
        if c.decode_graphs and hub.device_of(common(c)).type != "cuda":
            raise ValueError("--decode-graphs needs a GPU, and this model runs on the CPU")
        hub.own_workers(replace(common(c), workers=c.workers), 4)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def main(argv: list[str] | None = None) -> int:
    """Measure, show and record; returns the exit status."""
    c = read_settings(BenchConfig, argv, "bench.train_step")
    problem = impossible(c)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if c.profile:
        profile(Crew(), c)
        return 0
    workers = hub.own_workers(replace(common(c), workers=c.workers), 4)
    endpoint = corrector(port=c.port) if "gtr" in settings(c) else nullcontext()
    where = environment() | {"processor": device_name(hub.device_of(common(c)).type)}
    record = Record(results_file(name=where["processor"]), where) if c.save else None
    with endpoint, tempfile.TemporaryDirectory() as scratch:
        measured = run_crew(workers, updates, c, Path(scratch), record)
        peaks = memory(c, workers, measured, Path(scratch)) if c.memory else {}
    summary = summaries(measured.turns)
    for variant, held in peaks.items():
        summary[variant]["peak_bytes"] = spread([held])
    shapes = describe(c, workers, measured.setting, measured.micro)
    rate = summary[PRODUCT]["flops_per_second"].median
    title = (
        f"{next(iter(shapes.values()))}\n{where['processor']}, torch {where['torch']}\n"
        f"a square product makes {rate / 1e9:,.0f} GFLOP/s"
    )
    shown = {variant: figures for variant, figures in summary.items() if variant != PRODUCT}
    wide = None if sys.stdout.isatty() else 190  # nothing is cut off in a file
    Console(width=wide).print(table(shown, title))
    if RECIPE in shown:
        print(f"{RECIPE}: {shapes[RECIPE]}")
    if record is not None:
        record.renew(summary, shapes)
        print(f"appended {len(record.rows)} rows to {record.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
