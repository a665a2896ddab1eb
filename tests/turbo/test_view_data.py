"""turbo/view_data.py: what a page is given of a run, also of an old one, or a damaged one."""

import json
import shutil

import pytest
import tiny_runs

from turbo.log import read_jsonl
from turbo.measure import interval
from turbo.view_data import ceilings, collapsed, episode, may_be_right, read_run, state_of


@pytest.fixture(scope="module")
def run():
    return tiny_runs.trained("viewed", "--workers", "1", "--updates", "3")


def changed(run, tmp_path, name, change):
    """A copy of a run in which the text of one file is another."""
    other = tmp_path / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("checkpoints"))
    file = other / name
    file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")
    return other


def test_curves(run):
    data, records = read_run(run, 100), read_jsonl(run / "metrics.jsonl")
    updates = [r for r in records if "success_rate" in r]
    assert data["curves"]["update"] == [1, 2, 3]
    for name in ("success_rate", "teacher_kl", "seconds_rollout", "self_bleu", "thought_entropy"):
        assert data["curves"][name] == [r[name] for r in updates]
    for i, r in enumerate(updates):
        low, high = data["curves"]["success_low"][i], data["curves"]["success_high"][i]
        assert (low, high) == interval(round(r["success_rate"] * r["episodes"]), r["episodes"])
    assert data["evaluations"]["update"] == [0, 3]
    at_end = [r for r in records if "eval_success_rate" in r][-1]
    for name in ("eval_success_rate", "eval_success_low", "eval_teacher_success_rate"):
        assert data["evaluations"][name][-1] == at_end[name]
    assert data["evaluations"]["eval_teacher_success_rate"][0] is None  # there was no teacher yet
    assert "explained_variance" not in data["curves"]  # no number in any update
    json.dumps(data, allow_nan=False)


def test_a_kl_that_was_not_measured_is_not_zero(run, tmp_path):
    def without_teacher(text):
        records = [json.loads(line) for line in text.splitlines()]
        for r in records:
            if "teacher_kl" in r:
                r |= {"teacher_kl": 0.0, "teacher_kl_coef": 0.0}
        return "".join(json.dumps(r) + "\n" for r in records)

    other = changed(run, tmp_path, "metrics.jsonl", without_teacher)
    assert "teacher_kl" in read_run(run, 1)["curves"]
    assert "teacher_kl" not in read_run(other, 1)["curves"]


def test_episodes(run):
    data, records = read_run(run, 100), read_jsonl(run / "episodes.jsonl")
    assert data["recorded"] == len(records) == len(data["episodes"])
    names = set()
    for shown, record in zip(data["episodes"], records, strict=True):
        assert (shown["update"], shown["number"]) == (record["update"], record["episode"])
        assert shown["success"] == record["success"] and shown["return"] == record["return"]
        assert shown["illegal"] == any(s["error"] is not None for s in record["steps"])
        assert shown["deal"] == " ".join(record["deal"])
        for s, told in zip(shown["steps"], record["steps"], strict=True):
            assert "answer" not in s  # its tokens say it
            assert s["tokens"] == told["tokens"] and s["kl"] == told["kl"]
            names.add(s["frame"])
    assert set(data["frames"]) == names
    assert data["name"] == run.name and data["env"] == "numberline"
    assert data["settings"]["updates"] == 3 and data["versions"]["torch"]


def test_few_of_the_episodes_with_their_pictures_alone(run):
    whole, few = read_run(run, 100), read_run(run, 4)
    assert few["recorded"] == whole["recorded"] and len(few["episodes"]) == 4
    assert {e["update"] for e in few["episodes"]} == {1, 2, 3}  # at even distances
    assert all(e in whole["episodes"] for e in few["episodes"])
    wanted = {s["frame"] for e in few["episodes"] for s in e["steps"]}
    assert set(few["frames"]) == wanted  # also those stored with an episode that is left out


def test_a_run_of_an_older_version(run, tmp_path):
    """Its episodes have neither tokens nor pictures, its settings lack what came later."""
    kept = ("update", "episode", "deal", "success", "return", "steps")
    steps = ("answer", "thought", "action", "error", "reward", "verdict")

    def older(text):
        records = [{k: r[k] for k in kept} for r in map(json.loads, text.splitlines())]
        for r in records:
            r["steps"] = [{k: s[k] for k in steps} for s in r["steps"]]
        return "".join(json.dumps(r) + "\n" for r in records)

    other = changed(run, tmp_path, "episodes.jsonl", older)
    record = json.loads((other / "config.json").read_text())
    del record["config"]["skip_certain"], record["versions"]
    (other / "config.json").write_text(json.dumps(record))
    data = read_run(other, 100)
    assert data["frames"] == {} and data["versions"] == {}
    assert [e["return"] for e in data["episodes"]] == [
        e["return"] for e in read_run(run, 100)["episodes"]
    ]
    step = data["episodes"][0]["steps"][0]
    assert "tokens" not in step and step["answer"] and step["thought"]
    assert data["ceilings"][0]["success"] == 1.0


