"""The Triton kernels of TIES: the trim threshold by histograms, and the merge.

Both compute a task vector by the same `tau_tile` and tiling, so both see the same bits. The merge
walks over all checkpoints inside a tile and keeps P, N, Wp, Wn in registers (equations: ties.py):
nothing of the matrix's size is written but the result.

The k-th largest |tau| is found digit by digit from the top: floats that are not negative sort like
their bits. A pass counts the next 8 bits among the entries that share the digits found so far, on
recomputed tiles; four passes give all 31 bits. Each program counts many tiles in registers and
adds its counts to the global ones once.

Importing this needs triton; factors may be fp32, bf16 or fp16. Left out: fp64, which ties.py
computes with PyTorch.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles_triton import (
    BLOCK_COLUMNS,
    BLOCK_RANK,
    BLOCK_ROWS,
    TRITON_DTYPES,
    addresses,
    rounded,
    tau_tile,
)

DIGITS = ((23, 8), (15, 8), (7, 8), (0, 7))  # (shift, bits) of each counting pass over 31 bits
PROGRAMS = 1024  # that count: enough for any GPU, few enough that adding up costs nothing


@triton.jit
def merged_tile(
    base,
    a_addresses,  # [K] int64
    b_addresses,
    ranks,  # [K] int32
    numbers,  # [3, K] float32: scale, threshold, weight
    lam,
    rows,
    columns,
    count,  # K
    FACTOR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """This program's tile of base + lam * TIES in base's dtype, where it lies, what is inside."""
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    positive = tl.zeros([BM, BN], dtype=tl.float32)
    negative = tl.zeros([BM, BN], dtype=tl.float32)
    positive_weight = tl.zeros([BM, BN], dtype=tl.float32)
    negative_weight = tl.zeros([BM, BN], dtype=tl.float32)
    for i in range(count):
        a = tl.load(a_addresses + i).to(tl.pointer_type(FACTOR))
        b = tl.load(b_addresses + i).to(tl.pointer_type(FACTOR))
        rank = tl.load(ranks + i)
        scale = tl.load(numbers + i)
        threshold = tl.load(numbers + count + i)
        weight = tl.load(numbers + 2 * count + i)
        tau = tau_tile(a, b, rank, scale, rows, columns, row, column, BM, BN, BR)
        tau = tl.where(tl.abs(tau) >= threshold, tau, 0.0)
        positive += weight * tl.maximum(tau, 0.0)
        negative += weight * tl.minimum(tau, 0.0)
        positive_weight += tl.where(tau > 0, weight, 0.0)
        negative_weight += tl.where(tau < 0, weight, 0.0)
    total = positive + negative
    agreeing = tl.where(total > 0, positive, tl.where(total < 0, negative, 0.0))
    weight = tl.where(total > 0, positive_weight, tl.where(total < 0, negative_weight, 1.0))
    m = row + tl.arange(0, BM).to(tl.int64)
    n = column + tl.arange(0, BN).to(tl.int64)
    inside = (m[:, None] < rows) & (n[None, :] < columns)
    at = m[:, None] * columns + n[None, :]
    old = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    merged = old + lam * tl.div_rn(agreeing, weight)
    return rounded(merged, base.dtype.element_ty, 0, 0, False), at, inside


@triton.jit
def _merge(
    base,
    out,
    a_addresses,
    b_addresses,
    ranks,
    numbers,
    lam,
    rows,
    columns,
    count,
    FACTOR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    merged, at, inside = merged_tile(
        base,
        a_addresses,
        b_addresses,
        ranks,
        numbers,
        lam,
        rows,
        columns,
        count,
        FACTOR,
        BM,
        BN,
        BR,
    )
    tl.store(out + at, merged, mask=inside)


@triton.jit
def _count(
    a,
    b,
    rank,
    scale,
    rows,
    columns,
    prefix,  # [1] int32: the digits found so far
    counts,  # [2 ** BITS] int32
    tiles,
    tiles_across,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    found = tl.load(prefix)
    own = tl.zeros([1 << BITS], dtype=tl.int32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, column = (tile // tiles_across) * BM, (tile % tiles_across) * BN
        tau = tau_tile(a, b, rank, scale, rows, columns, row, column, BM, BN, BR)
        bits = tl.abs(tau).to(tl.int32, bitcast=True)
        m = row + tl.arange(0, BM)
        n = column + tl.arange(0, BN)
        counted = (m[:, None] < rows) & (n[None, :] < columns) & (bits >> (SHIFT + BITS) == found)
        digits = (bits >> SHIFT) & ((1 << BITS) - 1)
        digits, counted = tl.reshape(digits, [BM * BN]), tl.reshape(counted, [BM * BN])
        own += tl.histogram(digits, 1 << BITS, mask=counted)
    tl.atomic_add(counts + tl.arange(0, 1 << BITS), own)


def trim_threshold(lora_a: Tensor, lora_b: Tensor, scale: float, k: int) -> Tensor:
    """The k-th largest |s B A|, k >= 1, without a transfer to the host.  # [] float32"""
    rows, columns = lora_b.shape[0], lora_a.shape[1]
    across = triton.cdiv(columns, BLOCK_COLUMNS)
    tiles = triton.cdiv(rows, BLOCK_ROWS) * across
    device = lora_a.device
    prefix = torch.zeros(1, dtype=torch.int32, device=device)
    left = torch.full((1,), k, device=device)  # the k-th largest among those with this prefix
    blocks = dict(BM=BLOCK_ROWS, BN=BLOCK_COLUMNS, BR=BLOCK_RANK)
    factors = lora_a.contiguous(), lora_b.contiguous(), lora_a.shape[0]
    for shift, bits in DIGITS:
        counts = torch.zeros(1 << bits, dtype=torch.int32, device=device)
        matrix = (*factors, scale, rows, columns, prefix, counts, tiles, across)
        _count[(min(tiles, PROGRAMS),)](*matrix, SHIFT=shift, BITS=bits, **blocks)
        at_least = counts.flip(0).cumsum(0).flip(0)  # entries whose digit is >= this one
        digit = (at_least >= left).sum(0, keepdim=True) - 1
        left = left - (at_least[digit] - counts[digit])
        prefix = (prefix << bits) | digit.int()
    return prefix.view(torch.float32)[0]


