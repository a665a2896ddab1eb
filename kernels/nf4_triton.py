"""The Triton kernel that writes a merged tile as NF4: a row of 64 columns of it is one block.

Importing this needs triton. Left out: rows that 64 does not divide, and a base in NF4; nf4.py
computes both with PyTorch. Layout: nf4.py.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .nf4 import BLOCK, SMALLEST, Nf4Matrix, middles
from .ties_triton import launch, merged_tile


@triton.jit
def _merge_nf4(
    base,
    codes,  # [rows * columns / 2] uint8
    absmax,  # [rows * columns / 64] float32
    middles,  # [15] float32, between the levels
    smallest,
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
    x = merged.to(tl.float32)
    largest = tl.max(tl.abs(x), axis=1)  # [BM], one block a row
    scaled = x * tl.div_rn(1.0, tl.maximum(largest, smallest))[:, None]
    code = tl.zeros([BM, BN], dtype=tl.int32)
    for level in tl.static_range(15):
        code += (scaled > tl.load(middles + level)).to(tl.int32)
    first, second = tl.split(tl.reshape(code, [BM, BN // 2, 2]))
    block = m * (columns // BN) + tl.min(n, 0) // BN
    byte = block[:, None] * (BN // 2) + tl.arange(0, BN // 2)[None, :]
    tl.store(codes + byte, ((first << 4) | second).to(tl.uint8), mask=m[:, None] < rows)
    tl.store(absmax + block, largest, mask=m < rows)


def merge(
    base: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    weights: Sequence[float],
    thresholds: Sequence[float],
    lam: float,
    out: Nf4Matrix,
) -> Nf4Matrix:
    """`nf4.ties_merge_lora_nf4`, checked already, in one launch; 64 divides the columns."""
    lora_a, lora_b = [a.contiguous() for a in lora_a], [b.contiguous() for b in lora_b]
    grid, arguments, blocks = launch(base, lora_a, lora_b, scales, weights, thresholds, lam)
    if blocks["BN"] != BLOCK:
        raise ValueError(f"BLOCK_COLUMNS: expected {BLOCK} to write NF4, got {blocks['BN']}")
    outputs = (out.codes, out.absmax, middles(base.device), SMALLEST)
    _merge_nf4[grid](base.contiguous(), *outputs, *arguments, **blocks)
    return out
