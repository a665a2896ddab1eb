"""turbo/families.py, turbo/modules.py: every family equals transformers' own model."""

import warnings

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from family_models import FAMILIES, load_plain, model, own_logits
from tiny_models import new_env

from turbo import prompts
from turbo.coded import bnb_product, bnb_read, product
from turbo.kernels.nf4 import dequantize_nf4, quantize_nf4
from turbo.kernels.ties import ties_merge_lora
from turbo.modules import SCRATCH, merge_policy
from turbo.teacher import Teacher

TEXT = '{"thoughts": "12+3=15, so 4", "action": "+"}'


@pytest.fixture(scope="module", params=FAMILIES)
def vlm(request):
    return model(request.param)


def shown(count: int) -> list:
    """Pictures of numberline."""
    env = new_env()
    return [env.reset(seed=i)[0] for i in range(count)]


def our_logits(vlm, lora, pictures: list, owner: list[int], rows: list[list[int]], merged=False):
    """Logits [R, L, V] of right-padded rows behind their pictures' prefixes."""
    features, grid = vlm.see(pictures)
    weights = vlm.weights(lora)
    weights = vlm.merged(weights) if merged else weights
    prefix = vlm.prefix(weights, features, "the rules", grid)
    length = max(map(len, rows))
    ids = torch.tensor([r + [vlm.pad] * (length - len(r)) for r in rows])
    hidden = vlm.suffix(weights, ids, prefix.select(torch.tensor(owner)))
    return F.linear(vlm.text.final_norm(weights, hidden), weights.head)


def adapted_parameters(vlm, lora) -> dict:
    """All parameters of the untouched model, with `lora` merged in float32; differentiable."""
    out = dict(load_plain(vlm).named_parameters())
    for name, (a, b) in lora.factors.items():
        out[name + ".weight"] = out[name + ".weight"].detach() + lora.scale * (b @ a)
    return out


@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True])
def test_logits_are_those_of_transformers(vlm, merged):
    lora, pictures = tiny_models.noisy_lora(vlm), shown(2)
    rows = [vlm.encode(TEXT), vlm.encode("so 4"), vlm.encode(TEXT + TEXT)]
    ours = our_logits(vlm, lora, pictures, [0, 1, 1], rows, merged)
    parameters = adapted_parameters(vlm, lora)
    for i, (picture, row) in enumerate(zip((0, 1, 1), rows, strict=True)):
        theirs = own_logits(vlm, parameters, pictures[picture], "the rules", row)
        assert (ours[i, : len(row)] - theirs).abs().max() < 2e-4
    # The picture and the factors matter, or the above would show nothing.
    other = own_logits(vlm, parameters, pictures[0], "the rules", rows[2])
    assert (ours[2, : len(rows[2])] - other).abs().max() > 1e-2
    base = our_logits(vlm, None, pictures, [0, 1, 1], rows)
    assert (ours - base).abs().max() > 1e-2


@torch.no_grad()
def test_nothing_that_transformers_will_drop_is_used(vlm):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        our_logits(vlm, None, shown(1), [0], [vlm.encode(TEXT)])


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_factors_are_those_of_transformers(family, checkpointing):
    vlm = model(family, checkpointing=checkpointing)
    lora, pictures, row = tiny_models.noisy_lora(vlm), shown(1), vlm.encode(TEXT)
    target = torch.tensor([*row[1:], 7])
    ours = our_logits(vlm, lora, pictures, [0], [row])[0]
    theirs = own_logits(vlm, adapted_parameters(vlm, lora), pictures[0], "the rules", row)
    pairs = [
        torch.autograd.grad(F.cross_entropy(x, target), lora.parameters()) for x in (ours, theirs)
    ]
    for one, two in zip(*pairs, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-3, atol=1e-5)
        assert two.abs().max() > 0