def test_a_run_that_has_begun(run, tmp_path):
    path = tmp_path / "begun"
    path.mkdir()
    shutil.copy(run / "config.json", path)
    data = read_run(path, 100)
    assert data["episodes"] == [] and data["recorded"] == 0 and data["evaluations"] == {}
    assert "update" not in data["curves"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "episodes.jsonl"])
def test_a_line_that_is_being_written_is_left_out(run, tmp_path, name):
    before = state_of(run)
    other = changed(run, tmp_path, name, lambda text: text + text[:50])
    assert not (other / name).read_text().endswith("\n")
    whole, half = read_run(run, 100), read_run(other, 100)
    assert {**half, "name": ""} == {**whole, "name": ""}
    assert state_of(other) != before == state_of(run)  # yet it is news


@pytest.mark.parametrize("name", ["metrics.jsonl", "episodes.jsonl"])
@pytest.mark.parametrize("line", ["{", "[1]", "{}", '{"update": "x"}', '{"update": null}'])
def test_a_damaged_line_is_named(run, tmp_path, name, line):
    other = changed(run, tmp_path, name, lambda text: line + "\n" + text)
    with pytest.raises(ValueError, match=rf"{name}, line 1"):
        read_run(other, 100)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"steps": None, "frames": [], "deal": "x", "success": "yes", "return": "much"},
        {"steps": [None, 3, {}], "frames": {"a": 1}, "return": float("nan")},
        {"steps": [{"tokens": [], "verdict": "good", "thought": 3, "action": None}]},
        {"steps": [{"tokens": [3], "kl": [float("nan")], "verdict": {"aim": 1}, "frame": [1]}]},
        {"steps": [{"tokens": "x", "kl": 1, "thought_tokens": "y", "reward": float("inf")}]},
    ],
)
def test_odd_records_become_episodes_that_can_be_shown(run, tmp_path, record):
    line = json.dumps({"update": 1, **record}) + "\n"
    data = read_run(changed(run, tmp_path, "episodes.jsonl", lambda text: line), 100)
    (shown,) = data["episodes"]
    assert shown["update"] == 1 and "success" not in shown and shown["return"] is None
    assert all(isinstance(s, dict) for s in shown["steps"])
    json.dumps(data, allow_nan=False)


def said(thought, deal, right, **more):
    verdict = {"perception": True, "aim": right, "follows": True}
    step = {"thought": thought, "verdict": verdict, "frame": str(deal), "state": ""}
    return {"update": 1, "deal": [deal], "steps": [step], **more}


def test_collapsed_thoughts():
    records = [
        said("always the same", 1, False),
        said("always the same", 2, False),
        said("wrong once", 3, False),
        said("always right", 4, True),
        said("always right", 5, True),
        said("wrong once, and again of the same", 6, False),
        said("wrong once, and again of the same", 6, False),
        said("always the same", 7, False, solvable=False),
        said("right here", 8, True),
        said("right here", 9, False),
    ]
    marked = [i for i, mark in enumerate(collapsed(records)) if mark]
    assert marked == [0, 1, 9]  # and not where the deal cannot be won
    for record in records:  # an older run: the deal tells states apart
        del record["steps"][0]["frame"]
    assert [i for i, mark in enumerate(collapsed(records)) if mark] == marked


def test_what_the_solver_says():
    parts = ("perception", "aim", "follows")
    for values, want in (
        ((True, True, True), True),
        ((True, None, None), True),
        ((True, None, False), False),
        ((None, None, None), False),
    ):
        assert may_be_right({"verdict": dict(zip(parts, values, strict=True))}) == want
    assert not may_be_right({}) and not may_be_right({"verdict": None})


def test_an_illegal_answer_is_one_without_an_action():
    for action, want in (("+", False), (None, True)):
        assert episode({"update": 1, "steps": [{"action": action}]})["illegal"] == want


def test_ceilings():
    (only,) = ceilings({"env": "points24"})
    assert only["success"] == pytest.approx(20876 / 28561) and only["label"] == ""
    pool, every = ceilings({"env": "points24", "hands": 60, "seed": 0})
    assert every["success"] == only["success"] != pool["success"]
    assert (pool["label"], every["label"]) == ("of the pool", "of all hands")
    assert ceilings({"env": "blackjack"})[0]["return"] == pytest.approx(-0.04656, abs=1e-5)
    for settings in ({}, {"env": None}, {"env": "os:system"}, {"env": ["points24"]}):
        assert ceilings(settings) == []
