"""The EMA of a list of weights against PyTorch's own: `python -m bench.ema`.

One list of the tiny model's shapes (many small tensors) and one of a transformer layer's (few large
ones), in fp32 and bf16. The floor is two reads and one write at the rate of a plain copy.
"""

import sys
from dataclasses import dataclass

import torch
import tyro

from bench.race import copy_rate, device_name, race
from turbo.kernels.ema import ema_update_

LISTS = {
    "100 of 128x128": [(128, 128)] * 100,
    "7 of a 2,048-wide layer": [(2048, 2048)] * 4 + [(5632, 2048)] * 2 + [(2048, 5632)],
}
ALPHA = 0.01


@dataclass
class Config:
    """Race the EMA update against its rivals."""

    repeats: int = 7
    """timed turns"""
    save: bool = True
    """append the rows to bench/results/"""


def rivals(average: list[torch.Tensor], new: list[torch.Tensor]) -> dict:
    """Every implementation of one update."""

    def timm() -> None:
        from timm.utils import ModelEmaV3

        if not hasattr(timm, "ema"):
            timm.model = torch.nn.ParameterList(new)
            timm.ema = ModelEmaV3(timm.model, decay=1 - ALPHA)
        timm.ema.update(timm.model)

    def stochastic() -> None:
        ema_update_(average, new, ALPHA, rounding="stochastic")

    calls = {
        "ours": lambda: ema_update_(average, new, ALPHA),
        "torch._foreach_lerp_": lambda: torch._foreach_lerp_(average, new, ALPHA),
        "timm ModelEmaV3": timm,
    }
    if average[0].dtype == torch.bfloat16:
        calls["ours, stochastic"] = stochastic
    return calls


def main(argv: list[str] | None = None) -> int:
    """Measure, show and record; returns the exit status."""
    c = tyro.cli(Config, args=argv, prog="bench.ema")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"on {device_name(device)}")
    rate = copy_rate(device)
    for name, shapes in LISTS.items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            average = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
            new = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
            ours, theirs = ([x.clone() for x in average] for _ in range(2))
            ema_update_(ours, new, ALPHA)
            torch._foreach_lerp_(theirs, new, ALPHA)
            for x, y in zip(ours, theirs, strict=True):
                torch.testing.assert_close(x, y)
            moved = 3 * sum(x.numel() * x.element_size() for x in average)
            race(
                "ema",
                f"{name} {str(dtype).removeprefix('torch.')}",
                rivals(average, new),
                device=device,
                repeats=c.repeats,
                floor=moved / rate,
                save=c.save,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
