"""TIES from LoRA factors against dense implementations: `python -m bench.ties`.

On a CPU: one matrix of 2,048 x 2,048, rank 64, 8 checkpoints, against peft's `ties` on the dense
task vectors and mergekit's on the dense checkpoints (which are made beforehand, at their gain),
with thresholds at hand and with them computed; then the peak memory for 2, 8 and 32 checkpoints. On
a GPU: also all 196 text matrices of Qwen2.5-VL-7B's shapes, rank 128, 30 checkpoints, and the
largest of them against peft, whose 30 dense task vectors take 8 GB in fp32.

Each result is first compared with the fp64 reference. Where votes cancel but for rounding, and at
the threshold, either answer is right: one entry in a thousand may differ.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.harness import read_settings
from bench.race import agreeing, check_close, device_name, product_rate, race, status
from turbo.kernels import reference
from turbo.kernels.ties import linear_merge_lora, ties_merge_lora, trim_threshold

DENSITY = 0.8
ODD = 1e-3  # share of the entries whose sign or trim rounding may decide
FEW = 64  # rows that are compared where the whole matrix is too large for a dense reference
QWEN_7B = {  # matrices of one of 28 layers: [out, in]
    "q_proj": (3584, 3584),
    "k_proj": (512, 3584),
    "v_proj": (512, 3584),
    "o_proj": (3584, 3584),
    "gate_proj": (18944, 3584),
    "up_proj": (18944, 3584),
    "down_proj": (3584, 18944),
}


@dataclass
class Config:
    """Race the TIES merge against its rivals."""

    size: int = 2048
    """rows and columns of the matrix"""
    rank: int = 64
    """rank of the factors"""
    checkpoints: int = 8
    """task vectors that are merged"""
    whole: bool = True
    """on a GPU, the whole model of 7B too"""
    repeats: int = 5
    """timed turns"""
    save: bool = True
    """append the rows to bench/results/"""


def make(shape: tuple[int, int], rank: int, count: int, dtype: torch.dtype, device: str) -> tuple:
    """A base and `count` random pairs of factors with scale 1."""
    torch.manual_seed(0)
    rows, columns = shape
    base = torch.randn(rows, columns, device=device).to(dtype)
    a = [torch.randn(rank, columns, device=device).to(dtype) for _ in range(count)]
    b = [torch.randn(rows, rank, device=device).to(dtype) for _ in range(count)]
    return base, a, b, [1.0] * count


def peft_ties(base: torch.Tensor, task_vectors: list[torch.Tensor]) -> torch.Tensor:
    """base + peft's TIES with unit weights."""
    from peft.utils.merge_utils import ties

    weights = torch.ones(len(task_vectors), device=base.device)
    return base + ties(task_vectors, weights, DENSITY)


def mergekit_ties(base: torch.Tensor, checkpoints: list[torch.Tensor]) -> torch.Tensor:
    """mergekit's TIES of dense checkpoints with unit weights."""
    from mergekit.merge_methods.base import TensorGroup
    from mergekit.merge_methods.registry import get

    numbers = range(1, len(checkpoints) + 1)  # the base is 0
    return get("ties").merge_group(
        TensorGroup.from_tensors([base, *checkpoints], base_index=0),
        weight=dict.fromkeys(numbers, 1.0),
        density=dict.fromkeys(numbers, DENSITY),
        normalize=True,
        rescale=False,
        int8_mask=False,
        **{"lambda": 1.0},
    )


def check_rows(got: torch.Tensor, base: torch.Tensor, a: list, b: list, levels: list) -> None:
    """The first rows of a merge with unit scales and weights equal the reference, trimmed alike."""
    taus = [y[:FEW].double() @ x.double() for x, y in zip(a, b, strict=True)]
    trimmed = [reference.trim_at(tau, float(h)) for tau, h in zip(taus, levels, strict=True)]
    ones = torch.ones(len(taus), dtype=torch.float64, device=base.device)
    wanted = reference.merge_trimmed(base[:FEW].double(), torch.stack(trimmed), ones)
    rtol = torch.finfo(base.dtype).eps + 1e-4
    check_close(got[:FEW], wanted, rtol=rtol, atol=1e-3, odd=ODD)


def compare(c: Config, device: str) -> None:
    """One matrix, every implementation."""
    base, a, b, scales = make((c.size, c.size), c.rank, c.checkpoints, torch.float32, device)
    weights = [1.0] * c.checkpoints
    dense = [y @ x for x, y in zip(a, b, strict=True)]
    checkpoints = [base + tau for tau in dense]
    variants = ours_and_peft(base, a, b, dense) | {
        "mergekit ties, checkpoints at hand": lambda: mergekit_ties(base, checkpoints),
    }
    linear = {"ours, linear merge": lambda: linear_merge_lora(base, a, b, scales, weights)}
    exact = [y.double() @ x.double() for x, y in zip(a, b, strict=True)]
    merged = reference.ties_merge_reference(base.double(), exact, weights, DENSITY)
    mean = reference.linear_merge_reference(base.double(), exact, weights)
    del exact
    shape = f"{c.size}x{c.size} r={c.rank} K={c.checkpoints} float32"

    def equals(wanted: torch.Tensor, odd: float):
        return lambda call: check_close(call(), wanted, rtol=1e-4, atol=1e-3, odd=odd)

    variants = agreeing(f"ties {shape}", variants, equals(merged, ODD))
    variants |= agreeing(f"ties {shape}", linear, equals(mean, 0.0))
    del merged, mean
    flops = 2 * c.size**2 * c.rank * c.checkpoints
    race(
        "ties",
        shape,
        variants,
        device=device,
        repeats=c.repeats,
        floor=flops / product_rate(torch.float32, device),
        save=c.save,
    )


