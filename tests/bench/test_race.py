"""bench/race.py and bench/report.py: memory counted, failures left out, tables from rows."""

import csv

import pytest
import torch

from bench import ema, harness, policy_head, race, report, ties


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A results folder of the test's own."""
    path = tmp_path / "cpu.csv"
    monkeypatch.setattr(race, "results_file", lambda name="": path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return path


def test_peak_memory_is_what_exists_at_once():
    def call():
        a = torch.ones(1 << 18)  # 1 MiB
        b = a + 1
        del a
        return b * 2

    assert race.peak_bytes(call, "cpu") == pytest.approx(2 << 20, rel=0.02)
    assert race.peak_bytes(lambda: None, "cpu") < 1024


def test_a_variant_that_fails_is_named_and_left_out(results, capsys):
    def missing():
        raise ModuleNotFoundError("No module named 'rival'")

    calls = []
    variants = {"ours": lambda: calls.append("a"), "rival": missing, "b": lambda: calls.append("b")}
    timed = race.race("ties", "2x2", variants, repeats=2, floor=1e-9)
    assert list(timed) == ["ours", "b"] and timed["ours"].seconds.repeats == 2
    assert calls == ["a", "a", "b", "b"] + ["a", "b"] * 2  # warm-up and memory, then two turns
    out = capsys.readouterr().out
    assert "rival is left out: No module named 'rival'" in out
    rows = list(csv.DictReader(results.open(newline="")))
    assert [row["metric"] for row in rows] == ["seconds", "peak_bytes", "floor_share"] * 2
    assert set(rows[0]) == set(harness.COLUMNS)


def test_the_report_shows_the_latest_rows_and_fills_the_page(
    results, tmp_path, monkeypatch, capsys
):
    for _ in range(2):
        race.race("ema", "small", {"ours": lambda: None, "b": lambda: None}, repeats=1)
    race.race("train_step", "not a kernel", {"ours": lambda: None}, repeats=1)
    page = tmp_path / "README.md"
    page.write_text("text\n## Measured\nold\n")
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.main(["--write"]) == 0
    text = page.read_text()
    assert text.startswith("text\n## Measured\n") and "old" not in text
    assert text.count("| ema | small | ours |") == 1 and "not a kernel" not in text
    page.write_text("no mark")
    assert report.main(["--write"]) == 2
    assert "has no line" in capsys.readouterr().err
    assert report.main([]) == 0 and "| ema |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bench", "arguments"),
    [
        (ties, "--size 96 --rank 4 --checkpoints 3"),
        (policy_head, "--rows 8 --widths 16 --vocabulary 500"),
        (ema, ""),
    ],
    ids=["ties", "policy_head", "ema"],
)
def test_each_benchmark_runs_and_agrees_with_its_rivals(bench, arguments, results, monkeypatch):
    monkeypatch.setattr(ema, "LISTS", {"few": [(3, 4), (5,)]})
    monkeypatch.setattr(race, "product_rate", lambda dtype, device: 1e9)
    for module in (ties, policy_head):
        monkeypatch.setattr(module, "product_rate", lambda dtype, device: 1e9)
    monkeypatch.setattr(ema, "copy_rate", lambda device: 1e9)
    assert bench.main([*arguments.split(), "--repeats", "1"]) == 0
    rows = list(csv.DictReader(results.open(newline="")))
    assert {"seconds", "peak_bytes"} <= {row["metric"] for row in rows}
    assert any(row["variant"].startswith("ours") for row in rows)
    assert any(not row["variant"].startswith("ours") for row in rows)


def test_an_unknown_dtype_is_refused(capsys):
    assert policy_head.main(["--dtype", "int8"]) == 2
    assert "--dtype must be float32 or bfloat16, got 'int8'" in capsys.readouterr().err
