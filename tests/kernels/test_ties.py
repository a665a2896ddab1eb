"""TIES and linear merging: numpy brute force, peft, mergekit's rule, limits, streaming, errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo.kernels import checks, ties, tiles

SHAPES = [(1, 1, 1), (1, 507, 3), (127, 33, 4), (130, 257, 16)]


def make_factors(count, rows, columns, rank, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    lora_a = [normal(rank, columns) for _ in range(count)]
    lora_b = [normal(rows, rank) for _ in range(count)]
    scales = [0.5 + i for i in range(count)]
    return normal(rows, columns), lora_a, lora_b, scales


def products(lora_a, lora_b, scales):
    factors = zip(lora_a, lora_b, scales, strict=True)
    return [s * (b.double() @ a.double()) for a, b, s in factors]


def merge_lora(base, lora_a, lora_b, scales, weights, density, **options):
    impl = options.get("impl")
    levels = [
        ties.trim_threshold(a, b, s, density, impl=impl)
        for a, b, s in zip(lora_a, lora_b, scales, strict=True)
    ]
    return ties.ties_merge_lora(base, lora_a, lora_b, scales, weights, levels, **options)


def brute_force(base, taus, weights, density, lam=1.0):
    """Element by element, following the paper's three steps."""
    taus = [tau.double().flatten().numpy().copy() for tau in taus]
    result = base.double().flatten().numpy().copy()
    for tau in taus:
        k = round(density * tau.size)
        level = np.sort(np.abs(tau))[::-1][k - 1] if k else math.inf
        tau[np.abs(tau) < level] = 0.0
    for j in range(result.size):
        vote = sum(w * tau[j] for w, tau in zip(weights, taus, strict=True))
        pairs = zip(weights, taus, strict=True)
        agree = [(w, tau[j]) for w, tau in pairs if tau[j] * vote > 0]
        if agree:
            result[j] += lam * sum(w * t for w, t in agree) / sum(w for w, _ in agree)
    return torch.tensor(result).reshape(base.shape)


# ---------------------------------------------------------------------------------- the result


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("density", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_lora_merge_equals_brute_force(shape, density, impl):
    base, *factors = make_factors(5, *shape, dtype=torch.float64)
    weights = [0.1, 0.4, 0.2, 0.25, 0.05]
    got = merge_lora(base, *factors, weights, density, lam=0.7, impl=impl)
    expected = brute_force(base, products(*factors), weights, density, lam=0.7)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(7,), (9, 5), (3, 4, 5), (2, 3, 2, 5)])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_dense_merge_takes_any_rank(shape, impl):
    base, *taus = torch.randn(4, *shape, dtype=torch.float64)
    got = ties.ties_merge(base, taus, [1.0, 2.0, 3.0], 0.5, impl=impl)
    torch.testing.assert_close(got, brute_force(base, taus, [1.0, 2.0, 3.0], 0.5))


def test_equals_peft_for_unit_weights_and_distinct_values():
    from peft.utils.merge_utils import ties as peft_ties

    base, *factors = make_factors(6, 40, 50, 8, dtype=torch.float64)
    taus = products(*factors)
    expected = base + peft_ties(taus, torch.ones(6, dtype=torch.float64), density=0.8)
    torch.testing.assert_close(merge_lora(base, *factors, [1.0] * 6, 0.8), expected)
    torch.testing.assert_close(ties.ties_merge(base, taus, [1.0] * 6, 0.8), expected)


def test_weights_vote_and_the_divisor_is_the_agreeing_weight():
    # mergekit's rule: 3 votes of +1 beat 2 votes of -1 (peft would see 0.9 against -2)
    base, taus = torch.zeros(1), [torch.tensor([0.9]), torch.tensor([-1.0]), torch.tensor([-1.0])]
    got = ties.ties_merge(base, taus, [3.0, 1.0, 1.0], 1.0)
    torch.testing.assert_close(got, torch.tensor([0.9]))
    taus = [torch.tensor([1.0]), torch.tensor([4.0]), torch.tensor([-1.0])]
    got = ties.ties_merge(base, taus, [1.0, 3.0, 5.0], 1.0)
    torch.testing.assert_close(got, torch.tensor([(1 + 3 * 4) / (1 + 3)]))


@pytest.mark.parametrize("count", [1, 4, 33])
@pytest.mark.parametrize("density", [0.8, 1.0])
def test_identical_checkpoints_merge_to_that_checkpoint(count, density):
    base, (a,), (b,), (scale,) = make_factors(1, 31, 45, 4)
    weights = [0.1 + 0.37 * i for i in range(count)]
    got = merge_lora(base, [a] * count, [b] * count, [scale] * count, weights, density)
    alone = merge_lora(base, [a], [b], [scale], [1.0], density)
    torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)
    if density == 1.0:
        torch.testing.assert_close(got, base + scale * (b @ a), rtol=1e-5, atol=1e-5)


