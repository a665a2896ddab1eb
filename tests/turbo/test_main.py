"""turbo/__main__.py: the list of commands, fast and complete; commands run by name."""

import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import turbo
from turbo.__main__ import commands, main

ROOT = Path(__file__).resolve().parents[2]


def test_every_module_that_can_be_run_is_listed(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == listed
    found = commands()
    for path in (ROOT / "turbo").glob("[!_]*.py"):
        runs = path.read_text(encoding="utf-8").endswith("    sys.exit(conclude(main))\n")
        assert (path.stem in found) == runs, f"{path.name} does not end as commands do"
    for name, what in found.items():
        assert f"\n  {name} " in listed and what in listed
        assert len(what) > 15 and "\n" not in what and "`" not in what
    assert all(len(line) <= 100 for line in listed.splitlines())
    assert {"eval", "export", "memory", "play", "replay", "sft", "train"} <= set(found)


def test_help_and_errors_wait_for_no_model_library():
    """transformers takes longer to import than everything else: only a model is worth it."""
    code = (
        "import sys, turbo.train, turbo.eval, turbo.sft, turbo.export\n"
        "late = {'transformers', 'tokenizers', 'peft', 'matplotlib', 'torch._dynamo'}\n"
        "assert not late & set(sys.modules), late & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_list_is_fast():
    """Less than a second of processor time: torch alone takes more."""
    code = (
        "import sys, time\nfrom turbo.__main__ import main\nmain([])\n"
        "assert not {'torch', 'numpy', 'tyro'} & set(sys.modules), sys.modules\n"
        "print(time.process_time())"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 1 and time.monotonic() - began < 10


def test_the_version(capsys):
    for flag in ("--version", "-V"):
        assert main([flag]) == 0
        assert capsys.readouterr().out == f"gtr-turbo {turbo.__version__}\n"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("tran", ": did you mean train?"), ("--versoin", ": did you mean --version?"), ("zzz", " (")],
)
def test_what_is_no_command(name, hint, capsys):
    assert main([name]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"{name!r} is no command{hint}" in err


def test_a_command_is_run_by_name(capsys):
    flags = ["memory", "--model", "qwen2.5-vl-7b", "--gpu"]
    assert main([*flags, "80"]) == 0 and "it fits" in capsys.readouterr().out
    assert main([*flags, "24"]) == 1  # what the command returns
    assert main([*flags, "x"]) == 2
    assert "--gpu" in capsys.readouterr().err


def test_ctrl_c_while_it_begins(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("turbo.__main__.commands", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_the_installed_command_is_this_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"gtr-turbo": "turbo.__main__:main"}
