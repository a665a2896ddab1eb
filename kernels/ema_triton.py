"""The Triton kernels of the EMA: a list of tensors in one launch, and base + s B A tile by tile.

The list is cut into spans; a program finds its tensor and its place there in two small tables,
which stay on the device as long as the lists stay where they are, and walks over its span in blocks
of 16 bytes a thread: a short chain of loads each, and many programs at once to hide it. Random bits
are Philox numbers of (seed + span, entry): no state is kept, and the same seed gives the same bits.
Equations and rounding: ema.py.

Importing this needs triton. Left out: fp64, which ema.py computes with PyTorch.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles_triton import (
    FUSED,
    TRITON_DTYPES,
    addresses,
    random_bits,
    rounded,
    table,
    tau_tile,
    tiling,
)

BLOCK = 1024  # entries at once
SPAN = 8 * BLOCK  # of one program


@triton.jit
def _lerp(old, fresh, alpha):
    """As torch.lerp: from the nearer end, so that alpha = 1 gives `fresh`, an infinity included."""
    near = old + alpha * (fresh - old)
    return tl.where(alpha < 0.5, near, fresh - (fresh - old) * (1 - alpha))


@triton.jit(do_not_specialize=["seed"])  # a random number: one of 16 would be compiled for
def _ema_list(
    tensors,  # [4, count] int64: addresses of average and new, entries, number of the first span
    tensor_of_span,  # [spans] int32
    count,
    alpha,
    seed,
    AVERAGE: tl.constexpr,
    NEW: tl.constexpr,
    ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    span = tl.program_id(0)
    tensor = tensors + tl.load(tensor_of_span + span)
    average = tl.load(tensor).to(tl.pointer_type(AVERAGE))
    new = tl.load(tensor + count).to(tl.pointer_type(NEW))
    start = (span - tl.load(tensor + 3 * count)) * SPAN
    if ALIGNED:  # the compiler cannot know it of numbers that come from memory
        average, new = tl.multiple_of(average, 16), tl.multiple_of(new, 16)
    left = tl.minimum(tl.load(tensor + 2 * count) - start, SPAN)
    average, new = average + start, new + start
    whole = (left // BLOCK * BLOCK).to(tl.int32)
    for at in range(0, whole, BLOCK):  # no mask, which would take apart what is read together
        _ema_block(average, new, at, left, alpha, seed + span, False, STOCHASTIC, BLOCK)
    if whole < left:
        _ema_block(average, new, whole, left, alpha, seed + span, True, STOCHASTIC, BLOCK)


@triton.jit
def _ema_block(
    average,
    new,
    at,  # first entry
    left,  # entries of the span
    alpha,
    seed,
    MASKED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = at + tl.arange(0, BLOCK)
    inside = entry < left if MASKED else None
    other = 0.0 if MASKED else None
    old = tl.load(average + entry, mask=inside, other=other).to(tl.float32)
    fresh = tl.load(new + entry, mask=inside, other=other).to(tl.float32)
    random = random_bits(seed, at, BLOCK) if STOCHASTIC else 0
    dtype: tl.constexpr = average.dtype.element_ty
    x = rounded(_lerp(old, fresh, alpha), dtype, random, STOCHASTIC)
    tl.store(average + entry, x, mask=inside)


@triton.jit(do_not_specialize=["seed"])
def _ema_lora(
    average,
    base,
    a,
    b,
    rank,
    scale,
    rows,
    columns,
    alpha,
    seed,
    STOCHASTIC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    ONCE: tl.constexpr,
):
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    tau = tau_tile(a, b, rank, scale, rows, columns, row, column, BM, BN, BR, ONCE)
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    inside = (row + m[:, None] < rows) & (column + n[None, :] < columns)
    at = (row + m[:, None]).to(tl.int64) * columns + column + n[None, :]
    old = tl.load(average + at, mask=inside, other=0.0).to(tl.float32)
    fresh = tl.load(base + at, mask=inside, other=0.0).to(tl.float32) + tau
    block = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    random = tl.reshape(random_bits(seed + block, 0, BM * BN), [BM, BN]) if STOCHASTIC else 0
    dtype: tl.constexpr = average.dtype.element_ty
    x = rounded(_lerp(old, fresh, alpha), dtype, random, STOCHASTIC)
    tl.store(average + at, x, mask=inside)


def ema_list_(
    average: Sequence[Tensor], new: Sequence[Tensor], alpha: float, seed: int | None
) -> None:
    """`ema.ema_update_` of contiguous tensors; one launch for each pair of dtypes among them."""
    kinds = [(a.dtype, n.dtype) for a, n in zip(average, new, strict=True)]
    launched = 0
    for kind in dict.fromkeys(kinds):
        own = [i for i, other in enumerate(kinds) if other == kind]
        old, fresh = [average[i] for i in own], [new[i] for i in own]
        sizes = tuple(tensor.numel() for tensor in old)
        starts = tuple(addresses(old)), tuple(addresses(fresh))
        tensors, tensor_of_span, aligned = _places(*starts, sizes, old[0].device)
        spans = len(tensor_of_span)
        if not spans:
            continue
        _ema_list[(spans,)](
            tensors,
            tensor_of_span,
            len(old),
            alpha,
            (seed or 0) + launched,
            AVERAGE=TRITON_DTYPES[kind[0]],
            NEW=TRITON_DTYPES[kind[1]],
            ALIGNED=aligned,
            STOCHASTIC=seed is not None and kind[0] == torch.bfloat16,
            SPAN=SPAN,
            BLOCK=BLOCK,
            **FUSED,
        )
        launched += spans


@lru_cache(maxsize=4)
def _places(
    average: tuple[int, ...], new: tuple[int, ...], sizes: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, bool]:
    """What `_ema_list` looks up, from where tensors begin and how many entries they have."""
    spans = torch.tensor([triton.cdiv(size, SPAN) for size in sizes])
    first = spans.cumsum(0) - spans
    tensors = table([average, new, sizes, first.tolist()], torch.int64, device)
    tensor_of_span = torch.arange(len(sizes)).repeat_interleave(spans)
    aligned = all(start % 16 == 0 for start in (*average, *new))
    return tensors, table(tensor_of_span, torch.int32, device), aligned


def ema_lora_(
    average: Tensor,
    base: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    alpha: float,
    seed: int | None,
) -> None:
    """`ema.ema_update_lora_` of contiguous tensors."""
    (rows, columns), rank = base.shape, lora_a.shape[0]
    blocks = tiling([lora_a], rank)
    _ema_lora[(triton.cdiv(rows, blocks["BM"]), triton.cdiv(columns, blocks["BN"]))](
        average,
        base,
        lora_a.contiguous(),
        lora_b.contiguous(),
        rank,
        scale,
        rows,
        columns,
        alpha,
        seed or 0,
        STOCHASTIC=seed is not None and average.dtype == torch.bfloat16,
        **blocks,
    )
