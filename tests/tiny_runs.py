"""A run of the nano model for tests of what reads run directories; made once a process."""

import functools
from pathlib import Path

import tiny_models
from kept_signals import kept_signals

from turbo import train

FLAGS = """
    --dtype float32 --envs 8 --group-size 4 --steps-per-update 16 --max-new-tokens 40
    --minibatch 16 --lora-rank 4 --lora-alpha 8 --eval-episodes 8 --temperature 0.8 --epochs 1
    --learning-rate 0.02 --skip-certain 0 --teacher-sample 4
"""


@functools.cache
def trained(name: str, *more: str) -> Path:
    """The directory of a real run on numberline, with these flags; tests leave it as it is."""
    out = tiny_models.new_folder(f"runs/{name}")
    model = str(tiny_models.fitted_folder())
    flags = ["--out", str(out), "--model", model, *FLAGS.split(), *more]
    with kept_signals():
        assert train.main(["numberline", *flags]) == 0
    return out
