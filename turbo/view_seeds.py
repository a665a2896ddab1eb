"""Runs that differ in their seed alone, shown as one: means over the seeds.

Every metric of an update, or of an evaluation, that all of them have is their mean; NAME_low and
NAME_high are its 95 % interval over three seeds or more (Student's t), in place of what each run
recorded.

Left out: what is shown of one run (`turbo.view_data`).
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from turbo import checkpoint
from turbo.config import TrainConfig
from turbo.log import METRICS
from turbo.measure import mean_interval
from turbo.saved import INDIFFERENT
from turbo.view_data import number

ENDS = ("_low", "_high")  # of an interval: those of single runs mean nothing over seeds
LEAST = 3  # seeds that have an interval


def by_seed(runs: Sequence[Path]) -> list[list[Path]]:
    """The run directories, those of one setting together; in the order of their first ones.

    ValueError where two of a setting have the same seed, which are not independent.
    """
    groups: dict[str, dict[object, Path]] = {}  # setting -> seed -> run
    for run in runs:
        own = {str(k): v for k, v in checkpoint.read_run(run)["config"].items()}
        settings = asdict(TrainConfig()) | own  # an older run knows fewer
        seed = settings.pop("seed")
        same = sorted((k, v) for k, v in settings.items() if k not in INDIFFERENT)
        group = groups.setdefault(repr(same), {})
        if seed in group:
            raise ValueError(f"--mean: {group[seed]} and {run} have one seed, {seed}: give one")
        group[seed] = run
    return [list(group.values()) for group in groups.values()]


def merged(runs: Sequence[dict]) -> dict:
    """Runs of one setting as one, with the episodes of the first."""
    first, *others = runs
    if not others:
        return first
    lengths = [len(run["curves"].get("update", [])) for run in runs]
    shortest = runs[lengths.index(min(lengths))]["settings"].get("seed")
    return first | {
        "name": f"{first['name']} and {len(others)} more",
        "settings": first["settings"] | {"seed": [r["settings"].get("seed") for r in runs]},
        "seeds": len(runs),
        "shortest": shortest if min(lengths) < max(lengths) else None,  # seed that ends first
        "ceilings": [c for c in first["ceilings"] if all(c in run["ceilings"] for run in others)],
        "curves": means([run["curves"] for run in runs]),
        "evaluations": means([run["evaluations"] for run in runs]),
    }


def means(tables: Sequence[dict[str, list]]) -> dict[str, list]:
    """Mean and interval of every column that all tables have, for the updates that all have."""
    rows = [{u: i for i, u in enumerate(t.get("update", []))} for t in tables]
    updates = sorted(set.intersection(*map(set, rows)))
    out: dict[str, list] = {"update": updates}
    for name in tables[0]:
        if name == "update" or name.endswith(ENDS) or not all(name in t for t in tables):
            continue
        stem = name.removesuffix("_rate") if name.endswith("success_rate") else name
        of_updates = [[t[name][r[u]] for t, r in zip(tables, rows, strict=True)] for u in updates]
        found = [over_seeds(values, METRICS[name].unit) for values in of_updates]
        for place, key in enumerate((name, f"{stem}_low", f"{stem}_high")):
            out[key] = [three[place] for three in found]
    return out


def over_seeds(values: Sequence[object], unit: str) -> tuple[float | None, ...]:
    """Mean and interval of one metric's values; None where one is no number, and no interval of
    two: it would fill the picture."""
    if not all(map(number, values)):
        return None, None, None
    mean, low, high = mean_interval(values)
    if len(values) < LEAST:
        return mean, None, None
    return (mean, max(low, 0.0), min(high, 1.0)) if unit == "0..1" else (mean, low, high)
