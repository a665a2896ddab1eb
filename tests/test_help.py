"""`--help` of every command and benchmark: what each flag does, its unit, its default."""

import contextlib
import importlib
import io
import re
from pathlib import Path

import pytest

from turbo.__main__ import commands
from turbo.envs.make import ENVIRONMENTS

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = [
    path.stem
    for path in sorted((ROOT / "bench").glob("*.py"))
    if path.stem != "harness" and "read_settings(" in path.read_text(encoding="utf-8")
]
MODULES = [f"turbo.{name}" for name in commands()] + [f"bench.{name}" for name in BENCHMARKS]

# What a number may count, or what it may be where it counts nothing.
COUNTED = """
    checkpoints columns cores deals dollars entries environments episodes examples files GB
    minibatches minutes multisets nats passes processes repeats requests runs samples seconds
    seed solutions states steps tokens turns updates vectors words
"""
PLAIN = """
    alpha clip density discount epsilon lambda norm number port rank rate ratio reward share size
    sizes temperature weight
"""
UNIT = re.compile(rf"\b({'|'.join((COUNTED + PLAIN).split())})\b")


def entries(text: str) -> list[str]:
    """The flags of a help text of tyro's, each with what is said about it, in one line."""
    found: list[str] = []
    for line in text.splitlines():
        row = re.match(r"│ (.*?) *│$", line)
        if row is None:
            before = len(found)  # a frame begins or ends
        elif re.fullmatch("─+", row[1]):
            del found[before:]  # it was about a group of flags
        elif row[1].startswith(" "):
            found[-1] += " " + row[1].strip()
        else:
            found.append(row[1])
    return [" ".join(entry.split()) for entry in found]


def problem(entry: str) -> str:
    """What is missing in an entry of a help text; nothing where all is there."""
    if entry.startswith("-h, --help "):
        return ""
    said = re.fullmatch(
        r"(?P<name>-\S+(, --no-\S+)?|\S+)"
        r"(?P<kind> (\{.*?\}(\|\S+)*( \S+\})?|\[.*\]\]|[A-Z_/]+(?= )))?"
        r"(?P<text> .*?)?"
        r" \((?P<default>default: .*|required)\)",
        entry,
    )
    if said is None:
        return "no default"
    if len((said["text"] or "").split()) < 2:
        return "no text"
    if re.search(r"\b(INT|FLOAT)\b", said["kind"] or "") and not UNIT.search(said["text"]):
        return "no unit"
    return ""


def help_of(name: str) -> str:
    """What `--help` prints; tyro draws frames where the output is in UTF-8."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(["--help"])
    assert not ended.value.code
    out.flush()
    return out.buffer.getvalue().decode("utf-8")


@pytest.mark.parametrize("name", MODULES)
def test_every_flag_is_explained(name):
    text = help_of(name)
    assert text.startswith(f"usage: {name} [-h]")
    listed = entries(text)
    assert len(listed) > 1  # one is --help
    wrong = [f"{problem(entry)}: {entry}" for entry in listed if problem(entry)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["turbo.train", "turbo.sft"])
def test_every_environment_is_listed(name):
    entry = next(entry for entry in entries(help_of(name)) if entry.startswith("[ENV]"))
    assert [e for e in ENVIRONMENTS if not re.search(rf"\b{e}\b", entry)] == []


@pytest.mark.parametrize("name", MODULES)
def test_a_slip_names_the_nearest_flag(name, capsys):
    """The first flag of every command with a letter too few."""
    flags = [e.split()[0].strip(",") for e in entries(help_of(name)) if e.startswith("--")]
    flag = flags[0] if flags else "--help"
    slip = flag[:-2] + flag[-1]
    try:
        status = importlib.import_module(name).main([slip, "1"])
    except SystemExit as ended:
        status = ended.code
    out, err = capsys.readouterr()
    assert status == 2 and out == ""
    assert err.count("\n") == 1
    hint = f": did you mean {flag}?" if flags else " (see"
    assert err.startswith(f"error: flag {slip} is unknown{hint}")


@pytest.mark.parametrize(
    ("entry", "wrong"),
    [
        ("--gpu FLOAT memory of the card in GB (default: 24.0)", ""),
        ("--gpu FLOAT (default: 24.0)", "no text"),
        ("--gpu FLOAT memory of the card in GB", "no default"),
        ("--gpu FLOAT what the card has (default: 24.0)", "no unit"),
        ("--seed {None}|INT what begins (default: None)", "no unit"),
        ("--seed {None}|INT seed of the deals (default: None)", ""),
        ("--json, --no-json one line (default: False)", ""),
        ("--json, --no-json (default: False)", "no text"),
        ("--env {points24,ezpoints} which game (default: points24)", ""),
        ("--env {points24,ezpoints} (default: points24)", "no text"),
        ("RUN run directory (required)", ""),
        ("RUN (required)", "no text"),
        ("[{points24,ezpoints}] which game (default: points24)", ""),
        ("--seeds [INT [INT ...]] of each (default: 0 1 2)", "no unit"),
    ],
)
def test_what_is_missing_is_seen(entry, wrong):
    assert problem(entry) == wrong