def test_checkpointing_keeps_less(monkeypatch):
    """What autograd holds between forward and backward, with and without checkpointing."""
    held = {}
    for checkpointing in (True, False):
        vlm = model("qwen3_vl", checkpointing=checkpointing)
        lora, sizes = tiny_models.noisy_lora(vlm), {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            our_logits(vlm, lora, shown(1), [0], [vlm.encode(TEXT * 8)])
        held[checkpointing] = sum(sizes.values())
    assert held[True] < 0.4 * held[False]


@torch.no_grad()
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_swaps_leave_the_base_as_it_was(family, quantize):
    """Policy and teacher take turns in the scratch; it is always filled from the pristine base."""
    play = "merged" if quantize == "none" else "auto"
    vlm = model(family, dtype=torch.bfloat16, quantize=quantize, play=play)

    def bits() -> list[torch.Tensor]:
        found = []
        for matrix in vlm.matrices.values():
            coded = quantize == "nf4"
            found += [matrix.codes.clone(), matrix.absmax.clone()] if coded else [matrix.clone()]
        return found + [p.clone() for p in vlm.module.parameters()]

    before, lora, other = bits(), tiny_models.noisy_lora(vlm), tiny_models.noisy_lora(vlm, 1)
    row, policies, teachers = [vlm.encode(TEXT)], [], []
    for _ in range(25):
        policies.append(our_logits(vlm, lora, shown(1), [0], row, merged=True))
        teachers.append(our_logits(vlm, other, shown(1), [0], row, merged=True))
    assert all(torch.equal(x, policies[0]) for x in policies)
    assert all(torch.equal(x, teachers[0]) for x in teachers)
    assert not torch.equal(policies[0], teachers[0])
    for one, two in zip(before, bits(), strict=True):
        assert torch.equal(one, two)
    # Merged and unmerged differ by rounding to bfloat16 alone.
    adapted = our_logits(vlm, lora, shown(1), [0], row)
    spread = adapted.float().std()
    assert (policies[0] - adapted).float().std() < 0.05 * spread
    assert (policies[0] - teachers[0]).float().std() > 0.2 * spread


@torch.no_grad()
def test_weights_of_an_older_content_are_refused(vlm):
    lora = tiny_models.noisy_lora(vlm)
    old = vlm.merged(vlm.weights(lora))
    assert old.role == SCRATCH and vlm.merged(old) is old
    features, grid = vlm.see(shown(1))
    vlm.prefix(old, features, "", grid)
    vlm.merged(vlm.weights(lora))
    with pytest.raises(RuntimeError, match="merge them again"):
        vlm.prefix(old, features, "", grid)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_in_four_bits_computes_what_its_codes_stand_for(family):
    vlm = model(family, quantize="nf4")
    lora, row = tiny_models.noisy_lora(vlm), vlm.encode(TEXT)
    parameters = dict(load_plain(vlm).named_parameters())
    for name, coded in vlm.matrices.items():
        parameters[name] = dequantize_nf4(coded)
        if (module := name.removesuffix(".weight")) in lora.factors:
            a, b = lora.factors[module]
            parameters[name] = parameters[name] + lora.scale * (b @ a)
    theirs = own_logits(vlm, parameters, shown(1)[0], "the rules", row)
    ours = our_logits(vlm, lora, shown(1), [0], [row])[0]
    assert (ours - theirs).abs().max() < 2e-4
    # Decoding uses the very same weights: a sum in four bits would lose what was trained.
    played = our_logits(vlm, lora, shown(1), [0], [row], merged=True)[0]
    assert torch.equal(played, ours)


@torch.no_grad()
@pytest.mark.parametrize("size", [0.05, 0.0005])
def test_a_teacher_over_a_base_in_four_bits(size):
    """It stands for base + merged task vectors, a tenth of the task vector off, however small."""
    vlm = model("qwen3_vl", quantize="nf4")
    teacher = Teacher(vlm, tiny_models.noisy_lora(vlm), tiny_models.new_config(density=1.0))
    lora = tiny_models.noisy_lora(vlm, size=size)
    teacher.push(0, lora)
    before = {name: (m.codes.clone(), m.absmax.clone()) for name, m in vlm.matrices.items()}
    dense = {name: merged for name, merged, _ in teacher.dense()}
    for name, (a, b) in lora.factors.items():
        base = dequantize_nf4(vlm.matrices[name + ".weight"])
        wanted = lora.scale * (b @ a)
        moved = dense[name] - base
        assert (moved - wanted).norm() < 0.15 * wanted.norm()
    row = vlm.encode(TEXT)
    features, grid = vlm.see(shown(1))
    weights = teacher.weights
    prefix = vlm.prefix(weights, features, "the rules", grid)
    hidden = vlm.suffix(weights, torch.tensor([row]), prefix)
    ours = F.linear(hidden, weights.head)[0]
    parameters = dict(load_plain(vlm).named_parameters())
    parameters |= {name + ".weight": matrix for name, matrix in dense.items()}
    theirs = own_logits(vlm, parameters, shown(1)[0], "the rules", row)
    assert (ours - theirs).abs().max() < 2e-4
    for name, m in vlm.matrices.items():
        assert torch.equal(m.codes, before[name][0]) and torch.equal(m.absmax, before[name][1])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_over_a_dense_base(family):
    """The scratch holds what merging the history gives, and again after the policy was in it."""
    vlm = model(family)
    config = tiny_models.new_config(weighting="sma", density=0.8)
    teacher = Teacher(vlm, tiny_models.noisy_lora(vlm), config)
    for seed in range(3):
        teacher.push(seed, tiny_models.noisy_lora(vlm, seed))
    dense = {name: merged for name, merged, _ in teacher.dense()}
    for name, module in vlm.text.linears.items():
        history = teacher.history.entries
        want = ties_merge_lora(
            module.base.detach(),
            *([e.factors[name][side] for e in history] for side in (0, 1)),
            [e.scale for e in history],
            [1 / 3] * 3,
            [e.thresholds[name] for e in history],
        )
        assert torch.equal(dense[name], want)
    held = teacher.weights
    assert teacher.weights.content == held.content  # not merged twice
    vlm.merged(vlm.weights(tiny_models.noisy_lora(vlm)))
    again = teacher.weights
    assert again.content != held.content
    for name, module in vlm.text.linears.items():
        assert torch.equal(module.scratch, dense[name])


def test_gradients_with_a_base_in_four_bits():
    """Reading the matrix back in the backward pass gives the gradient of the dense one."""
    vlm = model("qwen3_vl", quantize="nf4", checkpointing=False)
    lora, row = tiny_models.noisy_lora(vlm), vlm.encode(TEXT)
    parameters = dict(load_plain(vlm).named_parameters())
    for name, coded in vlm.matrices.items():
        parameters[name] = dequantize_nf4(coded)
        a, b = lora.factors[name.removesuffix(".weight")]
        parameters[name] = parameters[name] + lora.scale * (b @ a)
    target = torch.tensor([*row[1:], 7])
    ours = our_logits(vlm, lora, shown(1), [0], [row])[0]
    theirs = own_logits(vlm, parameters, shown(1)[0], "the rules", row)
    pairs = [
        torch.autograd.grad(F.cross_entropy(x, target), lora.parameters()) for x in (ours, theirs)
    ]
    for one, two in zip(*pairs, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-3, atol=1e-5)


def test_codes_are_read_by_bitsandbytes_too():
    bnb = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        coded = quantize_nf4(torch.randn(48, 192).to(dtype))
        torch.testing.assert_close(bnb_read(bnb, coded), dequantize_nf4(coded), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_codes_are_multiplied_by_bitsandbytes_too(dtype, biased):
    pytest.importorskip("bitsandbytes")
    if not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        pytest.skip("bitsandbytes before 0.50")
    torch.manual_seed(0)
    coded, x = quantize_nf4(torch.randn(48, 192).to(dtype)), torch.randn(2, 3, 192).to(dtype)
    bias = torch.randn(48).to(dtype) if biased else None
    close = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2**-6, 0.1)}[dtype]
    got, wanted = bnb_product(x, coded, bias), product(x, coded, bias)
    assert got.shape == (2, 3, 48) and got.dtype == dtype
    torch.testing.assert_close(got, wanted, rtol=close[0], atol=close[1])


