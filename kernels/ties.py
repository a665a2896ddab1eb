"""TIES and linear merging straight from LoRA factors, without K dense task vectors.

A task vector tau_i = s_i B_i A_i exists only one row tile at a time. One pass over i is enough: on
trimmed values ([|tau_i| >= threshold_i], ties at the threshold are all kept) hold per entry

    P  = sum_i w_i max(tau_i, 0)      Wp = sum_i w_i [tau_i > 0]
    N  = sum_i w_i min(tau_i, 0)      Wn = sum_i w_i [tau_i < 0]

    merged = P / Wp if P + N > 0,  N / Wn if P + N < 0,  0 if P + N = 0
    result = base + lam * merged                  linear: base + lam * sum w_i tau_i / sum w_i

The sums are additive, so a history that only grows need not be kept at all: `StreamingTies`.

Precision: products and sums in fp32, or in fp64 if a factor is fp64. The threshold pass and the
merge pass call the same function on the same tiles, so both see the same bits of tau. Where P + N
is zero but for rounding, the elected sign, and with it the result, is decided by that rounding.
The Triton kernels are in ties_triton.py; fp64, dense task vectors, the linear merge and streaming
run as PyTorch on any device. A factor with a NaN or an infinity is refused; `check_finite=False`
trusts a caller who has looked. Left out: autograd (a merge is not differentiated).
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    check_density,
    check_factors,
    check_lora_merge,
    check_out,
    check_placed,
    check_same,
    check_streaming,
    check_task_vectors,
    check_thresholds,
    check_weights,
    compute_dtype,
    find_sums,
    fits_triton,
)
from .dispatch import choose_impl
from .reference import (
    kept_count,
    linear_merge_reference,
    merge_trimmed,
    ties_merge_reference,
    trim_at,
    trim_threshold_reference,
)
from .tiles import (
    accumulate_,
    dense_task_vectors,
    elect_and_average,
    just_below,
    kth_largest_magnitude,
    merge_tiles,
    row_tiles,
    task_vector_tile,
)

FORGOTTEN = 1e-30  # decayed sums below it become 0: subnormal numbers are 40 times slower


# ----------------------------------------------------------------------------------- public ops


@torch.no_grad()
def trim_threshold(
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    density: float,
    *,
    impl: str | None = None,
    check_finite: bool = True,
) -> Tensor:
    """|s B A| of its k-th largest entry, k = round(density * numel); +inf if k = 0.  # []

    Exact, with bounded memory: a large matrix is never held, sorted or copied whole.
    """
    check_density(density)
    check_factors([lora_a], [lora_b], [scale], finite=check_finite)
    shape, dtype = (lora_b.shape[0], lora_a.shape[1]), compute_dtype([lora_a, lora_b])
    how = choose_impl(impl, lora_a.device, has_triton=True)
    if how == "reference":
        return trim_threshold_reference(dense_task_vectors([lora_a], [lora_b], [scale])[0], density)
    k = kept_count(shape[0] * shape[1], density)
    if how == "triton" and dtype == torch.float32 and k:
        from . import ties_triton

        return ties_triton.trim_threshold(lora_a, lora_b, float(scale), k)

    def tiles() -> Iterator[Tensor]:
        for rows in row_tiles(*shape, lora_a.device):
            yield task_vector_tile(lora_a, lora_b, scale, rows, dtype)

    return kth_largest_magnitude(tiles, shape[0] * shape[1], density)


@torch.no_grad()
def ties_merge_lora(
    base: Tensor,  # [out, in]
    lora_a: Sequence[Tensor],  # K x [r_i, in]
    lora_b: Sequence[Tensor],  # K x [out, r_i]
    scales: Sequence[float],  # K
    weights: Sequence[float],  # K, not negative
    thresholds: Sequence[Tensor | float],  # K, each from trim_threshold with the same impl
    *,
    lam: float = 1.0,
    out: Tensor | None = None,
    impl: str | None = None,
    check_finite: bool = True,
) -> Tensor:
    """base + lam * TIES of the products s_i B_i A_i, in base's dtype.  # [out, in]"""
    scales, weights = check_lora_merge(base, lora_a, lora_b, scales, weights, finite=check_finite)
    thresholds = check_thresholds(thresholds, len(weights))
    out = check_out(out, base)
    dtype = compute_dtype([*lora_a, *lora_b])
    how = choose_impl(impl, base.device, has_triton=True)
    if how == "reference":
        tau = dense_task_vectors(lora_a, lora_b, scales)
        trimmed = torch.stack([trim_at(t, h) for t, h in zip(tau, thresholds, strict=True)])
        exact_weights = torch.tensor(weights, dtype=torch.float64)
        return out.copy_(merge_trimmed(base.double(), trimmed, exact_weights, lam))
    if how == "triton" and fits_triton(base, [*lora_a, *lora_b]):
        from . import ties_triton

        return ties_triton.merge(base, lora_a, lora_b, scales, weights, thresholds, lam, out)

    def tau_tile(i: int, rows: slice) -> Tensor:
        own = compute_dtype([lora_a[i], lora_b[i]])  # as its threshold was computed
        return task_vector_tile(lora_a[i], lora_b[i], scales[i], rows, own).to(dtype)

    tiles = row_tiles(*base.shape, base.device)
    return merge_tiles(base, out, tiles, tau_tile, thresholds, weights, lam, dtype)


