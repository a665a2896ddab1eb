"""Both cores busy: a crew of processes that run the same program on their own share of the data.

Every worker plays its own deals and computes the gradient of its own steps; sums over the crew are
taken in shared memory, in the order of the ranks, so all workers hold the same bits and take the
same optimiser steps. Worker 0 is the process that was started; it alone talks, logs and writes.
(Threads were tried first: two of them were 1.1 to 1.4 times as fast as one, since the interpreter
lock changes hands at every small operation. See docs/LOG.md.)

Left out: several machines, GPUs.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait as wait_for
from multiprocessing.sharedctypes import RawValue
from queue import Empty

import torch
from torch import Tensor

PATIENCE = 1800.0  # seconds that a worker waits for the others
FROM_TERMINAL = (signal.SIGINT, signal.SIGHUP)  # Ctrl-C; its end


class Broken(RuntimeError):
    """A worker failed, was killed, or did not come in time."""


class Barrier:
    """Where every worker waits for all others, also when one of them is killed while it waits.

    There is a counting semaphore for each ordered pair of workers. To come here is to raise those
    towards the others; to have met is to have lowered those from the others. No worker ever holds
    a lock, so none takes one with it. (`multiprocessing.Barrier` waits forever for a sleeper that
    was killed: it wakes the others under a lock and waits for each to be awake.)
    """

    def __init__(self, size: int, context):
        self.size = size
        self._from_to = [[context.Semaphore(0) for _ in range(size)] for _ in range(size)]
        self._broken = context.RawValue("b", 0)

    @property
    def broken(self) -> bool:
        """Whether a worker gave up; it stays so."""
        return bool(self._broken.value)

    def abort(self) -> None:
        """Wake all who wait here, now or later, with `Broken`."""
        self._broken.value = 1
        for row in self._from_to:
            for semaphore in row:
                semaphore.release()

    def wait(self, rank: int, patience: float) -> None:
        """Return when all have come; `Broken` after so many seconds, or when one gave up."""
        others = [other for other in range(self.size) if other != rank]
        for other in others:
            self._from_to[rank][other].release()
        until = time.monotonic() + patience
        for other in others:
            came = self._from_to[other][rank].acquire(timeout=max(0.0, until - time.monotonic()))
            if not came:
                self.abort()
            if self.broken:
                raise Broken("another worker failed; its error is printed above")


class Crew:
    """What one worker knows of the others: its `rank`, their number `size`, and sums over all."""

    def __init__(
        self, rank: int = 0, size: int = 1, barrier=None, board=None, queues=(), asked=None
    ):
        self.rank, self.size = rank, size
        self._barrier, self._board, self._queues = barrier, board, queues
        # A byte in shared memory without a lock: it is set by a signal handler.
        self._asked = RawValue("b", 0) if asked is None else asked
        # Compiled matrix kernels that are kept, one for each shape; read at their first use.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
        torch.set_num_threads(1)

    @property
    def leads(self) -> bool:
        """Whether this is the worker that logs and writes."""
        return self.rank == 0

    def ask_to_stop(self) -> None:
        """Ask all workers to abandon what can be abandoned."""
        self._asked.value = 1

    @property
    def is_asked(self) -> bool:
        """Whether a worker asked to stop. Workers may see it at different moments."""
        return bool(self._asked.value)

    def wait(self) -> None:
        """Return when every worker has come here."""
        if self.size > 1:
            self._barrier.wait(self.rank, PATIENCE)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace float32 tensors by their sums over the crew, in place."""
        if self.size == 1:
            return
        flat = torch.cat([t.detach().reshape(-1).float() for t in tensors])
        for start in range(0, len(flat), self._board.shape[1]):
            piece = flat[start : start + self._board.shape[1]]
            self._board[self.rank, : len(piece)] = piece
            self.wait()
            piece.copy_(self._board[:, : len(piece)].sum(0))
            self.wait()
        at = 0
        for t in tensors:
            t.detach().copy_(flat[at : at + t.numel()].view_as(t))
            at += t.numel()

    def total(self, *numbers: float) -> list[float]:
        """Sums of plain numbers over the crew, in double precision."""
        return [sum(column) for column in zip(*self.share(list(numbers)), strict=True)]

    def share(self, item) -> list:
        """Every worker's `item`, in the order of the ranks, on every worker."""
        if self.size == 1:
            return [item]
        for rank in range(self.size):
            if rank != self.rank:
                self._queues[rank].put((self.rank, item))
        out = [None] * self.size
        out[self.rank] = item
        for _ in range(self.size - 1):
            rank, other = self._next()
            out[rank] = other
        self.wait()
        return out

    def problem(self, own: str) -> str:
        """The first worker's that has one, on every worker; empty where none has."""
        return next(filter(None, self.share(own)), "")

    def _next(self) -> tuple:
        """The next item sent to this worker; one that failed sends none, and is not waited for."""
        for _ in range(int(PATIENCE)):
            try:
                return self._queues[self.rank].get(timeout=1.0)
            except Empty:
                if self._barrier.broken:
                    break
        raise Broken("another worker failed; its error is printed above")


