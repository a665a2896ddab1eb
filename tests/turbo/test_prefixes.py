"""turbo/prefixes.py: those of a large model are computed several at once, and few are kept."""

import pytest
import tiny_models
import torch
from family_models import model

from turbo.memory import KEPT
from turbo.prefixes import Prefixes
from turbo.rollout import TOGETHER, enough


@pytest.fixture
def large(monkeypatch):
    """A model that reads prompts in passes, and the size of every batch of prefixes."""
    vlm, sizes = model("qwen3_vl"), []
    prefix = vlm.prefix

    def counted(w, features, fixed, grid):
        sizes.append(len(features))
        return prefix(w, features, fixed, grid)

    monkeypatch.setattr(vlm, "prefix", counted)
    monkeypatch.setattr(vlm.batches, "decode_tokens", 0)
    return vlm, sizes


def prefixes_of(vlm, count):
    env = tiny_models.new_env("ezpoints")
    found = Prefixes(vlm, vlm.weights(), "the rules")
    found.add(*vlm.see([env.reset(seed=i)[0] for i in range(count)]))
    return found


@torch.no_grad()
def test_what_is_asked_for_next_is_computed_too(large):
    vlm, sizes = large
    many, single = prefixes_of(vlm, 12), prefixes_of(vlm, 12)
    order = [3, 0, 3, 7, 11, 1, 0, 2, 4, 5, 6, 8]
    for place, number in enumerate(order):
        batch, row = many.get(number, order[place + 1 :])
        assert sum(map(len, many._batches)) == len(many._place) <= KEPT
        alone, first = single.get(number)
        for one, two in zip(batch.keys + batch.values, alone.keys + alone.values, strict=True):
            torch.testing.assert_close(one[row], two[first], rtol=1e-4, atol=1e-5)
    assert sum(n > 1 for n in sizes) >= 2 and max(sizes) == KEPT


@torch.no_grad()
def test_a_batch_keeps_to_the_tokens_of_a_pass_and_to_memory(large, monkeypatch):
    vlm, sizes = large
    found = prefixes_of(vlm, 6)
    length = len(vlm.encode(vlm.frame.prefix("the rules", len(found.features[0]))))
    monkeypatch.setattr(vlm.batches, "decode_tokens", 4 * length + 1)
    found.get(0, range(6))
    assert sizes == [4]
    counted = vlm.prefix

    def scarce(w, features, fixed, grid):
        if len(features) > 1:
            raise torch.OutOfMemoryError
        return counted(w, features, fixed, grid)

    monkeypatch.setattr(vlm, "prefix", scarce)
    found.get(4, [5])
    assert sizes == [4, 1] and vlm.batches.decode_tokens < 4 * length


def test_slots_begin_together(large):
    """New pictures of several environments are read in one pass."""
    vlm, sizes = large
    lora = tiny_models.noisy_lora(vlm)
    envs = 2 * TOGETHER
    rollout = tiny_models.play(vlm, lora, steps=24, envs=envs, group=1, max_new_tokens=12)
    pictures = len(rollout.pictures)
    assert len(rollout.steps) >= 24 and pictures >= 8
    assert len(sizes) <= 0.7 * pictures and max(sizes) > 1


def test_how_long_a_free_slot_waits(large):
    found = [[enough(large[0], free, busy) for free in (1, 7, 8)] for busy in (0, 7, 8, 49, 57)]
    assert found == [
        [True, True, True],
        [True, True, True],
        [False, True, True],
        [False, True, True],
        [False, False, False],
    ]
    assert enough(tiny_models.random_model(), 1, 63)  # a small one does not wait
