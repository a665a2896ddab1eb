"""NF4 against bitsandbytes: `python -m bench.nf4`.

First one matrix at hand, coded by ours and by bitsandbytes. Then what the teacher needs, the merge
of 8 checkpoints in NF4: ours codes each tile as it is merged; the other way is a dense merge of the
whole matrix, which bitsandbytes codes. On a CPU 2,048 x 2,048 with rank 64, on a GPU 18,944 x 3,584
with rank 128, in bf16. The floors are one read and the write of 4.5 bits a value, and the products.

Codes and maxima are first compared with the fp64 reference. A value between two levels, or one that
the merge rounds to its neighbour in bf16, may have the next code.
"""

import sys
from dataclasses import dataclass

import torch

from bench.harness import read_settings
from bench.race import agreeing, check_close, copy_rate, device_name, product_rate, race, status
from bench.ties import DENSITY, make
from turbo.kernels import reference
from turbo.kernels.nf4 import Nf4Matrix, quantize_nf4, ties_merge_lora_nf4
from turbo.kernels.ties import ties_merge_lora, trim_threshold

ROWS = 64  # of the merge that are compared: in fp64 every checkpoint is dense
ODD_CODES = 1e-2
SHAPES = {"cpu": (2048, 2048, 64), "cuda": (18944, 3584, 128)}  # out, in, rank


@dataclass
class Config:
    """Race coding into NF4 against bitsandbytes."""

    size: tuple[int, int, int] | None = None
    """rows, columns and rank (default: 2,048, 2,048, 64 on a CPU, 18,944, 3,584, 128 on a GPU)"""
    checkpoints: int = 8
    """task vectors that are merged"""
    repeats: int = 5
    """timed turns"""
    save: bool = True
    """append the rows to bench/results/"""


def bitsandbytes_nf4(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' codes and maxima."""
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(matrix, blocksize=64, quant_type="nf4")
    return codes, state.absmax


def parts(coded: Nf4Matrix | tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes and maxima of either."""
    return (coded.codes, coded.absmax) if isinstance(coded, Nf4Matrix) else coded


def check_codes(coded: Nf4Matrix | tuple, values: torch.Tensor, odd: float) -> None:
    """Codes and maxima of the first of what was coded are those of `values`, by the reference."""
    wanted, absmax = reference.nf4_reference(values.double().reshape(-1))
    packed, maxima = parts(coded)
    packed = packed.reshape(-1)[: len(wanted) // 2]
    got = torch.stack([packed >> 4, packed & 15], 1).view(-1)
    check_close(got, wanted, rtol=0, atol=0, odd=odd)
    check_close(got, wanted, rtol=0, atol=1, odd=odd / 100)
    check_close(maxima.reshape(-1)[: len(absmax)], absmax, rtol=2**-7, atol=0, odd=odd)


def compare(c: Config, device: str) -> None:
    """A matrix at hand, then a merge."""
    rows, columns, rank = c.size or SHAPES[device]
    base, a, b, scales = make((rows, columns), rank, c.checkpoints, torch.bfloat16, device)
    weights = [1.0] * c.checkpoints
    known = [trim_threshold(x, y, 1.0, DENSITY) for x, y in zip(a, b, strict=True)]
    factors = (a, b, scales, weights, known)

    taus = [y[:ROWS].double() @ x.double() for x, y in zip(a, b, strict=True)]
    trimmed = [reference.trim_at(tau, float(h)) for tau, h in zip(taus, known, strict=True)]
    ones = torch.ones(c.checkpoints, dtype=torch.float64, device=device)
    merged = reference.merge_trimmed(base[:ROWS].double(), torch.stack(trimmed), ones)
    merged = merged.to(base.dtype)  # rounded before it is coded
    del taus, trimmed

    quantizers = {
        "ours": lambda: quantize_nf4(base),
        "bitsandbytes": lambda: bitsandbytes_nf4(base),
    }
    mergers = {
        "ours, tiles straight to NF4": lambda: ties_merge_lora_nf4(base, *factors),
        "dense merge, then bitsandbytes": lambda: bitsandbytes_nf4(ties_merge_lora(base, *factors)),
    }
    flops = 2 * rows * columns * rank * c.checkpoints
    moved = base.numel() * (base.element_size() + 4.5 / 8)
    races = {
        f"quantize {rows}x{columns} bfloat16": (
            quantizers,
            lambda call: check_codes(call(), base[:ROWS], 1e-4),
            moved / copy_rate(device),
        ),
        f"merge {rows}x{columns} r={rank} K={c.checkpoints} bfloat16": (
            mergers,
            lambda call: check_codes(call(), merged, ODD_CODES),
            flops / product_rate(torch.bfloat16, device),
        ),
    }
    for shape, (variants, check, floor) in races.items():
        race(
            "nf4",
            shape,
            agreeing(f"nf4 {shape}", variants, check),
            device=device,
            repeats=c.repeats,
            floor=floor,
            save=c.save,
        )


def main(argv: list[str] | None = None) -> int:
    """Measure, show and record; returns the exit status."""
    c = read_settings(Config, argv, "bench.nf4")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"on {device_name(device)}")
    compare(c, device)
    return status()


if __name__ == "__main__":
    sys.exit(main())
