"""turbo/console.py: a live view in a pseudo-terminal, a line an update in a pipe, JSON, silence."""

import errno
import io
import json
import math
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import launch
import pytest
import tiny_models
from rich.console import Console

from turbo import train
from turbo.advice import Advice
from turbo.config import TrainConfig
from turbo.console import Display, clock, counting, phase_bar, remaining, summary
from turbo.log import read_jsonl
from turbo.phases import Phases

ROOT = Path(__file__).resolve().parents[2]
FLAGS = """
    --workers 1 --dtype float32 --envs 8 --group-size 4 --steps-per-update 16 --max-new-tokens 40
    --minibatch 16 --lora-rank 4 --updates 2 --eval-episodes 4 --teacher-sample 4
"""
SHORT = ["--updates", "1", "--eval-episodes", "0"]
METRICS = {
    "update": 3,
    "elapsed": 30.0,
    "episodes": 100,
    "success_rate": 0.42,
    "episode_return": 2.5,
    "reasoning_score": 0.6,
    "teacher_kl": 0.0123,
    "thought_entropy": 0.0456,
    "clip_fraction": 0.07,
    "steps_per_second": 123.4,
    "peak_memory_gb": 1.25,
    "seconds_rollout": 6.0,
    "seconds_score": 0.5,
    "seconds_write": 0.5,
    "seconds_train": 2.0,
    "seconds_merge": 0.5,
    "seconds_other": 0.5,
}
ADVICE = Advice("collapse suspected", "right thoughts fell", "guide them")


@pytest.fixture(autouse=True)
def made():
    """The model, before anything that is printed counts."""
    tiny_models.fitted_folder()


def command(out, *more):
    """The arguments of a short run of a nano model."""
    model = str(tiny_models.fitted_folder())
    return ["numberline", "--model", model, "--out", str(out), *FLAGS.split(), *more]