def fail(crew: Crew, why: object, status: int) -> int:
    """Say in one line why all workers cannot go on; the exit status."""
    if crew.leads:
        print(f"error: {why}", file=sys.stderr)
    return status


def cores() -> int:
    """Workers to use when none are asked for: one a core, at most 4."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(4, available or 1))


def run_crew(size: int, program: Callable, *arguments, board: int = 1 << 20):
    """Run `program(crew, *arguments)` on `size` workers; what it returns on worker 0.

    `board` is the number of float32 that are summed at once.
    """
    if size == 1:
        return program(Crew(), *arguments)
    context = multiprocessing.get_context("spawn")
    barrier = Barrier(size, context)
    shared = torch.zeros(size, board).share_memory_()
    queues, asked = [context.Queue() for _ in range(size)], context.RawValue("b", 0)
    others = [
        context.Process(
            target=_work,
            args=(program, arguments, rank, size, barrier, shared, queues, asked),
            daemon=True,
        )
        for rank in range(1, size)
    ]
    # Inherited: until it ignores them, none of them dies of what the terminal sends to all.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, FROM_TERMINAL)
    try:
        for process in others:
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(others, barrier, over), daemon=True)
    watch.start()
    try:
        return program(Crew(0, size, barrier, shared, queues, asked), *arguments)
    except BaseException:
        _give_up(barrier, queues)
        raise
    finally:
        over.set()
        for process in others:
            process.join(5)
            if process.is_alive():
                process.kill()


def _give_up(barrier: Barrier, queues: list) -> None:
    """Let the others know, and let this process end without having sent them all it was to send."""
    barrier.abort()
    for queue in queues:
        queue.cancel_join_thread()


def _watch(others: list, barrier, over: threading.Event) -> None:
    """See to it that nobody waits for a worker that was killed from outside."""
    left = {process.sentinel: rank for rank, process in enumerate(others, 1)}
    while left:
        for sentinel in wait_for(list(left)):
            rank = left.pop(sentinel)
            others[rank - 1].join()
            code = others[rank - 1].exitcode
            if code and not over.is_set():
                if code < 0:
                    print(f"worker {rank} was ended by signal {-code}", file=sys.stderr)
                barrier.abort()


def _follow() -> None:
    """A worker whose worker 0 is gone has nobody to work for."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(program, arguments, rank, size, barrier, board, queues, asked) -> None:
    for number in (signal.SIGTERM, *FROM_TERMINAL):
        signal.signal(number, signal.SIG_IGN)  # worker 0 decides when to stop
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FROM_TERMINAL)
    threading.Thread(target=_follow, daemon=True).start()
    try:
        program(Crew(rank, size, barrier, board, queues, asked), *arguments)
    except BaseException:
        if not barrier.broken:
            traceback.print_exc()
        _give_up(barrier, queues)
        raise SystemExit(1) from None
