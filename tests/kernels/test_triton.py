"""The Triton kernels against the fp64 reference: small shapes anywhere, real ones on a GPU.

Without a CUDA device the kernels' own code runs in Triton's interpreter (tests/conftest.py).
"""

import math

import pytest
import torch

from tests.kernels.devices import device_of
from turbo.kernels import dispatch, nf4, policy_head, policy_head_sums, ties
from turbo.kernels.policy_head import OUTPUTS

DEVICE = device_of("triton")


def normal(*shape, dtype=torch.float32, seed=0):
    where = DEVICE if math.prod(shape) > 1 << 24 else "cpu"  # large ones take a core many seconds
    generator = torch.Generator(where).manual_seed(seed)
    options = dict(generator=generator, dtype=torch.float64, device=where)
    return torch.randn(shape, **options).to(DEVICE, dtype)


def factors(count, rows, columns, rank, dtype=torch.float32):
    lora_a = [normal(rank + i % 2, columns, dtype=dtype, seed=i) for i in range(count)]
    lora_b = [normal(rows, rank + i % 2, dtype=dtype, seed=90 + i) for i in range(count)]
    return lora_a, lora_b, [0.5 + 0.1 * i for i in range(count)]


# ------------------------------------------------------------------------------------------ TIES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("density", [1e-9, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 507, 3), (127, 66, 4)])
def test_threshold_is_the_kth_largest_of_what_the_merge_sees(shape, density, dtype):
    (a,), (b,), (scale,) = factors(1, *shape, dtype=dtype)
    got = ties.trim_threshold(a, b, scale, density, impl="triton")
    assert got.shape == () and got.dtype == torch.float32 and got.device == a.device
    exact = scale * (b.double() @ a.double())
    k = round(density * exact.numel())
    wanted = exact.abs().flatten().sort(descending=True).values[k - 1] if k else torch.inf
    assert float(got) == pytest.approx(float(wanted), rel=1e-5, abs=1e-6)
    # the same bits: exactly k entries of a single checkpoint survive, and they are the result
    zero = torch.zeros(shape[:2], device=DEVICE)
    merged = ties.ties_merge_lora(zero, [a], [b], [scale], [1.0], [got], impl="triton")
    assert int((merged != 0).sum()) == k


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "shape"), [(1, (5, 3, 1)), (5, (70, 130, 9)), (33, (3, 65, 2))])
def test_merge_equals_the_reference(count, shape, dtype, base_dtype):
    lora_a, lora_b, scales = factors(count, *shape, dtype=dtype)
    weights = [0.2 + (i % 3) for i in range(count)]
    base = normal(*shape[:2], dtype=base_dtype, seed=5)
    levels = {"triton": [0.4] * count, "reference": [0.4] * count}
    if count < 10:  # computed thresholds are at the bits of one implementation
        for impl in levels:
            pairs = zip(lora_a, lora_b, scales, strict=True)
            levels[impl] = [ties.trim_threshold(*pair, 0.6, impl=impl) for pair in pairs]
    arguments = (lora_a, lora_b, scales, weights, levels["triton"])
    out = torch.full_like(base, torch.nan)
    got = ties.ties_merge_lora(base, *arguments, lam=0.7, out=out, impl="triton")
    assert got is out
    exact = (*arguments[:-1], levels["reference"])
    exact = ties.ties_merge_lora(base.double(), *exact, lam=0.7, impl="reference")
    # An entry at the threshold, or an election that only rounding decides, may fall either way.
    unit = torch.finfo(base_dtype).eps
    wrong = (got.double() - exact).abs() > 1e-5 + unit * exact.abs()
    assert wrong.double().mean() < 0.005 and int(wrong.sum()) <= 3
    again = ties.ties_merge_lora(base, *arguments, lam=0.7, impl="triton")
    assert torch.equal(got, again)


def test_merge_of_nothing_and_of_what_cancels_is_the_base():
    (a,), (b,), _ = factors(1, 9, 70, 2)
    base = normal(9, 70, seed=1)
    level = ties.trim_threshold(a, b, 1.0, 0.0, impl="triton")
    assert torch.equal(ties.ties_merge_lora(base, [a], [b], [1.0], [1.0], [level]), base)
    opposite = ([a, a], [b, b], [1.0, -1.0], [1.0, 1.0], [0.0, 0.0])
    assert torch.equal(ties.ties_merge_lora(base, *opposite, impl="triton"), base)


def test_what_the_kernels_do_not_take_runs_as_pytorch():
    lora_a, lora_b, scales = factors(2, 8, 6, 2)
    base = normal(8, 6)
    mixed = [lora_a[0], lora_a[1].double()], [lora_b[0], lora_b[1].double()]
    for old, (a, b) in ((base, mixed), (base.double(), (lora_a, lora_b))):
        arguments = (a, b, scales, [1.0, 1.0], [0.1, 0.1])
        got = ties.ties_merge_lora(old, *arguments, impl="triton")
        assert torch.equal(got, ties.ties_merge_lora(old, *arguments, impl="torch"))


