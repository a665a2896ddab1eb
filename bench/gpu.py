"""What needs a GPU, part by part in the time that there is: `python -m bench.gpu`.

For a GPU that is at hand for a quarter of an hour. Each part is a command of its own with a limit
of time, what decides comes first, and a part that fails or is stopped stops no other: rows are
written race by race and update by update. All output goes to the console and into gpu.log.

    kernels   the policy head, EMA, TIES against peft, the kernels' tests, NF4, a whole TIES merge
              of a 7B, then the policy head at another width
    model     whole updates of a model of 7B shapes, with and without decode graphs, then with the
              policy merged for playing; the tests that need a GPU; smaller micro-batches
    recipe    the same beside the published recipe, whose two models need some 80 GB together

On a machine where only one folder is kept, `--out` names it; `python -m bench.report --add` takes
the rows from there. Wheels for a machine without a network: CONTRIBUTING.md.

Left out: what is measured (`bench.policy_head`, `bench.ties`, `bench.train_step`).
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from bench.harness import RESULTS, read_settings

LEAST = 20.0  # seconds in which a part may tell something


@dataclass(frozen=True)
class Part:
    """One command, as arguments of Python, and the seconds after which it is stopped."""

    command: str
    seconds: float


LARGE = (
    "-m bench.train_step --model qwen2.5-vl-7b --random-weights --only kl --no-memory "
    "--envs 64 --max-new-tokens 100 --steps 128 --epochs 1 --updates 2"
)
HEAD = "-m bench.policy_head --widths"
PARTS = {
    "kernels": [
        Part(f"{HEAD} 3584 --rows 8192 256 1024 4096", 200),
        Part("-m bench.ema --repeats 5", 45),
        Part("-m bench.ties --repeats 3 --no-whole", 60),
        Part("-m pytest -q -n 8 -m 'not long' -k triton tests/kernels", 90),
        Part("-m bench.nf4 --repeats 3", 30),
        Part("-m bench.ties --repeats 3", 120),
        Part(f"{HEAD} 2048 --rows 8192 4096 1024 256", 480),
    ],
    "model": [
        Part(f"{LARGE} --recipe-steps 0 --decode-graphs", 240),
        Part(f"{LARGE} --recipe-steps 0", 240),
        Part(f"{LARGE} --recipe-steps 0 --decode-graphs --play merged", 240),
        Part("-m pytest -q -n 8 -m 'gpu and not long' tests/turbo", 200),
        Part(f"{LARGE} --recipe-steps 0 --decode-graphs --micro-tokens 2048", 240),
    ],
    "recipe": [Part(f"{LARGE} --recipe-steps 4", 440)],
}


@dataclass
class Config:
    """Run what needs a GPU, part by part in the time that there is."""

    what: tuple[Literal["kernels", "model", "recipe"], ...] = ("kernels",)
    """which parts, in this order"""
    minutes: float = 9.0
    """minutes for all of them together"""
    out: str = ""
    """folder for the rows and the log (empty: bench/results/, and no log)"""
    commit: str = ""
    """commit that the rows name where git cannot be asked (empty: none)"""


def run(part: Part, seconds: float, files: Sequence[IO[str]], environment: dict[str, str]) -> int:
    """Run a part and pass its output on line by line; its status, -SIGKILL where it was stopped."""
    process = subprocess.Popen(
        [sys.executable, *shlex.split(part.command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,  # the processes that it begins are stopped with it
    )

    def stop() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        for line in process.stdout:
            tell(line, files)
        return process.wait()
    finally:
        timer.cancel()
        stop()


def tell(text: str, files: Sequence[IO[str]]) -> None:
    """A line, at once and everywhere."""
    for file in files:
        print(text.rstrip("\n"), file=file, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the parts; returns 0, or 1 where one failed or was stopped."""
    c = read_settings(Config, argv, "bench.gpu")
    until, failed = time.monotonic() + 60 * c.minutes, 0
    results = Path(c.out) if c.out else RESULTS
    results.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"BENCH_RESULTS": str(results.resolve()), "PYTHONUNBUFFERED": "1"}
    if c.commit:
        environment["BENCH_COMMIT"] = c.commit
    with open(results / "gpu.log" if c.out else os.devnull, "a", encoding="utf-8") as log:
        files = (sys.stdout, log)
        for part in (part for what in c.what for part in PARTS[what]):
            left = until - time.monotonic()
            if left < LEAST:
                tell(f"no time for: {part.command}", files)
                failed += 1
                continue
            tell(f"\n$ python {part.command}", files)
            start = time.monotonic()
            status = run(part, min(left, part.seconds), files, environment)
            tell(f"status {status} after {time.monotonic() - start:.0f} s", files)
            failed += status != 0
        tell(f"{failed} parts failed, were stopped or had no time", files)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
