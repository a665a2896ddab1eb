"""Replay of a recorded fault: `python -m turbo.replay RUN/faults/FILE.json`.

Computes the gradients of the minibatch again, one step at a time, with the factors and the reading
of the teacher that were recorded, and names the steps that give no finite one.

Left out: when a minibatch counts as a fault, and what is recorded (`turbo.faults`).
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor

from turbo import checkpoint
from turbo.envs.base import Answer, Verdict
from turbo.faults import RAGGED
from turbo.flags import conclude, read_flags
from turbo.hub import open_model
from turbo.lora import new_lora
from turbo.model import ValueHead
from turbo.parallel import Crew
from turbo.rollout import Episode, Rollout, Step
from turbo.saved import from_saved
from turbo.score import TeacherReading
from turbo.update import Learner, StepData

NONE = Verdict(None, None, None)


@dataclass
class ReplayConfig:
    """Compute a recorded minibatch again, and name the steps that give no finite gradient."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN/faults/FILE.json")]
    """the record of a skipped minibatch, in the run directory that made it"""


def replay(path: Path) -> list[tuple[int, str, str]]:
    """The steps of a recorded minibatch that give no finite gradient: number, answer, what."""
    if path.suffix != ".json" or not path.is_file():
        raise ValueError(f"{path} is no record of a minibatch: give RUN/faults/FILE.json")
    run = path.parent.parent
    c = from_saved(checkpoint.read_run(run)["config"], str(run))
    about, tensors = checkpoint.read_json(path), load_file(path.with_suffix(".safetensors"))
    vlm = open_model(c)
    lora = new_lora(vlm.matrices, c.lora_rank, c.lora_alpha, 0)
    lora.load_state_dict(checkpoint.section(tensors, "lora/"))
    head = None
    if critic := checkpoint.section(tensors, "value_head/"):
        head = ValueHead(vlm.text.dim).to(vlm.device)
        head.load_state_dict(critic)
    rollout = _rollout(vlm, tensors, about["fixed"])
    parts = [tensors[k] for k in ("advantages", "returns", "old_logprob")]
    data = StepData(*parts, list(range(len(rollout.steps))), 1.0, 0.0)
    reading = None
    if "teacher" in tensors:
        pieces = tensors["teacher"].to(vlm.text.dtype).split(tensors["tokens_sizes"].tolist())
        reading = TeacherReading(dict(enumerate(pieces)), vlm.weights().head.detach())
    learner, found = Learner(vlm, lora, head, Crew(), c), []
    for i, step in enumerate(rollout.steps):
        sums = learner.gradients(rollout, data, [i], 1, reading, about["beta"])
        odd = [name for name, value in sums.items() if not value.isfinite()]
        odd += ["gradient"] * any(not p.grad.isfinite().all() for p in learner.parameters())
        if odd:
            found.append((i, step.answer.text, ", ".join(odd)))
    return found


def _rollout(vlm, tensors: dict[str, Tensor], fixed: str) -> Rollout:
    lists = {}
    for name in RAGGED:
        pieces = tensors[name].split(tensors[name + "_sizes"].tolist())
        lists[name] = [piece.tolist() for piece in pieces]
    blank = Step(0, [], [], [], 0, torch.empty(0), 0.0, 0.0, Answer("", None, {}, ""), NONE, 0, 0)
    steps = []
    for i, picture in enumerate(tensors["picture"].tolist()):
        ragged = {name: values[i] for name, values in lists.items()}
        answer = Answer(vlm.decode(ragged["tokens"]), None, {}, "recorded")
        thought = int(tensors["thought"][i])
        steps.append(replace(blank, picture=picture, thought=thought, answer=answer, **ragged))
    return Rollout([Episode(0, (), steps)], tensors["features"], tensors["grid"], fixed)


def main(argv: list[str] | None = None) -> int:
    """Replay a recorded fault; returns the exit status."""
    try:
        c = read_flags(ReplayConfig, sys.argv[1:] if argv is None else argv, "turbo.replay")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        found = replay(Path(c.file))
    except (ValueError, OSError, KeyError) as error:
        print(f"error: {c.file} cannot be replayed: {error}", file=sys.stderr)
        return 2
    for number, text, what in found:
        print(json.dumps({"step": number, "not finite": what, "answer": text}))
    print(f"{len(found)} steps give no finite gradient")
    return 0


if __name__ == "__main__":
    sys.exit(conclude(main))
