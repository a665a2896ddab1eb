"""Decode steps on a GPU, recorded once for every shape and replayed (CUDA graphs).

A step that samples one token of every answer starts some hundreds of short kernels. Started one by
one from Python they take longer than the card needs to run them; a recorded step starts as one.

What is replayed is the very kernels on the very addresses. So a step may be recorded only if

    it reads nothing but its inputs and tensors that stay where they are
    it never asks the host: no sizes or branches that depend on values

Inputs are copied into places of their own. All records share one pool of memory: they never run at
the same time, and what a replay returns is to be read before the next one.

Left out: which steps are worth it (`turbo.decode`); training, whose shapes hardly recur.
"""

import functools
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Step = Callable[..., Tensor]
# (step, inputs) -> what runs the step again on those very inputs, and returns its output
Record = Callable[[Step, tuple[Tensor, ...]], Callable[[], Tensor]]


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One stream to warm up on: each keeps a workspace of the matrix library for good."""
    return torch.cuda.Stream(device)


class CudaRecord:
    """Records steps as CUDA graphs, which share one pool of memory."""

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
        """Run `step` once, so that libraries allocate what they need, then record it."""
        own = torch.cuda.current_stream()
        side = _side_stream(torch.cuda.current_device())
        side.wait_stream(own)
        with torch.cuda.stream(side):
            step(*inputs)
        own.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = step(*inputs)

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class Graphs:
    """The recorded steps of one decoder, by key."""

    def __init__(self, new_record: Callable[[], Record]):
        self.new_record = new_record
        self.clear()

    def run(self, key: Hashable, step: Step, inputs: tuple[Tensor, ...]) -> Tensor:
        """`step(*inputs)`, replayed where a step of this key is recorded.

        The key tells all that the inputs' values do not: shapes, and the addresses that `step`
        reads. A step is recorded when its key comes a second time: many come only once. The output
        is overwritten by the next run.
        """
        if key not in self.kept:
            if key not in self.met:
                self.met.add(key)
                return step(*inputs)
            own = tuple(x.clone() for x in inputs)
            self.kept[key] = own, self.record(step, own)
        own, replay = self.kept[key]
        for place, given in zip(own, inputs, strict=True):
            place.copy_(given)
        return replay()

    def clear(self) -> None:
        """Forget all, as what they read has moved or their memory is needed.

        What is recorded then has a new pool: one whose last graph is gone cannot be used again.
        """
        self.kept: dict[Hashable, tuple[tuple[Tensor, ...], Callable[[], Tensor]]] = {}
        self.met: set[Hashable] = set()
        self.record = self.new_record()