def ours_and_peft(base: torch.Tensor, a: list, b: list, dense: list) -> dict[str, Callable]:
    """TIES with unit scales and weights: ours twice, and peft's of the dense task vectors."""
    ones = [1.0] * len(a)

    def levels() -> list[torch.Tensor]:
        return [trim_threshold(x, y, 1.0, DENSITY) for x, y in zip(a, b, strict=True)]

    known = [float(level) for level in levels()]
    return {
        "ours, thresholds at hand": lambda: ties_merge_lora(base, a, b, ones, ones, known),
        "ours, thresholds computed": lambda: ties_merge_lora(base, a, b, ones, ones, levels()),
        "peft ties, task vectors at hand": lambda: peft_ties(base, dense),
    }


def large_matrix(c: Config, rank: int = 128, count: int = 30) -> None:
    """The largest matrix of a 7B model with factors in bf16, against peft on fp32 task vectors."""
    size = max(QWEN_7B.values(), key=math.prod)
    base, a, b, _ = make(size, rank, count, torch.bfloat16, "cuda")
    dense = [y.float() @ x.float() for x, y in zip(a, b, strict=True)]
    levels = [reference.trim_threshold_reference(tau, DENSITY) for tau in dense]
    shape = f"{size[0]}x{size[1]} r={rank} K={count} bfloat16"
    variants = ours_and_peft(base, a, b, dense)
    race(
        "ties",
        shape,
        agreeing(f"ties {shape}", variants, lambda call: check_rows(call(), base, a, b, levels)),
        device="cuda",
        repeats=c.repeats,
        floor=2 * size[0] * size[1] * rank * count / product_rate(torch.bfloat16, "cuda"),
        save=c.save,
    )


def memory(c: Config, device: str) -> None:
    """Peak memory of the merge as the history grows."""
    for count in (2, 8, 32):
        base, a, b, scales = make((c.size, c.size), 16, count, torch.float32, device)
        levels = [0.5] * count
        arguments = (base, a, b, scales, [1.0] * count, levels)
        shape = f"{c.size}x{c.size} r=16 K={count} float32"
        ours = {"ours": lambda arguments=arguments: ties_merge_lora(*arguments)}
        factors = base, a, b, levels
        race(
            "ties-memory",
            shape,
            agreeing(f"ties {shape}", ours, lambda call, f=factors: check_rows(call(), *f)),
            device=device,
            repeats=2,
            save=c.save,
        )


def whole_model(c: Config) -> None:
    """All text matrices of a 7B model, 30 checkpoints: a merge, and one checkpoint's thresholds.

    As the trainer calls them: the history has looked at the factors and knows the thresholds. Also
    with factors that wait in pinned memory, as in the history, and with factors in fp32 (the floor
    is still that of bf16, whose products are a third).
    """
    count, rank, device = 30, 128, "cuda"
    weights = [1.0] * count
    flops = 28 * sum(2 * rows * columns * rank for rows, columns in QWEN_7B.values())
    rate = product_rate(torch.bfloat16, device)
    options = dict(device=device, repeats=c.repeats, save=c.save)
    shape = f"qwen2.5-vl-7b r={rank}"
    for dtype, called in ((torch.bfloat16, "ours"), (torch.float32, "ours, factors fp32")):
        layer = [make(size, rank, count, torch.bfloat16, device) for size in QWEN_7B.values()]
        layer = [(w, [x.to(dtype) for x in a], [y.to(dtype) for y in b]) for w, a, b, _ in layer]
        known = [
            [float(trim_threshold(x, y, 1.0, DENSITY)) for x, y in zip(a, b, strict=True)]
            for _, a, b in layer
        ]

        def merge(layer: list = layer, known: list = known) -> None:
            for _ in range(28):  # the same seven matrices stand for every layer
                for (base, a, b), levels in zip(layer, known, strict=True):
                    a, b = ([x.to(device, non_blocking=True) for x in side] for side in (a, b))
                    ties_merge_lora(base, a, b, weights, weights, levels, check_finite=False)

        def threshold(layer: list = layer) -> None:
            for _ in range(28):
                for _, a, b in layer:
                    trim_threshold(a[0], b[0], 1.0, DENSITY, check_finite=False)

        def check(_: object, layer: list = layer, known: list = known) -> None:
            for (base, a, b), levels in zip(layer, known, strict=True):
                got = ties_merge_lora(base, a, b, weights, weights, levels)
                check_rows(got, base, a, b, levels)

        merges = agreeing(f"ties {shape}", {called: merge}, check)
        if merges:
            pinned = [
                (w, [x.cpu().pin_memory() for x in a], [y.cpu().pin_memory() for y in b])
                for w, a, b in layer
            ]
            merges[f"{called}, in pinned memory"] = lambda p=pinned, k=known, m=merge: m(p, k)
        race("ties", f"{shape} K={count}", merges, floor=count * flops / rate, **options)
        race("ties-threshold", shape, {called: threshold}, floor=flops / rate, **options)


def main(argv: list[str] | None = None) -> int:
    """Measure, show and record; returns the exit status."""
    c = read_settings(Config, argv, "bench.ties")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"on {device_name(device)}")
    if device == "cuda":
        if c.whole:
            whole_model(c)
        large_matrix(c)
    compare(c, device)
    memory(c, device)
    return status()


if __name__ == "__main__":
    sys.exit(main())