class Terminal:
    """A training process in a pseudo-terminal of 100 columns."""

    def __init__(self, out, *more):
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
        env |= {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
        self.written, self.process, (self.master, self.slave) = "", None, pty.openpty()
        self.settings = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            launch.in_terminal([sys.executable, "-m", "turbo.train", *command(out, *more)]),
            **dict.fromkeys(("stdin", "stdout", "stderr"), self.slave),
            env=env,
            start_new_session=True,
        )

    def read(self, until="", seconds=120.0):
        """What is written, up to a text or the end of the process."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            over = self.process.poll() is not None
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.written += os.read(self.master, 65536).decode(errors="replace")
                except OSError as error:
                    assert error.errno == errno.EIO
                    return
            elif over:
                return
            if until and re.search(until, self.written):
                return
        raise AssertionError(f"no {until!r} within {seconds} s: {self.written[-2000:]}")

    def interrupt(self):
        """Ctrl-C, as the terminal passes it on."""
        os.write(self.master, b"\x03")

    def end(self):
        """The status; the terminal is as it was."""
        self.read()
        assert termios.tcgetattr(self.slave) == self.settings
        assert self.written.rfind("\x1b[?25l") < self.written.rfind("\x1b[?25h")  # with its cursor
        assert "\x1b[?1049h" not in self.written  # what was on the screen is still there
        os.close(self.master)
        os.close(self.slave)
        return self.process.wait(30)


@pytest.mark.slow
def test_the_live_view_of_a_run(tmp_path):
    terminal = Terminal(tmp_path / "run", "--eval-episodes", "24")
    assert terminal.end() == 0
    *_, last = terminal.written.split("╭")  # the panel as it was left
    assert f"evaluate it with: python -m turbo.eval {tmp_path / 'run'}" in last
    for text in (
        "2/2",
        "0:00 left",
        "success ",
        "return ",
        "KL to teacher ",
        "entropy ",
        "memory ",
    ):
        assert text in last, text
    assert re.search(r"steps/s.*\d", last)
    assert re.search(r"rollout \d+%.*score \d+%.*train \d+%.*merge \d+%.*other \d+%", last)
    assert "policy before training: success" in terminal.written
    assert "evaluate policy" in terminal.written  # while it went on
    assert "Traceback" not in terminal.written


@pytest.mark.slow
def test_ctrl_c_closes_the_live_view(tmp_path):
    run = tmp_path / "run"
    terminal = Terminal(run, "--steps-per-update", "20000", "--eval-episodes", "0")
    terminal.read("rollout")
    terminal.interrupt()
    assert terminal.end() == 130
    _, rest = terminal.written.rsplit("╯", 1)
    assert f"continue with: python -m turbo.train numberline --resume {run}" in rest
    assert "stopping: saving what is done" in terminal.written
    assert "Traceback" not in terminal.written
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["00000000"]


@pytest.mark.long
def test_a_terminal_that_closes_ends_a_run_that_is_saved(tmp_path):
    run = tmp_path / "run"
    more = ("--steps-per-update", "20000", "--eval-episodes", "0", "--workers", "2")
    terminal = Terminal(run, *more)
    try:
        terminal.read("rollout")
        os.close(terminal.slave)
        os.close(terminal.master)
        assert terminal.process.wait(60) == 129
    finally:
        terminal.process.kill()
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["00000000"]


def test_lines_in_a_pipe(tmp_path, capsys):
    assert train.main(command(tmp_path / "run")) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and "\x1b" not in out
    assert lines[0] == f"numberline: 2 updates on 1 worker, into {tmp_path / 'run'}"
    assert lines[1].startswith("policy before training: success ")
    assert lines[2].startswith("1/2 success ") and re.search(r" \d+:\d\d left$", lines[2])
    assert lines[3].startswith("2/2 success ") and lines[3].endswith(" 0:00 left")
    assert [line.split()[0] for line in lines[4:]] == ["policy", "teacher", "evaluate"]


def test_json_prints_the_records_and_nothing_else(tmp_path, capsys):
    assert train.main(command(tmp_path / "run", "--json", *SHORT)) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == read_jsonl(
        tmp_path / "run" / "metrics.jsonl"
    )
    assert err == ""
    assert train.main(["--resume", str(tmp_path / "run")]) == 0  # nothing is left to do
    assert capsys.readouterr().out == ""


def say_all(display):
    """Everything that a run may print."""
    for _ in range(3):
        display.say("news")
        display.warn("a problem")
        display.teach(ADVICE)
        display.tell(METRICS, [ADVICE])
        display.record(METRICS)


def closed_pipe():
    """A stream that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


def full_disk():
    """A stream that takes nothing."""
    return open("/dev/full", "w")


@pytest.mark.parametrize("json", [False, True])
@pytest.mark.parametrize(
    ("stream", "told"),
    [
        (closed_pipe, "nobody reads standard output any more; metrics.jsonl goes on"),
        (
            full_disk,
            "standard output cannot be written: [Errno 28] No space left on device; "
            "metrics.jsonl goes on",
        ),
    ],
)
def test_output_that_fails_is_told_once_and_ends_no_run(json, stream, told, monkeypatch, capsys):
    with stream() as nowhere:
        monkeypatch.setattr(sys, "stdout", nowhere)
        say_all(Display(TrainConfig(json=json), "run", Phases()))
    lines = capsys.readouterr().err.splitlines()
    assert lines.count(told) == 1
    if not json:  # with it, warnings are on standard error
        assert lines == [told]


def test_nobody_to_be_told_of_it_ends_no_run_either(monkeypatch):
    with closed_pipe() as out, closed_pipe() as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        display = Display(TrainConfig(), "run", Phases())
        display.notify("stopping")
        say_all(display)
    monkeypatch.setattr(sys, "stdout", None)  # closed from the start
    monkeypatch.setattr(sys, "stderr", None)
    display = Display(TrainConfig(), "run", Phases())
    say_all(display)
    display.notify("stopping")