def test_strided_tensors_merge_like_their_copies():
    lora_a, lora_b, scales = factors(2, 70, 9, 3)
    base = normal(9, 70).T
    strided = [a.T.contiguous().T for a in lora_a], lora_b
    arguments = (scales, [1.0, 1.0], [0.1, 0.1])
    got = ties.ties_merge_lora(base, *strided, *arguments, impl="triton")
    plain = ties.ties_merge_lora(base.contiguous(), lora_a, lora_b, *arguments, impl="triton")
    assert torch.equal(got, plain)


@pytest.mark.parametrize("grid", [(40, 24), (7, 3), (33, 17), (1, 40)])
def test_programs_that_run_together_work_on_a_square(grid):
    from tests.kernels.probe_kernels import note_places

    count = grid[0] * grid[1]
    places = torch.full((count, 2), -1, device=DEVICE)
    note_places[grid](places)
    assert len({tuple(p) for p in places.tolist()}) == count  # each tile once
    assert places.min() == 0 and places.amax(0).tolist() == [n - 1 for n in grid]
    together = 128
    for first in range(0, count - together + 1, together):
        spans = places[first : first + together]
        down, across = (spans.amax(0) - spans.amin(0) + 1).tolist()
        stripe = int(spans[0, 1]) // 16
        if stripe == int(spans[-1, 1]) // 16:  # not where a stripe ends
            width = min(16, grid[1] - 16 * stripe)  # the last one may be thin
            assert across <= width and down <= together // width + 2


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"impl='triton'.*got cpu.*TRITON_INTERPRET"):
        dispatch.choose_impl("triton", torch.device("cpu"), has_triton=True)
    with pytest.raises(NotImplementedError, match="no Triton kernel yet"):
        dispatch.choose_impl("triton", torch.device("cuda"))
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install triton"):
        dispatch.choose_impl("triton", torch.device("cuda"), has_triton=True)
    assert dispatch.choose_impl(None, torch.device("cuda"), has_triton=True) == "torch"


# ------------------------------------------------------------------------------------------- NF4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 2), (67, 128, 3)])
def test_nf4_merge_equals_coding_the_merged_matrix(shape, dtype):
    lora_a, lora_b, scales = factors(3, *shape)
    base = normal(*shape[:2], dtype=dtype, seed=5)
    base[0, :64] = 0
    arguments = (lora_a, lora_b, scales, [1.0, 2.0, 1.0], [0.4, 0.1, torch.inf])
    merged = ties.ties_merge_lora(base, *arguments, impl="triton")
    got = nf4.ties_merge_lora_nf4(base, *arguments, impl="triton")
    wanted = nf4.quantize_nf4(merged)
    assert torch.equal(got.absmax, wanted.absmax) and torch.equal(got.codes, wanted.codes)


# ----------------------------------------------------------------------------------- policy head


def head_inputs(rows, width, vocabulary, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(vocabulary, (rows,), generator=generator).to(DEVICE)
    targets[1::4] = -100
    banned = torch.zeros(vocabulary, dtype=torch.bool, device=DEVICE)
    banned[2::7] = vocabulary > 1
    hidden, teacher = (normal(rows, width + i, seed=2 * i) / width**0.5 for i in (0, 2))
    hidden, teacher = hidden.to(dtype), teacher.to(dtype)
    weight = normal(vocabulary, width, dtype=dtype, seed=1)
    teacher_weight = normal(vocabulary, width + 2, dtype=dtype, seed=3)
    bias = normal(vocabulary, dtype=dtype, seed=4)
    return hidden, weight, targets, teacher, teacher_weight, bias, banned


def run_head(inputs, impl, with_ban, **options):
    hidden, weight, targets, teacher, teacher_weight, bias, banned = inputs
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    out = policy_head.policy_head(
        leaves[0],
        leaves[1],
        targets,
        temperature=0.7,
        teacher_hidden=teacher,
        teacher_weight=teacher_weight,
        bias=leaves[2],
        banned=banned if with_ban else None,
        impl=impl,
        **options,
    )
    loss = 0.0
    for i, name in enumerate(OUTPUTS):
        value = vars(out)[name]
        if value.requires_grad:
            shares = torch.linspace(0.5, 1.5 + i, value.numel(), device=value.device)
            loss = loss + (shares * value.masked_fill(value.isinf(), 0.0)).sum()
    return out, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("with_ban", [False, True])
@pytest.mark.parametrize(
    ("shape", "width"),  # of a part of the vocabulary
    [
        ((1, 1, 1), 1),
        ((5, 7, 33), 64),
        ((40, 70, 101), 64),
        ((9, 3, 507), 64),
        ((2, 3, 4100), 2048),  # a row is of several programs
        ((2, 3, 4100), None),
    ],
)
def test_head_and_every_gradient_equal_the_reference(shape, width, with_ban):
    inputs = head_inputs(*shape)
    exact, exact_grads = run_head(inputs, "reference", with_ban)
    chunk = None if width is None else width * shape[0]
    got, grads = run_head(inputs, "triton", with_ban, chunk_elements=chunk)
    for name in OUTPUTS:
        value, wanted = vars(got)[name], vars(exact)[name]
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), wanted.double(), rtol=2e-5, atol=2e-5)
    for grad, wanted in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad, wanted.to(grad), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("chunk", "passes"), [(None, 1), (64 * 5, 4)])
