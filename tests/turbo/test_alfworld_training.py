"""ALFWorld through all of it: a warm start, training in both kinds of process, evaluation."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from turbo import eval as evaluation
from turbo import sft, train
from turbo.decode import Decoder, Request
from turbo.envs.make import make, tiny_kwargs
from turbo.log import read_jsonl
from turbo.parallel import Crew
from turbo.presets import defaults
from turbo.rollout import RolloutOptions, Table
from turbo.run import check_prompts, env_maker

SMALL = ["--workers", "1", "--dtype", "float32"]


@pytest.fixture(scope="module")
def warm_start(alfworld_games, tmp_path_factory):
    out = tmp_path_factory.mktemp("alfworld") / "start"
    flags = ["--games", alfworld_games, "--out", str(out), "--size", "nano", *SMALL]
    flags += ["--steps", "6", "--deals", "2", "--read-out-steps", "2", "--eval-episodes", "2"]
    flags += ["--max-new-tokens", "24"]
    assert sft.main(["alfworld", *flags]) == 0
    return str(out)


@pytest.fixture(scope="module")
def vlm(warm_start):
    from turbo.hub import open_model

    return open_model(dataclasses.replace(defaults("alfworld", "tiny"), model=warm_start))


@pytest.mark.slow
def test_two_updates_and_an_evaluation_by_task(alfworld_games, warm_start, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--games", alfworld_games, "--model", warm_start, "--out", str(out), *SMALL]
    flags += ["--updates", "2", "--envs", "4", "--group-size", "2", "--steps-per-update", "8"]
    flags += ["--eval-episodes", "4", "--no-eval-start", "--max-new-tokens", "24"]
    assert train.main(["alfworld", *flags]) == 0
    records = [r for r in read_jsonl(out / "metrics.jsonl") if "goal_rate" in r]
    assert len(records) == 2 and all(0 <= r["goal_rate"] <= 1 for r in records)
    assert all(r["success_rate"] <= r["goal_rate"] for r in records)
    capsys.readouterr()
    asked = [str(out), "--env", "alfworld", "--episodes", "6", "--json", "--workers", "1"]
    asked += ["--max-new-tokens", "16"]
    assert evaluation.main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["split"] == "unseen" and found["episodes"] == 6
    assert sum(task["episodes"] for task in found["tasks"].values()) == 6
    assert all(task["success_low"] <= task["success_rate"] for task in found["tasks"].values())
    only = ["--tasks", "pick_heat_then_place_in_recep", "--split", "all"]
    assert evaluation.main([*asked, *only]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["tasks"]) == ["pick_heat_then_place_in_recep"]


@pytest.mark.slow
def test_games_in_their_own_processes_play_beside_each_other_and_repeatably(alfworld_games, vlm):
    """Steps of slow environments are fetched a pass later; their order never depends on time."""
    options = RolloutOptions(4, 2, 1.0, 16)

    def play(own_process):
        kwargs = tiny_kwargs("alfworld") | {"own_process": own_process, "max_history": 4}
        table = Table(
            vlm, lambda: make("alfworld", games=alfworld_games, **kwargs), options, Crew()
        )
        rollout = table.collect(vlm.merged(vlm.weights()), (3, 0), 24)
        for env in (*table.envs, table.scout):
            env.close()
        return [[(s.tokens, s.reward) for s in e.steps] for e in rollout.episodes], rollout

    apart, rollout = play(True)
    assert apart == play(True)[0]
    assert len(rollout.steps) >= 24 and all(1 <= len(e.steps) <= 5 for e in rollout.episodes)
    assert {len({e.deal for e in rollout.episodes if e.group == g}) for g in range(4)} == {1}
    here, _ = play(False)
    assert [len(e) for e in here] and len(here) >= len(apart) - 4


def test_a_prompt_that_cannot_fit_is_refused_before_the_first_step(
    alfworld_games, vlm, warm_start, tmp_path, capsys
):
    config = dataclasses.replace(
        defaults("alfworld", "tiny"), games=alfworld_games, model=warm_start
    )
    check_prompts(vlm, env_maker(config)(), config)  # a full history fits
    long = dataclasses.replace(config, max_new_tokens=900)
    with pytest.raises(ValueError, match=r"40 commands has up to \d+ tokens.*1,024 positions"):
        check_prompts(vlm, env_maker(long)(), long)
    flags = ["--games", alfworld_games, "--model", warm_start, "--out", str(tmp_path / "run")]
    assert train.main(["alfworld", *flags, *SMALL, "--max-new-tokens", "900"]) == 2
    assert "Lower --history-length or --max-new-tokens" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_is_too_long_all_the_same_is_not_cut(vlm):
    weights = vlm.merged(vlm.weights())
    decoder = Decoder(vlm, weights, 1, 1.0, 24, torch.Generator())
    decoder.ask(0, Request([5] * 1000, lambda written: written))
    with pytest.raises(ValueError, match=r"1,001 tokens and its answer may have 24.*1,024 posit"):
        decoder.ask(0, Request([5] * 1001, lambda written: written))


def test_flags_of_alfworld_are_refused_elsewhere(alfworld_games, capsys):
    for flag, value in (("--games", "x"), ("--tasks", "x"), ("--backend", "thor")):
        assert train.main(["points24", flag, value]) == 2
        assert f"{flag} must be" in capsys.readouterr().err
    assert train.main(["alfworld", "--games", alfworld_games, "--tasks", "dance"]) == 2
    assert "task 'dance' is unknown" in capsys.readouterr().err
    assert train.main(["alfworld", "--games", "/nowhere"]) == 2
    assert "holds no ALFWorld game in train" in capsys.readouterr().err


def test_what_is_missing_is_said_before_anything_begins(
    alfworld_games, tmp_path, monkeypatch, capsys
):
    some = tmp_path / "games" / "json_2.1.1"
    some.mkdir(parents=True)
    (some / "train").symlink_to(next(Path(alfworld_games).glob("json_*")) / "train")
    flags = ["--games", str(some.parent), "--out", str(tmp_path / "run")]
    for command in (train, sft):  # the evaluation's games are asked for at the end
        assert command.main(["alfworld", *flags]) == 2
        assert "holds no ALFWorld game in valid_unseen" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "fast_downward", None)
    monkeypatch.setenv("GTR_TURBO_CACHE", str(tmp_path / "cache"))
    for more in (flags, flags[2:]):
        assert train.main(["alfworld", *more]) == 2
        told = capsys.readouterr().err
        assert "pip install 'gtr-turbo[alfworld]'" in told and told.count("\n") == 1
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_the_built_in_model_plays_rooms_it_never_saw(alfworld_games, capsys):
    flags = ["--env", "alfworld", "--games", alfworld_games, "--episodes", "8", "--json"]
    assert evaluation.main(["tiny", *flags, "--workers", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["success_rate"] > 0.1 and found["legal_rate"] > 0.6
    assert found["goal_rate"] >= found["success_rate"]
