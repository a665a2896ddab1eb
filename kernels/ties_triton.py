"""The Triton kernels of TIES: the trim threshold by histograms, and the merge.

Both compute a task vector by the same `tau_tile` and tiling, so both see the same bits. The merge
walks over all checkpoints inside a tile and keeps P, N, Wp, Wn in registers (equations: ties.py):
nothing of the matrix's size is written but the result. Programs that run at the same time work on
tiles of a square, not of a row, so that they share more of the factors in the cache.

The k-th largest |tau| is found digit by digit from the top: floats that are not negative sort like
their bits. A pass counts the next 8 bits among the entries that share the digits found so far, on
recomputed tiles; four passes give all 31 bits. Each program counts many tiles in registers and
adds its counts to the global ones once; then a single program chooses the digit.

Importing this needs triton; factors may be fp32, bf16 or fp16. Left out: fp64, which ties.py
computes with PyTorch.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles_triton import FUSED, TRITON_DTYPES, addresses, rounded, table, tau_tile, tiling

DIGITS = ((23, 8), (15, 8), (7, 8), (0, 7))  # (shift, bits) of each counting pass over 31 bits
PROGRAMS = 1024  # that count: enough for any GPU, few enough that adding up costs nothing
SQUARE = tl.constexpr(16)  # tiles across, of 64 columns; the 8 below each other have 128 rows
SMALLEST = 2.0**-149  # above zero in fp32
ALIGNMENT = 16  # bytes of an address, and entries of a rank: then copies are of 16 bytes


@triton.jit
def place():
    """This program's tile in the grid [down, across], such that neighbours in time are in space.

    A GPU starts programs along the first axis of the grid first.
    """
    across, down = tl.swizzle2d(
        tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), SQUARE
    )
    return down, across


@triton.jit
def merged_tile(
    base,
    factors,  # [3, K] int64: addresses of A and of B, rank
    numbers,  # [3, K] float32: scale, threshold > 0, weight
    lam,
    rows,
    columns,
    count,  # K
    FACTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    ONCE: tl.constexpr,
):
    """This program's tile of base + lam * TIES in base's dtype: values, rows, columns of it."""
    down, across = place()
    row, column = down * BM, across * BN
    positive = tl.zeros([BM, BN], dtype=tl.float32)
    negative = tl.zeros([BM, BN], dtype=tl.float32)
    positive_weight = tl.zeros([BM, BN], dtype=tl.float32)
    negative_weight = tl.zeros([BM, BN], dtype=tl.float32)
    for i in range(count):
        a = tl.load(factors + i).to(tl.pointer_type(FACTOR))
        b = tl.load(factors + count + i).to(tl.pointer_type(FACTOR))
        rank = tl.load(factors + 2 * count + i).to(tl.int32)
        if ALIGNED:  # the compiler cannot know it of numbers that come from memory
            a, b, rank = tl.multiple_of(a, 16), tl.multiple_of(b, 16), tl.multiple_of(rank, 16)
        scale = tl.load(numbers + i)
        threshold = tl.load(numbers + count + i)
        weight = tl.load(numbers + 2 * count + i)
        tau = tau_tile(a, b, rank, scale, rows, columns, row, column, BM, BN, BR, ONCE)
        above, below = tau >= threshold, tau <= -threshold  # a zero is neither
        positive = tl.where(above, positive + weight * tau, positive)
        negative = tl.where(below, negative + weight * tau, negative)
        positive_weight = tl.where(above, positive_weight + weight, positive_weight)
        negative_weight = tl.where(below, negative_weight + weight, negative_weight)
    total = positive + negative
    agreeing = tl.where(total > 0, positive, tl.where(total < 0, negative, 0.0))
    weight = tl.where(total > 0, positive_weight, tl.where(total < 0, negative_weight, 1.0))
    m = row + tl.arange(0, BM).to(tl.int64)
    n = column + tl.arange(0, BN).to(tl.int64)
    inside = (m[:, None] < rows) & (n[None, :] < columns)
    at = m[:, None] * columns + n[None, :]
    old = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    merged = old + lam * tl.div_rn(agreeing, weight)
    return rounded(merged, base.dtype.element_ty, 0, False), m, n


@triton.jit
def _merge(
    base,
    out,
    factors,
    numbers,
    lam,
    rows,
    columns,
    count,
    FACTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    ONCE: tl.constexpr,
):
    merged, m, n = merged_tile(
        base,
        factors,
        numbers,
        lam,
        rows,
        columns,
        count,
        FACTOR,
        ALIGNED,
        BM,
        BN,
        BR,
        ONCE,
    )
    inside = (m[:, None] < rows) & (n[None, :] < columns)
    tl.store(out + m[:, None] * columns + n[None, :], merged, mask=inside)


@triton.jit(do_not_specialize=["tiles", "tiles_across"])
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
    ONCE: tl.constexpr,
):
    found = tl.load(prefix)
    own = tl.zeros([1 << BITS], dtype=tl.int32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, column = (tile // tiles_across) * BM, (tile % tiles_across) * BN
        tau = tau_tile(a, b, rank, scale, rows, columns, row, column, BM, BN, BR, ONCE)
        bits = tl.abs(tau).to(tl.int32, bitcast=True)
        m = row + tl.arange(0, BM)
        n = column + tl.arange(0, BN)
        counted = (m[:, None] < rows) & (n[None, :] < columns) & (bits >> (SHIFT + BITS) == found)
        digits = (bits >> SHIFT) & ((1 << BITS) - 1)
        digits, counted = tl.reshape(digits, [BM * BN]), tl.reshape(counted, [BM * BN])
        own += tl.histogram(digits, 1 << BITS, mask=counted)
    tl.atomic_add(counts + tl.arange(0, 1 << BITS), own)


@triton.jit
def _choose(
    counts,  # [2 ** BITS] int32
    prefix,  # [1] int32
    left,  # [1] int64: k among the entries that share the prefix
    BITS: tl.constexpr,
):
    """Append the digit of the k-th largest to the prefix, and leave out of k what lies above."""
    digits = tl.arange(0, 1 << BITS)
    counted = tl.load(counts + digits).to(tl.int64)
    at_least = tl.cumsum(counted, 0, reverse=True)  # entries whose digit is >= this one
    k = tl.load(left)
    digit = tl.sum((at_least >= k).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(digits == digit, at_least - counted, 0), 0)
    tl.store(left, k - above)
    tl.store(prefix, (tl.load(prefix) << BITS) | digit)


def trim_threshold(lora_a: Tensor, lora_b: Tensor, scale: float, k: int) -> Tensor:
    """The k-th largest |s B A|, k >= 1, without a transfer to the host.  # [] float32"""
    rows, columns = lora_b.shape[0], lora_a.shape[1]
    rank, device = lora_a.shape[0], lora_a.device
    blocks = tiling([lora_a], rank)
    across = triton.cdiv(columns, blocks["BN"])
    tiles = triton.cdiv(rows, blocks["BM"]) * across
    prefix = torch.zeros(1, dtype=torch.int32, device=device)
    left = torch.full((1,), k, device=device)
    counts = torch.zeros(len(DIGITS), 1 << DIGITS[0][1], dtype=torch.int32, device=device)
    factors = lora_a.contiguous(), lora_b.contiguous(), rank
    for (shift, bits), counted in zip(DIGITS, counts, strict=True):
        matrix = (*factors, scale, rows, columns, prefix, counted, tiles, across)
        _count[(min(tiles, PROGRAMS),)](*matrix, SHIFT=shift, BITS=bits, **blocks)
        _choose[(1,)](counted, prefix, left, BITS=bits, **FUSED)
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
    known = [a.shape[0] for a in lora_a]
    places = addresses(lora_a), addresses(lora_b)
    factors = table([*places, known], torch.int64, device)
    thresholds = [max(float(threshold), SMALLEST) for threshold in thresholds]
    numbers = table([scales, thresholds, weights], torch.float32, device)
    arguments = [factors, numbers, lam, rows, columns, len(lora_a)]
    blocks = tiling(lora_a, max(known))
    grid = (triton.cdiv(rows, blocks["BM"]), triton.cdiv(columns, blocks["BN"]))
    aligned = (*known, *places[0], *places[1])
    blocks["ALIGNED"] = all(number % ALIGNMENT == 0 for number in aligned)
    blocks["FACTOR"] = TRITON_DTYPES[lora_a[0].dtype]
    return grid, arguments, blocks
