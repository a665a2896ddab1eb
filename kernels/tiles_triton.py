"""What the Triton kernels share: the tile of a task vector, tables of addresses, names of dtypes.

Importing this needs triton. Left out: any kernel that is launched.
"""

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_RANK = 64, 64, 32  # one tiling for every pass: the same bits

# The interpreter takes bf16 for integers in a product; in fp32 the products are the same.
WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    """Where contiguous tensors begin, for kernels that take a list of them.  # [K] int64"""
    return torch.tensor([tensor.data_ptr() for tensor in tensors], device=tensors[0].device)


@triton.jit
def tau_tile(
    a,  # [rank, columns]
    b,  # [rows, rank]
    rank,
    scale,
    rows,
    columns,
    row,  # first of the tile
    column,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """s B A of one tile in fp32, zero outside of the matrix.  # [BM, BN]"""
    m = row + tl.arange(0, BM).to(tl.int64)
    n = column + tl.arange(0, BN).to(tl.int64)
    product = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, rank, BR):
        r = start + tl.arange(0, BR)
        inside = (m[:, None] < rows) & (r[None, :] < rank)
        left = tl.load(b + m[:, None] * rank + r[None, :], mask=inside, other=0.0)
        inside = (r[:, None] < rank) & (n[None, :] < columns)
        right = tl.load(a + r[:, None] * columns + n[None, :], mask=inside, other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        product = tl.dot(left, right, product, input_precision="ieee")
    return product * scale


@triton.jit
def rounded(x, dtype: tl.constexpr, seed, entry, STOCHASTIC: tl.constexpr):
    """fp32 x in `dtype`: to nearest, or for bf16 stochastically (see ema.py).

    bf16 is what is left of fp32 without its lower half: to nearest (ties to even) half a unit is
    added before the cut, stochastically 16 random bits. Infinities and NaN stay what they are.
    """
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        if STOCHASTIC:
            more = (tl.randint(seed, entry) & 0xFFFF).to(tl.int32)
        else:
            more = 0x7FFF + ((bits >> 16) & 1)
        finite = (bits & 0x7FFFFFFF) < 0x7F800000
        x = tl.where(finite, ((bits + more) & -65536).to(tl.float32, bitcast=True), x)
    return x.to(dtype)
