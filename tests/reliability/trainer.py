"""A real training process of the nano model, for tests that break it from outside."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import launch
import tiny_models
from kept_signals import kept_signals
from safetensors.torch import load_file

from turbo import train
from turbo.log import read_jsonl

ROOT = Path(__file__).resolve().parents[2]
FLAGS = """
    --workers 1 --dtype float32 --envs 8 --group-size 4 --steps-per-update 16 --max-new-tokens 40
    --minibatch 16 --lora-rank 4 --save-every 1 --keep 3 --eval-episodes 0 --temperature 0.8
    --teacher-sample 4
"""
SHORT = ["--envs", "4", "--group-size", "2", "--steps-per-update", "4", "--teacher-sample", "2"]


def command(out: Path, *more: str, resume: bool = False) -> list[str]:
    """The command line of a run, or of going on with it."""
    if resume:
        place = ["--resume", str(out)]
    else:
        place = ["--out", str(out), "--model", str(tiny_models.fitted_folder()), *FLAGS.split()]
    return [sys.executable, "-m", "turbo.train", "numberline", *place, *more]


def start(out: Path, *more: str, resume: bool = False, file_limit: int = 0) -> subprocess.Popen:
    """Begin a training process; `file_limit` stands for a full disk, in bytes."""
    begun = command(out, *more, resume=resume)
    if file_limit:
        begun = launch.with_file_limit(file_limit, begun)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    return subprocess.Popen(
        begun,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen, timeout: float = 240) -> tuple[int, str, str]:
    """Wait for the end: status, output, errors. A process that takes longer is killed."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def here(out: Path, *more: str, resume: bool = False) -> tuple[int, str, str]:
    """Status, output, errors of a run that nothing disturbs, in this process: no imports anew."""
    said, told = io.StringIO(), io.StringIO()
    _, _, _, *flags = command(out, *more, resume=resume)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told), kept_signals():
        status = train.main(flags)
    return status, said.getvalue(), told.getvalue()


def result(run: Path, update: int) -> tuple:
    """What a run came to: factors, state, and metrics without times."""
    folder, bits = run / "checkpoints" / f"{update:08d}", {}
    for name in ("adapter", "state"):
        for key, value in load_file(folder / f"{name}.safetensors").items():
            bits[name, key] = value.numpy().tobytes()
    metrics = [tiny_models.without_times(r) for r in read_jsonl(run / "metrics.jsonl")]
    return bits, metrics, (run / "episodes.jsonl").read_text()
