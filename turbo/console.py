"""What the user sees of a run: a live view on a terminal, a line an update elsewhere, or nothing.

    terminal      a panel that follows the run: progress, figures, phases, warnings
    pipe, file    a line an update
    --json        one line of JSON a record on standard output; warnings on standard error
    --quiet       nothing but errors, on standard error

Left out: what a run records (`turbo.log`), when it is told (`turbo.scribe`).
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from turbo.advice import Advice
from turbo.config import TrainConfig
from turbo.flags import discard
from turbo.measure import interval
from turbo.phases import Phases

COLOURS = {
    "rollout": "blue",
    "score": "cyan",
    "write": "magenta",
    "train": "green",
    "merge": "yellow",
    "other": "white",
}
PLAIN = dict(highlight=False, markup=False, soft_wrap=True)  # a path may hold [brackets]
PACE = 5  # updates from which the time that is left is reckoned
WIDTH = 100  # columns of the live view at most


class Outlet:
    """A stream that may fail: `tell` hears of it once, and what comes after goes nowhere."""

    def __init__(self, stream: TextIO | None, tell: Callable[[OSError], None]):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115  closed from the start
        self.tell, self.is_lost = tell, False

    def write(self, text: str) -> None:
        """Write, or lose, a text."""
        self._attempt(lambda: self.stream.write(text))

    def flush(self) -> None:
        """Hand on what was written."""
        self._attempt(self.stream.flush)

    def isatty(self) -> bool:
        """Whether a person is likely to read."""
        return self.stream.isatty()

    @property
    def encoding(self) -> str:
        """How characters become bytes."""
        return self.stream.encoding

    def _attempt(self, action: Callable[[], object]) -> None:
        if self.is_lost:
            return
        try:
            action()
        except OSError as error:
            self.is_lost = True
            discard(self.stream)
            self.tell(error)


class Display:
    """Shows one run, as its settings and the terminal allow; silent unless it `leads`."""

    def __init__(self, c: TrainConfig, place: str, phases: Phases, leads: bool = True):
        self.config, self.place, self.phases = c, place, phases
        self.out = Outlet(sys.stdout, self._lost)
        self.console = Console(file=self.out, quiet=not leads or c.quiet or c.json, **PLAIN)
        unheard = Outlet(sys.stderr, lambda error: None)
        self.errors = Console(file=unheard, stderr=True, quiet=not leads, **PLAIN)
        on_terminal = self.console.is_terminal and self.out.isatty()
        self.is_live = on_terminal and not (self.console.quiet or self.console.is_dumb_terminal)
        self.live: Live | None = None
        self.update = 0
        self.times: list[float] = []  # seconds of the run at its last updates
        self.metrics: Mapping[str, float | None] = {}  # of the last update
        self.advice: list[Advice] = []  # that is on
        self.notice = ""  # what a signal handler has to say

    def open(self, update: int) -> None:
        """Start the view of a run that has had so many updates."""
        self.update = update
        if self.is_live:
            self.live = Live(
                get_renderable=self.render,
                console=self.console,
                refresh_per_second=2,
                redirect_stderr=sys.stderr.isatty(),
            )
            self.live.start()
            # A process that is killed leaves a terminal with its cursor.
            self.console.show_cursor(True)

    def close(self) -> None:
        """Leave the last state of the view on the screen, and give the terminal back."""
        live, self.live = self.live, None
        if live is not None:
            live.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text)

    def warn(self, text: str) -> None:
        """Print a line that matters with --quiet and --json too."""
        (self.errors if self.console.quiet else self.console).print(text)

    def teach(self, advice: Advice) -> None:
        """Print a warning that begins."""
        (self.errors if self.config.json else self.console).print(f"warning: {advice}")

    def tell(self, metrics: Mapping, advice: Iterable[Advice]) -> None:
        """Show an update, and the warnings that hold after it."""
        self.update, self.metrics, self.advice = metrics["update"], metrics, list(advice)
        self.times = [*self.times[-PACE:], metrics["elapsed"]]
        if not self.is_live:
            self.say(f"{self.update}/{self.config.updates} {summary(metrics)} {self._left()}")

    def record(self, record: Mapping) -> None:
        """With --json, print a record as it stands in metrics.jsonl."""
        if not self.config.json or self.errors.quiet:
            return
        self.out.write(json.dumps(record) + "\n")
        self.out.flush()

    def _lost(self, error: OSError) -> None:
        """Say once, on standard error, why nothing is printed any more; the run goes on."""
        why = "nobody reads standard output any more"
        if not isinstance(error, BrokenPipeError):
            why = f"standard output cannot be written: {error}"
        self.errors.print(f"{why}; metrics.jsonl goes on")

    def notify(self, text: str) -> None:
        """Say something from a signal handler, which must not wait for the locks of the view."""
        self.notice = text
        with contextlib.suppress(OSError):  # of a terminal that was closed
            if self.live is None or not sys.__stderr__.isatty():
                print(f"\n{text}", file=sys.__stderr__ if self.live else sys.stderr)

    def _left(self) -> str:
        left = remaining(self.config, self.update, self.times)
        return "" if left is None else f"{clock(left)} left"

    def render(self) -> RenderableType:
        """The view as it is now."""
        c, wide = self.config, min(WIDTH, self.console.width) - 4
        parts: list[RenderableType] = [gauge("update", self.update, c.updates, self._left())]
        if self.live is not None:
            parts.append(under_way(self.phases))
        if self.metrics:
            parts += [figures(self.metrics), *phase_bar(self.metrics, wide)]
        told = [(f"warning: {a.name}: {a.meaning}", "yellow") for a in self.advice]
        told += [(self.notice, "bold red")] if self.notice else []
        parts += [Text(text, style=style, no_wrap=False, overflow="fold") for text, style in told]
        return Panel(Group(*parts), title=Text(f"{c.env}  {self.place}"), width=wide + 4)


def under_way(phases: Phases) -> Table:
    """A bar of the phase that is under way."""
    name, total = phases.name, phases.total
    done = min(phases.done, total)  # whole episodes: a little more than was asked for
    return gauge(name, done, total or None, f"{done / total:.0%}" if total else "")


def gauge(name: str, done: int, total: int | None, text: str) -> Table:
    """A named bar with a text behind it; it moves to and fro where no total is known."""
    grid = Table.grid(padding=(0, 1))
    for width in (16, 32, None):
        grid.add_column(width=width)
    counted = f"{done}/{total}" if name == "update" else ""
    bar = ProgressBar(total=total, completed=done, width=32, pulse=total is None)
    grid.add_row(name, bar, "  ".join(t for t in (counted, text) if t))
    return grid


def figures(m: Mapping) -> Table:
    """The figures that matter, in two rows."""
    low, high = bounds(m)
    rows = (
        {
            "success": f"{percent(m['success_rate'])} [{low:.0%}-{high:.0%}]",
            "thoughts right": percent(m["reasoning_score"]),
            "return": f"{m['episode_return']:.2f}",
            "steps/s": f"{m['steps_per_second']:.0f}",
        },
        {
            "KL to teacher": f"{m.get('teacher_kl') or 0.0:.4f}",
            "entropy": f"{m.get('thought_entropy') or 0.0:.4f}",
            "clipped": percent(m.get("clip_fraction")),
            "memory": f"{m.get('peak_memory_gb') or 0.0:.1f} GB",
        },
    )
    grid = Table.grid(padding=(0, 2))
    for row in rows:
        grid.add_row(*(Text.assemble((k + " ", "dim"), (v, "bold")) for k, v in row.items()))
    return grid


def phase_bar(m: Mapping, width: int) -> list[Text]:
    """Where the time of an update went: a bar of `width` columns, and its legend."""
    seconds = {name: m.get(f"seconds_{name}") or 0.0 for name in COLOURS}
    total = sum(seconds.values()) or 1.0
    bar, legend, edge = Text(), Text(), 0.0
    for name, value in seconds.items():
        start, edge = round(edge), edge + width * value / total
        bar.append(" " * (round(edge) - start), style=f"on {COLOURS[name]}")
        legend.append(f"{name} {value / total:.0%}  ", style=COLOURS[name])
    return [bar, legend]


def summary(m: Mapping) -> str:
    """The figures that matter, in one line."""
    low, high = bounds(m)
    kl = f"KL to teacher {m['teacher_kl']:.4f} " if m.get("teacher_kl") else ""
    return (
        f"success {percent(m['success_rate'])} [{low:.0%}-{high:.0%}] "
        f"return {m['episode_return']:.2f} thoughts right {percent(m['reasoning_score'])} "
        f"{kl}entropy {m.get('thought_entropy') or 0.0:.4f} "
        f"{m['steps_per_second']:.0f} steps/s {m.get('peak_memory_gb') or 0.0:.1f} GB"
    )


def evaluated(e: Mapping, of: str) -> str:
    """The figures of an evaluation that matter, in one line; `of` says of what episodes."""
    return (
        f"{success(e)}, return {e['episode_return']:.2f}, legal {e['legal_rate']:.1%}, "
        f"thoughts right {percent(e['reasoning_score'])} "
        f"({e['episodes']} {of})"
    )


def success(e: Mapping) -> str:
    """The success of an evaluation with its interval."""
    return f"success {e['success_rate']:.1%} [{e['success_low']:.1%}, {e['success_high']:.1%}]"


def when(update: int) -> str:
    """How far a policy is."""
    return f"after {count(update, 'update')}" if update else "before training"


def count(number: int, thing: str) -> str:
    """1 update, 2 updates"""
    return f"{number} {thing}" + "s" * (number != 1)


@contextmanager
def counting(phases: Phases, wanted: bool, stderr: bool = False) -> Iterator[None]:
    """Where it is wanted, and standard output, or error, is a terminal, a bar of the phase.

    What is printed to either meanwhile appears above it, if it goes to a terminal too, but for
    standard output above a bar in standard error, which may be a file's or a pipe's.
    """
    console = Console(stderr=stderr, **PLAIN)
    if not wanted or not console.is_terminal or console.is_dumb_terminal:
        yield
        return
    with Live(
        get_renderable=lambda: under_way(phases),
        console=console,
        refresh_per_second=2,
        transient=True,
        redirect_stdout=not stderr,
        redirect_stderr=sys.stderr.isatty(),  # else an error would miss its file
    ):
        yield


def bounds(m: Mapping) -> tuple[float, float]:
    """The 95 % interval of an update's success."""
    return interval(round(m["success_rate"] * m["episodes"]), m["episodes"])


def percent(share: float | None) -> str:
    """A share for people; a dash where it does not apply."""
    return "-" if share is None or share != share else f"{share:.1%}"


def remaining(c: TrainConfig, update: int, times: Sequence[float]) -> float | None:
    """Seconds until the last update, at the pace of the last ones; None while it is not known.

    `times` has the run's seconds at its last updates. Evaluations are not counted.
    """
    if not times:
        return None
    pace = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else times[0] / update
    left = pace * (c.updates - update)
    return max(0.0, min(left, 60 * c.minutes - times[-1]) if c.minutes else left)


def clock(seconds: float) -> str:
    """A duration as minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
