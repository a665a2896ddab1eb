"""Validation of the kernels' arguments: ValueError naming argument, expected and got.

Left out: anything the operation itself would reject with a clear message.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import IGNORED_TARGET


def compute_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 if any of the tensors is, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def fits_triton(base: Tensor, factors: Sequence[Tensor]) -> bool:
    """Whether the merge kernels take these: factors of one dtype, nothing in fp64."""
    one_dtype = len({factor.dtype for factor in factors}) == 1
    return one_dtype and torch.float64 not in (base.dtype, factors[0].dtype)


def check_streaming(weighting: str, alpha: float) -> None:
    """A weighting that can be kept as running sums, and its alpha."""
    if weighting not in ("sma", "ema"):
        raise ValueError(f"weighting: expected 'sma' or 'ema' to stream, got {weighting!r}")
    check_alpha(alpha)


def check_alpha(alpha: float) -> None:
    """The share of the newest checkpoint: in (0, 1]."""
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha: expected a number in (0, 1], got {alpha}")


def check_density(density: float) -> None:
    """The share of entries that trimming keeps: in [0, 1]."""
    if not 0 <= density <= 1:
        raise ValueError(f"density: expected a number in [0, 1], got {density}")


def check_same(name: str, got: object, other: str, expected: object) -> None:
    """`name` agrees with the same property of `other`."""
    if got != expected:
        raise ValueError(f"{name}: expected {expected} like the {other}, got {got}")


def check_placed(name: str, tensor: Tensor, held: Tensor) -> None:
    """A tensor that meets running sums has their shape and device."""
    got, expected = (tuple(tensor.shape), tensor.device), (tuple(held.shape), held.device)
    check_same(name, got, "running sums", expected)


def find_sums(sums: dict[str, Tensor], name: str) -> Tensor:
    """The running sums pushed under a name."""
    if name not in sums:
        raise ValueError(f"name: nothing was pushed under {name!r}; known: {sorted(sums)}")
    return sums[name]


def check_floating(name: str, tensor: Tensor, index: int | None = None) -> None:
    """A tensor of floating point numbers, the `index`-th of a list if that is given."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        place = "" if index is None else f"[{index}]"
        raise ValueError(
            f"{name}{place}: expected a floating point tensor, got {_describe(tensor)}"
        )


def _describe(value: object) -> str:
    return f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__


def check_length(name: str, values: Sequence, expected: int) -> None:
    """One value per checkpoint."""
    if len(values) != expected:
        raise ValueError(f"{name}: expected {expected} (one per checkpoint), got {len(values)}")


def check_weights(weights: Sequence[float], expected: int) -> list[float]:
    """One finite weight >= 0 per checkpoint, not all 0; returns them as floats."""
    weights = [float(weight) for weight in weights]
    check_length("weights", weights, expected)
    if not all(0 <= weight < float("inf") for weight in weights) or sum(weights) == 0:
        raise ValueError(f"weights: expected finite, >= 0 and not all 0, got {weights}")
    return weights


def check_thresholds(thresholds: Sequence[Tensor | float], expected: int) -> list[float]:
    """One number >= 0 per checkpoint; returns them as floats."""
    check_length("thresholds", thresholds, expected)
    if all(isinstance(threshold, Tensor) for threshold in thresholds):  # one transfer for all
        thresholds = torch.stack([threshold.double() for threshold in thresholds]).tolist()
    thresholds = [float(threshold) for threshold in thresholds]
    if not all(threshold >= 0 for threshold in thresholds):  # also catches NaN
        raise ValueError(f"thresholds: expected numbers >= 0, got {thresholds}")
    return thresholds


def check_factors(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    shape: tuple[int, int] | None = None,
    finite: bool = True,
) -> list[float]:
    """Every pair multiplies to `shape` [out, in] and is finite; returns the scales as floats.

    With finite=False the entries are not looked at: whoever calls has done that.
    """
    check_length("lora_b", lora_b, len(lora_a))
    check_length("scales", scales, len(lora_a))
    for i, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        for name, factor in ((f"lora_a[{i}]", a), (f"lora_b[{i}]", b)):
            check_floating(name, factor)
            if factor.dim() != 2:
                raise ValueError(f"{name}: expected 2 dimensions, got {tuple(factor.shape)}")
        check_same(f"lora_b[{i}] dtype, device", (b.dtype, b.device), "lora_a", (a.dtype, a.device))
        shape = (b.shape[0], a.shape[1]) if shape is None else shape
        if (b.shape[0], a.shape[1]) != tuple(shape) or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"lora_a[{i}], lora_b[{i}]: expected [r, {shape[1]}] and [{shape[0]}, r], "
                f"got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        if 0 in (*a.shape, *b.shape):
            raise ValueError(f"lora_a[{i}], lora_b[{i}]: expected no dimension of size 0")
    if finite:
        check_finite({f"lora_a[{i}]": a for i, a in enumerate(lora_a)})
        check_finite({f"lora_b[{i}]": b for i, b in enumerate(lora_b)})
    scales = [float(scale) for scale in scales]
    if not all(abs(scale) < float("inf") for scale in scales):
        raise ValueError(f"scales: expected finite numbers, got {scales}")
    return scales


