"""turbo/trajectory.py: what is recorded of an episode is what was: pictures, tokens, exact KL."""

import base64
import io
import json

import numpy as np
import pytest
import tiny_models
import tiny_runs
import torch
from PIL import Image

from turbo import trajectory
from turbo.log import read_jsonl
from turbo.parallel import Crew
from turbo.tiny import GAMES

TEMPERATURE = 0.7


def records_of(vlm, rollout, policy=None, teacher=None):
    with torch.no_grad():
        weights = vlm.weights(policy)
        other = None if teacher is None else vlm.weights(teacher)
    options = dict(update=3, temperature=TEMPERATURE, prompt_style="short")
    return trajectory.episode_records(vlm, weights, other, rollout, **options)


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


@pytest.fixture(scope="module")
def played(fitted):
    """A rollout on numberline, the factors of policy and teacher, and its records."""
    policy = tiny_models.noisy_lora(fitted, 1, 0.02)
    teacher = tiny_models.noisy_lora(fitted, 2, 0.1)
    rollout = tiny_models.play(fitted, policy, temperature=TEMPERATURE, steps=40)
    return rollout, policy, teacher, records_of(fitted, rollout, policy, teacher)


def test_the_kl_of_every_token_is_that_of_transformers_passes(fitted, played):
    rollout, policy, teacher, records = played
    shown, starts = tiny_models.shown_pictures(rollout), {}
    for number, episode in enumerate(rollout.episodes):
        starts[number] = sum(len(e.steps) for e in rollout.episodes[:number])
        assert episode.steps
    largest = 0.0
    with torch.no_grad():
        both = [tiny_models.merged_parameters(fitted, lora) for lora in (policy, teacher)]
        for record in records[::2]:
            row = starts[record["episode"]]
            s, told = rollout.steps[row], record["steps"][0]
            place = (shown[row], rollout.fixed, s.suffix, s.tokens, TEMPERATURE)
            log_p, log_q = (tiny_models.own_answer(fitted, p, *place)[0].double() for p in both)
            want = (log_p.exp() * (log_p - log_q)).sum(-1)
            assert told["kl"] == pytest.approx(want.tolist(), rel=1e-3, abs=1e-4)
            assert len(told["kl"]) == len(told["tokens"]) == len(s.tokens)
            largest = max(largest, max(told["kl"]))
    assert largest > 0.1  # there is something to be measured


def test_a_record_tells_the_episode(fitted, played):
    rollout, _, _, records = played
    assert [r["episode"] for r in records] == sorted({r["episode"] for r in records})
    assert 2 <= len(records) <= trajectory.EPISODES
    for record in records:
        episode = rollout.episodes[record["episode"]]
        assert record["update"] == 3 and record["prompt"] == rollout.fixed
        assert record["success"] == episode.success and record["return"] == episode.episode_return
        assert record["solvable"] is True and record["deal"] == [str(v) for v in episode.deal]
        assert record["left_out"] == len(episode.steps) - len(record["steps"])
        for step, told in zip(episode.steps, record["steps"], strict=False):
            text = "".join(told["tokens"])
            ended = step.tokens[-1] == fitted.end
            assert text.removesuffix("<|im_end|>" if ended else "") == step.answer.text
            assert told["thought_tokens"] == step.thought
            assert told["state"] == "- or +?"
            assert told["reward"] == step.reward and told["format_reward"] == step.format_reward
            assert told["action"] == step.answer.action and told["error"] == step.answer.error
            parts = {part: getattr(step.verdict, part) for part in trajectory.PARTS}
            assert told["verdict"] == parts
    assert any(s["action"] is None for r in records for s in r["steps"])  # both kinds are there
    assert any(s["action"] is not None for r in records for s in r["steps"])


def test_the_pictures_are_those_that_the_policy_saw_each_stored_once(fitted, played):
    rollout, _, _, records = played
    frames = [pair for r in records for pair in r["frames"].items()]
    assert len(frames) == len(dict(frames)) > 2
    shown = tiny_models.shown_pictures(rollout)
    compared = 0
    for record in records:
        row = sum(len(e.steps) for e in rollout.episodes[: record["episode"]])
        for i, step in enumerate(record["steps"]):
            np.testing.assert_array_equal(pixels(dict(frames)[step["frame"]]), shown[row + i])
            compared += 1
    assert compared > len(frames)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("game", GAMES)
