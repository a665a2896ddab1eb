"""bench/study*.py, bench/claims.py: the grid is resumed, data come back, verdicts are right."""

import json
import math
import socket
import tomllib
from pathlib import Path

import httpx
import numpy as np
import pytest
import tiny_models

from bench import endpoint, passes, study
from bench.claims import (
    CLAIMS,
    SUCCESS,
    TEACHER,
    Comparison,
    Finding,
    compare,
    compare_passes,
    finding,
    rising,
    steadier,
    value_of,
)
from bench.study_page import band, draw_curves, percent, write_page
from bench.study_runs import StudyRun, read_runs, read_table, write_runs
from turbo.envs.make import make, tiny_kwargs
from turbo.measure import T975, fresh_deals

ROOT = Path(__file__).resolve().parents[2]
TABLE = """
common = "--workers 1 --envs 8 --no-eval-start --eval-episodes 6 --dtype float32 --save-every 1"
[regimes.short]
title = "Short"
about = "Two updates."
flags = "numberline --model MODEL --updates 2 --steps-per-update 16 --group-size 4"
[regimes.long]
title = "Long"
about = "More updates than there is time."
flags = "numberline --model MODEL --updates 400 --steps-per-update 16 --group-size 4"
[methods]
kl = ""
none = "--guidance none"
[[groups]]
regime = "short"
methods = ["kl", "none"]
seeds = 2
[[groups]]
regime = "long"
methods = ["none"]
seeds = 1
"""


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A small table in the place of the committed one."""
    path = tmp_path / "study.toml"
    path.write_text(TABLE.replace("MODEL", str(tiny_models.fitted_folder())))
    monkeypatch.setattr("bench.study.read_table", lambda: read_table(path))
    monkeypatch.setattr("bench.study_page.read_table", lambda: read_table(path))
    return read_table(path)


def test_the_committed_table_can_be_planned():
    table = read_table()
    planned = study.plan(table)
    assert len({p.name for p in planned}) == len(planned) >= 60
    assert {p.regime for p in planned} == set(table["regimes"])
    assert {p.method for p in planned} == set(table["methods"])
    for p in planned:
        assert p.config.workers == 1 and p.config.seed == p.seed
        assert p.config.eval_episodes >= 500
    by_regime = {}
    for p in planned:  # methods of a regime get the same budget
        c = p.config
        budget = (c.env, c.updates, c.steps_per_update, c.eval_episodes, c.minutes)
        assert by_regime.setdefault(p.regime, budget) == budget


def test_every_committed_run_is_one_of_the_table():
    """A changed default would drop them from the page when it is next written."""
    planned = {p.name: p for p in study.plan(read_table())}
    for name, run in read_runs(ROOT / "docs" / "study").items():
        assert planned[name].differs(run.settings) == [], name


def test_claims_compare_what_the_table_runs():
    planned = {(p.regime, p.method): 0 for p in study.plan(read_table())}
    for p in study.plan(read_table()):
        planned[p.regime, p.method] += 1
    for claim in CLAIMS:
        least = 5 if claim.letter in "abc" else 3
        for c in claim.comparisons:
            for method in (c.better, c.worse, *c.order):
                assert planned.get((c.regime, method), 0) >= least, (claim.letter, c.regime, method)


def test_settings_that_are_newer_than_a_run_stand_at_their_defaults(table):
    p = study.plan(table)[0]
    assert not p.differs(p.settings)
    older = {k: v for k, v in p.settings.items() if k != "teacher_sample"}
    assert not p.differs(older)  # 64 is the default
    now = p.settings["kl_coef"]
    assert p.differs({**p.settings, "kl_coef": "0.123"}) == [f"kl_coef 0.123, now {now}"]
    assert p.differs({**p.settings, "model": "another"})
    no_envs = {k: v for k, v in p.settings.items() if k != "envs"}
    assert p.differs(no_envs)  # 8 is not


def run_of(method, seed, success, regime="r"):
    update = {"update": 1, "env_steps": 10.0, "elapsed": 2.0, "success_rate": success}
    after = {"update": 2, "env_steps": 20.0, "elapsed": 4.0, "eval_success_rate": success}
    return StudyRun(regime, method, seed, "abc", {"seed": seed}, [update, after])


def test_verdicts():
    runs = [run_of("one", s, 0.5 + 0.01 * s) for s in range(4)]
    runs += [run_of("two", s, 0.4 + 0.012 * s) for s in range(5)]
    found = compare(runs, Comparison("r", "one", "two"))
    differences = [0.1 - 0.002 * s for s in range(4)]
    assert found.seeds == 4 and found.mean == pytest.approx(np.mean(differences))
    half = T975[2] * np.std(differences, ddof=1) / 2
    assert found.low == pytest.approx(found.mean - half)
    assert found.verdict == "holds"
    assert compare(runs, Comparison("r", "two", "one")).verdict == "contradicted"
    noisy = [run_of("three", s, 0.3 + 0.4 * (s % 2)) for s in range(4)]
    assert compare(runs + noisy, Comparison("r", "one", "three")).verdict == "not separated"
    assert compare(runs, Comparison("r", "one", "absent")).verdict == "not run yet"
    single = [run_of("four", 0, 0.1)]
    assert compare(runs + single, Comparison("r", "one", "four")).verdict.startswith("one seed")
    assert math.isnan(finding([]).mean)


def test_steadiness_is_the_mean_change_between_evaluations():
    run = run_of("one", 0, 0.5)
    rates = [(0.4, 0.4), (0.5, 0.45), (0.3, 0.5), (0.6, 0.5)]
    run.records = [{SUCCESS: p, TEACHER: t} for p, t in rates]
    assert value_of(run, f"change {SUCCESS}") == pytest.approx((0.1 + 0.2 + 0.3) / 3)
    found = compare([run], steadier("r", "one"))
    assert found.mean == pytest.approx(0.2 - 0.1 / 3)
    run.records = run.records[:2]  # before and after alone say nothing
    assert value_of(run, f"change {SUCCESS}") is None


def test_students_t():
    """Of samples with a known mean, 95 % of the intervals hold it."""
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 10):
        held = [f.low <= 1.0 <= f.high for f in map(finding, rng.normal(1.0, 3.0, (4000, n)))]
        assert np.mean(held) == pytest.approx(0.95, abs=0.012)


def test_methods_that_rise_in_an_order():
    values = {"one": (0.1, 0.2), "two": (0.5, 0.2), "three": (0.4, 0.2), "four": (0.4, 0.4)}
    runs = [run_of(name, s, v) for name, of in values.items() for s, v in enumerate(of)]
    found = compare([*runs, run_of("one", 7, 0.9)], rising("r", *values))
    slopes = [np.polyfit(range(4), [of[s] for of in values.values()], 1)[0] for s in (0, 1)]
    assert found.seeds == 2 and found.mean == pytest.approx(np.mean(slopes))
    assert compare(runs, rising("r", *reversed(values))).mean == pytest.approx(-found.mean)
    assert compare(runs, rising("r", "one", "absent", "two")).verdict == "not run yet"


def test_bands_are_over_seeds():
    runs = [run_of("one", s, 0.4 + 0.1 * s) for s in range(3)]
    for run in runs:
        run.records.insert(1, {"env_steps": 15.0, "success_rate": run.curve[0]["success_rate"]})
    x, mean, half = band(runs, "success_rate")
    assert x[0] == 0.01 and x[-1] == 0.015 and np.allclose(mean, 0.5)
    assert np.allclose(half, T975[1] * 0.1 / math.sqrt(3))


def main(tmp_path, *options):
    places = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    return study.main([*places, *options])


@pytest.mark.long
def test_the_grid_is_trained_in_pieces(tmp_path, table, capsys):
    """Some runs are trained, one is cut by the time limit; then the data alone are enough."""
    assert main(tmp_path, "--only", "short", "--jobs", "2") == 0
    assert "4 of 5 runs are complete" in capsys.readouterr().out
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| kl | 2 |" in page and (tmp_path / "out" / "short.png").stat().st_size > 1e4
    assert main(tmp_path, "--minutes", "0.8") == 0
    assert "long/none/0: saved, to be resumed" in capsys.readouterr().out
    (long,) = (tmp_path / "runs").glob("long-none-seed0-????????")
    updates = len((long / "metrics.jsonl").read_text().splitlines())
    assert 1 <= updates < 400
    data = (tmp_path / "out" / "runs.csv").read_bytes()
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert main(tmp_path, "--no-train") == 0
    assert (tmp_path / "out" / "runs.csv").read_bytes() == data
    capsys.readouterr()
    assert main(tmp_path, "--list") == 0
    out = capsys.readouterr().out
    assert out.count("complete short/") == 4 and "4 of 5 complete" in out


def test_what_is_not_in_the_table_is_refused(tmp_path, table, capsys):
    assert main(tmp_path, "--only", "short/kl,shorter") == 2
    assert "'shorter' is not in the table: long, long/none, short" in capsys.readouterr().err
    assert main(tmp_path, "--no-train") == 1
    assert "no run is complete" in capsys.readouterr().err


def test_data_that_the_table_no_longer_asks_for_are_not_dropped(tmp_path, table, capsys):
    p = study.plan(table)[0]
    run = run_of(p.method, p.seed, 0.5, p.regime)
    run.settings = {**p.settings, "kl_coef": "0.123"}
    fine = study.plan(table)[1]
    good = run_of(fine.method, fine.seed, 0.5, fine.regime)
    good.settings = fine.settings
    write_runs(tmp_path / "out", [run, good])
    before = (tmp_path / "out" / "runs.csv").read_bytes()
    assert main(tmp_path, "--no-train") == 1
    told = f"error: 1 runs of {tmp_path / 'out'} are not of the table any more, such as {p.name} "
    assert told + "(kl_coef 0.123, now" in capsys.readouterr().err
    assert (tmp_path / "out" / "runs.csv").read_bytes() == before


def test_no_difference_is_not_told_as_less_than_none():
    assert percent(Finding(3, -1e-9, -0.02, 0.0004)) == "0.0 [-2.0, 0.0]"
    assert percent(Finding(1, 0.123, math.nan, math.nan)) == "12.3"


def test_data_come_back(tmp_path):
    runs = [run_of("one", 0, 0.25), run_of("two", 1, 1 / 3)]
    runs[0].records[0]["entropy"] = 1.0  # not a metric: not kept
    write_runs(tmp_path, runs)
    found = read_runs(tmp_path)
    assert list(found) == ["r/one/0", "r/two/1"]
    assert found["r/two/1"].after["eval_success_rate"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["r/one/0"].settings == {"seed": 0} and len(found["r/one/0"].curve) == 1
    assert "entropy" not in found["r/one/0"].records[0]
    assert read_runs(tmp_path / "absent") == {}


def test_the_headline_is_drawn_once_its_methods_are_there(tmp_path, table, monkeypatch):
    monkeypatch.setattr("bench.study_page.HEADLINE", "short")
    runs = [run_of(method, s, 0.3, "short") for method in ("none", "kl") for s in range(2)]
    for run in runs:
        run.curve[0]["reasoning_score"] = 0.5
    write_page(tmp_path, runs, 9)
    assert not (tmp_path / "headline.png").exists()
    runs += [run_of("sft", s, 0.3 + 0.6 * s, "short") for s in range(2)]  # a band beyond 0 and 1
    write_page(tmp_path, runs, 9)
    assert (tmp_path / "headline.png").stat().st_size > 1e4


def test_bands_of_shares_end_where_shares_do():
    from matplotlib import pyplot as plt

    runs = [run_of("one", s, 0.05 + 0.45 * s) for s in range(3)]
    figure, axis = plt.subplots()
    draw_curves(axis, "success_rate", "success", {"two seeds": runs[:2], "three": runs})
    assert len(axis.lines) == 2 and len(axis.collections) == 1
    y = axis.collections[0].get_paths()[0].vertices[:, 1]
    plt.close(figure)
    assert y.min() == 0.0 and y.max() == 1.0


def test_the_page_says_what_has_not_been_run(tmp_path, table):
    write_page(tmp_path, [run_of("kl", s, 0.5, "short") for s in range(3)], 9)
    page = (tmp_path / "README.md").read_text()
    assert "3 of the 9" in page and page.count("not run yet") > 20
    for claim in CLAIMS:
        assert claim.statement in page


def test_passes_are_compared_hand_by_hand(tmp_path, table):
    warm, trained = [0, 0, 0, 5, 1, 32, 0], [4, 3, 8, 0, 8, 1, 0]
    possible = [True] * 6 + [False]  # what nobody can win is left out
    got = compare_passes(warm, trained, 8, possible)
    assert got["hands that can be won"] == 6 and got["never won by 32 samples"] == 3
    assert got["of these won at least every second time"] == 2  # 4 and 8 of 8, not 3
    assert got["warm start, pass@32"] == 0.5 and got["trained, pass@1"] == 24 / 48
    assert got["won by some of 32 samples"] == 3 and got["of these never won any more"] == 1
    known = {"solvable": possible, "warm start": warm, "short/kl/0": trained}
    (tmp_path / "passes.json").write_text(json.dumps(known))
    write_page(tmp_path, [run_of("kl", 0, 0.5, "short")], 1)
    row = "| short/kl/0 | 6 | 50.0% | 50.0% | 3 | 2 | 3 | 1 |"
    assert row in (tmp_path / "README.md").read_text()


def test_hands_that_can_be_won_are_those_that_are_played():
    possible = passes.solvable()
    assert len(possible) == passes.HANDS and 0.6 < sum(possible) / len(possible) < 0.85
    env = make("points24", **tiny_kwargs("points24"))
    for deal, can in list(zip(fresh_deals(passes.HANDS, passes.SEED), possible, strict=True))[:20]:
        env.reset(**deal)
        assert (env.expert_answer(np.random.default_rng(0)) is not None) == can


def test_the_corrector_is_there_for_the_runs_that_ask_it():
    planned = [p for p in study.plan(read_table()) if p.config.guidance == "gtr"]
    assert planned and all(p.config.teacher_url == endpoint.URL for p in planned)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    with endpoint.corrector(port=port):
        assert httpx.post(url, json={}, timeout=20).status_code == 400  # it says what it misses
        with pytest.raises(RuntimeError, match="in use"), endpoint.corrector(port=port):
            pass
    with endpoint.corrector(False, port), pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_claims_are_toml(tmp_path):
    with pytest.raises(tomllib.TOMLDecodeError):
        (tmp_path / "bad.toml").write_text("[regimes")
        read_table(tmp_path / "bad.toml")
