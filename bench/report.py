"""The Markdown table of what was measured: `python -m bench.report`.

Reads every bench/results/<device>.csv and prints, for each device and shape, the latest figures of
each variant. `--write` puts the table behind "## Measured" in kernels/README.md. `--add` first
takes over the rows of another machine, from files of the same names.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.harness import COLUMNS, RESULTS, ROOT, append_rows, read_settings

PAGE = ROOT / "kernels" / "README.md"
MARK = "## Measured\n"
KERNELS = ("ties", "ties-threshold", "ties-memory", "ema", "nf4", "policy_head")


@dataclass
class Config:
    """Print the Markdown tables of the kernels' measurements."""

    write: bool = False
    """put them into kernels/README.md instead of printing them"""
    add: tuple[str, ...] = ()
    """files of rows to append to bench/results/ beforehand, each to the file of its name"""


COLUMNS_MEAN = """\
The *floor* is the least time for the arithmetic or the traffic of a kernel, by the rate that a
plain matrix product or a copy reaches on the same device; *of the floor* is floor / time. It is
beyond 100 % where data stay in a cache that the copy was too large for. *Times the first* is
time / time of the first row of the group: above 1 is slower than ours.
"""


def latest(path: Path) -> dict[tuple[str, str], dict[str, dict[str, dict]]]:
    """(benchmark, shape) -> variant -> metric -> the last such row of a CSV file."""
    found: dict = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["benchmark"].startswith(KERNELS):
                race = found.setdefault((row["benchmark"], row["shape"]), {})
                race.setdefault(row["variant"], {})[row["metric"]] = row
    return found


def section(path: Path) -> list[str]:
    """The table of one device, as lines; none where no kernel was measured."""
    races = latest(path)
    if not races:
        return []
    any_row = next(iter(next(iter(next(iter(races.values())).values())).values()))
    lines = [
        f"{any_row['processor']}, {any_row['cores']} cores, torch {any_row['torch']}; medians, and "
        f"the memory that a call needs beyond its inputs. Data: [bench/results/{path.name}]"
        f"(../bench/results/{path.name}).",
        "",
        "| kernel | shape | variant | ms | times the first | peak MB | of the floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for (benchmark, shape), variants in races.items():
        first = None
        for variant, metrics in variants.items():
            seconds = float(metrics["seconds"]["median"])
            first = first or seconds
            peak = float(metrics["peak_bytes"]["median"]) / 1e6
            share = metrics.get("floor_share")
            floor = f"{float(share['median']):.0%}" if share else ""
            lines.append(
                f"| {benchmark} | {shape} | {variant} | {1e3 * seconds:,.2f} "
                f"| {seconds / first:.2f} | {peak:,.1f} | {floor} |"
            )
    return [*lines, ""]


def add(path: Path) -> None:
    """Append the rows of a file to the one of the same name in bench/results/."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames != COLUMNS:
            raise ValueError(f"{path} has not the columns {', '.join(COLUMNS)}")
        append_rows(RESULTS / path.name, rows)


def report() -> str:
    """All tables, and what their columns are."""
    lines = [line for path in sorted(RESULTS.glob("*.csv")) for line in section(path)]
    return "\n".join([COLUMNS_MEAN, *lines])


def main(argv: list[str] | None = None) -> int:
    """Print or write the tables; returns the exit status."""
    c = read_settings(Config, argv, "bench.report")
    try:
        for path in c.add:
            add(Path(path))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not c.write:
        print(report())
        return 0
    page = PAGE.read_text(encoding="utf-8")
    head, mark, _ = page.partition(MARK)
    if not mark:
        print(f"error: {PAGE.relative_to(ROOT)} has no line {MARK.strip()!r}", file=sys.stderr)
        return 2
    PAGE.write_text(f"{head}{MARK}\n{report()}", encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