def test_every_game(vlm, game, fresh):
    """Also one that makes a new array for every picture."""
    rollout = tiny_models.play(
        vlm,
        game=game,
        make_env=lambda: tiny_models.scripted(game, fresh_pictures=fresh),
        max_new_tokens=2,
    )
    records = records_of(vlm, rollout)
    frames = {name: data for r in records for name, data in r["frames"].items()}
    for record in records:
        steps = rollout.episodes[record["episode"]].steps
        for step, told in zip(steps, record["steps"], strict=False):
            np.testing.assert_array_equal(pixels(frames[told["frame"]]), step.asked.render())
            assert told["kl"] is None  # there is no teacher
    assert json.loads(json.dumps(records, allow_nan=False)) == records


def test_what_is_recorded_is_bounded_in_steps(fitted, played, monkeypatch):
    rollout = played[0]
    monkeypatch.setattr(trajectory, "STEPS", 5)
    records = records_of(fitted, rollout)
    assert sum(len(r["steps"]) for r in records) == 5
    last = records[-1]
    assert last["left_out"] == len(rollout.episodes[last["episode"]].steps) - len(last["steps"])


@pytest.mark.parametrize("bound", [0, 2_000, 6_000, 12_000, 1_000_000])
def test_what_is_recorded_is_bounded_in_bytes(fitted, played, monkeypatch, bound):
    """Text goes before pictures; a record says what it lacks."""
    rollout, policy, teacher, whole = played
    monkeypatch.setattr(trajectory, "BYTES", bound)
    records = records_of(fitted, rollout, policy, teacher)
    written = sum(len(json.dumps(r)) + 1 for r in records)
    assert written <= bound
    assert (records == whole) == (bound == 1_000_000)
    if bound == 2_000:
        assert not any(r["frames"] for r in records) and records[0]["steps"][0]["frame"] is None
    for r in records:
        assert r["left_out"] == len(rollout.episodes[r["episode"]].steps) - len(r["steps"])


def test_a_large_picture_is_made_small():
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    smooth = np.zeros((224, 448, 3), np.uint8)
    smooth[40:, 100:] = (30, 110, 60)
    for picture, same in ((noise, False), (smooth, True)):
        name, data = trajectory.frame(picture)
        assert len(base64.b64decode(data)) <= trajectory.FRAME_BYTES
        assert np.array_equal(pixels(data), picture) == same
        assert trajectory.frame(picture.copy())[0] == name


def test_pieces_of_characters_that_are_several_tokens(vlm):
    text = 'a ♥ 🂡 "é"'
    pieces = trajectory.pieces(vlm, vlm.encode(text))
    assert "".join(pieces) == text and len(pieces) == len(vlm.encode(text)) > len(text)
    cut = vlm.encode("♥")[:-1]
    assert "".join(trajectory.pieces(vlm, [*cut, vlm.end])) == vlm.decode(cut) + "<|im_end|>"
    assert "".join(trajectory.pieces(vlm, cut)) == vlm.decode(cut) == "\ufffd"


def test_numbers_that_json_cannot_say():
    values = [trajectory.rounded(x) for x in (0.123456, 0.0, float("nan"), float("inf"))]
    assert values == [0.1235, 0.0, None, None]


def test_only_worker_0_records(played):
    run = type("AnyRun", (), {"crew": Crew(1, 2), "config": tiny_models.new_config()})
    assert trajectory.sample_episodes(run, None, played[0]) == []


@pytest.mark.slow
def test_a_run_with_two_workers_records_the_episodes_of_one():
    path = tiny_runs.trained("two-workers", "--workers", "2", "--updates", "2")
    records = read_jsonl(path / "episodes.jsonl")
    assert sorted({r["update"] for r in records}) == [1, 2]
    kl = [x for r in records for s in r["steps"] for x in s["kl"]]
    assert max(kl) > 0 and min(kl) > -1e-6
    first = [x for r in records if r["update"] == 1 for s in r["steps"] for x in s["kl"]]
    assert max(first) < 1e-6  # the teacher is the warm start still