@torch.no_grad()
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_few_bits_a_policy_plays_as_it_is_trained(family, quantize):
    """Base and factors apart, to the bit; the factors are rounded once."""
    vlm = model(family, dtype=torch.bfloat16, quantize=quantize)
    lora = tiny_models.noisy_lora(vlm)
    whole, narrow = vlm.weights(lora), vlm.merged(vlm.weights(lora))
    assert {f.dtype for f in lora.parameters()} == {torch.float32}
    assert {f.dtype for f in narrow.lora.parameters()} == {torch.bfloat16}
    ids = torch.tensor([vlm.encode(TEXT)])
    features, grid = vlm.see(shown(1))
    hidden = [vlm.suffix(w, ids, vlm.prefix(w, features, "x", grid)) for w in (whole, narrow)]
    assert torch.equal(*hidden)
    old = [f.clone() for f in narrow.lora.parameters()]
    for factor in lora.parameters():  # the policy learns on: what plays is what it was
        factor.mul_(2)
    assert all(map(torch.equal, old, narrow.lora.parameters()))


@torch.no_grad()
def test_a_policy_that_plays_lies_in_the_scratch_until_a_teacher_does():
    vlm = model("qwen3_vl", dtype=torch.bfloat16)
    lora, other = tiny_models.noisy_lora(vlm), tiny_models.noisy_lora(vlm, 1)

    def merge(name, base, out):
        merge_policy(base, *other.factors[name], other.scale, out)

    row = [vlm.encode(TEXT)]
    alone = our_logits(vlm, lora, shown(1), [0], row, merged=True)  # there is no scratch yet
    teacher = vlm.text.fill(merge, "teacher")
    memory = {module.scratch.data_ptr() for module in vlm.text.linears.values()}
    policy = vlm.merged(vlm.weights(lora))
    assert {a.data_ptr() for a, _ in policy.lora.factors.values()} == memory
    assert vlm.text.held("teacher") is None
    features, grid = vlm.see(shown(1))
    with pytest.raises(RuntimeError, match="merge them again"):
        vlm.prefix(teacher, features, "", grid)
    assert torch.equal(our_logits(vlm, lora, shown(1), [0], row, merged=True), alone)
    vlm.text.fill(merge, "teacher")
    with pytest.raises(RuntimeError, match="merge them again"):
        vlm.prefix(policy, features, "", grid)