def test_merging_products_is_not_merging_factors():
    base, lora_a, lora_b, scales = make_factors(3, 20, 30, 4, dtype=torch.float64)
    scales, ones = [1.0] * 3, [1.0] * 3
    got = merge_lora(base, lora_a, lora_b, scales, ones, 0.8)
    merged_a = ties.ties_merge(torch.zeros_like(lora_a[0]), lora_a, ones, 0.8)
    merged_b = ties.ties_merge(torch.zeros_like(lora_b[0]), lora_b, ones, 0.8)
    assert not torch.allclose(got, base + merged_b @ merged_a, atol=0.5)


def test_every_checkpoint_matters():
    base, lora_a, lora_b, scales = make_factors(4, 20, 30, 4)
    first = merge_lora(base, lora_a, lora_b, scales, [1.0] * 4, 0.8)
    for i in range(4):
        changed = [a.clone() for a in lora_a]
        changed[i] += 0.1
        assert not torch.equal(first, merge_lora(base, changed, lora_b, scales, [1.0] * 4, 0.8))


def test_cancelling_checkpoints_leave_the_base():
    base, (a,), (b,), (scale,) = make_factors(1, 12, 13, 3)
    got = merge_lora(base, [a, a], [b, b], [scale, -scale], [0.5, 0.5], 0.8)
    assert torch.equal(got, base)


def test_ranks_may_differ_and_zero_columns_stay():
    base, (a, _), (b, _), scales = make_factors(2, 12, 13, 3)
    wide_a, wide_b = torch.randn(5, 13), torch.randn(12, 5)
    a[:, 4] = wide_a[:, 4] = 0.0
    got = merge_lora(base, [a, wide_a], [b, wide_b], scales, [1.0, 1.0], 1.0)
    assert torch.equal(got[:, 4], base[:, 4])
    taus = products([a, wide_a], [b, wide_b], scales)
    torch.testing.assert_close(got, brute_force(base, taus, [1.0, 1.0], 1.0).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_factors_merge_in_fp32(dtype):
    base, *factors = make_factors(3, 33, 65, 8, dtype=dtype)
    got = merge_lora(base.float(), *factors, [1.0, 2.0, 3.0], 0.8)
    expected = brute_force(base.float(), products(*factors), [1.0, 2.0, 3.0], 0.8)
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-4)
    assert merge_lora(base, *factors, [1.0, 2.0, 3.0], 0.8).dtype == dtype


def test_checkpoints_of_different_dtypes_keep_their_own_trim():
    base, lora_a, lora_b, scales = make_factors(2, 33, 65, 8)
    lora_a[1], lora_b[1] = lora_a[1].double(), lora_b[1].double()
    for weights in ([1.0, 0.0], [0.0, 1.0]):
        got = merge_lora(torch.zeros_like(base), lora_a, lora_b, scales, weights, 0.8)
        assert (got != 0).sum() == round(0.8 * base.numel())


def test_linear_merge_is_the_weighted_mean_of_products():
    base, *factors = make_factors(3, 70, 600, 8)
    weights = [1.0, 2.0, 5.0]
    mean = sum(w * tau for w, tau in zip(weights, products(*factors), strict=True)) / 8
    expected = (base + 0.5 * mean).float()
    for impl in ("torch", "reference"):
        got = ties.linear_merge_lora(base, *factors, weights, lam=0.5, impl=impl)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_out_is_filled_whole_and_runs_repeat_bit_for_bit():
    base, *factors = make_factors(3, 130, 257, 8)
    out = torch.full_like(base, float("nan"))
    got = merge_lora(base, *factors, [1.0] * 3, 0.8, out=out)
    assert got is out and not out.isnan().any()
    assert torch.equal(out, merge_lora(base, *factors, [1.0] * 3, 0.8))
    dense = [tau.float() for tau in products(*factors)]
    out.fill_(float("nan"))
    assert torch.equal(
        ties.ties_merge(base, dense, [1.0] * 3, 0.8, out=out),
        ties.ties_merge(base, dense, [1.0] * 3, 0.8),
    )


# ----------------------------------------------------------------------------------- the trim


