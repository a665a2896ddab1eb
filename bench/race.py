"""A kernel against its rivals: agreement first, then time in turn (A B A B), then peak memory.

    peak bytes   what exists at once beyond the inputs, while one call runs
    floor        the least time that the arithmetic or the traffic takes on this machine, measured
                 by a plain matrix product or copy in the same process

    agreement    with turbo.kernels.reference in fp64, on the benchmark's own data, before the race

A variant that fails or disagrees, or whose package is missing, is named with the reason and left
out; the others go on. If one of ours was, the benchmark ends with status 1 (`status`). Rows are
appended to the CSV file race by race, so that a run that is cut short keeps what it measured. On a
GPU the L2 cache is written over before each call, as the floor is that of the memory behind it.

Left out: what is compared (`bench.ties`, `bench.ema`, `bench.nf4`, `bench.policy_head`).
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table

from bench.harness import Spread, append_rows, environment, measurement, results_file, spread
from turbo.versions import processor

Call = Callable[[], object]
Variant = TypeVar("Variant")
L2 = 1 << 28  # bytes: more than the L2 cache of any GPU
_failed: list[str] = []  # of ours


@dataclass(frozen=True)
class Timed:
    """One variant's figures."""

    seconds: Spread
    peak_bytes: int


def device_name(device: str) -> str:
    """The GPU's name, or the processor's."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return processor()


def needs_cuda(tensor: torch.Tensor) -> None:
    """For a rival that is made of Triton kernels: say why it cannot run here."""
    if tensor.device.type != "cuda":
        raise RuntimeError("it needs a CUDA device")


def agreeing(
    label: str, variants: dict[str, Variant], check: Callable[[Variant], None]
) -> dict[str, Variant]:
    """The variants that `check` lets pass; the others are named."""
    passed = {}
    for name, variant in variants.items():
        try:
            check(variant)
            passed[name] = variant
        except Exception as error:  # whatever one raises, the others are measured
            _leave_out(label, name, error)
    return passed


def status() -> int:
    """Of the process: 0, or 1 where one of ours failed or was wrong, which is told once more."""
    for what in _failed:
        print(f"error: {what}", file=sys.stderr)
    failed = bool(_failed)
    _failed.clear()
    return int(failed)


def check_close(
    got: torch.Tensor, wanted: torch.Tensor, *, rtol: float, atol: float, odd: float = 0.0
) -> None:
    """|got - wanted| <= atol + rtol |wanted|, but for a share `odd` of the entries."""
    if got.shape != wanted.shape:
        raise AssertionError(f"expected the shape {tuple(wanted.shape)}, got {tuple(got.shape)}")
    distance, wanted = (got.double() - wanted.double()).abs(), wanted.double().abs()
    apart = ~(distance <= atol + rtol * wanted)  # also where there is a NaN
    share = apart.double().mean().item()
    if share > odd:
        raise AssertionError(
            f"{share:.1e} of the entries differ from the fp64 reference by more than {atol:.1e} + "
            f"{rtol:.1e} of it, {odd:.1e} may; the largest difference is {distance.max():.1e}"
        )


def _leave_out(label: str, name: str, error: Exception) -> None:
    why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    print(f"{label}: {name} is left out: {why}", flush=True)
    if name.startswith("ours"):
        _failed.append(f"{label}: {name}: {why}")


def race(
    benchmark: str,
    shape: str,
    variants: dict[str, Call],
    *,
    device: str = "cpu",
    repeats: int = 5,
    floor: float | None = None,
    save: bool = True,
) -> dict[str, Timed]:
    """Time all variants in turn and measure their memory; print, record and return the figures."""
    running, peaks = {}, {}
    for name, call in variants.items():
        try:
            call()  # warms up: compiles, fills caches
            peaks[name] = peak_bytes(call, device)
            running[name] = call
        except Exception as error:  # whatever a rival raises, the others are measured
            _leave_out(f"{benchmark} {shape}", name, error)
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(repeats):
        for name, times in list(seconds.items()):
            try:
                times.append(_seconds(running[name], device))
            except Exception as error:
                _leave_out(f"{benchmark} {shape}", name, error)
                del seconds[name]
    timed = {name: Timed(spread(s), peaks[name]) for name, s in seconds.items()}
    _print(benchmark, shape, timed, floor, device)
    if save and timed:
        _record(benchmark, shape, timed, floor, device)
    return timed


def peak_bytes(call: Call, device: str) -> int:
    """The most memory that exists at once during a call, beyond what existed before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = call()
    del result
    now = most = 0
    events = trace.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def _seconds(call: Call, device: str) -> float:
    if device == "cuda":
        torch.empty(L2, dtype=torch.uint8, device=device).zero_()
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    del result
    return time.perf_counter() - start


def _print(
    benchmark: str, shape: str, timed: dict[str, Timed], floor: float | None, device: str
) -> None:
    table = Table(title=f"{benchmark} {shape}\n{device_name(device)}, torch {torch.__version__}")
    for column in ("variant", "ms (p20-p80)", "times the first", "peak MB", "of the floor"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    ours = next(iter(timed.values())).seconds.median if timed else 1.0
    for name, t in timed.items():
        s = t.seconds
        table.add_row(
            name,
            f"{1e3 * s.median:,.2f} ({1e3 * s.p20:,.2f}-{1e3 * s.p80:,.2f})",
            f"{s.median / ours:.2f}",
            f"{t.peak_bytes / 1e6:,.1f}",
            f"{floor / s.median:.0%}" if floor else "",
        )
    Console().print(table)


def _record(
    benchmark: str, shape: str, timed: dict[str, Timed], floor: float | None, device: str
) -> None:
    where, rows = environment(), []
    where["processor"] = device_name(device)
    for name, t in timed.items():
        once = spread([t.peak_bytes])
        rows.append(measurement(benchmark, name, shape, "seconds", "s", t.seconds))
        rows.append(measurement(benchmark, name, shape, "peak_bytes", "bytes", once))
        if floor:
            share = spread([floor / t.seconds.median])
            rows.append(measurement(benchmark, name, shape, "floor_share", "0..1", share))
    append_rows(results_file(name=device_name(device)), [where | row for row in rows])


def product_rate(dtype: torch.dtype, device: str) -> float:
    """Floating point operations a second of a plain square matrix product in this dtype."""
    size = 8192 if device == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    # fp32 on a GPU's tensor cores: three products in tf32 keep its digits, as the kernels have them
    thrice = dtype == torch.float32 and device == "cuda"
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = thrice or before
    times = [_seconds(lambda: a @ a, device) for _ in range(6)]
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * size**3 / min(times[1:]) / (3 if thrice else 1)


def copy_rate(device: str) -> float:
    """Bytes a second, read and written, of a plain copy."""
    count = 1 << (28 if device == "cuda" else 26)
    a, b = (torch.zeros(count, dtype=torch.float32, device=device) for _ in range(2))
    times = [_seconds(lambda: b.copy_(a), device) for _ in range(6)]
    return 8 * count / min(times[1:])
