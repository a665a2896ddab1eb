"""What a run tells: console, progress bar, metrics.jsonl, episodes.jsonl, evaluations; interrupts.

Left out: what the metrics mean (`turbo.log`), how figures are measured (`turbo.measure`).
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from turbo import checkpoint
from turbo.log import JsonlLogger, TensorboardSink
from turbo.measure import interval
from turbo.rollout import Abandoned
from turbo.run import Run, space

EVAL_KEYS = (
    "success_rate",
    "success_low",
    "success_high",
    "episode_return",
    "reasoning_score",
)
SAVE_PAUSES = (1.0, 5.0)  # seconds between the attempts to save


class Scribe:
    """Console, progress bar and log files; silent on all workers but the first."""

    def __init__(self, run: Run):
        self.run, self.leads = run, run.crew.leads
        plain = dict(highlight=False, markup=False, soft_wrap=True)  # a path may hold [brackets]
        self.console = Console(quiet=not self.leads, **plain)
        self.interrupt = Interrupt(run.crew.ask_to_stop) if self.leads else None
        self.interrupted = 0  # the signal that ended the run
        self.unsaved = False  # whether the last attempt to save failed
        self.unanswered = 0  # questions that an external teacher left, as far as told

    def __enter__(self) -> "Scribe":
        run, c = self.run, self.run.config
        if self.leads:
            sinks = [TensorboardSink(run.path / "tensorboard")] if c.tensorboard else []
            self.logger = JsonlLogger(run.path / checkpoint.METRICS, sinks)
        columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(
            *columns,
            TextColumn("{task.fields[text]}"),
            console=self.console,
            disable=not (self.leads and self.console.is_terminal),
        )
        self.task = self.bar.add_task("", total=c.updates, completed=run.update, text="")
        self.bar.start()
        self.say(f"{c.env}: {c.updates} updates on {run.crew.size} workers, into {run.path}")
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()
        if self.leads:
            self.logger.close()

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text)

    def write(self, metrics: dict) -> None:
        """Append a record to the log."""
        if self.leads:
            self.logger.write(metrics)
            if self.logger.problem:
                self.say(f"{self.logger.path}: {self.logger.problem}")

    def must_stop(self) -> bool:
        """Whether the user or the time limit ends the run; the same answer on every worker."""
        limit = 60 * self.run.config.minutes
        late = 0 < limit <= self.run.elapsed
        asked = self.interrupt.asked if self.leads else 0
        asked, late = self.run.crew.total(asked, self.leads and late)
        self.interrupted = int(asked)
        return asked > 0 or late > 0

    def tell(self, metrics: dict, sample: list[dict]) -> None:
        """Show an update, and append the sample of its episodes to episodes.jsonl."""
        if not self.leads:
            return
        run = self.run
        self.bar.update(self.task, completed=run.update, text=summary(metrics))
        if not self.console.is_terminal:
            self.say(f"{run.update}/{run.config.updates} {summary(metrics)}")
        failed = int(metrics.get("teacher_failed", 0))
        if failed > self.unanswered:
            more, self.unanswered = failed - self.unanswered, failed
            self.say(f"{more} questions to the teacher went unanswered: {run.corrector.problem}")
        lines = "".join(json.dumps(record) + "\n" for record in sample)
        try:
            checkpoint.append_text(run.path / checkpoint.EPISODES, lines)
        except OSError as error:
            self.say(f"the sample of episodes could not be written: {error}")

    def report(self, metrics: dict | None = None) -> None:
        """Evaluate policy and teacher, print it, and log it with the `metrics` of the update.

        When it is abandoned the metrics are logged alone.
        """
        run = self.run
        place = {"update": run.update, "env_steps": run.env_steps, "elapsed": run.elapsed}
        record = dict(metrics or place)
        try:
            record |= self._evaluations()
        except Abandoned:
            if metrics:
                self.write(metrics)
            raise
        self.write(record)

    def _evaluations(self) -> dict:
        run, record = self.run, {}
        when = f"after {run.update} updates" if run.update else "before training"
        for who in ("policy", "teacher") if run.config.eval_episodes else ():
            if who == "teacher" and (run.teacher.weights is None or run.update == 0):
                continue
            e = run.evaluate(who == "teacher")
            self.say(
                f"{who} {when}: success {e['success_rate']:.1%} "
                f"[{e['success_low']:.1%}, {e['success_high']:.1%}], "
                f"return {e['episode_return']:.2f}, legal {e['legal_rate']:.1%}, "
                f"thoughts right {e['reasoning_score']:.1%} "
                f"({e['episodes']} fresh episodes at T {run.config.eval_temperature})"
            )
            prefix = "eval_" if who == "policy" else "eval_teacher_"
            record |= {prefix + k: e[k] for k in EVAL_KEYS}
        return record

    def save(self) -> None:
        """Save the run. A failure is told and tried again; it stops nothing."""
        for pause in (*SAVE_PAUSES, None):
            try:
                self.run.save()
                self.unsaved = False
                return
            except OSError as error:
                self.unsaved = True
                self.say(
                    f"update {self.run.update} could not be saved: {error} "
                    f"({space(self.run)}); the checkpoint before it is still there"
                )
                if pause is not None:
                    time.sleep(pause)


class Interrupt:
    """Ctrl-C and SIGTERM: the first asks to stop and save, the second ends at once.

    Ending at once corrupts nothing: a checkpoint counts when it is whole, and not before.
    """

    def __init__(self, ask: Callable[[], None] = lambda: None):
        self.asked, self.ask = 0, ask
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        if self.asked:
            print("\nstopped at once, without saving", file=sys.stderr, flush=True)
            os._exit(128 + number)
        self.asked = number
        self.ask()
        print("\nstopping: saving what is done (once more to stop at once)", file=sys.stderr)


def summary(m: dict) -> str:
    """The figures that matter, in one line."""
    wins = round(m["success_rate"] * m["episodes"])
    low, high = interval(wins, m["episodes"])
    return (
        f"success {m['success_rate']:.1%} [{low:.0%}-{high:.0%}] return {m['episode_return']:.2f} "
        f"thoughts right {m['reasoning_score']:.1%} KL {m.get('teacher_kl', 0.0):.4f} "
        f"{m['steps_per_second']:.0f} steps/s"
    )