def test_quiet_prints_errors_only(tmp_path, capsys):
    assert train.main(command(tmp_path / "run", "--quiet", *SHORT)) == 0
    assert capsys.readouterr() == ("", "")
    display = Display(TrainConfig(quiet=True), "run", Phases())
    display.say("news")
    display.teach(ADVICE)
    display.tell(METRICS, [ADVICE])
    assert capsys.readouterr() == ("", "")
    display.warn("the disk is full")
    assert capsys.readouterr() == ("", "the disk is full\n")


def test_where_a_warning_goes(capsys):
    for c, place in ((TrainConfig(), 0), (TrainConfig(json=True), 1)):
        Display(c, "run", Phases()).teach(ADVICE)
        told = capsys.readouterr()
        assert told[place] == f"warning: {ADVICE}\n" and told[1 - place] == ""
    assert "collapse suspected: right thoughts fell; try this: guide them" in str(ADVICE)


def test_the_other_workers_are_silent(capsys):
    display = Display(TrainConfig(json=True), "run", Phases(), leads=False)
    display.warn("a problem")
    display.record(METRICS)
    display.teach(ADVICE)
    assert capsys.readouterr() == ("", "")


def shown(width, metrics=METRICS):
    """The live view as text."""
    display = Display(TrainConfig(updates=12), "runs/[first]", Phases())
    display.tell(metrics, [ADVICE])
    display.notice = "stopping"
    display.live = object()
    display.phases.begin("rollout")
    display.phases.expect(200)
    display.phases.done = 50
    display.console = Console(width=width, record=True, file=io.StringIO())
    display.console.print(display.render())
    return display.console.export_text()


def test_the_view():
    text = shown(120)
    for part in (
        "points24  runs/[first]",
        "3/12  1:30 left",
        "rollout ",
        " 25%",
        "success 42.0% [33%-52%]",
        "thoughts right 60.0%",
        "return 2.50",
        "steps/s 123",
        "KL to teacher 0.0123",
        "entropy 0.0456",
        "memory 1.2 GB",
        "rollout 60%  score 5%  write 5%  train 20%  merge 5%  other 5%",
        "warning: collapse suspected: right thoughts fell",
        "stopping",
    ):
        assert part in text, (part, text)
    for width in (20, 40, 60, 300):  # a narrow window breaks lines, and nothing else
        lines = shown(width).splitlines()
        assert max(map(len, lines)) <= width and "suspected" in "".join(lines)


def test_the_view_of_what_does_not_apply():
    odd = {**METRICS, "reasoning_score": math.nan, "clip_fraction": None, "teacher_kl": None}
    text = shown(120, odd)
    assert "thoughts right -" in text and "clipped -" in text and "KL to teacher 0.0000" in text
    assert "thoughts right - " in summary(odd)


def test_the_phase_bar_is_filled():
    for width in (7, 30, 96):
        bar, legend = phase_bar(METRICS, width)
        assert len(bar.plain) == width
        assert bar.spans[0].style == "on blue" and "rollout 60%" in legend.plain
    bar, _ = phase_bar({}, 30)
    assert bar.plain == ""


def test_what_is_left():
    c = TrainConfig(updates=10)
    assert remaining(c, 0, []) is None
    assert remaining(c, 2, [10.0]) == 40.0  # of a resumed run: its mean pace
    assert remaining(c, 4, [10.0, 20.0, 40.0]) == 90.0
    assert remaining(c, 10, [10.0, 20.0]) == 0.0
    limited = TrainConfig(updates=10, minutes=1.0)
    assert remaining(limited, 4, [10.0, 20.0, 40.0]) == 20.0
    assert remaining(limited, 4, [10.0, 20.0, 70.0]) == 0.0
    assert [clock(s) for s in (0, 59.6, 61, 3599, 3661)] == [
        "0:00",
        "1:00",
        "1:01",
        "59:59",
        "1:01:01",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_counts_the_phase_under_way(monkeypatch, terminal):
    out = io.StringIO()
    out.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    phases = Phases()
    phases.begin("read-out")
    phases.expect(8)
    with counting(phases, True):
        phases.done = 2
        print("a line above it")
    said = out.getvalue()
    assert "a line above it\n" in said.replace("\r", "")
    assert ("read-out" in said and "%" in said) == terminal
