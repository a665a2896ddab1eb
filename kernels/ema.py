"""Exponential moving averages of weights, in place, for a whole list of tensors at once.

    average <- average + alpha * (new - average),     new = base + s B A in the LoRA form

The sum is formed in fp32 (fp64 for fp64 averages) and then rounded to the average's dtype. To
nearest, a bf16 average stalls: with alpha = 0.001 the change is mostly below half a unit in the
last place, and is lost every time. Stochastic rounding goes up with the probability of the
remainder, so that it is right in the mean:

    x = lo + f (hi - lo)   ->   hi with probability f, lo with probability 1 - f,   E = x

bf16 is the upper half of fp32: adding 16 random bits to the lower half and cutting it off does this
exactly, for either sign (the bits are sign and magnitude), and leaves infinities what they are.

The random bits come from one seed that is drawn from the generator: the same generator state gives
the same average, on one device and implementation. Left out: fp16 averages rounded stochastically
(their halves are no prefix of fp32), and autograd.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .checks import check_alpha, check_factors, check_floating, check_same, compute_dtype
from .dispatch import choose_impl
from .reference import ema_reference
from .tiles import row_tiles, task_vector_tile

ROUNDINGS = ("nearest", "stochastic")
PLAIN = {torch.float32, torch.bfloat16, torch.float64}  # dtypes that every rounding takes
TILE = 1 << 16  # entries worked on at once: their fp32 copies stay in a core's cache


@torch.no_grad()
def ema_update_(
    average: Sequence[Tensor],  # any shapes and floating dtypes, updated in place
    new: Sequence[Tensor],  # the same shapes and devices
    alpha: float,
    *,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,  # a CPU generator; None: torch's own
    impl: str | None = None,
) -> None:
    """average[i] <- (1 - alpha) * average[i] + alpha * new[i]; on a GPU in one launch."""
    _check(average, new, alpha, rounding)
    if not average:
        return
    how = choose_impl(impl, average[0].device, has_triton=True)
    seed = _draw_seed(generator) if rounding == "stochastic" else None
    if how == "triton" and _fits_triton((*average, *new)):
        from .ema_triton import ema_list_

        return ema_list_(average, new, alpha, seed)
    bits = None if seed is None else torch.Generator(average[0].device).manual_seed(seed)
    alike: tuple[list[Tensor], list[Tensor]] = [], []
    for a, n in zip(average, new, strict=True):
        if how == "reference":
            _store(a, ema_reference(a.double(), n.double(), alpha), bits)
        elif a.dtype == n.dtype and (bits is None or a.dtype != torch.bfloat16):
            alike[0].append(a)
            alike[1].append(n)
        else:
            for old, fresh in _tiles(a, n):
                wide = compute_dtype([old, fresh])
                _store(old, torch.lerp(old.to(wide), fresh.to(wide), alpha), bits)
    if alike[0]:  # one pass; the sum is formed in fp32 for bf16 and fp16 too
        torch._foreach_lerp_(*alike, alpha)


@torch.no_grad()
def ema_update_lora_(
    average: Tensor,  # [out, in], updated in place
    base: Tensor,  # [out, in]
    lora_a: Tensor,  # [r, in]
    lora_b: Tensor,  # [out, r]
    scale: float,
    alpha: float,
    *,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
    impl: str | None = None,
) -> None:
    """average <- (1 - alpha) * average + alpha * (base + s B A), without the dense product."""
    _check([average], [base], alpha, rounding)
    if base.dim() != 2:
        raise ValueError(f"base: expected [out, in], got {tuple(base.shape)}")
    (scale,) = check_factors([lora_a], [lora_b], [scale], tuple(base.shape))
    check_same("lora_a device", lora_a.device, "average", average.device)
    how = choose_impl(impl, average.device, has_triton=True)
    seed = _draw_seed(generator) if rounding == "stochastic" else None
    if how == "triton" and _fits_triton((average, base, lora_a)):
        from .ema_triton import ema_lora_

        return ema_lora_(average, base, lora_a, lora_b, scale, alpha, seed)
    bits = None if seed is None else torch.Generator(average.device).manual_seed(seed)
    if how == "reference":
        new = base.double() + scale * (lora_b.double() @ lora_a.double())
        return _store(average, ema_reference(average.double(), new, alpha), bits)
    wide = compute_dtype([average, base, lora_a])
    for rows in row_tiles(*base.shape, base.device):
        new = task_vector_tile(lora_a, lora_b, scale, rows, wide).add_(base[rows])
        _store(average[rows], torch.lerp(average[rows].to(wide), new, alpha), bits)


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 values as bf16, each up or down with the probability that keeps its mean.

    A finite value beyond the largest bf16 may become infinite, as it would to nearest.
    """
    draws = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device)
    draws.random_(-(2**63), None, generator=generator)  # 64 bits, for 4 values
    random = draws.view(torch.int16)[: values.numel()].view(values.shape)  # less 2^15: signed
    cut = (values.contiguous().view(torch.int32) + random).add_(1 << 15).bitwise_and_(~0xFFFF)
    rounded = cut.view(torch.float32)
    if not values.sum().isfinite():  # there may be a NaN: only that cannot bear the added bits
        rounded = torch.where(values.isnan(), values, rounded)
    return rounded.to(torch.bfloat16)


def _store(into: Tensor, values: Tensor, bits: torch.Generator | None) -> None:
    """Round to the dtype of `into`: to nearest, or stochastically with the bits of a generator."""
    if bits is None or into.dtype != torch.bfloat16:
        into.copy_(values)
    else:
        into.copy_(round_stochastically(values.float(), bits))


def _tiles(average: Tensor, new: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of both, tile by tile; whole where the average is not contiguous."""
    if not average.is_contiguous():
        yield average, new
        return
    flat, fresh = average.view(-1), new.reshape(-1)
    yield from zip(flat.split(TILE), fresh.split(TILE), strict=True)


def _draw_seed(generator: torch.Generator | None) -> int:
    return int(torch.randint(2**31 - 1, (), generator=generator))


def _fits_triton(tensors: Sequence[Tensor]) -> bool:
    """What the kernels take: contiguous, fp32 or narrower."""
    return torch.float64 not in {t.dtype for t in tensors} and all(
        t.is_contiguous() for t in tensors
    )


def _check(average: Sequence[Tensor], new: Sequence[Tensor], alpha: float, rounding: str) -> None:
    check_alpha(alpha)
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: expected one of {ROUNDINGS}, got {rounding!r}")
    if len(average) != len(new):
        raise ValueError(f"new: expected {len(average)} tensors like average, got {len(new)}")
    tensors = (*average, *new)
    if all(isinstance(t, Tensor) for t in tensors):
        alike = all(a.shape == n.shape for a, n in zip(average, new, strict=True))
        if alike and len({t.device for t in tensors}) <= 1 and {t.dtype for t in tensors} <= PLAIN:
            return  # a list of hundreds of small tensors is not looked at one by one
    for i, (a, n) in enumerate(zip(average, new, strict=True)):
        check_floating("average", a, i)
        check_floating("new", n, i)
        if a.shape != n.shape or a.device != n.device or a.device != average[0].device:
            got, expected = (tuple(n.shape), n.device), (tuple(a.shape), a.device)
            check_same(f"new[{i}] shape, device", got, f"average[{i}]", expected)
            check_same(f"average[{i}] device", a.device, "average[0]", average[0].device)
        if rounding == "stochastic" and a.dtype == torch.float16:
            raise ValueError(
                f"average[{i}]: expected bfloat16 (or fp32 and fp64, which round to nearest) "
                "with rounding='stochastic', got float16"
            )
