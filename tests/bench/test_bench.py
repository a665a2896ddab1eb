"""bench/: quantiles, the CSV file, which runs are complete, plots, and the page of metrics.

The metrics files below are fixtures: invented numbers in the form that `turbo.train` writes, in
tmp_path only.
"""

import csv
import json
import math
import sys

import numpy as np
import pytest

from bench import harness, learn, metrics_page, plot, records, train_step
from bench.harness import Spread, alternate, append_rows, measurement, renew_rows, slug, spread
from turbo import checkpoint
from turbo.measure import interval
from turbo.presets import defaults


def test_spread_is_median_and_quantiles():
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0, 1)
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0, 0.0]) == Spread(2.5, 1.0, 4.0, 6)
    with pytest.raises(ValueError, match="repeat at least once"):
        spread([])


def test_variants_take_turns_and_warm_up_is_dropped():
    calls = []
    variants = {name: lambda name=name: calls.append(name) or len(calls) for name in "AB"}
    kept = []
    measured = alternate(variants, 2, keep=lambda m: kept.append(sum(map(len, m.values()))))
    assert calls == list("ABABAB") and kept == [1, 2, 3, 4]
    assert [result for _, result in measured["B"]] == [4, 6]
    assert all(seconds >= 0 for seconds, _ in measured["A"])


def test_slug():
    assert slug("Intel(R) Xeon(R) CPU @ 2.10GHz") == "intel-xeon-cpu-2-10ghz"
    assert slug("  (R) ") == "unknown"


def test_rows_are_appended_under_one_header(tmp_path):
    path = tmp_path / "new" / "cpu.csv"
    row = harness.environment() | measurement("b", "v", "s", "m", "s", spread([1.0, 2.0, 3.0]))
    assert set(row) == set(harness.COLUMNS)
    append_rows(path, [row])
    append_rows(path, [row, row])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and rows[0] == rows[2]
    assert (rows[0]["median"], rows[0]["repeats"]) == ("2", "3")


def test_rows_are_renewed_or_left_as_they_are(tmp_path, monkeypatch):
    path = tmp_path / "cpu.csv"

    def row(variant: str, value: float) -> dict:
        what = measurement("b", variant, "a, b", "m", "s", spread([value]))
        return dict.fromkeys(harness.WHERE, "x") | what

    def medians() -> list[tuple[str, str]]:
        with path.open(newline="") as file:
            return [(r["variant"], r["median"]) for r in csv.DictReader(file)]

    renew_rows(path, [], [row("ours", 1.0)])
    append_rows(path, [row("another run", 7.0)])
    renew_rows(path, [row("ours", 1.0)], [row("ours", 2.0), row("theirs", 3.0)])
    expected = [("another run", "7"), ("ours", "2"), ("theirs", "3")]
    assert medians() == expected

    def fail(*paths) -> None:
        raise OSError("killed")

    monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(OSError, match="killed"):
        renew_rows(path, [row("ours", 2.0), row("theirs", 3.0)], [row("ours", 4.0)])
    assert medians() == expected


def test_a_file_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "cpu.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns a, b"):
        append_rows(path, [{"a": 1}], ["a", "c"])
    with pytest.raises(ValueError, match="not in fieldnames"):
        append_rows(path, [{"c": 1}], ["a", "b"])
    assert path.read_text() == "a,b\n1,2\n"


def test_the_variants_of_the_training_benchmark():
    configs = train_step.settings(train_step.BenchConfig(steps=64))
    assert [c.guidance for c in configs.values()] == ["none", "kl", "sft", "sft", "gtr"]
    assert {c.steps_per_update for c in configs.values()} == {64}
    figures = {name: 1.0 for name in train_step.REPORTED}
    summary = train_step.summaries({"none": [figures], "kl": [figures, figures]})
    assert train_step.table(summary, "title").row_count == len(train_step.REPORTED)


def test_the_page_of_metrics_says_what_the_program_says():
    assert metrics_page.PAGE.read_text(encoding="utf-8") == metrics_page.page(), (
        "docs/metrics.md is out of date: run `make metrics`"
    )


def fixture_run(folder, config, seed_shift=0.0, updates=None):
    """A run directory with invented numbers; `updates` cuts it short, without a last evaluation."""
    (folder / "checkpoints").mkdir(parents=True)
    known = {"commit": "0" * 40, "torch": "fixture", "python": "fixture"}
    checkpoint.write_json(
        folder / checkpoint.CONFIG, {"config": vars(config), "versions": known, "model_sha256": ""}
    )

    def evaluation(rate):
        values = (rate, rate - 0.04, rate + 0.04, 1.0, rate + 0.2)
        names = records.EVALUATION[:5]
        return dict(zip(names, values, strict=True))

    lines = [{"update": 0, "env_steps": 0, "elapsed": 0.0, **evaluation(0.2)}]
    for k in range(1, (updates or config.updates) + 1):
        rate = 0.15 + 0.3 * k / config.updates + 0.03 * math.sin(9 * k) + seed_shift
        place = {"update": k, "env_steps": 2100 * k, "elapsed": 9.5 * k}
        lines.append({**place, "success_rate": rate, "reasoning_score": rate + 0.2})
        lines[-1]["teacher_kl"] = None if k == 1 else 0.01
    if updates is None:
        lines.append({**place, **evaluation(0.5 + seed_shift)})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / checkpoint.METRICS).write_text(text)
    return folder