@torch.no_grad()
def ties_merge(
    base: Tensor,
    task_vectors: Sequence[Tensor],  # K x base's shape
    weights: Sequence[float],
    density: float,
    *,
    lam: float = 1.0,
    out: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """base + lam * TIES of dense task vectors of any rank (full fine-tuning)."""
    check_density(density)
    check_task_vectors(task_vectors, base)
    weights = check_weights(weights, len(task_vectors))
    out = check_out(out, base)
    if choose_impl(impl, base.device) == "reference":
        tau = [t.double() for t in task_vectors]
        return out.copy_(ties_merge_reference(base.double(), tau, weights, density, lam))
    dtype = compute_dtype(task_vectors)
    thresholds = [float(dense_trim_threshold(t, density)) for t in task_vectors]
    flat = [t.reshape(-1) for t in task_vectors]

    def tau_tile(i: int, entries: slice) -> Tensor:
        return flat[i][entries].to(dtype)

    merged = torch.empty_like(base, memory_format=torch.contiguous_format).view(-1)
    spans = row_tiles(base.numel(), 1, base.device)
    merge_tiles(base.reshape(-1), merged, spans, tau_tile, thresholds, weights, lam, dtype)
    return out.copy_(merged.view(base.shape))


@torch.no_grad()
def linear_merge_lora(
    base: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    weights: Sequence[float],
    *,
    lam: float = 1.0,
    out: Tensor | None = None,
    impl: str | None = None,
    check_finite: bool = True,
) -> Tensor:
    """base + lam * sum_i w_i s_i B_i A_i / sum_i w_i, in base's dtype.  # [out, in]"""
    scales, weights = check_lora_merge(base, lora_a, lora_b, scales, weights, finite=check_finite)
    out = check_out(out, base)
    if choose_impl(impl, base.device) == "reference":
        tau = dense_task_vectors(lora_a, lora_b, scales)
        return out.copy_(linear_merge_reference(base.double(), tau, weights, lam))
    dtype = compute_dtype([*lora_a, *lora_b])
    shares = [w * s / sum(weights) for w, s in zip(weights, scales, strict=True)]
    for rows in row_tiles(*base.shape, base.device):
        mean = torch.zeros(base[rows].shape, dtype=dtype, device=base.device)
        for a, b, share in zip(lora_a, lora_b, shares, strict=True):
            mean.addmm_(b[rows].to(dtype), a.to(dtype), alpha=share)
        out[rows] = torch.add(base[rows], mean, alpha=lam)
    return out


@torch.no_grad()
def dense_trim_threshold(task_vector: Tensor, density: float) -> Tensor:
    """`trim_threshold` of a dense task vector of any rank.  # []"""
    check_density(density)
    flat, dtype = task_vector.reshape(-1), compute_dtype([task_vector])

    def tiles() -> Iterator[Tensor]:
        for entries in row_tiles(flat.numel(), 1, flat.device):
            yield flat[entries].to(dtype)

    return kth_largest_magnitude(tiles, flat.numel(), density)


# ------------------------------------------------------------------------------------ streaming


class StreamingTies:
    """TIES over a history that only grows, in O(1) memory and time per checkpoint.

    Holds P, N, Wp, Wn of each named matrix. "sma" adds every checkpoint with weight 1; "ema" decays
    the sums by (1 - alpha) and adds with weight alpha, the first one with weight 1. The result
    equals the batch merge with equal or with EMA weights, to rounding.
    """

    def __init__(self, weighting: str = "sma", alpha: float = 0.5):
        check_streaming(weighting, alpha)
        self.weighting, self.alpha = weighting, alpha
        self.sums: dict[str, Tensor] = {}  # name -> [4, *shape]

    @torch.no_grad()
    def push_lora(
        self,
        name: str,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
        threshold: Tensor | float,
        *,
        check_finite: bool = True,
    ) -> None:
        """Add s B A, trimmed at the threshold that `trim_threshold` gave for it."""
        (scale,) = check_factors([lora_a], [lora_b], [scale], finite=check_finite)
        shape, dtype = (lora_b.shape[0], lora_a.shape[1]), compute_dtype([lora_a, lora_b])

        def tau_tile(rows: slice) -> Tensor:
            return task_vector_tile(lora_a, lora_b, scale, rows, dtype)

        self._push(name, shape, lora_a.device, dtype, tau_tile, threshold)

    @torch.no_grad()
    def push(self, name: str, task_vector: Tensor, density: float) -> None:
        """Add a dense task vector of rank 1 or more, trimmed at `density`."""
        check_task_vectors([task_vector], task_vector)
        threshold, dtype = dense_trim_threshold(task_vector, density), compute_dtype([task_vector])

        def tau_tile(rows: slice) -> Tensor:
            return task_vector[rows].to(dtype)

        self._push(name, task_vector.shape, task_vector.device, dtype, tau_tile, threshold)

    def _push(
        self,
        name: str,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        tau_tile: Callable[[slice], Tensor],
        threshold: Tensor | float,
    ) -> None:
        bound = just_below(check_thresholds([threshold], 1)[0], dtype)
        first = name not in self.sums
        if first:
            self.sums[name] = torch.zeros(4, *shape, dtype=dtype, device=device)
        sums = self.sums[name]
        check_same(
            "pushed shape, device",
            (tuple(shape), device),
            "sums",
            (tuple(sums.shape[1:]), sums.device),
        )
        decays = self.weighting == "ema" and not first
        for rows in row_tiles(shape[0], sums[0, 0].numel(), device):
            tile = sums[:, rows]
            if decays:
                tile.copy_(F.hardshrink(tile * (1 - self.alpha), FORGOTTEN))
            accumulate_(tile, tau_tile(rows), bound, self.alpha if decays else 1.0)

    @torch.no_grad()
    def merge(
        self, name: str, base: Tensor, *, lam: float = 1.0, out: Tensor | None = None
    ) -> Tensor:
        """base + lam * TIES of everything pushed under `name` so far."""
        sums = find_sums(self.sums, name)
        check_placed("base", base, sums[0])
        out = check_out(out, base)
        for rows in row_tiles(base.shape[0], base[0].numel(), base.device):
            out[rows] = torch.add(base[rows], elect_and_average(sums[:, rows]), alpha=lam)
        return out

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.sums)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.sums = {name: tensor.clone() for name, tensor in state.items()}


