"""A merged matrix straight into NF4 (Dettmers et al. 2023, QLoRA), without its bf16 copy.

The matrix is read row by row and cut into blocks of 64 values x; with m = max |x| of the block,

    code = the level nearest to x / m (of 16; the lower one in the middle of two)      4 bits
    read back: level[code] * m                                                         fp32 m

so 4.5 bits a value. The layout is that of bitsandbytes' `quantize_4bit`: two codes a byte, the
first in the upper half. A merge rounds to the base's dtype before it is coded, so that the result
equals `quantize_4bit` of the merged matrix code for code; only row tiles of it ever exist. The base
may be in NF4 itself: it is read back tile by tile.

Left out: nested quantisation of the maxima, other block sizes, products with a coded matrix
(bitsandbytes has them), and the Triton kernel for rows that 64 does not divide.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import (
    check_finite,
    check_floating,
    check_lora_merge,
    check_same,
    check_thresholds,
    compute_dtype,
    fits_triton,
)
from .dispatch import choose_impl
from .reference import NF4_LEVELS
from .tiles import just_below, merged_tile, row_tiles, task_vector_tile

BLOCK = 64
SMALLEST = 1e-38  # a block of zeros is divided by it


@dataclass(frozen=True)
class Nf4Matrix:
    """A matrix in NF4, in bitsandbytes' layout."""

    codes: Tensor  # [ceil(numel / 2)] uint8
    absmax: Tensor  # [ceil(numel / 64)] float32
    shape: tuple[int, ...]
    dtype: torch.dtype  # of what was coded, and of what is read back

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def numel(self) -> int:
        """Values that are coded."""
        return torch.Size(self.shape).numel()


@torch.no_grad()
def quantize_nf4(matrix: Tensor) -> Nf4Matrix:
    """A finite tensor of fp32, bf16 or fp16, of any shape, in NF4."""
    _check_codable("matrix", matrix)
    check_finite({"matrix": matrix})
    out = empty_nf4(tuple(matrix.shape), matrix.dtype, matrix.device)
    writer = _Writer(out)
    flat = matrix.reshape(-1)
    for entries in row_tiles(flat.numel(), 1, flat.device):
        writer.write(flat[entries])
    writer.close()
    return out


@torch.no_grad()
def dequantize_nf4(matrix: Nf4Matrix) -> Tensor:
    """What the codes stand for, in the dtype of what was coded."""
    return _read(matrix, 0, matrix.numel()).view(matrix.shape)


@torch.no_grad()
def ties_merge_lora_nf4(
    base: Tensor | Nf4Matrix,  # [out, in]
    lora_a: Sequence[Tensor],  # K x [r_i, in]
    lora_b: Sequence[Tensor],  # K x [out, r_i]
    scales: Sequence[float],  # K
    weights: Sequence[float],  # K, not negative
    thresholds: Sequence[Tensor | float],  # K, each from ties.trim_threshold with the same impl
    *,
    lam: float = 1.0,
    out: Nf4Matrix | None = None,
    impl: str | None = None,
    check_finite: bool = True,
) -> Nf4Matrix:
    """`ties.ties_merge_lora` in NF4: base + lam * TIES of the products s_i B_i A_i.  # [out, in]"""
    coded = isinstance(base, Nf4Matrix)
    shape, kind = tuple(base.shape), base.dtype
    like = torch.empty(shape, dtype=kind, device="meta") if coded else base
    if not coded:
        _check_codable("base", base)
    scales, weights = check_lora_merge(
        like, lora_a, lora_b, scales, weights, base.device, finite=check_finite
    )
    thresholds = check_thresholds(thresholds, len(weights))
    out = _check_out(out, shape, kind, base.device)
    how = choose_impl(impl, base.device, has_triton=True)
    dtype = compute_dtype([*lora_a, *lora_b])
    if how == "reference":
        from .ties import ties_merge_lora

        whole = dequantize_nf4(base) if coded else base
        factors = (lora_a, lora_b, scales, weights, thresholds)
        merged = ties_merge_lora(whole, *factors, lam=lam, impl=how, check_finite=False)
        return copy_nf4(quantize_nf4(merged), out)
    fits = not coded and shape[1] % BLOCK == 0 and fits_triton(base, [*lora_a, *lora_b])
    if how == "triton" and fits:
        from .nf4_triton import merge

        return merge(base, lora_a, lora_b, scales, weights, thresholds, lam, out)

    def tau_tile(i: int, rows: slice) -> Tensor:
        own = compute_dtype([lora_a[i], lora_b[i]])  # as its threshold was computed
        return task_vector_tile(lora_a[i], lora_b[i], scales[i], rows, own).to(dtype)

    bounds = [just_below(threshold, dtype) for threshold in thresholds]
    writer = _Writer(out)
    for rows in row_tiles(*shape, base.device):
        span = rows.start * shape[1], rows.stop * shape[1]
        old = _read(base, *span).view(-1, shape[1]) if coded else base[rows]
        merged = merged_tile(old, rows, tau_tile, bounds, weights, lam, dtype)
        writer.write(merged.to(kind).reshape(-1))
    writer.close()
    return out


