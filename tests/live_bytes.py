"""Counts the bytes of tensors that are alive, operation by operation, on any device.

Under PyTorch's fake tensors it tells what a model of the published shape would hold, though nothing
of that size exists. Every distinct storage counts once, from the operation that first returns it
until the last tensor of it is gone.
"""

import weakref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`now` and `peak`: bytes that operations within this context made and that are alive."""

    def __init__(self, *known: Tensor):
        super().__init__()
        self.now = self.peak = 0
        self.storages: dict[int, weakref.ref] = {}
        for tensor in known:  # were there before
            self._note(tensor)
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return out

    def reset(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, count = storage._cdata, storage.nbytes()
        if key in self.storages:
            return

        def gone(_) -> None:
            del self.storages[key]
            self.now -= count

        self.storages[key] = weakref.ref(storage, gone)
        self.now += count
        self.peak = max(self.peak, self.now)


class Adapted(nn.Module):
    """A frozen linear layer and its LoRA branch in fp32, which multiplies in the input's dtype."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        out_features, in_features = linear.weight.shape
        self.linear = linear
        self.lora_a = nn.Parameter(torch.zeros(rank, in_features, dtype=torch.float32))
        self.lora_b = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + s (x A^T) B^T."""
        inner = nn.functional.linear(x, self.lora_a.to(x.dtype))
        return self.linear(x) + 2.0 * nn.functional.linear(inner, self.lora_b.to(x.dtype))


def adapt(text: nn.Module, names: tuple[str, ...], rank: int) -> None:
    """Freeze a text model and put LoRA branches on its linear layers of these names."""
    text.requires_grad_(False)
    for path, module in list(text.named_modules()):
        parent, _, leaf = path.rpartition(".")
        if leaf in names:
            setattr(text.get_submodule(parent), leaf, Adapted(module, rank))


def nbytes(*tensors: Tensor) -> int:
    """Bytes of these tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)
