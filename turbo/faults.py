"""Numerical faults: a minibatch without a finite gradient is skipped, kept for replay, and counted.

    RUN/faults/00000012-0007-worker0.safetensors     the steps, the factors, the teacher's reading
    RUN/faults/00000012-0007-worker0.json            what was not finite

After `--max-faults` minibatches in a row the run stops: a policy that gives no finite gradient is
not trained by waiting.

Left out: computing a recorded minibatch again (`turbo.replay`); steps whose sampled log-probability
is not finite, which `turbo.update.prepare` drops.
"""

import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from turbo import checkpoint
from turbo.lora import Lora
from turbo.rollout import Rollout
from turbo.score import TeacherReading, local_pictures
from turbo.update import Learner, StepData

KEPT = 20  # faults of a run that are written down; more would fill the disk
RAGGED = ("suffix", "tokens", "logprobs")  # lists of their own length in every step


class NumericalFault(RuntimeError):
    """Training cannot go on; the message is a diagnosis."""


class FaultLog:
    """Counts the minibatches that were skipped, and stops the run after too many in a row."""

    def __init__(self, folder: Path, limit: int, rank: int):
        self.folder, self.limit, self.rank = folder, limit, rank
        self.total = self.in_a_row = 0

    def passed(self) -> None:
        """A minibatch was as it should be."""
        self.in_a_row = 0

    def note(
        self,
        name: str,  # of the minibatch
        learner: Learner,
        rollout: Rollout,
        data: StepData,
        rows: list[int],  # this worker's
        teacher: TeacherReading | None,
        beta: float,
        figures: dict[str, float],
    ) -> None:
        """Write a skipped minibatch down; NumericalFault after too many in a row."""
        self.total += 1
        self.in_a_row += 1
        if self.total <= KEPT and rows:
            about = {
                "fixed": rollout.fixed,
                "beta": beta,
                "figures": {k: str(v) for k, v in figures.items()},
            }
            path = self.folder / f"{name}-worker{self.rank}"
            record(path, learner, rollout, data, rows, teacher, about)
        if self.in_a_row >= self.limit:
            told = diagnosis(learner.lora, figures)
            raise NumericalFault(
                f"{self.in_a_row} minibatches in a row gave no finite gradient: {told}. They are "
                f"in {self.folder}: python -m turbo.replay FILE.json names the steps. Lower "
                "--learning-rate or --grad-clip, or use --dtype float32"
            )


def diagnosis(lora: Lora, figures: dict[str, float]) -> str:
    """What is not finite, in words."""
    pairs = lora.factors.items()
    broken = [name for name, pair in pairs if not all(t.isfinite().all() for t in pair)]
    odd = ", ".join(name for name, value in figures.items() if not math.isfinite(value))
    if broken:
        others = f" and of {len(broken) - 1} more" if len(broken) > 1 else ""
        return f"the LoRA factors of {broken[0]}{others} are not finite"
    return f"all LoRA factors are finite, but not {odd or 'what they give'}"


def record(
    path: Path,  # without an ending
    learner: Learner,
    rollout: Rollout,
    data: StepData,
    rows: list[int],
    teacher: TeacherReading | None,
    about: dict,
) -> None:
    """Write what computing this minibatch again needs; a full disk does not end the run."""
    steps = rollout.select(rows)
    pictures, owner = local_pictures(steps)
    index = torch.tensor(rows)
    tensors = {f"lora/{k}": v for k, v in learner.lora.state_dict().items()}
    if learner.value_head is not None:
        critic = learner.value_head.state_dict()
        tensors |= {f"value_head/{k}": v for k, v in critic.items()}
    for name in RAGGED:
        values = [getattr(s, name) for s in steps]
        tensors[name] = torch.tensor([x for value in values for x in value])
        tensors[name + "_sizes"] = torch.tensor([len(value) for value in values])
    tensors |= {
        "features": rollout.features[pictures].cpu(),
        "grid": rollout.grid,
        "picture": torch.tensor(owner),
        "thought": torch.tensor([s.thought for s in steps]),
        "advantages": data.advantages[index],
        "returns": data.returns[index],
        "old_logprob": data.old_logprob[index],
    }
    if teacher is not None:
        tensors["teacher"] = teacher.of(rows).cpu()
    try:
        path.parent.mkdir(exist_ok=True)
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, f"{path}.safetensors")
        checkpoint.write_json(Path(f"{path}.json"), about)
    except Exception as error:  # SafetensorError is no OSError
        print(f"warning: a fault could not be recorded: {error}", file=sys.stderr)