class StreamingLinear:
    """The weighted mean of task vectors over a growing history: `StreamingTies` without TIES."""

    def __init__(self, weighting: str = "sma", alpha: float = 0.5):
        check_streaming(weighting, alpha)
        self.weighting, self.alpha = weighting, alpha
        self.means: dict[str, Tensor] = {}  # name -> [out, in]
        self.counts: dict[str, int] = {}

    @torch.no_grad()
    def push_lora(
        self,
        name: str,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
        *,
        check_finite: bool = True,
    ) -> None:
        """mean <- mean + share * (s B A - mean), share = 1 / count or alpha (1 at the first)."""
        (scale,) = check_factors([lora_a], [lora_b], [scale], finite=check_finite)
        shape, dtype = (lora_b.shape[0], lora_a.shape[1]), compute_dtype([lora_a, lora_b])
        count = self.counts.get(name, 0) + 1
        share = self.alpha if self.weighting == "ema" and count > 1 else 1 / count
        if count == 1:
            self.means[name] = torch.zeros(shape, dtype=dtype, device=lora_a.device)
        mean = self.means[name]
        check_same("pushed matrix", (shape, lora_a.device), "mean", (mean.shape, mean.device))
        for rows in row_tiles(*shape, mean.device):
            mean[rows].lerp_(task_vector_tile(lora_a, lora_b, scale, rows, dtype), share)
        self.counts[name] = count

    @torch.no_grad()
    def merge(
        self, name: str, base: Tensor, *, lam: float = 1.0, out: Tensor | None = None
    ) -> Tensor:
        """base + lam * the mean of everything pushed under `name` so far."""
        mean = find_sums(self.means, name)
        check_placed("base", base, mean)
        return check_out(out, base).copy_(torch.add(base, mean, alpha=lam))

    def state_dict(self) -> dict[str, Tensor]:
        counts = {f"{name}.count": torch.tensor(count) for name, count in self.counts.items()}
        return {f"{name}.mean": mean for name, mean in self.means.items()} | counts

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        names = [key.removesuffix(".mean") for key in state if key.endswith(".mean")]
        self.means = {name: state[f"{name}.mean"].clone() for name in names}
        self.counts = {name: int(state[f"{name}.count"]) for name in names}
