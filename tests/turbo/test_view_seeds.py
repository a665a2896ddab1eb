"""turbo/view_seeds.py: seeds of one setting as one run, checked against numpy."""

import json
import math

import numpy as np
import pytest

from turbo.measure import T975
from turbo.view_seeds import by_seed, means, merged


def new_run(folder, **settings):
    folder.mkdir()
    record = {"config": {"env": "points24", "seed": 0, "updates": 9, **settings}}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def test_runs_that_differ_in_their_seed_alone_are_together(tmp_path):
    first = new_run(tmp_path / "a", seed=0)
    other = new_run(tmp_path / "b", seed=0, guidance="none")
    again = new_run(tmp_path / "c", seed=1, workers=2, out="elsewhere", max_faults=5)
    longer = new_run(tmp_path / "e", seed=2, updates=20)  # another course of the learning rate
    assert by_seed([first, other, again, longer]) == [[first, again], [other], [longer]]
    twice = new_run(tmp_path / "d", seed=1)
    with pytest.raises(ValueError, match=r"--mean: .*/c and .*/d have one seed, 1: give one"):
        by_seed([first, again, twice])


def test_means_and_intervals_of_the_updates_that_all_have():
    rng = np.random.default_rng(0)
    values = rng.uniform(0.2, 0.8, (4, 5))
    tables = [
        {
            "update": list(range(1, 6 + seed)),  # longer and longer
            "success_rate": [*row, *([0.5] * seed)],
            "success_low": [0.0] * (5 + seed),
            "success_high": [1.0] * (5 + seed),
            "episode_return": [*(10 * v for v in row), *([0.5] * seed)],
        }
        for seed, row in enumerate(values.tolist())
    ]
    found = means(tables)
    assert found["update"] == [1, 2, 3, 4, 5]
    half = T975[2] * values.std(0, ddof=1) / math.sqrt(4)
    assert np.allclose(found["success_rate"], values.mean(0))
    assert np.allclose(found["success_low"], np.maximum(values.mean(0) - half, 0))
    assert np.allclose(found["success_high"], np.minimum(values.mean(0) + half, 1))
    assert np.allclose(found["episode_return_low"], 10 * (values.mean(0) - half))  # may be negative
    assert np.allclose(found["episode_return_high"], 10 * (values.mean(0) + half))
    assert set(found) == {
        "update", "success_rate", "success_low", "success_high",
        "episode_return", "episode_return_low", "episode_return_high",
    }  # fmt: skip


def test_what_one_of_them_lacks_has_no_mean():
    one = {
        "update": [0, 5],
        "eval_success_rate": [0.5, 0.6],
        "eval_teacher_success_rate": [None, 0.6],
    }
    two = {"update": [5], "eval_success_rate": [0.8], "eval_teacher_success_rate": [0.7]}
    found = means([one, two])
    assert found["update"] == [5] and found["eval_success_rate"] == [pytest.approx(0.7)]
    assert found["eval_success_low"] == [None] == found["eval_success_high"]  # of two seeds none
    assert found["eval_teacher_success_rate"] == [pytest.approx(0.65)]
    assert means([one, {"update": [0], "eval_success_rate": [0.7]}]).keys() == {
        "update", "eval_success_rate", "eval_success_low", "eval_success_high"
    }  # fmt: skip
    gap = means([one, {**one, "eval_teacher_success_rate": [0.1, 0.2]}])
    assert gap["eval_teacher_success_rate"] == [None, pytest.approx(0.4)]
    assert means([{}, {}]) == {"update": []}  # a run that has begun


def test_the_merged_run():
    def run(seed, updates=1):
        table = {"update": [*range(updates)], "success_rate": [0.5] * updates}
        settings = {"seed": seed, "env": "points24"}
        return {
            "name": f"run{seed}", "settings": settings, "curves": table,
            "evaluations": {}, "episodes": [seed],
            "ceilings": [{"label": "of the pool", "success": seed}, {"label": "of all hands"}],
        }  # fmt: skip

    one = run(0)
    assert merged([one]) is one
    both = merged([one, run(7)])
    assert both["name"] == "run0 and 1 more" and both["settings"]["seed"] == [0, 7]
    assert both["seeds"] == 2 and both["episodes"] == [0]
    assert both["ceilings"] == [{"label": "of all hands"}]  # a pool is of its seed
    assert one["settings"]["seed"] == 0 and both["shortest"] is None
    assert merged([run(3, 9), run(4, 5), run(5, 9)])["shortest"] == 4
