"""Which implementation of a kernel runs: one rule for all of them.

    impl = "reference"   plain PyTorch in fp64, written to be read
    impl = "torch"       chunked PyTorch: fast on CPU, bounded in memory, runs on any device
    impl = "triton"      a CUDA kernel
    impl = None          the best one the tensor's device has

Left out: any registry. A kernel asks `choose_impl` for a name and branches on it in plain sight.
"""

import torch

IMPLEMENTATIONS = ("reference", "torch", "triton")


def choose_impl(impl: str | None, device: torch.device, *, has_triton: bool = False) -> str:
    """Return the implementation to run; `has_triton` says whether the calling op has a kernel."""
    if impl is None:
        return "triton" if has_triton and device.type == "cuda" else "torch"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {IMPLEMENTATIONS} or None, got {impl!r}")
    if impl == "triton" and not has_triton:
        raise NotImplementedError(
            "impl='triton': this op has no Triton kernel yet; use impl='torch' or impl=None"
        )
    return impl
