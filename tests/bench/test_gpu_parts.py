"""bench/gpu.py: parts in their time, whatever becomes of them; rows of another machine."""

import importlib
import shlex

import pytest

from bench import gpu, harness, report
from bench.harness import append_rows, read_settings


def test_parts_that_fail_or_hang_stop_no_other(tmp_path, monkeypatch, capsys):
    told = "import os; print(os.environ['BENCH_RESULTS'], os.environ['BENCH_COMMIT'])"
    hangs = "import subprocess; print('hangs'); subprocess.run(['sleep', '99'])"
    commands = [told, "raise SystemExit(3)", hangs, "print(7)"]
    parts = [gpu.Part(f"-c {shlex.quote(c)}", 4.0) for c in commands]
    monkeypatch.setattr(gpu, "PARTS", {"kernels": parts, "model": parts[-1:]})
    out = tmp_path / "out"
    flags = f"--what kernels model --out {out} --commit abc"
    assert gpu.main(flags.split()) == 1
    printed = capsys.readouterr().out
    assert f"{out} abc\nstatus 0 after" in printed
    assert "status 3 after" in printed and "hangs\nstatus -9 after" in printed
    assert printed.count("7\nstatus 0 after") == 2
    assert "2 parts failed, were stopped or had no time" in printed
    assert (out / "gpu.log").read_text() == printed


def test_what_has_no_time_is_not_begun(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "PARTS", {"kernels": [gpu.Part("-c 'print(7)'", 9.0)]})
    assert gpu.main(f"--minutes 0.1 --out {tmp_path}".split()) == 1
    assert "no time for: -c 'print(7)'" in capsys.readouterr().out


def test_updates_of_a_7b_have_the_time_that_they_need():
    """30 s for a start and twice 50 s were estimated: half as much again, and what decides fits."""
    large = [p.seconds for p in gpu.PARTS["model"] if "train_step" in p.command]
    assert min(large) >= 1.5 * (30 + 2 * 50)
    assert sum(large[:2]) <= 60 * gpu.Config.minutes


@pytest.mark.parametrize("part", [p for parts in gpu.PARTS.values() for p in parts], ids=str)
def test_every_part_is_a_command_of_its_module(part):
    _, module, *flags = shlex.split(part.command)
    if module != "pytest":
        bench = importlib.import_module(module)
        read_settings(vars(bench).get("BenchConfig") or bench.Config, flags, module)


def test_rows_of_another_machine_are_added(tmp_path, monkeypatch, capsys):
    results, there = tmp_path / "results", tmp_path / "there" / "gpu.csv"
    monkeypatch.setattr(report, "RESULTS", results)
    once = harness.spread([0.5])
    row = dict.fromkeys(harness.WHERE, "x") | harness.measurement("ema", "ours", "", "m", "s", once)
    append_rows(there, [row])
    for lines in (2, 3):
        report.add(there)
        assert len((results / "gpu.csv").read_text().splitlines()) == lines
    there.write_text("a,b\n1,2\n")
    assert report.main(["--add", str(there)]) == 2
    assert "has not the columns date, commit" in capsys.readouterr().err
    assert report.main(["--add", str(tmp_path / "none.csv")]) == 2
