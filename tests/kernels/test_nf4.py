"""NF4: code for code as bitsandbytes writes it, merged tiles as the merged matrix, errors."""

import math

import pytest
import torch

from turbo.kernels import nf4, ties
from turbo.kernels.reference import NF4_LEVELS, nf4_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 64), (3, 21), (127, 66), (507,), (64, 1024), (3, 5, 70_001)]


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_maxima_equal_bitsandbytes(shape, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    matrix = normal(*shape, dtype=dtype)
    matrix.view(-1)[: matrix.numel() // 3] *= 1e-3
    packed, state = functional.quantize_4bit(matrix, blocksize=64, quant_type="nf4")
    got = nf4.quantize_nf4(matrix)
    assert torch.equal(got.codes, packed.view(-1)) and torch.equal(got.absmax, state.absmax)
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1).long()
    absmax = state.absmax.repeat_interleave(64)[: matrix.numel()]
    read = (torch.tensor(NF4_LEVELS)[codes[: matrix.numel()]] * absmax).to(dtype)
    assert torch.equal(nf4.dequantize_nf4(got), read.view(shape))


def test_a_block_of_zeros_and_the_middle_of_two_levels():
    levels = torch.tensor(NF4_LEVELS)
    middles = (levels[1:] + levels[:-1]) / 2
    block = torch.zeros(64)
    block[:15], block[15] = middles, 1.0
    coded = nf4.quantize_nf4(torch.cat([torch.zeros(64), block]))
    codes = torch.stack([coded.codes >> 4, coded.codes & 15], 1).view(-1).tolist()
    assert codes[:64] == [NF4_LEVELS.index(0.0)] * 64
    assert codes[64:80] == [*range(15), 15]  # the lower level of the two, and the largest
    assert coded.absmax.tolist() == [0.0, 1.0]


def test_codes_are_the_nearest_levels_in_fp64():
    values = normal(64 * 50)
    got = nf4.quantize_nf4(values)
    codes = torch.stack([got.codes >> 4, got.codes & 15], 1).view(-1)
    nearest, absmax = nf4_reference(values.double())
    assert torch.equal(codes.long(), nearest) and torch.equal(got.absmax.double(), absmax)


def test_what_was_coded_is_coded_alike_again():
    once = nf4.dequantize_nf4(nf4.quantize_nf4(normal(40, 64)))
    assert torch.equal(nf4.dequantize_nf4(nf4.quantize_nf4(once)), once)


def factors(count, rows, columns, rank, dtype=torch.float32):
    lora_a = [normal(rank + i, columns, seed=i).to(dtype) for i in range(count)]
    lora_b = [normal(rows, rank + i, seed=50 + i).to(dtype) for i in range(count)]
    scales = [0.3 + 0.2 * i for i in range(count)]
    pairs = zip(lora_a, lora_b, scales, strict=True)
    levels = [ties.trim_threshold(a, b, s, 0.7) for a, b, s in pairs]
    return lora_a, lora_b, scales, [1.0 + i for i in range(count)], levels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 127, 3), (130, 257, 4), (70, 128, 2)])
def test_the_merge_equals_coding_the_merged_matrix(shape, dtype):
    base = normal(*shape[:2], dtype=dtype, seed=9)
    arguments = factors(3, *shape)
    merged = ties.ties_merge_lora(base, *arguments, lam=0.8)
    wanted = nf4.quantize_nf4(merged)
    out = nf4.empty_nf4(tuple(base.shape), dtype, base.device)
    out.codes.fill_(0xEE)
    out.absmax.fill_(math.nan)
    got = nf4.ties_merge_lora_nf4(base, *arguments, lam=0.8, out=out)
    assert got is out and torch.equal(got.codes, wanted.codes)
    assert torch.equal(got.absmax, wanted.absmax)
    a, b, scales, weights, _ = arguments
    pairs = zip(a, b, scales, strict=True)
    levels = [ties.trim_threshold(*pair, 0.7, impl="reference") for pair in pairs]
    exact = (a, b, scales, weights, levels)
    reference = nf4.ties_merge_lora_nf4(base, *exact, lam=0.8, impl="reference")
    assert (reference.codes != wanted.codes).double().mean() < 0.01  # fp64, rounded once
    torch.testing.assert_close(reference.absmax, wanted.absmax, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("shape", [(33, 127, 3), (70, 128, 2)])
def test_the_base_may_be_coded_too(shape):
    coded = nf4.quantize_nf4(normal(*shape[:2], dtype=torch.bfloat16))
    arguments = factors(3, *shape, dtype=torch.float64)
    for impl in ("torch", "reference"):
        got = nf4.ties_merge_lora_nf4(coded, *arguments, impl=impl)
        wanted = nf4.ties_merge_lora_nf4(nf4.dequantize_nf4(coded), *arguments, impl=impl)
        assert torch.equal(got.codes, wanted.codes) and torch.equal(got.absmax, wanted.absmax)


def test_no_tensor_of_the_matrix_size_is_made():
    """Beside what is written, only tiles: counted through the allocations of the CPU."""
    from torch.profiler import ProfilerActivity, profile

    base, arguments = normal(2048, 1024, dtype=torch.bfloat16), factors(2, 2048, 1024, 4)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        nf4.ties_merge_lora_nf4(base, *arguments)
    largest = max(event.cpu_memory_usage for event in trace.events())
    assert 0 < largest <= base.numel() // 2 + 4096  # the codes themselves


A, B, BASE = torch.zeros(2, 6), torch.zeros(4, 2), torch.zeros(4, 6)
BAD = {
    "base: expected float32": dict(base=BASE.double()),
    "base: expected a floating": dict(base=BASE.int()),
    "lora_a: expected at least one": dict(lora_a=[], lora_b=[]),
    r"lora_a\[0\], lora_b\[0\]: expected": dict(lora_a=[A[:, :3]]),
    r"lora_a\[0\]: expected finite": dict(lora_a=[A + math.nan]),
    "weights: expected finite": dict(weights=[0.0]),
    "thresholds: expected numbers >= 0": dict(thresholds=[-1.0]),
    "out shape, dtype": dict(out=nf4.empty_nf4((6, 4), torch.float32, BASE.device)),
    "impl: expected one of": dict(impl="cuda"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    good = dict(base=BASE, lora_a=[A], lora_b=[B], scales=[1.0], weights=[1.0], thresholds=[0.0])
    with pytest.raises(ValueError, match=message):
        nf4.ties_merge_lora_nf4(**good | BAD[message])


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="matrix: expected finite values"):
        nf4.quantize_nf4(torch.tensor([1.0, math.inf]))
