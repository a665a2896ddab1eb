"""What the Triton kernels share: the tile of a task vector, its tiling, tables of numbers.

Importing this needs triton. Left out: any kernel that is launched.
"""

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_COLUMNS = 64  # of every tile: a block of NF4
FUSED = dict(enable_fp_fusion=True)  # multiply-adds; Triton 3.10 changes the default
MIN_RANK = 16  # the least depth of a product that tensor cores take

# The interpreter takes bf16 for integers in a product; in fp32 the products are the same.
WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def table(numbers: Sequence | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host for a kernel, without waiting for what the device has to do before."""
    numbers = torch.as_tensor(numbers, dtype=dtype)
    if device.type == "cuda":
        return numbers.pin_memory().to(device, non_blocking=True)
    return numbers.to(device)


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where contiguous tensors begin, for kernels that take a list of them."""
    return [tensor.data_ptr() for tensor in tensors]


def tiling(factors: Sequence[Tensor], rank: int) -> dict:
    """Constants of every kernel that calls `tau_tile` on these factors, of at most this rank.

    One tiling for every pass, so that all see the same bits. In 16 bits a checkpoint's rank up to
    128 is one product (ONCE), so that the next one's factors are copied while this one is voted on;
    in fp32, whose halves take registers too, it comes in slices. Chosen by what the compiler makes
    of it (`bench.compiled`): on Hopper the four sums of a tile and its product stay in registers.
    """
    is_16_bit = factors[0].element_size() == 2
    depth = min(max(MIN_RANK, triton.next_power_of_2(rank)), 128 if is_16_bit else 16)
    return dict(
        BM=128,
        BN=BLOCK_COLUMNS,
        BR=depth,
        ONCE=rank <= depth,
        num_warps=8,
        num_stages=2 if is_16_bit else 3,
        **FUSED,
    )


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
    ONCE: tl.constexpr,  # rank <= BR
):
    """s B A of one tile in fp32, zero outside of the matrix.  # [BM, BN]"""
    product = tl.zeros([BM, BN], dtype=tl.float32)
    if ONCE:  # no loop here, so that the loop around it is the one whose loads are prefetched
        product = _add_slice(product, a, b, 0, rank, rows, columns, row, column, BM, BN, BR)
    else:
        for start in range(0, rank, BR):
            product = _add_slice(product, a, b, start, rank, rows, columns, row, column, BM, BN, BR)
    return product * scale


@triton.jit
def _add_slice(
    product,
    a,
    b,
    start,
    rank,
    rows,
    columns,
    row,
    column,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """product + B[:, start : start + BR] A[start : start + BR] of one tile.

    fp32 is multiplied on tensor cores as three products of its upper and lower halves in tf32,
    which loses no more than fp32 sums do.
    """
    m = row + tl.arange(0, BM).to(tl.int64)
    n = column + tl.arange(0, BN).to(tl.int64)
    r = start + tl.arange(0, BR)
    inside = (m[:, None] < rows) & (r[None, :] < rank)
    left = tl.load(b + m[:, None] * rank + r[None, :], mask=inside, other=0.0)
    inside = (r[:, None] < rank) & (n[None, :] < columns)
    right = tl.load(a + r[:, None] * columns + n[None, :], mask=inside, other=0.0)
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, product, input_precision="tf32x3")


@triton.jit
def random_bits(seed, at, COUNT: tl.constexpr):
    """16 random bits for each of COUNT entries from a multiple of COUNT on.  # [COUNT] int32

    A number of Philox costs as much as 80 additions and has 128 bits, enough for eight entries.
    """
    first = at // 8 + tl.arange(0, COUNT // 8)
    a, b, c, d = tl.randint4x(seed, first)
    words = tl.join(tl.join(a, b), tl.join(c, d))  # [COUNT / 8, 2, 2]
    words = words.to(tl.int32, bitcast=True)
    return tl.reshape(tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF), [COUNT])


@triton.jit
def rounded(x, dtype: tl.constexpr, random, STOCHASTIC: tl.constexpr):
    """fp32 x in `dtype`: to nearest, or for bf16 with 16 random bits an entry (see ema.py).

    bf16 is what is left of fp32 without its lower half: to nearest (ties to even) half a unit is
    added before the cut, stochastically the random bits. Infinities and NaN stay what they are. A
    GPU rounds to nearest by itself; the interpreter only cuts.
    """
    if dtype == tl.bfloat16 and (STOCHASTIC or WIDEN):
        bits = x.to(tl.int32, bitcast=True)
        more = random if STOCHASTIC else 0x7FFF + ((bits >> 16) & 1)
        finite = (bits & 0x7FFFFFFF) < 0x7F800000
        x = tl.where(finite, ((bits + more) & -65536).to(tl.float32, bitcast=True), x)
    return x.to(dtype)
