"""The EMA of weights against PyTorch's own and timm's: `python -m bench.ema`.

One list of the tiny model's shapes (many small tensors) and one of a transformer layer's (few large
ones; on a GPU four layers of a 7B as well), in fp32 and bf16, rounded to nearest and
stochastically; and the form that takes the new weights as base + s B A against eager PyTorch, which
makes them first. The floor is two reads and one write at the rate of a plain copy; for the factors,
their product as well.

Each result is first compared with the fp64 reference: to nearest within half a unit in the last
place, stochastically within one, and then without a drift.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.harness import read_settings
from bench.race import agreeing, check_close, copy_rate, device_name, product_rate, race, status
from turbo.kernels.ema import ema_update_, ema_update_lora_
from turbo.kernels.reference import ema_reference

LISTS = {
    "100 of 128x128": [(128, 128)] * 100,
    "7 of a 2,048-wide layer": [(2048, 2048)] * 4 + [(5632, 2048)] * 2 + [(2048, 5632)],
}
GPU_LISTS = {  # large enough that a launch does not count
    "four layers of a 7B": [(3584, 3584)] * 8 + [(512, 3584)] * 8 + [(18944, 3584)] * 12,
}
FACTORS = {"cpu": (2048, 2048, 64), "cuda": (18944, 3584, 128)}  # out, in, rank
ALPHA = 0.01
SCALE = 2.0

Tensors = list[torch.Tensor]
Update = Callable[[Tensors], object]  # of a list of averages, in place


@dataclass
class Config:
    """Race the EMA update against its rivals."""

    repeats: int = 7
    """timed turns"""
    save: bool = True
    """append the rows to bench/results/"""


def timm_update(new: Tensors) -> Update:
    """timm's ModelEmaV3, which keeps its own copy: that takes the place of the averages given."""
    held: dict[int, object] = {}

    def update(average: Tensors) -> Tensors:
        from timm.utils import ModelEmaV3

        if id(average) not in held:  # as a user has it: made once, before training
            ema = ModelEmaV3(torch.nn.ParameterList(average), decay=1 - ALPHA)
            held[id(average)] = ema, torch.nn.ParameterList(new)
        ema, model = held[id(average)]
        ema.update(model)
        return list(ema.module.parameters())

    return update


def list_updates(new: Tensors) -> dict[str, Update]:
    """Every implementation of one update of a list."""
    updates = {
        "ours": lambda average: ema_update_(average, new, ALPHA),
        "torch._foreach_lerp_": lambda average: torch._foreach_lerp_(average, new, ALPHA),
    }
    if new[0].dtype != torch.bfloat16:
        return updates | {"timm ModelEmaV3": timm_update(new)}
    return updates | {
        "ours, stochastic": lambda average: ema_update_(average, new, ALPHA, rounding="stochastic"),
        "timm ModelEmaV3, stochastic": timm_update(new),
    }


def lora_updates(base: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> dict[str, Update]:
    """Every implementation of one update towards base + s B A."""

    def ours(rounding: str) -> Update:
        return lambda average: ema_update_lora_(
            average[0], base, a, b, SCALE, ALPHA, rounding=rounding
        )

    updates = {
        "ours": ours("nearest"),
        "eager: average.lerp_(base + s B A)": lambda average: average[0].lerp_(
            base + SCALE * (b @ a), ALPHA
        ),
    }
    if base.dtype == torch.bfloat16:
        updates["ours, stochastic"] = ours("stochastic")
    return updates


def check_update(update: Update, average: Tensors, exact_new: Tensors, stochastic: bool) -> None:
    """What one update makes of these averages equals the reference, to its rounding."""
    copies = [x.clone() for x in average]
    got = update(copies)
    got = got if isinstance(got, list) else copies
    unit = torch.finfo(average[0].dtype).eps  # of a value, at most; half of it to nearest
    error = torch.zeros(2, dtype=torch.float64, device=average[0].device)  # sum, sum of squares
    for x, old, new in zip(got, average, exact_new, strict=True):
        wanted = ema_reference(old.double(), new, ALPHA)
        # What eager makes of base + s B A is rounded before the sum: ALPHA of that remains.
        atol = 2**-20 + ALPHA * unit * new.abs().max().item()
        check_close(x, wanted, rtol=unit * (1.01 if stochastic else 0.51) + 2**-22, atol=atol)
        off = x.double() - wanted
        error += torch.stack([off.sum(), off.square().sum()])
    if stochastic and error[0].abs() > 5 * error[1].sqrt():
        raise AssertionError(
            f"rounding drifts: errors sum to {error[0]:.1e}, +- {error[1].sqrt():.1e}"
        )


def compare(
    c: Config, label: str, updates: dict[str, Update], average: Tensors, new: Tensors, floor: float
) -> None:
    """One set of averages: agreement of every implementation, then the race."""
    shape = f"{label} {str(average[0].dtype).removeprefix('torch.')}"
    updates = {
        name: update
        for kind in (False, True)
        for name, update in agreeing(
            f"ema {shape}",
            {n: u for n, u in updates.items() if n.endswith("stochastic") is kind},
            lambda update, kind=kind: check_update(update, average, new, kind),
        ).items()
    }
    race(
        "ema",
        shape,
        {name: lambda update=update: update(average) for name, update in updates.items()},
        device=average[0].device.type,
        repeats=c.repeats,
        floor=floor,
        save=c.save,
    )


def main(argv: list[str] | None = None) -> int:
    """Measure, show and record; returns the exit status."""
    c = read_settings(Config, argv, "bench.ema")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"on {device_name(device)}")
    rate = copy_rate(device)
    for dtype in (torch.float32, torch.bfloat16):
        for name, shapes in (LISTS | (GPU_LISTS if device == "cuda" else {})).items():
            torch.manual_seed(0)
            average = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
            new = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
            floor = 3 * sum(x.numel() * x.element_size() for x in average) / rate
            exact = [x.double() for x in new]
            compare(c, name, list_updates(new), average, exact, floor)
        rows, columns, rank = FACTORS[device]
        sizes = [(rows, columns)] * 2 + [(rank, columns), (rows, rank)]
        average, base, a, b = (torch.randn(size, device=device).to(dtype) for size in sizes)
        floor = 3 * base.numel() * base.element_size() / rate
        floor += 2 * rows * columns * rank / product_rate(dtype, device)
        exact = [base.double() + SCALE * (b.double() @ a.double())]
        updates = lora_updates(base, a, b)
        compare(c, f"base + s B A, {rows}x{columns} r={rank}", updates, [average], exact, floor)
    return status()


if __name__ == "__main__":
    sys.exit(main())