def empty_nf4(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Nf4Matrix:
    """Room for a matrix in NF4; its contents are undefined."""
    numel = torch.Size(shape).numel()
    codes = torch.empty(-(-numel // 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-numel // BLOCK), dtype=torch.float32, device=device)
    return Nf4Matrix(codes, absmax, shape, dtype)


def middles(device: torch.device) -> Tensor:
    """What lies between neighbouring levels: where one code ends and the next begins.  # [15]"""
    levels = nf4_levels(device)
    return (levels[:-1] + levels[1:]) / 2


class _Writer:
    """Codes a stream of values block by block; what does not fill a block waits for the next."""

    def __init__(self, out: Nf4Matrix):
        self.out, self.done = out, 0
        self.middles = middles(out.device)
        self.waiting = torch.empty(0, dtype=out.dtype, device=out.device)

    def write(self, values: Tensor) -> None:
        """Code all whole blocks of what waits and of `values` [n]."""
        if self.waiting.numel():
            values = torch.cat([self.waiting, values])
        whole = values.numel() // BLOCK * BLOCK
        self.waiting = values[whole:]
        blocks = values[:whole].view(-1, BLOCK).float()
        absmax = blocks.abs().amax(1)
        # bitsandbytes multiplies by the reciprocal, which rounds otherwise than a division
        self._put(blocks * (1.0 / absmax.clamp(min=SMALLEST))[:, None], absmax)

    def close(self) -> None:
        """Code the last block, which may be a part of one."""
        if self.waiting.numel():
            values = self.waiting.float()
            absmax = values.abs().amax().clamp(min=SMALLEST)
            self._put(values / absmax, absmax[None])

    def _put(self, scaled: Tensor, absmax: Tensor) -> None:
        codes = torch.bucketize(scaled.reshape(-1), self.middles, out_int32=True).to(torch.uint8)
        if codes.numel() % 2:
            codes = torch.cat([codes, codes.new_full((1,), NF4_LEVELS.index(0.0))])
        pairs, at, block = codes.view(-1, 2), self.done // 2, self.done // BLOCK
        self.out.codes[at : at + len(pairs)] = (pairs[:, 0] << 4) | pairs[:, 1]
        self.out.absmax[block : block + len(absmax)] = absmax
        self.done += scaled.numel()


@functools.cache
def nf4_levels(device: torch.device) -> Tensor:
    """The 16 levels, copied to a device once: while a CUDA graph is recorded nothing can be."""
    return torch.tensor(NF4_LEVELS, device=device)


def _read(matrix: Nf4Matrix, start: int, stop: int) -> Tensor:
    """Values start..stop of the flattened matrix, in its dtype."""
    stop = min(stop, matrix.numel())
    first = start // BLOCK * BLOCK
    packed = matrix.codes[first // 2 : -(-stop // 2)].int()
    levels = nf4_levels(matrix.device)
    values = levels[torch.stack([packed >> 4, packed & 15], 1).view(-1)]
    absmax = matrix.absmax[first // BLOCK : -(-stop // BLOCK)].repeat_interleave(BLOCK)
    return (values * absmax[: len(values)])[start - first : stop - first].to(matrix.dtype)


def copy_nf4(source: Nf4Matrix, out: Nf4Matrix) -> Nf4Matrix:
    """Put one matrix into the room of another of its shape; returns the latter."""
    out.codes.copy_(source.codes)
    out.absmax.copy_(source.absmax)
    return out


def _check_codable(name: str, tensor: Tensor) -> None:
    check_floating(name, tensor)
    if tensor.dtype == torch.float64:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}")


def _check_out(
    out: Nf4Matrix | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Nf4Matrix:
    if out is None:
        return empty_nf4(shape, dtype, device)
    got = (tuple(out.shape), out.dtype, out.device)
    check_same("out shape, dtype, device", got, "base", (shape, dtype, device))
    return out
