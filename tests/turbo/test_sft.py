"""turbo/sft.py: demonstrations are the expert's, and the folder that is written can be used."""

import json
import math
import re

import pytest
import tiny_models
import torch
from safetensors import SafetensorError
from tiny_models import suffix_text

from turbo import demos, sft
from turbo.envs.cards import evaluate, tokenize
from turbo.envs.formula import aim_of
from turbo.flags import conclude
from turbo.model import load
from turbo.parallel import Crew
from turbo.sft_config import sft_defaults, warm_cosine, written


@pytest.mark.parametrize("game", ["points24", "ezpoints", "numberline", "blackjack"])
def test_demonstrations_are_legal_answers_to_their_prompts(vlm, game):
    env = tiny_models.new_env(game)
    for seed in range(4):
        demo = demos.demonstrate(env, vlm, seed)
        assert len(demo.suffixes) == len(demo.answers) >= 1
        assert all(p.shape == env.observation_space.shape for p in demo.pictures)
        assert len(demo.shown) == len(demo.answers)
        assert sorted(set(demo.shown)) == list(range(len(demo.pictures)))
        assert demo.fixed == env.prompt("short").fixed
        for suffix, answer in zip(demo.suffixes, demo.answers, strict=True):
            assert answer[-1] == vlm.end and vlm.end not in answer[:-1]
            assert env.read_answer(vlm.decode(answer)).action is not None
            assert vlm.tokenizer.decode(suffix).endswith(suffix_text(""))
        again = demos.demonstrate(env, vlm, seed)
        assert again.answers == demo.answers
    assert demos.demonstrate(env, vlm, 99).answers != demo.answers


ASKED = {
    "short": r'target: ([0-9]+), formula: "(.*)"',
    "full": r'The target is ([0-9]+). The formula so far: "(.*)"',
}


@pytest.mark.parametrize("style", ASKED)
def test_states_are_of_episodes_of_their_own(vlm, style):
    env, first, targets, count = tiny_models.new_env("points24"), 0, [], 0
    fixed = env.reset(seed=0) and env.prompt(style).fixed
    for seed in range(12):
        demo = demos.demonstrate(env, vlm, seed, states=4, other_targets=0.5, style=style)
        assert demo.fixed == fixed  # it stands before the rows of all demonstrations
        assert 1 <= len(demo.answers) <= 4  # not every target can be reached with every hand
        for suffix, answer in zip(demo.suffixes, demo.answers, strict=True):
            asked = re.search(ASKED[style], vlm.tokenizer.decode(suffix))
            answer = env.read_answer(vlm.decode(answer))
            assert answer.fields["formula"] == asked[2]
            plan = tokenize(aim_of(answer.fields["thoughts"]))
            assert evaluate(plan) == int(asked[1])
            assert [*plan, "="][len(tokenize(asked[2]))] == answer.action
            assert [answer.fields["cards"]] == demo.labels
            first, count, targets = first + (not asked[2]), count + 1, [*targets, int(asked[1])]
    assert 0.3 < first / count < 0.7 and 0.3 < targets.count(24) / count < 0.8
    assert len(set(targets)) > 8
    assert len(demos.demonstrate(env, vlm, 3, states=1).answers) == 1


@pytest.mark.parametrize("states", [0, 6])
def test_every_answer_stands_beside_the_picture_of_its_own_state(vlm, states):
    """On the number line the picture changes with every move."""
    env, later = tiny_models.new_env("numberline"), 0
    for seed in range(12):
        demo = demos.demonstrate(env, vlm, seed, states=states)
        for number, answer in zip(demo.shown, demo.answers, strict=True):
            fields = env.read_answer(vlm.decode(answer)).fields
            hand = [int(fields["current number"]), int(fields["target number"])]
            picture, _ = env.reset(options={"hand": hand})
            assert (demo.pictures[number] == picture).all()
            assert demo.labels[number] == [fields["current number"], fields["target number"]]
            later += number > 0
    assert later > 5  # not only first states


def test_labels_are_what_the_picture_shows():
    fields = {"cards": ["10", "K"], "formula": "10+", "thoughts": "x", "action": "+"}
    assert demos.perception_labels(fields) == ["10", "K"]
    assert demos.perception_labels({"current number": 2, "target number": "5", "thoughts": ""}) == [
        "2",
        "5",
    ]


def test_the_read_out_names_what_later_pictures_show(vlm):
    """A model whose tower was taught the first pictures alone reads the prompt in place of them."""
    env = tiny_models.new_env("numberline")
    many = (demos.demonstrate(env, vlm, seed) for seed in range(20))
    found = next(d for d in many if len(d.labels) > 1)
    assert sft.names_of([found]).keys() == {name for labels in found.labels for name in labels}
    assert set(found.labels[1]) - set(found.labels[0])


