"""What the merge kernels do to one tile, and the exact k-th largest entry over all tiles.

A tile is a block of whole rows. `accumulate_` adds one checkpoint to P, N, Wp, Wn and
`elect_and_average` turns the four sums into merged values (equations: ties.py).
Left out: validation (checks.py) and any loop over checkpoints but `merge_tiles`.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import kept_count

TILE_ELEMENTS = 1 << 15  # a tile and its four sums, 640 KB in fp32, stay in a core's cache
CUDA_TILE_ELEMENTS = 1 << 22  # on a GPU a tile must keep it busy for longer than a launch takes
MIN_TILE_ROWS = 32  # a thinner tile would spend its time re-reading A
SORTED_SELECTION = 1 << 22  # up to this many entries the k-th largest is selected in memory
RADIX_BITS = 16


def row_tiles(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Cut [rows, columns] into row tiles. Depends on shape and device: every pass cuts alike."""
    elements = TILE_ELEMENTS if device.type == "cpu" else CUDA_TILE_ELEMENTS
    step = max(MIN_TILE_ROWS, elements // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def task_vector_tile(
    lora_a: Tensor, lora_b: Tensor, scale: float, rows: slice, dtype: torch.dtype
) -> Tensor:
    """s B[rows] A, the only place where a task vector is computed.  # [rows, in]"""
    return (lora_b[rows].to(dtype) @ lora_a.to(dtype)).mul_(scale)


def just_below(threshold: float, dtype: torch.dtype) -> float:
    """The next smaller number: |tau| > just_below(h) is the same as |tau| >= h."""
    level = torch.tensor(threshold, dtype=dtype)
    return torch.nextafter(level, torch.full_like(level, -float("inf"))).item()


def accumulate_(sums: Tensor, tau: Tensor, bound: float, weight: float) -> None:
    """Add one checkpoint's tile [...] to P, N, Wp, Wn [4, ...], trimmed to |tau| > bound."""
    tau = F.hardshrink(tau, bound)  # tau * [|tau| > bound] in one pass
    positive, negative, positive_weight, negative_weight = sums
    positive.add_(tau.clamp(min=0), alpha=weight)
    negative.add_(tau.clamp(max=0), alpha=weight)
    positive_weight.add_(tau.clone().gt_(0), alpha=weight)  # in place, gt_ stays in float: fast
    negative_weight.add_(tau.lt_(0), alpha=weight)


def elect_and_average(sums: Tensor) -> Tensor:
    """The elected side's sum over its weight; 0 where the sides cancel.  # [4, ...] -> [...]

    The masks are floats, not booleans: on a CPU that is ten times faster than `torch.where`.
    """
    positive, negative, positive_weight, negative_weight = sums
    total = positive + negative
    plus = total.clone().gt_(0)
    minus = total.lt_(0)
    agreeing_sum = (positive * plus).addcmul_(negative, minus)
    agreeing_weight = (positive_weight * plus).addcmul_(negative_weight, minus)
    return agreeing_sum.div_(agreeing_weight.clamp_(min=torch.finfo(sums.dtype).tiny))  # 0/tiny = 0


def merge_tiles(
    base: Tensor,
    out: Tensor,
    tiles: Iterable[slice],
    tau_tile: Callable[[int, slice], Tensor],
    thresholds: list[float],
    weights: list[float],
    lam: float,
    dtype: torch.dtype,
) -> Tensor:
    """out = base + lam * TIES of the task vectors whose tiles `tau_tile(i, rows)` computes."""
    bounds = [just_below(threshold, dtype) for threshold in thresholds]
    for rows in tiles:
        out[rows] = merged_tile(base[rows], rows, tau_tile, bounds, weights, lam, dtype)
    return out


def merged_tile(
    base: Tensor,
    rows: slice,
    tau_tile: Callable[[int, slice], Tensor],
    bounds: list[float],
    weights: list[float],
    lam: float,
    dtype: torch.dtype,
) -> Tensor:
    """The tile `rows` of `merge_tiles`, whose base is given; not yet rounded to base's dtype."""
    sums = torch.zeros(4, *base.shape, dtype=dtype, device=base.device)
    for i, (bound, weight) in enumerate(zip(bounds, weights, strict=True)):
        accumulate_(sums, tau_tile(i, rows), bound, weight)
    return torch.add(base, elect_and_average(sums), alpha=lam)


def dense_task_vectors(lora_a, lora_b, scales) -> list[Tensor]:
    """s B A of every checkpoint as a whole, in float64: exact, and as large as W."""
    factors = zip(lora_a, lora_b, scales, strict=True)
    return [s * (b.double() @ a.double()) for a, b, s in factors]


def kth_largest_magnitude(
    tiles: Callable[[], Iterator[Tensor]], numel: int, density: float
) -> Tensor:
    """The exact k-th largest |tau| over all tiles; `tiles` can be walked any number of times."""
    k = kept_count(numel, density)
    if k == 0:
        return next(tiles()).new_tensor(float("inf"))
    if numel > SORTED_SELECTION:
        return radix_select(tiles, k)
    magnitudes = torch.cat([tile.reshape(-1) for tile in tiles()]).abs_()
    if magnitudes.device.type != "cpu":
        return magnitudes.kthvalue(numel - k + 1).values
    # numpy's partition is ten times faster than kthvalue on a CPU
    magnitudes.numpy().partition(numel - k)
    return magnitudes[numel - k].clone()


def radix_select(tiles: Callable[[], Iterator[Tensor]], k: int) -> Tensor:
    """k-th largest by its binary digits, RADIX_BITS at a time from the top.

    Magnitudes are not negative, and such floats sort like their bits read as integers. Each pass
    counts the next digit among the entries that share the digits found so far.
    """
    first = next(tiles())
    bits = torch.int32 if first.dtype == torch.float32 else torch.int64
    prefix = 0
    for shift in range(torch.iinfo(bits).bits - RADIX_BITS, -1, -RADIX_BITS):
        counts = torch.zeros(1 << RADIX_BITS, dtype=torch.int64, device=first.device)
        for tile in tiles():
            keys = tile.abs().view(bits).reshape(-1) >> shift
            digits = keys[(keys >> RADIX_BITS) == prefix] & ((1 << RADIX_BITS) - 1)
            counts += torch.bincount(digits, minlength=counts.numel())
        at_least = counts.flip(0).cumsum(0).flip(0)  # entries whose digit is >= this one
        digit = int((at_least >= k).sum()) - 1
        k -= int(at_least[digit] - counts[digit])
        prefix = (prefix << RADIX_BITS) | digit
    return torch.tensor(prefix, dtype=bits, device=first.device).view(first.dtype)
