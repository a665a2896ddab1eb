"""turbo/eval.py from the command line: figures, their names, and refusals in one line."""

import json
import shutil

import pytest
import tiny_models
from safetensors.torch import load_file, save_file

from turbo import checkpoint, eval
from turbo.config import TrainConfig
from turbo.eval import JSON_KEYS
from turbo.hub import model_sha256
from turbo.measure import interval, paired_interval
from turbo.parallel import Crew
from turbo.run import Run

FAST = "--env numberline --episodes 6 --workers 1 --dtype float32 --max-new-tokens 40"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of which nothing was trained but the factors given: one with a teacher, one without."""
    out = {}
    for guidance in ("kl", "none"):
        path = tmp_path_factory.mktemp("eval") / guidance
        config = tiny_models.new_config(model=str(tiny_models.fitted_folder()), guidance=guidance)
        checkpoint.create_run(path, config, model_sha256(config))
        run = Run(config, path, Crew())
        run.lora.load_state_dict(tiny_models.noisy_lora(run.vlm, 1, 0.01).state_dict())
        if guidance == "kl":
            run.teacher.push(0, tiny_models.noisy_lora(run.vlm, 2, 0.3), 0.5)  # answers nonsense
        run.update = 1
        run.save()
        out[guidance] = path
    return out


def figures(capsys, *argv):
    capsys.readouterr()
    assert eval.main([str(a) for a in argv]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "NaN" not in out
    return json.loads(out)


def test_json_keys(runs, capsys):
    got = figures(capsys, runs["kl"], *FAST.split(), "--json", "--seed", "3")
    assert list(got) == JSON_KEYS
    assert (got["episodes"], got["seed"], got["temperature"], got["split"]) == (6, 3, 0.2, "all")
    assert got["legal_rate"] > 0.2
    wins = round(6 * got["success_rate"])
    assert (got["success_low"], got["success_high"]) == interval(wins, 6)
    assert got == figures(capsys, runs["kl"], *FAST.split(), "--json", "--seed", "3")


def test_the_names_that_scripts_read_do_not_change():
    assert JSON_KEYS == [
        "success_rate",
        "success_low",
        "success_high",
        "success_solvable",
        "episode_return",
        "legal_rate",
        "card_rate",
        "reasoning_score",
        "episodes",
        "samples",
        "pass_at_k",
        "seed",
        "temperature",
        "split",
        "source",
        "env",
        "who",
        "update",
    ]


def test_the_line_says_what_was_evaluated(runs, capsys):
    wanted = {"source": str(runs["kl"]), "env": "numberline", "who": "teacher", "update": 1}
    got = figures(capsys, runs["kl"], *FAST.split(), "--json", "--teacher")
    assert {key: got[key] for key in wanted} == wanted
    model = tiny_models.random_folder()
    wanted |= {"source": str(model), "who": "policy", "update": None}
    got = figures(capsys, model, *FAST.split(), "--json")
    assert {key: got[key] for key in wanted} == wanted


def test_samples_of_each_deal(runs, capsys):
    got = figures(capsys, runs["kl"], *FAST.split(), "--json", "--samples", "3")
    assert list(got) == [*JSON_KEYS, "solved"]
    assert (got["episodes"], got["samples"]) == (18, 3)
    assert len(got["solved"]) == 6 and all(0 <= n <= 3 for n in got["solved"])
    assert got["pass_at_k"] == sum(n > 0 for n in got["solved"]) / 6


def test_policy_teacher_and_model_are_told_apart(runs, capsys):
    policy = figures(capsys, runs["none"], *FAST.split(), "--json")
    alike = figures(capsys, runs["kl"], *FAST.split(), "--json")  # the same factors
    assert alike | {"source": policy["source"]} == policy
    teacher = figures(capsys, runs["kl"], *FAST.split(), "--json", "--teacher")
    assert teacher["legal_rate"] < policy["legal_rate"]
    model = figures(capsys, tiny_models.fitted_folder(), *FAST.split(), "--json")
    assert set(model) == set(policy)
    nonsense = figures(capsys, tiny_models.random_folder(), *FAST.split(), "--json")
    assert nonsense["legal_rate"] == 0 and nonsense["success_rate"] == 0
    assert nonsense["episode_return"] == -10


def test_what_does_not_apply_is_null(capsys, monkeypatch):
    """JSON has no NaN: a figure of nothing is null."""
    own = eval.evaluate
    monkeypatch.setattr(
        eval, "evaluate", lambda *a, **k: {**own(*a, **k), "card_rate": float("nan")}
    )
    assert (
        figures(capsys, tiny_models.random_folder(), *FAST.split(), "--json")["card_rate"] is None
    )


def test_the_table(runs, capsys):
    got = figures(capsys, runs["kl"], *FAST.split(), "--teacher", "--json")
    assert eval.main([str(runs["kl"]), *FAST.split(), "--teacher"]) == 0
    first, second, *more = capsys.readouterr().out.splitlines()
    assert first.endswith(" update) on numberline, all deals, seed 0")
    assert "(merged teacher after " in first
    low, high = got["success_low"], got["success_high"]
    assert second.startswith(f"success {got['success_rate']:.1%} [{low:.1%}, {high:.1%}], return ")
    assert f"({got['episodes']} episodes at T 0.2)" in second
    assert not any("samples" in line or "nan" in line for line in more)
    assert eval.main([str(runs["kl"]), *FAST.split(), "--samples", "2"]) == 0
    assert "of the deals are won by one of 2 samples" in capsys.readouterr().out


def test_two_on_the_same_deals(runs, capsys):
    """As each does alone, with the difference of paired deals."""
    flags = [*FAST.split(), "--samples", "2"]
    one = figures(capsys, runs["kl"], *flags, "--teacher", "--json")
    two = figures(capsys, runs["none"], *flags, "--json")
    both = figures(capsys, runs["kl"], *flags, "--teacher", "--json", "--against", runs["none"])
    assert both["against"] == two and {k: both[k] for k in one} == one
    assert both["difference"] == pytest.approx(one["success_rate"] - two["success_rate"])
    rates = [[n / 2 for n in side["solved"]] for side in (one, two)]
    wanted = paired_interval(*rates)
    assert (both["difference"], both["difference_low"], both["difference_high"]) == wanted
    assert eval.main([str(runs["kl"]), *flags, "--teacher", "--against", str(runs["none"])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "(merged teacher after 1 update)" in lines[0] and "on the same 6 deals" in lines[-1]
    assert [line for line in lines if str(runs["none"]) in line and "(policy after" in line]
    more = sum(a > b for a, b in zip(*rates, strict=True))
    less = sum(a < b for a, b in zip(*rates, strict=True))
    assert f"; {more} are won more often by the first, {less} by the second" in lines[-1]


def test_both_play_by_the_rules_of_the_first():
    """Of ALFWorld, whose games and tasks a run has of its own, and of truncation."""
    run = TrainConfig("alfworld", games="", tasks="", early_truncation=False, max_new_tokens=7)
    other = TrainConfig("alfworld", games="/data/X", tasks="look_at_obj_in_light")
    both = eval.same_deals(other, run)
    assert (both.games, both.tasks, both.early_truncation) == ("", "", False)
    assert both.max_new_tokens == other.max_new_tokens and eval.same_deals(run, run) == run


def test_opponents_that_cannot_be_are_refused(runs, tmp_path, capsys):
    words = "error: --against: 'nowhere' is neither a folder nor `tiny`"
    assert refused(capsys, runs["kl"], *FAST.split(), "--against", "nowhere").startswith(words)
    other = tmp_path / "other"
    config = tiny_models.new_config(model="tiny", env="ezpoints")
    checkpoint.create_run(other, config, model_sha256(config))
    told = refused(capsys, runs["kl"], *FAST.split(), "--against", other)
    assert told == f"error: --against: {other} has no checkpoint yet: train it first"
    Run(config, other, Crew()).save()
    flags = FAST.replace("--env numberline ", "").split()
    told = refused(capsys, runs["kl"], *flags, "--against", other)
    assert told.endswith(f"{other} ezpoints: give two that play the same")
    told = refused(capsys, "tiny", "--split", "pool", "--against", "tiny")
    assert told == "error: --split pool is of one run: leave it out, or --against"


def refused(capsys, *argv):
    capsys.readouterr()
    assert eval.main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line and "Loading weights" not in line]
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--temperature 0", "--temperature must be more than 0, got 0.0"),
        ("--temperature -1", "--temperature must be more than 0, got -1.0"),
        ("--temperature nan", "--temperature must be more than 0, got nan"),
        ("--episodes 0", "--episodes must be more than 0, got 0"),
        ("--episodes -5", "--episodes must be more than 0, got -5"),
        ("--max-new-tokens -1", "--max-new-tokens must be zero or more, got -1"),
        ("--seed -1", "--seed must be zero or more, got -1"),
        ("--split unseen", "--split unseen is for points24 and alfworld"),
        ("--env ezpoints", "was trained on numberline: name that, not ezpoints"),
    ],
)
def test_bad_numbers_are_refused(runs, capsys, options, message):
    assert message in refused(capsys, runs["kl"], *FAST.split(), *options.split())


def test_a_run_is_played_in_its_own_environment(runs, capsys):
    fast = FAST.removeprefix("--env numberline").split()
    got = figures(capsys, runs["kl"], *fast, "--json")
    assert got == figures(capsys, runs["kl"], *FAST.split(), "--json")
    assert eval.main([str(runs["kl"]), *fast]) == 0
    assert "(policy after 1 update) on numberline, all deals" in capsys.readouterr().out
    assert "not points24" in refused(capsys, runs["kl"], *fast, "--env", "points24")
    assert "environment 'chess' is unknown" in refused(capsys, "tiny", "--env", "chess")


def test_a_model_is_played_on_points24_unless_told():
    for source, env, wanted in (("tiny", "", "points24"), ("tiny", "ezpoints", "ezpoints")):
        assert eval.check(eval.EvalConfig(source, env=env)).env == wanted


def test_bad_sources_are_refused(runs, tmp_path, capsys):
    assert "is neither a folder nor `tiny`" in refused(capsys, tmp_path / "absent", *FAST.split())
    assert "model.safetensors is missing" in refused(capsys, tmp_path, *FAST.split())
    model = tiny_models.fitted_folder()
    assert "--teacher needs a run directory" in refused(capsys, model, *FAST.split(), "--teacher")
    assert "--guidance none" in refused(capsys, runs["none"], *FAST.split(), "--teacher")
    corrected = shutil.copytree(runs["none"], tmp_path / "gtr")
    record = json.loads((corrected / "config.json").read_text())
    record["config"]["guidance"] = "gtr"
    (corrected / "config.json").write_text(json.dumps(record))
    assert "--guidance gtr" in refused(capsys, corrected, *FAST.split(), "--teacher")
    pool = ["--env", "points24", "--split", "pool"]
    assert "--split pool needs a run" in refused(capsys, model, *FAST.split(), *pool)


def vouch(folder):
    """Make the manifest agree with what is there."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: checkpoint._fingerprint(folder / name) for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_an_earlier_checkpoint_is_evaluated(runs, tmp_path, capsys):
    run = shutil.copytree(runs["kl"], tmp_path / "run") / "checkpoints"
    later = shutil.copytree(run / "00000001", run / "00000002")
    meta = json.loads((later / "meta.json").read_text())
    (later / "meta.json").write_text(json.dumps(meta | {"update": 2}))
    adapter = load_file(later / "adapter.safetensors")
    save_file(
        {name: 50 * factor for name, factor in adapter.items()}, later / "adapter.safetensors"
    )
    vouch(later)
    asked = [*FAST.split(), "--json"]
    first = figures(capsys, runs["kl"], *asked)
    newest = figures(capsys, run.parent, *asked)
    earlier = figures(capsys, run / "1", *asked)  # or 00000001
    assert (newest["update"], earlier["update"]) == (2, 1)
    assert newest["legal_rate"] != first["legal_rate"]  # nonsense
    assert earlier == first | {"source": str(run / "1")}
    assert "no checkpoint of update 3; those kept: 1, 2" in refused(
        capsys, run / "3", *FAST.split()
    )
    assert "is neither a folder" in refused(capsys, tmp_path / "checkpoints" / "3", *FAST.split())
    assert "turbo.eval tiny --env ezpoints" in refused(capsys, "ezpoints", *FAST.split())
    shutil.rmtree(later)
    (run / "00000001" / "state.safetensors").write_bytes(b"")
    assert "is not the file that was written" in refused(capsys, run / "00000001", *FAST.split())


