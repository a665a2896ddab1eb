"""turbo/tiny.py: transformers' own classes in a small size, and a thrifty tokenizer."""

import itertools

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from tiny_models import suffix_text

from turbo import prompts, tiny
from turbo.model import VisionLanguageModel


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.tokenizer()


def test_specials_come_first_and_the_roles_are_set(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(prompts.SPECIAL_TOKENS)) == list(range(7))
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer) == tiny.VOCABULARY
    assert set(range(7)) <= set(tokenizer.all_special_ids)


def test_training_the_tokenizer_is_reproducible(monkeypatch):
    texts = list(tiny.corpus(4))
    assert texts == list(tiny.corpus(4)) and texts != list(tiny.corpus(4, seed=1))
    assert len(texts) > 100
    monkeypatch.setattr(tiny, "corpus", lambda: texts)
    one, two = (tiny.train_tokenizer(300).get_vocab() for _ in range(2))
    assert one == two and len(one) == 300


@pytest.mark.parametrize("game", tiny.GAMES)
def test_answers_are_short_and_come_back(tokenizer, game):
    env, rng = tiny_models.new_env(game), np.random.default_rng(0)
    lengths = []
    for seed in range(12):
        env.reset(seed=1000 + seed)
        answer = env.expert_answer(rng)
        if answer is None:
            continue
        for text in (answer, suffix_text(env.prompt("short").state)):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.decode(ids) == text
        lengths.append(len(tokenizer.encode(answer, add_special_tokens=False)))
        assert env.read_answer(answer).action is not None
    assert 0 < max(lengths) < 95  # within --max-new-tokens


def test_ranks_and_numbers_are_whole_tokens(tokenizer):
    text = '{"cards": ["10", "K"], "thoughts": "1 5 10: 5-1=4, 6 4: 6*4=24, so (10-4)*(5-1)"}'
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(text, add_special_tokens=False)]
    assert '10", "' in pieces and "K" in pieces
    assert " 10: " in pieces and "=24, so " in pieces
    assert not any("4" in p and "10" in p for p in pieces)  # two numbers never share a token


@pytest.mark.parametrize("size", tiny.SIZES)
def test_the_configuration_is_that_of_a_real_model(tokenizer, size):
    config = tiny.config(size, tokenizer)
    assert isinstance(config, transformers.Qwen2_5_VLConfig) and config.model_type == "qwen2_5_vl"
    text = config.text_config
    head_dim = text.hidden_size // text.num_attention_heads
    assert head_dim == 32 and 2 * sum(text.rope_parameters["mrope_section"]) == head_dim
    assert text.vocab_size % 16 == 0 and text.vocab_size >= len(tokenizer)
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert config.vision_config.out_hidden_size == text.hidden_size


def test_a_new_model_knows_its_seed(tokenizer):
    one, two, other = (tiny.new_model("nano", tokenizer, s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)
    assert all(v.dtype == torch.float32 for v in one.values())


@pytest.mark.parametrize("game", tiny.GAMES)
def test_pictures_are_never_resized(tokenizer, game):
    env = tiny_models.new_env(game)
    picture, _ = env.reset(seed=0)
    height, width = picture.shape[:2]
    cell = tiny.PATCH * tiny.MERGE
    assert height % cell == 0 == width % cell
    out = tiny.image_processor()(images=[picture], return_tensors="pt")
    assert out["image_grid_thw"].tolist() == [[1, height // tiny.PATCH, width // tiny.PATCH]]
    vlm = tiny_models.random_model()
    assert isinstance(vlm, VisionLanguageModel)
    pixels, grid = vlm.pixels([picture]).values()
    torch.testing.assert_close(pixels, out["pixel_values"])
    assert torch.equal(grid, out["image_grid_thw"])


def test_every_game_has_a_size_and_a_folder():
    assert set(tiny.SIZE_OF_GAME) == {*tiny.GAMES, "alfworld"}
    folders = [tiny.builtin_path(g) for g in tiny.SIZE_OF_GAME]
    assert all(a != b for a, b in itertools.pairwise(folders))
    assert all(f.parent.name == "models" for f in folders)
