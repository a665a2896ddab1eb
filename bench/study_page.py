"""The page and the plots of the study, from its data: docs/study/README.md.

Left out: the runs (`bench.study`), the statistics (`bench.claims`).
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.claims import (
    CLAIMS,
    SUCCESS,
    TEACHER,
    Claim,
    compare,
    compare_passes,
    final,
    finding,
)
from bench.plot import curve, pyplot
from bench.study_runs import StudyRun, read_table

# Colours of Okabe and Ito, told apart by colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PANELS = (
    ("success_rate", "success in the rollout"),
    ("reasoning_score", "right thoughts"),
    ("thought_entropy", "entropy of a thought token, nats"),
    ("self_bleu", "self-BLEU of the thoughts"),
)
SHARES = ("success_rate", "reasoning_score", "self_bleu")  # 1 at most; nothing here is below 0
# README's picture: a panel each of success and right thoughts in one regime
HEADLINE = "harsh"
HEADLINE_METHODS = {
    "kl": "KL to the merged teacher",
    "none": "plain PPO",
    "sft": "imitates what the merged teacher writes",
}
# The paper's claims are about final success, so that is what is compared.
ABOUT = """Written by `python -m bench.study` from [runs.csv](runs.csv): {done} of the {planned}
runs of [its table](../../bench/study.toml) are complete. The runs of a regime have the same number
of updates and of steps asked for. Success is that of 500 fresh deals at temperature 0.2, the same
deals for all methods of a seed. Differences are paired by seed; intervals are Student's t over
seeds, 95 %. Steps a second are of runs that shared the cores with other work, and compare
nothing."""


def by_method(runs: Sequence[StudyRun], regime: str) -> dict[str, list[StudyRun]]:
    """The runs of a regime by method, in the order in which they come."""
    found: dict[str, list[StudyRun]] = {}
    for run in runs:
        if run.regime == regime:
            found.setdefault(run.method, []).append(run)
    return found


def band(runs: Sequence[StudyRun], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Environment steps (thousands), mean and half width of the 95 % band over seeds."""
    curves = [curve(run, name) for run in runs]
    grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 50)
    values = np.array([np.interp(grid, x, y) for x, y in curves])  # [seeds, 50]
    found = [finding(column) for column in values.T]
    half = np.array([0.0 if math.isnan(f.low) else f.high - f.mean for f in found])
    return grid, values.mean(0), half


def draw_curves(axis, name: str, label: str, methods: dict[str, list[StudyRun]]) -> None:
    """One metric of some methods: the mean over seeds and its 95 % band, a colour a method.

    Of two seeds no band is drawn: it would fill the picture.
    """
    for colour, (method, runs) in zip(COLOURS, methods.items(), strict=False):
        x, mean, half = band(runs, name)
        axis.plot(x, mean, color=colour, label=f"{method} ({len(runs)})")
        if len(runs) < 3:
            continue
        low, high = np.maximum(mean - half, 0.0), mean + half
        if name in SHARES:
            high = np.minimum(high, 1.0)
        axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    axis.set(xlabel="environment steps (thousands)", ylabel=label)
    axis.grid(alpha=0.3)


def draw_headline(methods: dict[str, list[StudyRun]], path: Path) -> None:
    """Success and right thoughts without guidance and with it; 1200 x 450 pixels."""
    from matplotlib.ticker import PercentFormatter

    plt = pyplot()
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), dpi=100, layout="constrained")
        named = {words: methods[name] for name, words in HEADLINE_METHODS.items()}
        for axis, (name, label) in zip(axes, PANELS[:2], strict=True):
            draw_curves(axis, name, label, named)
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axis.set_ylim(bottom=0)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(named), frameon=False)
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)