def merge(
    base: Tensor,
    lora_a: Sequence[Tensor],  # of one dtype
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    weights: Sequence[float],
    thresholds: Sequence[float],
    lam: float,
    out: Tensor,
) -> Tensor:
    """`ties.ties_merge_lora`, checked already, in one launch."""
    result = out
    if not out.is_contiguous():
        result = torch.empty_like(base, memory_format=torch.contiguous_format)
    lora_a, lora_b = [a.contiguous() for a in lora_a], [b.contiguous() for b in lora_b]
    grid, arguments, blocks = launch(base, lora_a, lora_b, scales, weights, thresholds, lam)
    _merge[grid](base.contiguous(), result, *arguments, **blocks)
    return out if result is out else out.copy_(result)


def launch(
    base: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    weights: Sequence[float],
    thresholds: Sequence[float],
    lam: float,
) -> tuple[tuple[int, int], list, dict]:
    """Grid, arguments behind the outputs, and constants of a kernel built on `merged_tile`.

    The factors must be contiguous: the kernel knows but where they begin.
    """
    (rows, columns), device = base.shape, base.device
    ranks = torch.tensor([a.shape[0] for a in lora_a], dtype=torch.int32, device=device)
    numbers = torch.tensor([scales, thresholds, weights], dtype=torch.float32, device=device)
    places = addresses(lora_a), addresses(lora_b)
    arguments = [*places, ranks, numbers, lam, rows, columns, len(lora_a)]
    grid = (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(columns, BLOCK_COLUMNS))
    factor = TRITON_DTYPES[lora_a[0].dtype]
    return grid, arguments, dict(FACTOR=factor, BM=BLOCK_ROWS, BN=BLOCK_COLUMNS, BR=BLOCK_RANK)
