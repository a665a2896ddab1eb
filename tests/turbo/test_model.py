"""turbo/model.py against transformers' own pass and against peft; tokens, thoughts, errors."""

import copy
import dataclasses
import json

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo import prompts, tiny
from turbo.attend import causal_mask
from turbo.fused import KEYS
from turbo.lora import new_lora
from turbo.model import ValueHead, VisionLanguageModel, load, pick_dtype

FIXED = "Make 12 with the two cards. Reply in JSON.\n"
ANSWER = '{"cards": ["10", "2"], "thoughts": "2 10: 10+2=12, so 10+2, next +", "action": "+"}'


def pictures(count, game="ezpoints"):
    env = tiny_models.new_env(game)
    return [env.reset(seed=i)[0] for i in range(count)]


def own_logits(vlm, lora, shown, owner, rows):
    """[R, L, V] by this project's pass: prefixes of `shown`, rows of padded tokens behind them."""
    weights = vlm.weights(lora)
    features, grid = vlm.see(shown)
    prefix = vlm.prefix(weights, features, FIXED, grid).select(torch.tensor(owner))
    length = max(map(len, rows))
    ids = torch.tensor([r + [vlm.pad] * (length - len(r)) for r in rows])
    hidden = vlm.suffix(weights, ids, prefix)
    return F.linear(vlm.text.final_norm(weights, hidden), weights.head)