def test_the_read_out_learns_to_see(random_folder, monkeypatch):
    model = load(random_folder, torch.float32)
    model.module.requires_grad_(True)
    before = [p.clone() for p in model.module.parameters()]
    env = tiny_models.new_env()
    accuracy = sft.train_read_out(model, env, Crew(), steps=60, seed=0, pictures=16)
    assert accuracy > 0.25  # of six numbers, averaged from 0 on
    changed = [
        not torch.equal(a, b) for a, b in zip(before, model.module.parameters(), strict=True)
    ]
    visual = sum(1 for _ in model.module.model.visual.parameters())
    assert sum(changed) == visual  # the tower alone
    blackjack = tiny_models.new_env("blackjack")
    monkeypatch.setattr(blackjack, "picture_labels", list)  # nothing that a read-out could learn
    assert math.isnan(sft.train_read_out(model, blackjack, Crew(), steps=1, seed=0, pictures=2))


def test_a_warm_start_is_written_whole_and_can_be_used(tmp_path, monkeypatch, capsys):
    known = tiny_models.tokenizer()
    monkeypatch.setattr(sft.tiny, "train_tokenizer", lambda: known)  # to save its time
    out = tmp_path / "warm"
    small = "--size nano --steps 2 --deals 2 --read-out-steps 2 --eval-episodes 2 --workers 1"
    small += " --max-new-tokens 16"
    argv = ["numberline", "--out", str(out), "--dtype", "float32", *small.split()]
    assert sft.main(argv) == 0
    assert "written to" in capsys.readouterr().out
    names = {p.name for p in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "warm_start.json"} <= names
    record = json.loads((out / "warm_start.json").read_text())
    assert record["command"].startswith("python -m turbo.sft numberline --out ")
    assert record["config"]["steps"] == 2 and math.isfinite(record["figures"]["loss"])
    assert record["figures"]["all, temperature 0.2"]["episodes"] == 2
    model = load(out, torch.float32)
    assert model.encode("so +") == tiny_models.random_model().encode("so +")
    rollout = tiny_models.play(model, deals=[{"seed": 0}], group=1)
    assert len(rollout.episodes) == 1
    assert sft.main(argv) == 2  # a second time it would overwrite
    assert "is not empty: choose another folder, or add --overwrite" in capsys.readouterr().err

    def full(*arguments):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(sft, "save", full)  # after all that was learned
    assert conclude(lambda: sft.main([*argv, "--overwrite"])) == 1
    err = capsys.readouterr().err
    told = f"error: --out {out} cannot be written: I/O error: No space left on device\n"
    assert err.endswith(told) and "Traceback" not in err


@pytest.mark.parametrize("more", [[], ["--model", "anything"]])
def test_a_folder_that_cannot_be_written_is_told_before_anything_starts(
    more, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sft, "run_crew", lambda *arguments, **options: 1 / 0)
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/x"):
        assert sft.main(["numberline", "--out", str(out), *more]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: --out {out} cannot be written: ") and err.count("\n") == 1
    out = tmp_path / "two" / "folders"
    assert sft.main(["numberline", "--out", str(out), "--deals", "1", "--workers", "2", *more]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["chess"], "environment 'chess' is unknown"),
        (["numberline", "--steps", "0"], "--steps must be more than 0, got 0"),
        (["numberline", "--seed", "-1"], "--seed must be zero or more, got -1"),
        (
            ["numberline", "--deals", "1", "--workers", "2"],
            "--deals 1 is less than the number of workers",
        ),
        (
            ["--model", "x/y", "--size", "nano"],
            "--size is a setting of a new model, without --mod",
        ),
        (
            ["--model", "x/y", "--learning-rate", "1e-4"],
            "that of its factors is --lora-learning-r",
        ),
        (["--lora-rank", "8"], "--lora-rank is a setting with --model: leave it out"),
        (["--resume"], "--resume is a setting with --model: leave it out"),
        (["--model", "x/y", "--save-every", "-1"], "--save-every must be zero or more, got -1"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert sft.main(argv) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_warm_start_that_does_not_know_its_game_is_told_of():
    c = sft_defaults("ezpoints")
    assert written(c, 0.9).count("\n") == 0 and "--model warm-start" in written(c, 0.9)
    said = written(c, 0.2).splitlines()
    assert said[0] == written(c, 0.9)
    assert said[1].startswith("warning: only 20% of its answers are legal: it needs more --steps")


def test_the_rate_rises_and_falls():
    shares = [warm_cosine(step, 100, warm=10) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and max(shares) == shares[9] > 0.97
    assert shares[50] == pytest.approx(0.5) and shares[99] == 0.02
    assert shares[10:] == sorted(shares[10:], reverse=True)
