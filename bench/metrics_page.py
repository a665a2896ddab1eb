"""docs/metrics.md, written from the definitions in `turbo.log`: `python -m bench.metrics_page`.

A test fails when the page says something else than the program. Left out: any text of its own
about a metric.
"""

import sys
from collections.abc import Mapping

from bench.harness import ROOT
from turbo.log import METRICS, Metric

PAGE = ROOT / "docs" / "metrics.md"
INTRODUCTION = """\
# Metrics

Every number that a run records, as defined in [turbo/log.py](../turbo/log.py); a name that is not
there cannot be logged. They are written to `metrics.jsonl` in the run directory, one line of JSON
an update and one an evaluation, which has the names that begin with `eval_`; with `--tensorboard`,
`--wandb PROJECT` and `--trackio PROJECT` elsewhere too, under the same names. A value that is not
finite is `null`.

This page is generated: change `turbo/log.py`, then `make metrics`.

| metric | unit | meaning |
|---|---|---|
"""


def page(metrics: Mapping[str, Metric] = METRICS) -> str:
    """The page as Markdown: one row of the table a metric."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|")

    rows = (f"| `{name}` | {cell(m.unit)} | {cell(m.meaning)} |\n" for name, m in metrics.items())
    return INTRODUCTION + "".join(rows)


def main() -> int:
    """Write the page; returns the exit status."""
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{len(METRICS)} metrics written to {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
