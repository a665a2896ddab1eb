"""Where a test of an implementation runs: Triton on a GPU if there is one, all else on the CPU."""

import torch


def device_of(impl: str) -> str:
    """The device whose tensors the implementation is tested with."""
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