@pytest.mark.parametrize("selection", ["partition", "radix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.8, 0.999, 1.0])
def test_threshold_is_exactly_the_kth_largest(monkeypatch, selection, dtype, density):
    if selection == "radix":
        monkeypatch.setattr(tiles, "SORTED_SELECTION", 0)
    _, (a,), (b,), (scale,) = make_factors(1, 127, 507, 4, dtype=dtype)
    a[:, 3] = 0.0
    rows = tiles.row_tiles(127, 507, torch.device("cpu"))
    tau = torch.cat([tiles.task_vector_tile(a, b, scale, r, dtype) for r in rows])
    k = round(density * tau.numel())
    threshold = ties.trim_threshold(a, b, scale, density)
    assert threshold.shape == () and threshold.dtype == dtype
    assert threshold == tau.abs().flatten().sort(descending=True).values[k - 1]
    assert (tau.abs() >= threshold).sum() == k or threshold == 0


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-1024, 1024, width=32), min_size=1, max_size=40),
    density=st.floats(0.0, 1.0),
)
def test_radix_selection_equals_sorting(values, density):
    tau = torch.tensor(values, dtype=torch.float32)
    k = round(density * len(values))
    if k:
        expected = tau.abs().sort(descending=True).values[k - 1]
        assert tiles.radix_select(lambda: iter(tau.split(7)), k) == expected


def test_the_merge_keeps_exactly_k_entries_of_a_single_checkpoint():
    base, *factors = make_factors(1, 127, 507, 16)
    got = merge_lora(torch.zeros_like(base), *factors, [1.0], 0.8)
    assert (got != 0).sum() == round(0.8 * base.numel())


def test_entries_tied_at_the_threshold_are_all_kept():
    tau = torch.tensor([1.0, -1.0, 1.0, 2.0, 0.5])
    got = ties.ties_merge(torch.zeros(5), [tau], [1.0], 0.4)
    assert torch.equal(got, torch.tensor([1.0, -1.0, 1.0, 2.0, 0.0]))


def test_density_zero_gives_the_base_and_an_infinite_threshold():
    base, *factors = make_factors(3, 12, 13, 3)
    assert torch.equal(merge_lora(base, *factors, [1.0] * 3, 0.0), base)
    assert ties.trim_threshold(factors[0][0], factors[1][0], 1.0, 0.0) == math.inf


# ---------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("weighting", ["sma", "ema"])
@pytest.mark.parametrize("count", [1, 2, 33])
def test_streaming_equals_the_batch_merge(weighting, count):
    base, *factors = make_factors(count, 130, 257, 4, dtype=torch.float64)
    stream, linear = ties.StreamingTies(weighting, 0.3), ties.StreamingLinear(weighting, 0.3)
    for a, b, scale in zip(*factors, strict=True):
        stream.push_lora("layer", a, b, scale, ties.trim_threshold(a, b, scale, 0.8))
        linear.push_lora("layer", a, b, scale)
    weights = [0.7 ** (count - 1)] + [0.3 * 0.7 ** (count - 1 - i) for i in range(1, count)]
    weights = [1.0] * count if weighting == "sma" else weights
    expected = merge_lora(base, *factors, weights, 0.8, lam=0.9)
    torch.testing.assert_close(stream.merge("layer", base, lam=0.9), expected)
    expected = ties.linear_merge_lora(base, *factors, weights, lam=0.9)
    torch.testing.assert_close(linear.merge("layer", base, lam=0.9), expected)


def test_streaming_holds_matrices_apart_and_takes_dense_task_vectors():
    base, one, two, three = torch.randn(4, 6, 5, 4)
    stream = ties.StreamingTies()
    for tau in (one, two):
        stream.push("conv", tau, 0.5)
    stream.push("other", three, 0.5)
    expected = ties.ties_merge(base, [one, two], [1.0, 1.0], 0.5)
    torch.testing.assert_close(stream.merge("conv", base), expected)


def test_streaming_state_resumes_with_the_same_bits():
    base, *factors = make_factors(4, 20, 30, 4)
    for kind in (ties.StreamingTies, ties.StreamingLinear):
        one, two = kind("ema", 0.5), kind("ema", 0.5)
        for i, (a, b, scale) in enumerate(zip(*factors, strict=True)):
            if i == 2:
                two.load_state_dict({k: v.clone() for k, v in one.state_dict().items()})
            level = [] if kind is ties.StreamingLinear else [ties.trim_threshold(a, b, scale, 0.8)]
            for stream in (one, two) if i >= 2 else (one,):
                stream.push_lora("x", a, b, scale, *level)
        assert torch.equal(one.merge("x", base), two.merge("x", base))