def their_logits(vlm, lora, picture, row):
    """[L, V] of the same by transformers."""
    pixels, grid = vlm.pixels([picture]).values()
    parameters = tiny_models.merged_parameters(vlm, lora)
    ids = vlm.encode(tiny_models.prefix_text(FIXED, int(grid.prod()) // 4))
    return tiny_models.own_forward(vlm, parameters, ids + row, pixels, grid)[0][len(ids) :]


@pytest.mark.parametrize("game", ["ezpoints", "points24"])  # square and wide pictures
@pytest.mark.parametrize("adapted", [False, True])
@torch.no_grad()
def test_the_forward_pass_is_that_of_transformers(vlm, game, adapted):
    lora = tiny_models.noisy_lora(vlm) if adapted else None
    texts = [
        tiny_models.suffix_text('formula: ""') + ANSWER,
        "9+1=10",
        tiny_models.suffix_text("x"),
    ]
    rows, owner, shown = [vlm.encode(t) for t in texts], [1, 0, 1], pictures(2, game)
    ours = own_logits(vlm, lora, shown, owner, rows)
    for i, row in enumerate(rows):
        theirs = their_logits(vlm, lora, shown[owner[i]], row)
        assert (ours[i, : len(row)] - theirs).abs().max() < 1e-4
    # The check can fail: another picture, the base's weights, and one position less all show.
    other = their_logits(vlm, lora, shown[0], rows[0])
    assert (ours[0, : len(rows[0])] - other).abs().max() > 1e-3
    if adapted:
        base = their_logits(vlm, None, shown[1], rows[0])
        assert (ours[0, : len(rows[0])] - base).abs().max() > 1e-2


@torch.no_grad()
def test_the_picture_has_positions_in_three_dimensions(vlm):
    features, grid = vlm.see(pictures(1, "points24"))
    prefix = vlm.prefix(vlm.weights(), features, FIXED, grid)
    # 2 x 4 tokens of the picture take max(2, 4) positions and not 8.
    assert features.shape == (1, 8, vlm.text.dim)
    assert prefix.next_position == prefix.length - 8 + 4
    row = vlm.encode(ANSWER)
    right = their_logits(vlm, None, pictures(1, "points24")[0], row)
    for shift, same in ((0, True), (1, False), (prefix.length - prefix.next_position, False)):
        moved = dataclasses.replace(prefix, next_position=prefix.next_position + shift)
        hidden = vlm.suffix(vlm.weights(), torch.tensor([row]), moved)
        got = F.linear(vlm.text.final_norm(vlm.weights(), hidden), vlm.weights().head)[0]
        assert ((got - right).abs().max() < 1e-4) == same


@torch.no_grad()
def test_heads_that_share_keys_and_an_untied_head(vlm):
    """The nano model has as many keys as queries, and a tied head; larger models have neither."""
    config = tiny.config("small", vlm.tokenizer)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    config.text_config.num_hidden_layers = 1
    torch.manual_seed(3)
    module = type(vlm.module)(config).eval()
    other = VisionLanguageModel(module, vlm.tokenizer, vlm.processor, torch.float32)
    assert other.text.heads == 2 * other.text.kv_heads
    assert not torch.equal(other.weights().head, other.weights().embed)
    lora, row = tiny_models.noisy_lora(other), other.encode(ANSWER)
    ours = own_logits(other, lora, pictures(1), [0], [row])[0]
    assert (ours - their_logits(other, lora, pictures(1)[0], row)).abs().max() < 1e-4


@torch.no_grad()
def test_bfloat16_is_near_float32(vlm, random_folder):
    half = load(random_folder, torch.bfloat16)
    row = vlm.encode(ANSWER)
    one = own_logits(vlm, None, pictures(1), [0], [row])
    two = own_logits(half, None, pictures(1), [0], [row])
    assert two.dtype == torch.bfloat16
    assert (one - two.float()).abs().max() < 0.05


def test_gradients_of_the_factors_are_those_of_transformers(vlm):
    lora, row, shown = tiny_models.noisy_lora(vlm), vlm.encode(ANSWER), pictures(1)
    target = torch.tensor([*row[1:], 7])
    grads = []
    for logits in (
        own_logits(vlm, lora, shown, [0], [row])[0],
        their_logits(vlm, lora, shown[0], row),
    ):
        grads.append(torch.autograd.grad(F.cross_entropy(logits, target), lora.parameters()))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
        assert theirs.abs().max() > 0


@torch.no_grad()
def test_the_adapter_is_one_of_peft(vlm, random_folder):
    peft = pytest.importorskip("peft")
    lora = tiny_models.noisy_lora(vlm)
    module = load(random_folder, torch.float32).module
    names = "|".join(name.rsplit(".", 1)[-1] for name in list(lora.factors)[:7])
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank * lora.scale,
        target_modules=rf".*language_model.*({names})",
    )
    adapted = peft.get_peft_model(module, config)
    assert set(peft.get_peft_model_state_dict(adapted)) == set(lora.state_dict())
    result = peft.set_peft_model_state_dict(adapted, lora.state_dict())
    assert not result.unexpected_keys
    row, shown = vlm.encode(ANSWER), pictures(1)
    ours = own_logits(vlm, lora, shown, [0], [row])[0]
    pixels, grid = vlm.pixels(shown).values()
    ids = torch.tensor([vlm.encode(tiny_models.prefix_text(FIXED, int(grid.prod()) // 4)) + row])
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == vlm.image).int(),
        pixel_values=pixels,
        image_grid_thw=grid,
    )
    for model in (adapted, adapted.merge_and_unload()):
        theirs = model(**inputs).logits[0, -len(row) :]
        assert (ours - theirs).abs().max() < 1e-4


def test_new_factors_change_nothing_and_know_their_seed(vlm):
    lora = new_lora(vlm.matrices, 4, 8.0, seed=1)
    assert lora.scale == 2.0 and lora.rank == 4
    assert len(lora.factors) == 7 * vlm.text.layers
    assert not any(
        "embed" in name or "visual" in name or "lm_head" in name for name in lora.factors
    )
    assert all(p.requires_grad for p in lora.parameters())
    with torch.no_grad():
        for one, two in zip(vlm.weights(lora).layers, vlm.weights().layers, strict=True):
            assert torch.equal(one.qkv, two.qkv) and torch.equal(one.down, two.down)
    same, other = (new_lora(vlm.matrices, 4, 8.0, seed=s) for s in (1, 2))
    a = next(iter(lora.factors))
    assert torch.equal(lora.factors[a][0], same.factors[a][0])
    assert not torch.equal(lora.factors[a][0], other.factors[a][0])
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        new_lora(vlm.matrices, 0, 8.0, 0)


def test_factors_of_another_model_are_refused(vlm):
    lora = tiny_models.noisy_lora(vlm)
    state = {k: v.clone() for k, v in lora.state_dict().items()}
    fresh = new_lora(vlm.matrices, 4, 8.0, 9)
    fresh.load_state_dict(state)
    assert all(
        torch.equal(x, y) for x, y in zip(fresh.parameters(), lora.parameters(), strict=True)
    )
    missing = dict(list(state.items())[1:])
    with pytest.raises(ValueError, match="the adapter is of another model"):
        fresh.load_state_dict(missing)
    with pytest.raises(ValueError, match="the adapter is of another model"):
        fresh.load_state_dict({**state, "base_model.model.more.lora_A.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"\(8, 96\), expected floating point \(4, 96\)"):
        fresh.load_state_dict(new_lora(vlm.matrices, 8, 8.0, 0).state_dict())


def test_causal_mask(vlm):
    mask = causal_mask(3, 2, vlm.text)
    seen = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert (mask[:, :5] == 0).int().tolist() == seen
    assert mask.shape == (3, KEYS) and (mask[:, 5:] == -1e30).all()
    assert mask[0, 3] == -1e30


def test_specials_and_rows_without_a_token_are_banned(vlm, monkeypatch):
    names = {t: vlm.tokenizer.convert_tokens_to_ids(t) for t in prompts.SPECIAL_TOKENS}
    assert {i for i, b in enumerate(vlm.banned.tolist()) if b} == set(names.values()) - {vlm.end}
    # A vocabulary that is no multiple of 16 leaves rows of the embedding without a token.
    corpus = list(tiny.corpus(3))
    monkeypatch.setattr(tiny, "corpus", lambda seed=0, games=(): corpus)
    small = tiny.train_tokenizer(vocabulary=285)
    module = tiny.new_model("nano", small, 0)
    other = VisionLanguageModel(module, small, vlm.processor, torch.float32)
    assert len(small) == 285 and other.text.vocabulary == 288
    assert other.banned[285:].all() and not other.banned[7:285].any()
    assert len(other.token_bytes) == 288 and other.token_bytes[285:] == [b""] * 3


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=40))
def test_bytes_of_tokens_give_the_text_back(text):
    vlm = tiny_models.random_model()
    if any(special in text for special in prompts.SPECIAL_TOKENS):
        return
    ids = vlm.encode(text)
    assert b"".join(vlm.token_bytes[i] for i in ids) == text.encode()
    assert vlm.decode([*ids, vlm.end]) == text
    assert vlm.tokenizer.decode(ids) == text


def test_every_byte_is_some_token(vlm):
    assert {bytes([b]) for b in range(256)} <= set(vlm.token_bytes)
    half = vlm.token_bytes.index("é".encode()[:1])
    assert vlm.decode([half]) == "�"  # never an error


def test_thoughts_end_before_the_last_action_key(vlm):
    ids = [*vlm.encode(ANSWER), vlm.end]
    n = vlm.thought_tokens(ids)
    before, after = vlm.decode(ids[:n]), vlm.decode(ids[n:])
    assert before + after == ANSWER
    # The token in which the key begins belongs to the action.
    assert not before.endswith('"action":') and '"action":' in before[-12:] + after
    key = ANSWER.rindex('"action":')
    assert len(before) <= key < len(before) + len(vlm.token_bytes[ids[n]])


def test_thoughts_of_an_answer_without_an_action(vlm):
    for text in ("", "no JSON", '{"action" : "+"}', '{"thoughts": "action"}'):
        ids = vlm.encode(text)
        assert vlm.thought_tokens(ids) == len(ids)
        assert vlm.thought_tokens([*ids, vlm.end]) == len(ids) + 1


def test_an_action_key_within_the_thoughts_does_not_end_them(vlm):
    text = '{"thoughts": "say \\"action\\": 4 or "action": 5", "action": "4"}'
    ids = vlm.encode(text)
    n = vlm.thought_tokens(ids)
    assert vlm.decode(ids[:n]).rstrip(' "').endswith("5")
    assert len(vlm.decode(ids[:n])) <= text.rindex('"action":')


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_split_is_made_on_the_sampled_tokens(data):
    """However a text is cut into tokens, the split is at the token in which the key begins."""
    vlm = tiny_models.random_model()
    text = b'"t": "x", "action": "+"}'
    by_bytes = {}
    for i, piece in enumerate(vlm.token_bytes):
        if not vlm.banned[i] and i != vlm.end:
            by_bytes.setdefault(piece, i)
    ids, at = [], 0
    while at < len(text):
        sizes = [n for n in range(1, len(text) - at + 1) if text[at : at + n] in by_bytes]
        n = data.draw(st.sampled_from(sizes))
        ids.append(by_bytes[text[at : at + n]])
        at += n
    n = vlm.thought_tokens(ids)
    lengths = [len(vlm.token_bytes[i]) for i in ids]
    key = text.rindex(b'"action":')
    assert sum(lengths[:n]) <= key < sum(lengths[: n + 1])


def test_pictures_are_seen_once_each_and_alike_in_any_company(vlm):
    shown = pictures(3)
    features, grid = vlm.see(shown)
    alone, _ = vlm.see(shown[1:2])
    assert features.shape == (3, 4, vlm.text.dim) and grid.tolist() == [[1, 4, 4]]
    torch.testing.assert_close(features[1:2], alone, rtol=1e-4, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-3


def test_value_head_starts_at_zero():
    head = ValueHead(8)
    assert head(torch.randn(3, 8)).tolist() == [0, 0, 0]
    head(torch.randn(3, 8)).sum().backward()
    assert head.net[-1].weight.grad.abs().max() > 0


def test_pick_dtype():
    assert pick_dtype("float32") == torch.float32 and pick_dtype("bfloat16") == torch.bfloat16
    assert pick_dtype("auto") in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="dtype must be auto, float32 or bfloat16, got 'half'"):
        pick_dtype("half")


def test_what_cannot_be_loaded(random_folder, tmp_path):
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(ValueError, match="is not a folder with a Hugging Face model"):
            load(folder, torch.float32)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="is a gpt2, which takes no pictures"):
        load(other, torch.float32)
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(ValueError):
        load(unknown, torch.float32)


def test_a_loaded_model_is_frozen(random_folder):
    model = load(random_folder, torch.float32)
    assert not any(p.requires_grad for p in model.module.parameters())
    assert not model.module.training
    assert copy.copy(model).end == model.tokenizer.convert_tokens_to_ids("<|im_end|>")