def check_finite(tensors: dict[str, Tensor]) -> None:
    """No NaN or infinity in any tensor; one transfer from the device for all of them.

    A NaN is the least and the greatest entry of its tensor: one pass, where isfinite takes five.
    """
    filled = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    if not filled:
        return
    ends = [end for tensor in filled.values() for end in tensor.detach().aminmax()]
    ends = [end.to(ends[0].device) for end in ends]
    finite = torch.stack(ends).isfinite().view(-1, 2).all(1).tolist()
    for name, good in zip(filled, finite, strict=True):
        if not good:
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def check_lora_merge(
    base: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    weights: Sequence[float],
    device: torch.device | None = None,
    finite: bool = True,
) -> tuple[list[float], list[float]]:
    """All arguments of a merge from factors; returns scales and weights as floats.

    The factors lie on `device`, or where the base does; `finite` as in `check_factors`.
    """
    check_floating("base", base)
    if base.dim() != 2:
        raise ValueError(f"base: expected [out, in], got {tuple(base.shape)}")
    if len(lora_a) == 0:
        raise ValueError("lora_a: expected at least one checkpoint, got an empty history")
    scales = check_factors(lora_a, lora_b, scales, tuple(base.shape), finite)
    for i, factor in enumerate(lora_a):
        check_same(f"lora_a[{i}] device", factor.device, "base", device or base.device)
    return scales, check_weights(weights, len(lora_a))


def check_task_vectors(task_vectors: Sequence[Tensor], base: Tensor) -> None:
    """At least one finite task vector, each of the shape and device of `base`."""
    check_floating("base", base)
    if len(task_vectors) == 0:
        raise ValueError("task_vectors: expected at least one checkpoint, got an empty history")
    for i, task_vector in enumerate(task_vectors):
        name = f"task_vectors[{i}]"
        check_floating(name, task_vector)
        got = (tuple(task_vector.shape), task_vector.device)
        check_same(name, got, "base", (tuple(base.shape), base.device))
        check_finite({name: task_vector})


def check_out(out: Tensor | None, base: Tensor) -> Tensor:
    """Where to write: `out`, which must be like `base`, or a new tensor like it."""
    if out is None:
        return torch.empty_like(base)
    got = (tuple(out.shape), out.dtype, out.device)
    check_same("out", got, "base", (tuple(base.shape), base.dtype, base.device))
    return out


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """A tensor's shape, dtype and device."""
    got = (tuple(tensor.shape), tensor.dtype, tensor.device)
    if got != (shape, dtype, device):
        raise ValueError(f"{name}: expected {shape}, {dtype} on {device}, got {got}")


def check_head_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    bias: Tensor | None,
    banned: Tensor | None,
) -> bool:
    """All of the policy head's arguments but the teacher's; whether every row has a target."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature}")
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(
                f"{name}: expected a floating point matrix, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    dtype, device = hidden.dtype, hidden.device
    check_tensor("weight", weight, (vocabulary, width), dtype, device)
    check_tensor("targets", targets, (rows,), torch.int64, device)
    if bias is not None:
        check_tensor("bias", bias, (vocabulary,), dtype, device)
    if banned is not None:
        check_tensor("banned", banned, (vocabulary,), torch.bool, device)
    # One answer of the device for all that is asked
    zero = targets.new_zeros(())
    ends = targets.aminmax() if rows else (zero, zero)
    asked = [*ends, zero if banned is None else banned.all()]
    lowest, highest, all_banned = torch.stack([x.to(torch.int64) for x in asked]).tolist()
    if all_banned:
        raise ValueError("banned: expected at least one entry that is not banned, got none")
    if lowest >= 0 and highest < vocabulary:
        return True
    good = (targets == IGNORED_TARGET) | ((targets >= 0) & (targets < vocabulary))
    if not good.all():
        raise ValueError(
            f"targets: expected {IGNORED_TARGET} or 0..{vocabulary - 1}, "
            f"got {targets[~good][:5].tolist()}"
        )
    return False


def check_head_teacher(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> None:
    """The policy head's teacher, beside inputs that are checked."""
    if teacher_weight.dim() != 2:
        raise ValueError(f"teacher_weight: expected [V, D'], got {tuple(teacher_weight.shape)}")
    dtype, device = hidden.dtype, hidden.device
    shape = (weight.shape[0], teacher_weight.shape[1])
    check_tensor("teacher_weight", teacher_weight, shape, dtype, device)
    shape = (hidden.shape[0], teacher_weight.shape[1])
    check_tensor("teacher_hidden", teacher_hidden, shape, dtype, device)