def test_damaged_runs_are_refused(runs, tmp_path, capsys):
    def copied(name):
        return shutil.copytree(runs["kl"], tmp_path / name)

    empty = copied("empty")
    shutil.rmtree(empty / "checkpoints" / "00000001")
    assert "has no checkpoint yet" in refused(capsys, empty, *FAST.split())
    broken = copied("broken")
    (broken / "checkpoints" / "00000001" / "state.safetensors").write_bytes(b"no")
    assert "its size differs" in refused(capsys, broken, *FAST.split())
    other = copied("other")
    adapter = other / "checkpoints" / "00000001" / "adapter.safetensors"
    tensors = load_file(adapter)
    tensors.popitem()
    save_file(tensors, adapter)
    vouch(adapter.parent)
    assert "the adapter is of another model" in refused(capsys, other, *FAST.split())
    changed = copied("changed")
    record = json.loads((changed / "config.json").read_text())
    record["model_sha256"] = "0" * 64
    (changed / "config.json").write_text(json.dumps(record))
    assert "was trained from another model" in refused(capsys, changed, *FAST.split())
    old = copied("old")
    del record["config"]["seed"]
    record["config"]["setting_of_old"] = 1
    (old / "config.json").write_text(json.dumps(record))
    assert "another version" in refused(capsys, old, *FAST.split())


@pytest.mark.slow
def test_workers_share_the_episodes(runs, capsys):
    argv = FAST.replace("--episodes 6 --workers 1", "--episodes 33 --workers 2 --json").split()
    got = figures(capsys, runs["kl"], *argv)
    assert got["episodes"] == 33