def test_long_forgotten_sums_become_zero_not_subnormal():
    stream = ties.StreamingTies("ema", 0.5)
    stream.push("x", -torch.ones(3, 3), 1.0)
    for _ in range(140):
        stream.push("x", torch.ones(3, 3), 1.0)
    assert stream.sums["x"][1].abs().max() == 0
    torch.testing.assert_close(stream.merge("x", torch.zeros(3, 3)), torch.ones(3, 3))


# ------------------------------------------------------------------------------------- errors


def call(**changes):
    base, lora_a, lora_b, scales = make_factors(2, 6, 7, 3)
    arguments = {
        "base": base,
        "lora_a": lora_a,
        "lora_b": lora_b,
        "scales": scales,
        "weights": [1.0, 1.0],
        "thresholds": [0.1, torch.tensor(0.1)],
    }
    return ties.ties_merge_lora(**arguments | changes)


NAN = torch.full((3, 7), float("nan"))
BAD = {
    "empty history": ({"lora_a": [], "lora_b": [], "scales": []}, "lora_a.*empty"),
    "negative weight": ({"weights": [1.0, -1.0]}, "weights"),
    "all-zero weights": ({"weights": [0.0, 0.0]}, "weights"),
    "NaN weight": ({"weights": [1.0, math.nan]}, "weights"),
    "too few weights": ({"weights": [1.0]}, "weights.*expected 2"),
    "too few thresholds": ({"thresholds": [1.0]}, "thresholds.*expected 2"),
    "NaN threshold": ({"thresholds": [1.0, math.nan]}, "thresholds"),
    "infinite scale": ({"scales": [1.0, math.inf]}, "scales"),
    "wrong shape": ({"lora_a": [torch.ones(3, 8)] * 2}, r"lora_a\[0\].*expected"),
    "wrong rank": ({"lora_b": [torch.ones(6, 4)] * 2}, r"lora_b\[0\].*expected"),
    "vector factor": ({"lora_b": [torch.ones(6)] * 2}, r"lora_b\[0\].*2 dimensions"),
    "integer factor": ({"lora_a": [torch.ones(3, 7).int()] * 2}, r"lora_a\[0\].*floating"),
    "mixed dtypes": ({"lora_a": [torch.ones(3, 7).double()] * 2}, "dtype"),
    "other device": ({"base": torch.ones(6, 7, device="meta")}, "device"),
    "NaN factor": ({"lora_a": [torch.ones(3, 7), NAN]}, r"lora_a\[1\].*NaN"),
    "out of wrong dtype": ({"out": torch.ones(6, 7).double()}, "out"),
    "base of wrong rank": ({"base": torch.ones(6)}, "base"),
    "unknown impl": ({"impl": "cuda"}, "impl"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_other_bad_arguments():
    a, b = torch.ones(3, 7), torch.ones(6, 3)
    for density in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="density"):
            ties.trim_threshold(a, b, 1.0, density)
    with pytest.raises(ValueError, match="NaN"):
        ties.trim_threshold(NAN, b, 1.0, 0.5)
    with pytest.raises(ValueError, match=r"task_vectors\[0\]"):
        ties.ties_merge(torch.ones(3), [torch.ones(4)], [1.0], 0.5)
    with pytest.raises(ValueError, match="weighting"):
        ties.StreamingTies("score")
    with pytest.raises(ValueError, match="alpha"):
        ties.StreamingTies("ema", 0.0)
    with pytest.raises(ValueError, match="nothing was pushed"):
        ties.StreamingTies().merge("x", torch.ones(2, 2))
    stream = ties.StreamingTies()
    stream.push_lora("x", a, b, 1.0, 0.0)
    with pytest.raises(ValueError, match="pushed"):
        stream.push_lora("x", torch.ones(3, 8), b, 1.0, 0.0)


def test_a_caller_who_has_looked_is_trusted_with_the_entries_alone():
    broken = {"lora_a": [torch.ones(3, 7), NAN], "check_finite": False}
    assert call(**broken).isnan().any()
    with pytest.raises(ValueError, match="weights"):
        call(**broken, weights=[1.0])
    same = {"check_finite": False}
    assert torch.equal(call(**same), call())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_entry_that_is_not_finite_is_found(value, dtype):
    for size in (1, 7, 1_000):
        good = torch.full((size,), torch.finfo(dtype).max, dtype=dtype)
        checks.check_finite({"good": good, "wide": torch.ones(2), "none": good[:0]})
        for at in (0, size // 2, size - 1):
            bad = good.clone()
            bad[at] = value
            with pytest.raises(ValueError, match="bad: expected finite"):
                checks.check_finite({"good": good, "none": good[:0], "bad": bad})
