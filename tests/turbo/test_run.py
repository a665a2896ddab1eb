"""A run's memory is planned by its own prompts, on a card that --gpu names, without a GPU."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from family_models import roomy_folder

from turbo import checkpoint, hub, memory, train
from turbo.batch import MICRO_ROWS
from turbo.parallel import Crew
from turbo.run import Run, check_prompts, env_maker, prompt_tokens
from turbo.score import in_batches

FLAGS = (
    "--device cpu --workers 1 --engine modules --dtype float32 --observation full --lora-rank 4 "
    "--envs 512 --group-size 4 --steps-per-update 12 --max-new-tokens 16 --updates 1"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(roomy_folder("qwen2_5_vl", tmp_path_factory.mktemp("roomy") / "model"))


def settings(model: str, *flags: str, env: str = "points24"):
    """Settings of a run in the words of large models, with room for many environments' prompts."""
    return train.parse([env, "--model", model, *FLAGS.split(), *flags])


def test_open_micro_tokens_are_those_that_fit_with_the_real_prompts(model, tmp_path):
    c = settings(model, "--gpu", "1.3")
    assert hub.lack_of_memory(c) == "" and c.micro_tokens == 0
    assumed = hub.memory_plan(c)
    run = Run(c, tmp_path, Crew())
    lengths = run.plan.settings.prompt_tokens, run.plan.settings.suffix_tokens
    assert lengths[0] > 700 and lengths[1] == 128  # the rest of a prompt is short
    assert run.plan == hub.memory_plan(c, *lengths) and run.plan.fits
    tokens = run.plan.settings.micro_tokens
    assert run.vlm.batches.tokens == run.vlm.batches.decode_tokens == tokens
    assert tokens < assumed.settings.micro_tokens
    wide = replace(assumed.settings, prompt_tokens=lengths[0])  # would leave too little free
    there = 0.95 * assumed.gpu_bytes
    assert memory.plan(assumed.shape, wide, there).total > there


@pytest.mark.parametrize("tokens", [100, 3000])
def test_micro_tokens_that_are_given_are_kept(model, tmp_path, tokens):
    run = Run(settings(model, "--gpu", "2", "--micro-tokens", str(tokens)), tmp_path, Crew())
    assert run.vlm.batches.tokens == run.vlm.batches.decode_tokens == tokens
    s = run.plan.settings
    assert s.micro_tokens == max(tokens, s.row)  # a longer row runs alone


def test_what_does_not_fit_with_the_real_prompts_is_refused(model, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["points24", "--model", model, *FLAGS.split(), "--gpu", "1.2", "--out", str(out)]
    c = train.parse(flags)
    assert hub.lack_of_memory(c) == ""
    assert train.main(flags) == 2
    err = capsys.readouterr().err
    assert err == f"error: {memory.refuse(hub.memory_plan(c, 714, 22))}\n"
    assert "the card has 1.2 GB: it fits with --envs " in err and not out.exists()


def test_prompts_beyond_the_model_are_refused_before_they_are_played(model, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["points24", "--model", model, *FLAGS.split(), "--max-new-tokens", "40000"]
    assert train.main([*flags, "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: a prompt has 736 tokens and its answer 40000: more .*\n", err)
    assert "--observation small" in err and not out.exists()


def test_without_a_card_nothing_is_planned(model, tmp_path):
    run = Run(settings(model), tmp_path, Crew())
    assert run.plan is None and run.vlm.batches.tokens == memory.Settings.micro_tokens


def test_the_longest_prompts_of_alfworld_are_planned_for(model, alfworld_games):
    own = f"--games {alfworld_games} --history-length 20 --gpu 80"
    c = settings(model, *own.split(), env="alfworld")
    c.max_new_tokens = 16
    vlm, env = hub.open_model(c), env_maker(c)()
    prefix, suffix = prompt_tokens(vlm, env, c)
    assert suffix > 128 and env.process is None
    plan = check_prompts(vlm, env, c)
    assert plan.settings.suffix_tokens == suffix and plan.settings.prompt_tokens >= prefix
    short = hub.memory_plan(c)
    assert plan.settings.row > short.settings.row and plan.total > short.total
    c.gpu = short.total / memory.GB - 0.001
    with pytest.raises(ValueError, match="the card has"):
        check_prompts(vlm, env, c)


@pytest.mark.slow
def test_a_resumed_run_is_planned_again(model, tmp_path, monkeypatch):
    """It goes on in the same pieces, or in those of another card."""
    monkeypatch.setattr("turbo.run.prompt_tokens", lambda *_: (4000, 22))
    monkeypatch.setattr("turbo.model.VisionLanguageModel.positions", None)  # has place for them
    seen = []

    class Noted(Run):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            seen.append(self.vlm.batches.tokens)

    monkeypatch.setattr(train, "Run", Noted)
    out = tmp_path / "run"
    own = f"--gpu 1.06 --envs 8 --observation small --eval-episodes 0 --out {out}"
    assert train.main(["numberline", "--model", model, *FLAGS.split(), *own.split()]) == 0
    assert checkpoint.read_run(out)["config"]["micro_tokens"] == 0
    for more in ("", "--gpu 80", "--micro-tokens 900"):
        flags = f"--resume {out} --updates {len(seen) + 1} {more}"
        assert train.main(["numberline", *flags.split()]) == 0
    assert seen[0] == seen[1] < seen[2] == memory.ENOUGH and seen[3] == 900


def test_a_large_model_scores_no_more_rows_at_once_than_are_planned(model):
    vlm = hub.open_model(settings(model, "--micro-tokens", "8192"))
    steps = [SimpleNamespace(picture=0, suffix=[5] * 30, tokens=[7] * 30)] * 100
    rollout, seen = SimpleNamespace(features=torch.zeros(1, 4, 8), fixed=""), []
    in_batches(vlm, rollout, steps, lambda rows: seen.append(len(rows)))
    assert sum(seen) == 100 and max(seen) == MICRO_ROWS
