"""The picture of a demonstration: success and right thoughts against environment steps.

    thin     the rollouts of each seed
    bold     their mean, smoothed over about a tenth of the updates
    points   evaluations on fresh deals before and after, with 95 % intervals (Wilson) of success

Left out: where the numbers come from (`bench.records`).
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.records import Recorded, by_label, pooled
from bench.study_runs import StudyRun

POINTS24_CEILING = 20876 / 28561  # ordered draws that can make 24: tests/envs/test_cards.py
# Colours of Okabe and Ito, told apart by colour-blind readers; markers differ as well.
LOOKS = {
    "GTR-Turbo": ("#0072B2", "o"),
    "plain PPO": ("#D55E00", "s"),
}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average; near the ends over what is there."""
    ones = np.ones(window)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), ones, "same")
    count = np.convolve(known.astype(float), ones, "same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def pyplot():
    """The module of matplotlib, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def curve(run: Recorded | StudyRun, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Environment steps (thousands) and values of one metric."""
    values = [r.get(name) for r in run.curve]
    y = np.array([math.nan if v is None else v for v in values], dtype=float)
    return np.array([r["env_steps"] for r in run.curve]) / 1000, y


def mean_curve(runs: Sequence[Recorded], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the seeds where all of them are, smoothed over about a tenth of the updates."""
    curves = [curve(run, name) for run in runs]
    count = min(len(x) for x, _ in curves)
    grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), count)
    mean = np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)
    window = 2 * round(count / 20) + 1
    return grid, smooth(mean, min(window, count))


def draw(title: str, runs: Sequence[Recorded], path: Path) -> None:
    """Success on the left, right thoughts on the right; 1200 x 450 pixels."""
    from matplotlib.ticker import PercentFormatter

    plt = pyplot()
    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(8, 3), dpi=150, layout="constrained")
        panels = (
            ("success_rate", f"{title}: success"),
            ("reasoning_score", "Thoughts that the exact solver finds right"),
        )
        for ax, (name, heading) in zip(axes, panels, strict=True):
            for place, (label, group) in enumerate(by_label(runs).items()):
                _draw_variant(ax, name, label, group, place)
            ax.set_title(heading, loc="left", fontsize=9)
            ax.set_xlabel("environment steps (thousands)")
            ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            ax.grid(alpha=0.25, linewidth=0.5)
        if runs[0].config.env == "points24":
            axes[0].axhline(POINTS24_CEILING, color="#555555", linewidth=1, linestyle="--")
            text = f"{POINTS24_CEILING:.1%} of the hands can make 24"
            below = dict(xytext=(4, -3), textcoords="offset points", va="top", color="#555555")
            axes[0].annotate(text, (0, POINTS24_CEILING), fontsize=7, **below)
        for ax in axes:
            ax.set_ylim(bottom=0)
        handles = _legend(runs)
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), frameon=False
        )
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)


def _draw_variant(ax, name: str, label: str, runs: Sequence[Recorded], place: int) -> None:
    """One variant's rollouts as lines, its evaluations before and after as points."""
    colour, marker = LOOKS[label]
    for run in runs:
        ax.plot(*curve(run, name), color=colour, alpha=0.3, linewidth=0.7)
    ax.plot(*mean_curve(runs, name), color=colour, linewidth=2)
    end = np.mean([run.after["env_steps"] for run in runs]) / 1000
    # Moved a little, so that equal points of two variants stay visible.
    x = np.array([0.0, end]) + 0.012 * end * place
    points = dict(color=colour, marker=marker, markersize=5, linestyle="none", zorder=5)
    if name == "success_rate":
        y, low, high = np.array([pooled(runs, when) for when in ("before", "after")]).T
        ax.errorbar(x, y, yerr=[y - low, high - y], elinewidth=1.2, capsize=2.5, **points)
        return
    values = [[getattr(run, w).get(f"eval_{name}") for run in runs] for w in ("before", "after")]
    ax.plot(x, [math.nan if None in v else np.mean(v) for v in values], **points)


def _legend(runs: Sequence[Recorded]) -> list:
    """One entry per variant, and one for each kind of mark."""
    from matplotlib.lines import Line2D

    c, groups = runs[0].config, by_label(runs)
    many = any(len(group) > 1 for group in groups.values())
    smoothed = "mean" if many else "smoothed"
    seeds = {k: f"{k} ({len(group)} seed{'s'[: len(group) > 1]})" for k, group in groups.items()}
    grey = "#555555"
    return [
        *(
            Line2D([], [], color=LOOKS[k][0], marker=LOOKS[k][1], linewidth=2, label=seeds[k])
            for k in groups
        ),
        Line2D(
            [], [], color=grey, linewidth=2, label=f"rollouts (T {c.temperature:g}), {smoothed}"
        ),
        Line2D(
            *([], []),
            color=grey,
            marker="o",
            linestyle="none",
            label=f"evaluation (T {c.eval_temperature:g}), 95 % interval",
        ),
    ]
