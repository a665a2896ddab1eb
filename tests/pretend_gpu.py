"""A GPU that is not there: tensors that say they lie on one, computed on the CPU.

`with pretend_gpu():` a whole run works on the device `cuda` with its real control flow and real
numbers. What a GPU refuses is refused: an operation on tensors of both devices, numpy's view of one
that lies on the GPU, generators of the other device. Triton kernels run in its interpreter.

Left out: streams, graphs and pinned memory, which are not pretended; speed, and what the GPU's own
kernels compute. Those need one (`make test-gpu`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from turbo.kernels import dispatch

GPU, HOST, HIDDEN = torch.device("cuda:0"), torch.device("cpu"), torch.device("meta")
MEMORY = 80 << 30
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
# What only a GPU has: sums of a product in another type. Where the type stands, and a sum before.
WIDE_PRODUCTS = {aten.mm.dtype: (2, 0), aten.addmm.dtype_out: (3, 1)}
FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray}


class OnGpu(torch.Tensor):
    """A tensor of the GPU; `held` has its numbers.

    C++ knows it as one of `meta`, whose device needs no driver.
    """

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=HIDDEN,
        )

    def __init__(self, held: torch.Tensor):
        self.held = held

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def __repr__(self) -> str:
        return f"OnGpu({self.held})"

    def __format__(self, form: str) -> str:
        return format(self.held, form)

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Operations(TorchDispatchMode):
    """Also those without a tensor, that make one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Calls(TorchFunctionMode):
    """What C++ would answer before any operation is reached."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.device:
            return function(*args, **kwargs)
        args, kwargs = tree_map(_first, (args, kwargs))
        if function in FROM_NUMBERS and kwargs.get("device") == GPU:
            numbers = tree_map(_held, args)
            return function(*numbers, **{**kwargs, "device": HOST}).to(GPU)
        if args and isinstance(args[0], OnGpu):
            if function is torch.Tensor.to:  # to where it is already: the tensor itself
                args, kwargs = tree_map(_hidden, (args, kwargs))
            if function == torch.Tensor.data.__set__:
                args[0].held = args[1].held
            if function is torch.Tensor.tolist:
                return args[0].held.tolist()
            if function in (torch.Tensor.numpy, torch.Tensor.__array__):
                raise TypeError("a tensor on cuda:0 has no numpy array: copy it to the host first")
        return function(*args, **kwargs)


def _first(x: object) -> object:
    """`cuda` is `cuda:0`: to ask for the current one needs a driver."""
    named = isinstance(x, str) and x == "cuda"
    return GPU if named or (isinstance(x, torch.device) and x == torch.device("cuda")) else x


def _hidden(x: object) -> object:
    return HIDDEN if isinstance(x, torch.device) and x == GPU else x


def _held(x: object) -> object:
    return x.held if isinstance(x, OnGpu) else x


def compute(function, args: tuple, kwargs: dict):
    """One operation on the CPU; its results are on the GPU if they would be."""
    wanted = kwargs.get("device")
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    on_gpu = any(isinstance(x, OnGpu) for x in tensors)
    check_devices(function, args, tensors)
    if wanted is not None:
        on_gpu = torch.device(wanted).type in ("cuda", "meta")
        kwargs = {**kwargs, "device": HOST}
    if function is aten.copy_.default:
        on_gpu = isinstance(args[0], OnGpu)
    if on_gpu and kwargs.get("generator") is not None:
        raise RuntimeError(f"{function}: expected a generator on {GPU}, got one on {HOST}")
    given, named = tree_map(_held, (args, {k: v for k, v in kwargs.items() if k != "pin_memory"}))
    if function in WIDE_PRODUCTS:
        place, first = WIDE_PRODUCTS[function]
        left, right = (x.to(given[place]) for x in given[first : first + 2])
        out = left @ right if first == 0 else named["out"].copy_(given[0] + left @ right)
    else:
        out = function(*given, **named)
    if not on_gpu or function is aten._local_scalar_dense.default:
        moved = function is aten._to_copy.default and any(out is x for x in given)
        return out.clone() if moved else out
    out = tree_map(lambda x: OnGpu(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(function, args, kwargs, out)


def check_devices(function, args: tuple, tensors: list[torch.Tensor]) -> None:
    """RuntimeError where a GPU would not compute; single numbers and indices may lie here."""
    there = [x for x in tensors if isinstance(x, OnGpu)]
    here = [x for x in tensors if not isinstance(x, OnGpu) and x.dim() > 0]
    if function in INDEXED and isinstance(args[0], OnGpu):
        here = [x for x in here if x.is_floating_point()]
    if there and here and function not in MOVES:
        shapes = [(tuple(x.shape), str(x.device)) for x in tensors]
        raise RuntimeError(f"{function}: tensors are not all on one device: {shapes}")


@contextmanager
def pretend_gpu(triton: bool = True) -> Iterator[None]:
    """Inside, there is a GPU of 80 GB; without its Triton kernels PyTorch computes, much faster.

    Skips a test where Triton or bitsandbytes is missing.
    """
    pytest.importorskip("bitsandbytes")  # before there seems to be a GPU: it looks for one
    GridExecutor = pytest.importorskip("triton.runtime.interpreter").GridExecutor
    launch = GridExecutor.__call__

    def on_host(self, *args, **kwargs):
        args, kwargs = tree_map(_held, (args, kwargs))
        return launch(self, *args, **kwargs)

    answers = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "max_memory_reserved": lambda device=None: 1 << 30,
        "max_memory_allocated": lambda device=None: 1 << 30,
        "memory_allocated": lambda device=None: 1 << 29,
        "reset_peak_memory_stats": lambda device=None: None,
        "synchronize": lambda device=None: None,
        "get_device_name": lambda device=None: "a pretended GPU",
    }
    patches = [patch.object(torch.cuda, name, answer) for name, answer in answers.items()]
    patches.append(patch.object(GridExecutor, "__call__", on_host))
    if not triton:
        patches.append(patch.object(dispatch, "_installed", lambda: False))
    patches.append(patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor))
    for one in patches:
        one.start()
    try:
        with Calls(), Operations():
            yield
    finally:
        for one in patches:
            one.stop()
