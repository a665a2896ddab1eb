"""turbo/flags.py: mistakes in one line with the nearest flag; exit statuses of real processes."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from turbo.flags import conclude, flags, read_flags

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Inner:
    """Flags of a part."""

    lora_rank: int = 8
    """rank of the factors"""


@dataclass
class Outer:
    """Flags of a command."""

    inner: tyro.conf.OmitArgPrefixes[Inner]
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """what is read"""
    kind: Literal["one", "two"] = "one"
    """which"""
    learning_rate: float = 0.1
    """a rate"""
    is_fast: bool = False
    """a switch"""
    seed: int | None = None
    """a seed"""


def test_flags_of_a_dataclass():
    assert flags(Outer) == [
        "--lora-rank",
        "--kind",
        "--learning-rate",
        "--is-fast",
        "--no-is-fast",
        "--seed",
    ]


def test_what_is_right_is_read():
    argv = ["here", "--lora-rank", "3", "--learning_rate=-1e-3", "--is-fast", "--seed", "-5"]
    assert read_flags(Outer, argv, "cmd") == Outer(Inner(3), "here", "one", -1e-3, True, -5)
    again = read_flags(Outer, ["--seed", "7"], "cmd", default=Outer(Inner(), "there", "two"))
    assert (again.source, again.kind, again.seed) == ("there", "two", 7)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("here --lerning-rate 3", "flag --lerning-rate is unknown: did you mean --learning-rate?"),
        ("here --learning-rat=3", "flag --learning-rat is unknown: did you mean --learning-rate?"),
        ("here --lora_rnk 3", "flag --lora-rnk is unknown: did you mean --lora-rank?"),
        ("here --no-is-fst", "flag --no-is-fst is unknown: did you mean --no-is-fast?"),
        ("here --lr 3", "flag --lr is unknown: did you mean --learning-rate?"),
        ("here --load-in-4bit", "flag --load-in-4bit is unknown (see"),  # this one has no such
        ("--source here", "--source is no flag: what it names comes first, by itself"),
        ("here --xyzzy", "flag --xyzzy is unknown (see"),
        ("here -x", "flag -x is unknown"),
        ("--sed 3", "flag --sed is unknown: did you mean --seed?"),  # RUN is missing too
        ("", "Missing from cmd: RUN what is read (required)"),
        ("here there", "too many words: there"),
        ("here --lora-rank 3 4", "too many words: 4"),
        ("here --kind three", "'three'"),
        ("here --kind", "--kind"),
        ("here --learning-rate fast", "--learning-rate: could not convert string to float: 'fast'"),
        ("here --lora-rank 1.5", "'1.5'"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # tyro draws other frames
def test_a_mistake_is_told_in_one_line(argv, message, encoding, monkeypatch):
    with open(os.devnull, "w", encoding=encoding) as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(ValueError) as told:
            read_flags(Outer, argv.split(), "cmd")
    text = str(told.value)
    assert message in text and text.endswith(" (see cmd --help)")
    assert "\n" not in text and not set(text) & set("│╭╮╰╯─\x1b") and "---" not in text


@dataclass
class RunSettings:
    """Where and what."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RUN]")] = "newest"
    """what is read"""
    seed: int = 0
    """a seed"""


@dataclass
class RateSettings:
    """How fast."""

    learning_rate: float = 0.1
    """a rate"""


@dataclass
class Sections(RateSettings, RunSettings):
    """Flags of a command with many."""


def test_dataclasses_that_one_is_made_of_are_sections_of_its_help(capsys):
    assert flags(Sections) == ["--seed", "--learning-rate"]
    assert read_flags(Sections, [], "cmd") == Sections()
    default = Sections("first", seed=3)
    read = read_flags(Sections, ["--learning-rate", "2"], "cmd", default=default)
    assert read == Sections("first", 3, 2.0) and type(read) is Sections
    assert read_flags(Sections, ["other", "--seed", "1"], "cmd", default) == Sections("other", 1)
    with pytest.raises(ValueError, match="did you mean --seed"):
        read_flags(Sections, ["--sed", "1"], "cmd")
    with pytest.raises(SystemExit):
        read_flags(Sections, ["--help"], "cmd", default)
    _, out = capsys.readouterr().out.split("Flags of a command with many.")
    said = ["(default: first)", "run options", "Where and what.", "--seed"]
    said += ["(default: 3)", "rate options", "How fast.", "--learning-rate"]
    places = [out.index(words) for words in said]
    assert places == sorted(places)


def test_help_ends_the_program(capsys):
    with pytest.raises(SystemExit) as ended:
        read_flags(Outer, ["--help"], "cmd")
    assert ended.value.code == 0
    assert "rank of the factors (default: 8)" in capsys.readouterr().out


PROGRAM = """
import sys, time
from turbo.flags import conclude

def main():
    if sys.argv[1] == "sleep":
        try:
            print("ready", flush=True)  # a signal may come right behind it
            time.sleep(60)
        finally:
            print("cleaned up", flush=True)
    if sys.argv[1] == "memory":
        import torch
        raise torch.OutOfMemoryError("not even one row fits\\nand more words")
    print("ready", flush=True)
    if sys.argv[1] == "print":
        for _ in range(100_000):
            print("line", flush=True)
    return int(sys.argv[1])

sys.exit(conclude(main))
"""


def process(argument, **options):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, argument],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_status_is_what_the_command_returns(status):
    assert process(str(status)).wait(60) == status


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_tidily(number, status):
    running = process("sleep")
    assert running.stdout.readline() == "ready\n"
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert running.returncode == status
    assert out == "cleaned up\n" and "Traceback" not in err
    assert err.strip() == ("interrupted" if status == 130 else "")


def test_memory_that_ran_out_is_told_in_one_line():
    own = process("memory")
    _, err = own.communicate(timeout=60)
    assert (own.returncode, err) == (1, "error: memory ran out: not even one row fits\n")


def test_nobody_reads_any_more():
    running = process("print")
    running.stdout.readline()
    running.stdout.close()
    assert running.wait(60) == 128 + signal.SIGPIPE
    assert running.stderr.read() == ""
    running.stderr.close()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_that_cannot_be_written_is_told_in_one_line(unbuffered):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, "0"],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "No space left on device" in done.stderr


def test_standard_output_that_is_closed():
    command = '"$0" -c "$1" 0 >&-'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, PROGRAM], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_of_a_file_keeps_its_traceback():
    with pytest.raises(FileNotFoundError):
        conclude(lambda: Path("no-such-file").stat().st_size)
