"""Which implementation of a kernel runs: one rule for all of them.

    impl = "reference"   plain PyTorch in fp64, written to be read
    impl = "torch"       chunked PyTorch: fast on CPU, bounded in memory, runs on any device
    impl = "triton"      a CUDA kernel; with TRITON_INTERPRET=1 it runs on a CPU, for tests
    impl = None          the best one the tensor's device has

Left out: any registry. A kernel asks `choose_impl` for a name and branches on it in plain sight.
"""

import os
from importlib.util import find_spec

import torch

IMPLEMENTATIONS = ("reference", "torch", "triton")


def choose_impl(impl: str | None, device: torch.device, *, has_triton: bool = False) -> str:
    """Return the implementation to run; `has_triton` says whether the calling op has a kernel."""
    if impl is None:
        return "triton" if has_triton and device.type == "cuda" and _installed() else "torch"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {IMPLEMENTATIONS} or None, got {impl!r}")
    if impl == "triton":
        _check_triton(device, has_triton)
    return impl


def _check_triton(device: torch.device, has_triton: bool) -> None:
    if not has_triton:
        raise NotImplementedError(
            "impl='triton': this op has no Triton kernel yet; use impl='torch' or impl=None"
        )
    if not _installed():
        raise ModuleNotFoundError(
            "impl='triton': triton is not installed; `pip install triton`, or use impl='torch'"
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl='triton': expected tensors on a CUDA device, got {device}; use impl='torch', or "
            "set TRITON_INTERPRET=1 before Python starts to run the kernel's code on a CPU, slowly"
        )


def _installed() -> bool:
    return find_spec("triton") is not None