@torch.no_grad()
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_history_of_a_model_in_16_bits_is_the_policy_that_played(quantize):
    """Rounded as every pass rounds its factors; what was saved in fp32 is merged all the same."""
    vlm = model("qwen2_5_vl", dtype=torch.bfloat16, quantize=quantize)
    config = tiny_models.new_config(density=1.0, history_max=3)
    teacher = Teacher(vlm, tiny_models.noisy_lora(vlm), config)
    loras = [tiny_models.noisy_lora(vlm, k) for k in range(2)]
    for k, lora in enumerate(loras):
        teacher.push(k, lora)
        played = vlm.merged(vlm.weights(lora)).lora.factors
        for name, pair in teacher.history.entries[-1].factors.items():
            for kept, own in zip(pair, played[name], strict=True):
                assert kept.dtype == torch.bfloat16 and torch.equal(kept, own)
    tensors, data = teacher.state_dict()
    older = {
        key: tensor.float() if key.startswith("history/0.") else tensor
        for key, tensor in tensors.items()
    }
    resumed = Teacher(vlm, tiny_models.noisy_lora(vlm), config)
    resumed.load_state_dict(older, data)  # the first checkpoint in fp32, the second as now
    kinds = [
        {f.dtype for pair in e.factors.values() for f in pair} for e in resumed.history.entries
    ]
    assert kinds == [{torch.float32}, {torch.bfloat16}]
    wanted = {name: merged for name, merged, _ in teacher.dense()}
    for name, matrix, _ in resumed.dense():
        torch.testing.assert_close(matrix, wanted[name])


@torch.no_grad()
def test_in_16_bits_a_teacher_keeps_the_smallest_changes():
    """The scratch holds them and no sum; what it computes is base and changes together."""
    vlm = model("qwen2_5_vl", dtype=torch.bfloat16)
    lora = tiny_models.noisy_lora(vlm)

    def merge(name, base, out):
        merge_policy(base, *lora.factors[name], lora.scale, out)

    row = [vlm.encode(TEXT)]
    adapted, plain = (our_logits(vlm, x, shown(1), [0], row).float() for x in (lora, None))
    features, grid = vlm.see(shown(1))
    teacher = vlm.text.fill(merge, "teacher")
    prefix = vlm.prefix(teacher, features, "the rules", grid)
    hidden = vlm.suffix(teacher, torch.tensor(row), prefix)
    logits = torch.nn.functional.linear(hidden, teacher.head).float()
    assert (logits - adapted).std() < 0.05 * (logits - plain).std()
    for _, b in lora.factors.values():
        b.mul_(1e-5)
    vlm.text.fill(merge, "teacher of small changes")
    for name, module in vlm.text.linears.items():
        a, b = lora.factors[name]
        change = lora.scale * b @ a
        assert (module.scratch - change).norm() < 0.01 * change.norm()


