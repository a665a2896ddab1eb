"""What a run tells, and to whom: console, logs, episodes.jsonl, warnings.jsonl, evaluations;
interrupts.

Left out: what the metrics mean (`turbo.log`), how figures are measured (`turbo.measure`) and shown
(`turbo.console`), when to warn (`turbo.advice`).
"""

import contextlib
import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable

from turbo import checkpoint
from turbo.advice import Watch
from turbo.config import TrainConfig
from turbo.console import Display, count, evaluated, when
from turbo.log import JsonlLogger, read_jsonl
from turbo.measure import task_figures
from turbo.rollout import Abandoned
from turbo.run import Run, space
from turbo.sft_config import LEGAL
from turbo.sinks import open_sinks

EVAL_KEYS = (
    "success_rate",
    "success_low",
    "success_high",
    "episode_return",
    "reasoning_score",
)
SAVE_PAUSES = (1.0, 5.0)  # seconds between the attempts to save


class Scribe:
    """Console, logs and files of a run; silent on all workers but the first."""

    def __init__(self, run: Run):
        self.run, self.leads = run, run.crew.leads
        self.display = Display(run.config, str(run.path), run.phases, self.leads)
        ask, tell = run.crew.ask_to_stop, self.display.notify
        self.interrupt = Interrupt(ask, tell) if self.leads else None
        self.interrupted = 0  # the signal that ended the run
        self.unsaved = False  # whether the last attempt to save failed
        # Questions that an external teacher left unanswered, as far as told
        self.unanswered = run.asked["failed"]

    def __enter__(self) -> "Scribe":
        run, c = self.run, self.run.config
        if not self.leads:
            return self
        metrics = run.path / checkpoint.METRICS
        before = read_jsonl(metrics) if metrics.exists() else []
        self.watch = Watch(c, [r for r in before if "success_rate" in r])
        sinks = open_sinks(c, run.path, run.update, self.display.warn)
        self.logger = JsonlLogger(metrics, sinks, self.display.warn)
        self.display.open(run.update)
        at_once = "" if run.vlm.text.small else f", {run.vlm.batches.tokens:,} tokens at once"
        playing = len(run.table.envs) * run.crew.size
        if playing != c.envs:  # whole groups in every worker
            at_once += f", {playing} of {c.envs} environments"
        self.say(
            f"{c.env}: {count(c.updates, 'update')} on {count(run.crew.size, 'worker')}{at_once}, "
            f"into {run.path}"
        )
        for advice in self.watch.active.values():
            self.display.teach(advice)
        return self

    def __exit__(self, *exception: object) -> None:
        self.display.close()
        if self.leads:
            self.logger.close()

    def say(self, text: str) -> None:
        """Print a line."""
        self.display.say(text)

    def end(self, text: str) -> None:
        """Print a line below all else."""
        self.display.close()
        self.say(text)

    def write(self, metrics: dict) -> None:
        """Append a record to the log."""
        if self.leads:
            self.display.record(self.logger.write(metrics))
            if self.logger.problem:
                self.display.warn(f"{self.logger.path}: {self.logger.problem}")

    def must_stop(self) -> bool:
        """Whether the user or the time limit ends the run; the same answer on every worker."""
        limit = 60 * self.run.config.minutes
        late = 0 < limit <= self.run.elapsed
        asked = self.interrupt.asked if self.leads else 0
        asked, late = self.run.crew.total(asked, self.leads and late)
        self.interrupted = int(asked)
        return asked > 0 or late > 0

    def tell(self, metrics: dict, sample: list[dict]) -> None:
        """Show an update, warn where it gives cause to, keep the sample of its episodes."""
        if not self.leads:
            return
        run = self.run
        begun, ended = self.watch.note(metrics)
        self.display.tell(metrics, self.watch.active.values())
        for advice in begun:
            self.display.teach(advice)
        at = {"update": run.update}
        events = [at | {"on": True} | dataclasses.asdict(advice) for advice in begun]
        events += [at | {"on": False, "name": advice.name} for advice in ended]
        if events:
            self._append(checkpoint.WARNINGS, events)
        failed = int(metrics.get("teacher_failed", 0))
        if failed > self.unanswered:
            more, self.unanswered = failed - self.unanswered, failed
            self.display.warn(
                f"{more} questions to the teacher went unanswered: {run.corrector.problem}"
            )
        self._append(checkpoint.EPISODES, sample)

    def _append(self, name: str, records: list[dict]) -> None:
        """Add records to a file of the run; a failure is told, and stops nothing."""
        try:
            lines = "".join(json.dumps(record) + "\n" for record in records)
            checkpoint.append_text(self.run.path / name, lines)
        except OSError as error:
            self.display.warn(f"{name} misses records of update {self.run.update}: {error}")

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
        for who in ("policy", "teacher") if run.config.eval_episodes else ():
            if who == "teacher" and (run.teacher.weights is None or run.update == 0):
                continue
            e = run.evaluate(who == "teacher")
            told = f"fresh episodes at T {run.config.eval_temperature}"
            self.say(f"{who} {when(run.update)}: {evaluated(e, told)}")
            if not run.update and e["legal_rate"] < LEGAL:
                self.display.warn(lost_for_words(run.config, e["legal_rate"]))
            if who == "policy":
                run.note_evaluation(run.update, e["success_rate"])
            prefix = "eval_" if who == "policy" else "eval_teacher_"
            own = {k: e[k] for k in EVAL_KEYS} | task_figures(e["tasks"])
            record |= {prefix + name: value for name, value in own.items()}
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
                self.display.warn(
                    f"update {self.run.update} could not be saved: {error} "
                    f"({space(self.run)}); the checkpoint before it is still there"
                )
                if pause is not None:
                    time.sleep(pause)


def lost_for_words(c: TrainConfig, legal: float) -> str:
    """What to say of a model that hardly ever answers legally before it is trained."""
    start = f"python -m turbo.sft {c.env} --model {c.model} --out warm"
    return (
        f"only {legal:.0%} of the answers are legal before training: the model knows too little of "
        f"{c.env} or of its form of answers (a warm start: `{start}`), or --max-new-tokens "
        f"{c.max_new_tokens} is too short"
    )


class Interrupt:
    """Ctrl-C, SIGTERM, a closed terminal (SIGHUP): the first asks to stop and save, the second
    ends at once. But for SIGHUP: a shell passes its own on, so one closing sends two.

    Ending at once corrupts nothing: a checkpoint counts when it is whole, and not before.
    """

    def __init__(self, ask: Callable[[], None], tell: Callable[[str], None]):
        self.asked, self.ask, self.tell = 0, ask, tell
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            signal.signal(signal.SIGHUP, self._note)

    def _note(self, number: int, frame) -> None:
        if self.asked and number == signal.SIGHUP:
            return
        if self.asked:
            with contextlib.suppress(OSError):  # of a terminal that was closed
                os.write(2, b"\nstopped at once, without saving\n")
            os._exit(128 + number)
        self.asked = number
        self.ask()
        self.tell("stopping: saving what is done (once more to stop at once)")