def draw_regime(title: str, methods: dict[str, list[StudyRun]], path: Path) -> None:
    """Four panels of curves over environment steps, a colour a method; 1200 x 800 pixels."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), dpi=100)
    for axis, (name, label) in zip(axes.flat, PANELS, strict=True):
        draw_curves(axis, name, label, methods)
    axes.flat[0].legend(fontsize=8)
    figure.suptitle(f"{title}: mean and 95 % band over seeds (their number in brackets)")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def draw_teacher(runs: Sequence[StudyRun], path: Path) -> bool:
    """Success of policy and merged teacher on the same deals, seed by seed (the paper's figure 2).

    False where nothing was evaluated on the way.
    """
    plt = pyplot()
    watched = [r for r in runs if len(evaluations(r)) > 2]
    if not watched:
        return False
    figure, axes = plt.subplots(1, len(watched), figsize=(3 * len(watched), 3.2), sharey=True)
    for axis, run in zip(np.atleast_1d(axes), watched, strict=True):
        points = evaluations(run)
        x = [p["env_steps"] / 1000 for p in points]
        for name, colour, label in (
            (SUCCESS, COLOURS[0], "policy"),
            (TEACHER, COLOURS[1], "teacher"),
        ):
            axis.plot(x, [p.get(name, math.nan) for p in points], "o-", color=colour, label=label)
        axis.set(title=f"seed {run.seed}", xlabel="steps (thousands)")
        axis.grid(alpha=0.3)
    np.atleast_1d(axes)[0].set_ylabel("success, T 0.2")
    np.atleast_1d(axes)[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return True


def evaluations(run: StudyRun) -> list[dict]:
    """The records that hold an evaluation of policy and teacher."""
    return [r for r in run.records if r.get(SUCCESS) is not None and r.get(TEACHER) is not None]


def percent(f) -> str:
    """A mean and its interval, in percent."""
    if not f.seeds:
        return ""

    def told(share: float) -> str:
        return f"{round(100 * share, 1) + 0.0:.1f}"  # + 0.0: no minus before a zero

    tail = "" if math.isnan(f.low) else f" [{told(f.low)}, {told(f.high)}]"
    return told(f.mean) + tail


def regime_table(methods: dict[str, list[StudyRun]]) -> list[str]:
    """One row a method: final figures over its seeds."""
    lines = [
        "| method | seeds | success | merged teacher | right thoughts | self-BLEU | entropy "
        "| thought tokens | steps | steps/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, runs in methods.items():

        def last(name: str, runs: Sequence[StudyRun] = runs) -> float:
            return float(np.mean([r.curve[-1].get(name, math.nan) for r in runs]))

        regime = runs[0].regime
        figures = (SUCCESS, TEACHER, "eval_reasoning_score")
        ends = [final(runs, regime, method, figure) for figure in figures]
        cells = [
            method,
            str(len(runs)),
            *(percent(finding(list(values.values()))) for values in ends),
            f"{last('self_bleu'):.2f}",
            f"{last('thought_entropy'):.3f}",
            f"{last('thought_length'):.1f}",
            f"{np.mean([r.after['env_steps'] for r in runs]):,.0f}",
            f"{np.mean([r.after['env_steps'] / r.after['elapsed'] for r in runs]):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def claim_lines(claim: Claim, runs: Sequence[StudyRun]) -> list[str]:
    """A claim's rows: each comparison, its difference in points, its verdict."""
    lines = [f"**({claim.letter})** {claim.statement}", ""]
    lines += [
        "| regime | comparison | seeds | difference, points | verdict |",
        "|---|---|---|---|---|",
    ]
    for c in claim.comparisons:
        found = compare(runs, c)
        told = c.words or f"{c.better} over {c.worse}"
        row = (c.regime, told, str(found.seeds), percent(found), found.verdict)
        lines.append("| " + " | ".join(row) + " |")
    return [*lines, ""]


def pass_lines(out: Path) -> list[str]:
    """Claim (j), from what `bench.passes` has played; nothing where it has not."""
    lines = [
        "**(j)** After training, one answer wins hands that 32 answers of the warm start do not.",
        "",
    ]
    path = out / "passes.json"
    if not path.is_file():
        return [*lines, "Not run yet: `python -m bench.passes`.", ""]
    known = json.loads(path.read_text(encoding="utf-8"))
    warm, possible = known.pop("warm start"), known.pop("solvable")
    rows = {name: compare_passes(warm, trained, 8, possible) for name, trained in known.items()}
    if not rows:
        return [*lines, "No trained policy was there to be played.", ""]
    heads = list(next(iter(rows.values())))
    lines += ["| run | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, row in rows.items():
        cells = (f"{v:.1%}" if isinstance(v, float) else str(v) for v in row.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def write_page(out: Path, runs: Sequence[StudyRun], planned: int) -> None:
    """README.md and the plots, from the runs that are complete."""
    table = read_table()
    lines = [
        "# What works, on the tiny model",
        "",
        ABOUT.format(done=len(runs), planned=planned),
        "",
    ]
    note = out / "NOTES.md"
    if note.is_file():
        lines += [note.read_text(encoding="utf-8").strip(), ""]
    lines += ["## The claims", ""]
    for claim in CLAIMS:
        lines += claim_lines(claim, runs)
    lines += pass_lines(out)
    for name, regime in table["regimes"].items():
        methods = by_method(runs, name)
        if not methods:
            continue
        if name == HEADLINE and set(HEADLINE_METHODS) <= set(methods):
            draw_headline(methods, out / "headline.png")
        lines += [f"## {regime['title']}", "", regime["about"], ""]
        lines += [f"`{regime['flags']} {table['common']}`", ""]
        shown = {m: r for m, r in methods.items() if m in regime.get("drawn", [])} or methods
        draw_regime(regime["title"], shown, out / f"{name}.png")
        lines += [f"![{regime['title']}]({name}.png)", "", *regime_table(methods), ""]
        if draw_teacher(methods.get("kl", []), out / f"{name}-teacher.png"):
            lines += [f"![policy and merged teacher]({name}-teacher.png)", ""]
    lines += ["## The methods", ""]
    lines += [f"* {name}: `{flags or '(defaults)'}`" for name, flags in table["methods"].items()]
    (out / "README.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