@torch.no_grad()
def test_a_sum_in_bfloat16_loses_the_first_changes_of_a_run():
    """What is left of changes of 8e-6 in weights of 0.02; and of them when they stay apart."""
    torch.manual_seed(0)
    base, a = 0.02 * torch.randn(256, 512), torch.randn(16, 512) / 4
    b, x = 4e-6 * torch.randn(256, 16), torch.randn(64, 512)
    base, x = base.bfloat16(), x.bfloat16()
    true = x.double() @ (2.0 * (b @ a)).double().T
    merged = merge_policy(base, a, b, 2.0, torch.empty_like(base))
    low = x.double() @ a.bfloat16().double().T

    def kept(change: torch.Tensor) -> float:
        return float((change * true).sum() / true.square().sum())

    assert kept(x.double() @ (merged.double() - base.double()).T) < 0.4
    assert 0.99 < kept(2.0 * low @ b.bfloat16().double().T) < 1.01


def test_specials_are_never_sampled(vlm):
    words = vlm.tokenizer
    assert vlm.end == words.convert_tokens_to_ids(
        "<end_of_utterance>" if "<image>" in words.get_vocab() else "<|im_end|>"
    )
    banned = {i for i, b in enumerate(vlm.banned[: len(words)].tolist()) if b}
    specials = [*prompts.SPECIAL_TOKENS, "<image>", "<global-img>", "<end_of_utterance>"]
    specials.append("<fake_token_around_image>")
    known = {words.get_vocab()[t] for t in specials if t in words.get_vocab()}
    assert banned == known - {vlm.end}
    assert vlm.image in banned and vlm.banned[len(words) :].all()
    assert vlm.decode([*vlm.encode(TEXT), vlm.end]) == TEXT


@torch.no_grad()
def test_sampled_log_probs_are_the_scored_ones(vlm):
    """The decoder's, with merged weights, cache and guesses, against one pass of the adapted."""
    lora = tiny_models.noisy_lora(vlm)
    options = dict(game="blackjack", steps=8, envs=8, group=4, max_new_tokens=24)
    rollout = tiny_models.play(vlm, lora, **options)
    assert rollout.accepted >= 0 and len(rollout.steps) >= 8
    weights = vlm.weights(lora)
    for step in rollout.steps[:6]:
        features = rollout.features[step.picture : step.picture + 1]
        prefix = vlm.prefix(weights, features, rollout.fixed, rollout.grid)
        ids = torch.tensor([[*step.suffix, *step.tokens]])
        hidden = vlm.suffix(weights, ids, prefix)[0, len(step.suffix) - 1 : -1]
        logits = F.linear(vlm.text.final_norm(weights, hidden), weights.head)
        logits = logits.masked_fill(vlm.banned, -1e30) / 0.7
        scored = torch.log_softmax(logits, -1)[range(len(step.tokens)), step.tokens]
        assert (scored - torch.tensor(step.logprobs)).abs().max() < 1e-3


def bottom_right(module, query, key, value, attention_mask, scaling=None, **_):
    """What FlashAttention-2 computes without a mask: the last query sees all keys."""
    assert attention_mask is None
    length, keys = query.shape[2], key.shape[2]
    seen = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, seen, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_causal_attention_without_a_mask(family, monkeypatch):
    """The way of FlashAttention-2, with its definition in its place: there is no GPU here."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    vlm = model(family)
    lora, rows = tiny_models.noisy_lora(vlm), [vlm.encode(TEXT), vlm.encode("so 4")]
    masked = our_logits(vlm, lora, shown(2), [0, 1], rows)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", bottom_right)
    vlm.text.flash = True
    plain = our_logits(vlm, lora, shown(2), [0, 1], rows)
    for i, row in enumerate(rows):
        assert (masked - plain)[i, : len(row)].abs().max() < 1e-4
    rollout = tiny_models.play(vlm, lora, steps=4, max_new_tokens=8)  # decoding keeps its masks
    assert len(rollout.steps) >= 4