def test_products_of_one_part_are_kept_for_the_backward(chunk, passes, monkeypatch):
    formed = []
    products = policy_head_sums.Sides.products
    monkeypatch.setattr(
        policy_head_sums.Sides, "products", lambda *args: formed.append(1) or products(*args)
    )
    run_head(head_inputs(5, 7, 90), "triton", False, chunk_elements=chunk)
    assert len(formed) == passes


def test_head_in_bf16_is_as_exact_as_eager_bf16():
    inputs = head_inputs(33, 64, 300, dtype=torch.bfloat16)
    exact, exact_grads = run_head(
        [x.double() if x.is_floating_point() else x for x in inputs], "reference", True
    )
    got, grads = run_head(inputs, "triton", True)
    eager, eager_grads = run_head(inputs, "torch", True)

    def error(value, wanted):
        finite = wanted.isfinite()
        return (value.double() - wanted.double())[finite].abs().max().item()

    for name in OUTPUTS:
        ours, theirs = (error(vars(out)[name], vars(exact)[name]) for out in (got, eager))
        assert ours <= theirs + 1e-3, name
    for ours, theirs, wanted in zip(grads, eager_grads, exact_grads, strict=True):
        assert error(ours, wanted) <= 1.5 * error(theirs, wanted) + 1e-3


def test_head_without_teacher_and_of_a_shared_head():
    hidden, weight, targets, teacher, *_ = head_inputs(6, 5, 40)
    for options in ({}, {"teacher_hidden": teacher[:, :5].contiguous()}):
        got = policy_head.policy_head(hidden, weight, targets, impl="triton", **options)
        exact = policy_head.policy_head(hidden, weight, targets, impl="reference", **options)
        for name, wanted in vars(exact).items():
            value = vars(got)[name]
            assert (value is None) == (wanted is None), name
            if value is not None:
                torch.testing.assert_close(value.double(), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 130])
def test_gradients_of_a_shared_head_whose_logits_are_kept(rows):
    """Both sides are one product, cut in two; the outputs of 130 rows are of two programs."""
    hidden, weight, targets, teacher, *_, banned = head_inputs(rows, 5, 40)
    teacher, found = teacher[:, :5].contiguous(), []
    for impl in ("triton", "reference"):
        leaf = hidden.detach().clone().requires_grad_()
        options = dict(teacher_hidden=teacher, banned=banned, temperature=0.7, impl=impl)
        out = policy_head.policy_head(leaf, weight, targets, **options)
        value = (out.reverse_kl - 0.3 * out.entropy + out.forward_kl).sum()
        value = value + out.logprob.masked_fill(out.logprob.isinf(), 0.0).sum()
        found.append((value.detach().double(), *torch.autograd.grad(value, leaf)))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-4, atol=2e-5)


# ---------------------------------------------------------------------------- real sizes, on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_merge_on_a_gpu(dtype):
    lora_a, lora_b, scales = factors(4, 3584, 2048, 64, dtype=dtype)
    base = normal(3584, 2048, dtype=torch.bfloat16)
    pairs = list(zip(lora_a, lora_b, scales, strict=True))
    levels = [ties.trim_threshold(a, b, s, 0.8) for a, b, s in pairs]
    for (a, b, s), level in zip(pairs, levels, strict=True):
        exact = (s * (b.double() @ a.double())).abs().flatten()
        wanted = exact.kthvalue(exact.numel() - round(0.8 * exact.numel()) + 1).values
        assert float(level) == pytest.approx(float(wanted), rel=1e-4)
    arguments = (lora_a, lora_b, scales, [1.0, 0.5, 0.25, 0.25], levels)
    got = ties.ties_merge_lora(base, *arguments)
    exact = ties.ties_merge_lora(base.double(), *arguments, impl="reference")
    wrong = (got.double() - exact).abs() > 0.02 + 2**-8 * exact.abs()
    assert wrong.double().mean() < 1e-4
    coded, plain = nf4.ties_merge_lora_nf4(base, *arguments), nf4.quantize_nf4(got)
    assert torch.equal(coded.codes, plain.codes) and torch.equal(coded.absmax, plain.absmax)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [256, 1024])
def test_real_head_on_a_gpu(rows):
    inputs = head_inputs(rows, 2048, 151_936, dtype=torch.bfloat16)
    inputs = (0.02 * inputs[0], *inputs[1:])
    exact, exact_grads = run_head(
        [x.float() if x.is_floating_point() else x for x in inputs], "torch", True
    )
    got, grads = run_head(inputs, "triton", True)
    for name in OUTPUTS:
        torch.testing.assert_close(vars(got)[name], vars(exact)[name], rtol=0.02, atol=0.02)
    for grad, wanted in zip(grads, exact_grads, strict=True):
        difference = (grad.float() - wanted).norm() / wanted.norm()
        assert difference < 0.02