@pytest.mark.parametrize("what", learn.DEMONSTRATIONS)
def test_the_settings_of_every_demonstration_are_valid(what):
    variants = learn.DEMONSTRATIONS[what]
    for label, flags in variants:
        assert label in plot.LOOKS
        assert learn.settings(flags, 5).seed == 5
    assert len(dict(variants)) == len(variants)
    assert what in learn.TITLES


def test_a_run_is_complete_when_it_was_evaluated_at_its_end(tmp_path):
    c = defaults("points24", "tiny")
    c.updates = 100
    whole = fixture_run(tmp_path / "whole", c)
    assert records.is_complete(whole, c)
    assert not records.is_complete(tmp_path / "absent", c)
    assert not records.is_complete(fixture_run(tmp_path / "short", c, updates=7), c)
    # All updates are there, the evaluation is not: stopped in between.
    assert not records.is_complete(fixture_run(tmp_path / "late", c, updates=c.updates), c)
    c.updates += 1
    assert not records.is_complete(whole, c)
    c.minutes = 15  # reached: the fixture has 100 updates of 9.5 s
    assert records.is_complete(whole, c)
    c.minutes = 16
    assert not records.is_complete(whole, c)


def test_the_command_starts_resumes_or_starts_again(tmp_path):
    path, flags = tmp_path / "run", "points24 --updates 2"
    start = [sys.executable, *f"-m turbo.train {flags} --seed 3 --out {path}".split()]
    assert learn.command(path, flags, 3) == start
    path.mkdir()
    assert learn.command(path, flags, 3) == [*start, "--overwrite"]
    (path / "checkpoints" / "00000010").mkdir(parents=True)
    resume = [sys.executable, *f"-m turbo.train points24 --resume {path}".split()]
    assert learn.command(path, flags, 3) == resume


def test_other_settings_are_another_run(tmp_path):
    def folder(flags, model="m", **changes):
        c = learn.settings(flags, 0)
        vars(c).update(changes)
        return learn.run_folder(tmp_path, "points24", "GTR-Turbo", c, model)

    usual = folder("points24")
    assert usual.name.startswith("points24-gtr-turbo-seed0-")
    assert folder("points24", workers=2, out="x", keep=9) == usual
    assert folder("points24 --clip 0.1") != usual
    assert folder("points24", model="another") != usual


def test_training_is_skipped_where_it_is_complete(tmp_path, monkeypatch, capsys):
    """Seed 0 is complete and skipped, seed 1 is started and fails; --no-train draws the first."""
    monkeypatch.setattr(learn, "model_sha256", lambda c: "fixture")
    called = []
    monkeypatch.setattr(learn, "call", lambda arguments: called.append(arguments) or 9)
    ((label, flags),) = learn.DEMONSTRATIONS["ezpoints"]
    c = learn.settings(flags, 0)
    fixture_run(learn.run_folder(tmp_path / "runs", "ezpoints", label, c, "fixture"), c)
    arguments = f"--what ezpoints --seeds 0 1 --runs {tmp_path}/runs --out {tmp_path}/out".split()
    assert learn.main(arguments) == 9
    assert len(called) == 1 and called[0][-4:-1] == ["--seed", "1", "--out"]
    assert not (tmp_path / "out").exists()
    assert learn.main([*arguments, "--no-train"]) == 0
    assert len(called) == 1
    assert "left out" in capsys.readouterr().err
    names = ["ezpoints.csv", "ezpoints.md", "ezpoints.png", "settings.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names


def test_what_runs_recorded_is_gathered_and_drawn(tmp_path):
    from matplotlib.image import imread

    runs = []
    for number, (label, flags) in enumerate(learn.DEMONSTRATIONS["collapse"]):
        for seed in (0, 1):
            c = learn.settings(flags, seed)
            path = fixture_run(tmp_path / f"{number}-{seed}", c, 0.05 * seed - 0.1 * number)
            runs.append(records.recorded(path, label, c))
    records.write_csv(tmp_path / "all.csv", runs)
    with (tmp_path / "all.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == records.COLUMNS
    # One record an update, and one evaluation before and one after them.
    assert len(rows) == sum(len(run.records) for run in runs) == 4 * (c.updates + 2)
    assert rows[0]["success_rate"] == "" and rows[0]["eval_success_rate"] == "0.2"
    assert rows[-1]["label"] == runs[-1].label and rows[-1]["seed"] == "1"
    page = learn.summary("collapse", runs)
    assert page.count("\n| ") == 1 + 4 + 2  # header, runs, both seeds together
    pooled = 2 * c.eval_episodes  # of both seeds
    low, high = interval(round(0.2 * pooled), pooled)
    assert f"| plain PPO | all | 20.0% [{low:.1%}, {high:.1%}] | 52.5% [" in page
    plot.draw("title", runs, tmp_path / "all.png")
    assert imread(tmp_path / "all.png").shape[:2] == (450, 1200)


def test_smoothing_keeps_a_constant_and_passes_over_gaps():
    values = np.array([2.0, math.nan, 2.0, 2.0, 2.0])
    assert plot.smooth(values, 3).tolist() == [2.0] * 5
    assert math.isnan(plot.smooth(np.array([math.nan]), 1)[0])
