"""What every benchmark shares: where it ran, variants timed in turn, medians, rows in a CSV file.

    variants run as A B A B ..., not A A B B, so that a machine that slows down slows all alike
    median, p20 and p80 over the repeats; no mean, which one disturbance can move

Left out: what is measured (`bench.train_step`), demonstrations of learning (`bench.learn`).
"""

import csv
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import TypeVar

from turbo.flags import read_flags
from turbo.parallel import cores
from turbo.versions import processor, versions

ROOT = Path(__file__).resolve().parent.parent
# Where rows go, and of which commit the files are where the history beside them does not say
RESULTS = Path(os.environ.get("BENCH_RESULTS") or ROOT / "bench" / "results")
COMMIT = os.environ.get("BENCH_COMMIT", "")
WHERE = ["date", "commit", "changed", "python", "torch", "transformers", "processor", "cores"]
WHAT = ["benchmark", "variant", "shape", "metric", "unit", "median", "p20", "p80", "repeats"]
COLUMNS = WHERE + WHAT

Result = TypeVar("Result")
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Spread:
    """The middle of repeated measurements and the range that holds the central 60 % of them."""

    median: float
    p20: float
    p80: float
    repeats: int


def read_settings(kind: type[Settings], argv: Sequence[str] | None, prog: str) -> Settings:
    """The settings on the command line; what is wrong with it is told in one line, status 2."""
    try:
        return read_flags(kind, sys.argv[1:] if argv is None else argv, prog)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def spread(values: Sequence[float]) -> Spread:
    """Median, 20 % and 80 % quantile, with linear interpolation."""
    if not values:
        raise ValueError("no measurements: repeat at least once")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    tenths = quantiles(values, n=10, method="inclusive")
    return Spread(tenths[4], tenths[1], tenths[7], len(values))


def alternate(
    variants: Mapping[str, Callable[[], Result]],
    repeats: int,
    warmup: int = 1,
    keep: Callable[[dict[str, list[tuple[float, Result]]]], None] = lambda measured: None,
) -> dict[str, list[tuple[float, Result]]]:
    """Call the variants in turn (A B A B); seconds and result of each call, without the warm-up.

    `keep` is given what there is after each of these calls.
    """
    measured: dict[str, list[tuple[float, Result]]] = {name: [] for name in variants}
    for turn in range(warmup + repeats):
        for name, call in variants.items():
            start = time.perf_counter()
            result = call()
            seconds = time.perf_counter() - start
            if turn >= warmup:
                measured[name].append((seconds, result))
                keep(measured)
    return measured


def slug(name: str) -> str:
    """A name as part of a file name: `Intel(R) Xeon(R) @ 2.10GHz` -> `intel-xeon-2-10ghz`."""
    bare = re.sub(r"\((r|tm)\)", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", bare).strip("-") or "unknown"


def environment() -> dict[str, str | int]:
    """Where and on what a measurement was made, by the names of the CSV's columns."""
    known = versions()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": COMMIT or known["commit"],  # what is told goes before a checkout of other files
        "changed": "unknown" if COMMIT else uncommitted_changes(),
        "python": known["python"],
        "torch": known["torch"],
        "transformers": known["transformers"],
        "processor": processor(),
        "cores": cores(),
    }


def uncommitted_changes() -> str:
    """Whether the checkout has any: yes, no, or unknown where git cannot say."""
    # Without the lock: asking must not write into the index, not even its cache of file times.
    command = ["git", "--no-optional-locks", "-C", str(ROOT), "status", "--porcelain"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return "yes" if done.stdout.strip() else "no"


def results_file(folder: Path = RESULTS, name: str = "") -> Path:
    """The CSV file of this processor, or of the device called `name`."""
    return folder / f"{slug(name or processor())}.csv"


def append_rows(path: Path, rows: Iterable[Mapping], columns: Sequence[str] = COLUMNS) -> None:
    """Append rows to a CSV file, with a header if it is new; a file of other columns is refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or path.stat().st_size == 0
    if not fresh:
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file))
        if header != list(columns):
            raise ValueError(f"{path} has the columns {', '.join(header)}: move it away first")
    with path.open("a", newline="", encoding="utf-8") as file:
        file.write((",".join(columns) + "\n") * fresh + _lines(rows, columns))


def renew_rows(path: Path, old: Sequence[Mapping], new: Sequence[Mapping]) -> None:
    """Append rows in place of those that were appended before, which the file has until then."""
    if not old:
        append_rows(path, new)
        return
    text = path.read_text(encoding="utf-8").replace(_lines(old), "", 1)
    whole = path.with_name(path.name + ".new")
    whole.write_text(text + _lines(new), encoding="utf-8", newline="\n")
    whole.replace(path)


def _lines(rows: Iterable[Mapping], columns: Sequence[str] = COLUMNS) -> str:
    """Rows as they stand in a CSV file."""
    out = io.StringIO()
    csv.DictWriter(out, columns, lineterminator="\n").writerows(rows)
    return out.getvalue()


def measurement(
    benchmark: str, variant: str, shape: str, metric: str, unit: str, s: Spread
) -> dict:
    """What was measured, by the names of the CSV's columns; `environment()` has the others."""
    return {
        "benchmark": benchmark,
        "variant": variant,
        "shape": shape,
        "metric": metric,
        "unit": unit,
        "median": f"{s.median:.6g}",
        "p20": f"{s.p20:.6g}",
        "p80": f"{s.p80:.6g}",
        "repeats": s.repeats,
    }
