"""The free teacher: the policy's past checkpoints, merged in weight space after every update.

    teacher_k = base + merge(s B_1 A_1, ..., s B_k A_k)

(GTR-Turbo, section 3; TIES: arXiv 2306.01708).

A small model keeps the merged matrices: from a history of LoRA factors (any weighting, any bound on
its length) or, when all checkpoints count and weights are equal or decay with age, from running
sums whose update costs the same at the hundredth checkpoint as at the first. A large one keeps the
history alone, on the CPU, and what is to be merged of it; its teacher stands in the scratch buffer
of `turbo.modules`, merged when it is asked for and something else is there.

Left out: the merge itself (`turbo.merging`), and how the teacher guides (`turbo.score`,
`turbo.update`).
"""

import re
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from turbo.checkpoint import Checkpoint, CheckpointError, section
from turbo.coded import read_dense
from turbo.config import TrainConfig
from turbo.history import History, Snapshot, load_snapshot, snapshot_data, snapshot_tensors
from turbo.lora import Lora
from turbo.merging import StreamingTeacher, merge_matrix, merge_teacher
from turbo.model import VisionLanguageModel, Weights


def saved_teacher(
    vlm: VisionLanguageModel, lora: Lora, config: TrainConfig, saved: Checkpoint
) -> "Teacher":
    """The teacher of a checkpoint."""
    teacher = Teacher(vlm, lora, config)
    teacher.load_state_dict(section(saved.state, "teacher/"), saved.meta["teacher"])
    return teacher


class Teacher:
    """Checkpoints in, runnable teacher weights out; `weights` is None before the first one.

    With `--teacher initial` it is the warm start for ever, whatever comes in.
    """

    def __init__(self, vlm: VisionLanguageModel, lora: Lora, config: TrainConfig):
        self.vlm, self.config = vlm, config
        self.small = vlm.text.small
        self.base = {name: vlm.matrices[name + ".weight"] for name in lora.factors}
        self.streaming = self.small and config.history_max == 0 and config.weighting != "score"
        self.history = History(
            config.density if config.merge == "ties" else None, config.history_max
        )
        self.sums = None
        if self.streaming:
            base = {name: matrix.detach() for name, matrix in self.base.items()}
            options = dict(method=config.merge, weighting=config.weighting, alpha=config.ema_alpha)
            self.sums = StreamingTeacher(base, density=config.density, **options)
        self.count = 0
        self.merged: dict[str, Tensor] | None = None  # small: dense weights by module name
        self._weights: Weights | None = None
        self.recipe: tuple[list[Snapshot], list[float]] | None = None  # large: what is merged
        if config.teacher == "initial":
            self._weights = self._with({}) if self.small else vlm.weights()

    @property
    def kept_dtype(self) -> torch.dtype:
        """Of the factors in the history.

        A large model's passes round them to its dtype: so they are the policy that played, half
        the size, and merged in a fifth of the time that fp32 takes.
        """
        return torch.float32 if self.small else self.vlm.text.dtype

    @property
    def weights(self) -> Weights | None:
        """Runnable weights; a large model's are valid until the scratch is filled anew."""
        if self.recipe is None:
            return self._weights
        text, (entries, shares) = self.vlm.text, self.recipe
        owner = ("teacher", self.count, len(entries))

        def merge(name: str, base, out) -> None:
            merge_matrix(base, name, entries, shares, method=self.config.merge, out=out)

        with torch.no_grad():
            return text.held(owner) or text.fill(merge, owner)

    def dense(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of every merged matrix [out, in]: module name, the teacher's own, and what was added to
        the base's; nothing where the teacher is the warm start."""
        if self.recipe is None:
            for name, merged in (self.merged or {}).items():
                yield name, merged.detach(), merged.detach() - self.base[name].detach()
            return
        assert self.weights is not None  # merged into the scratch, where the matrices are
        for name, module in self.vlm.text.linears.items():
            base, held = read_dense(module.base).float(), read_dense(module.scratch).float()
            yield (name, base + held, held) if self.vlm.text.apart else (name, held, held - base)

    @property
    def age(self) -> int | None:
        """Checkpoints that came in since it was merged; None before the first one."""
        every = self.config.merge_every
        return self.count - max(1, self.count // every * every) if self.count else None

    def rate(self, score: float) -> None:
        """Set the success rate of the newest checkpoint, where weights depend on it."""
        if self.history.entries:
            self.history.entries[-1].score = score

    @torch.no_grad()
    def push(self, update: int, lora: Lora, score: float | None = None) -> None:
        """Take a checkpoint; the teacher is rebuilt every `merge_every` checkpoints.

        One whose success rate is not known yet takes that of the checkpoint before.
        """
        if self.config.teacher == "initial":
            return
        if score is None:
            score = self.history.entries[-1].score if self.history.entries else 0.0
        factors = {
            name: (a.detach().to(self.kept_dtype), b.detach().to(self.kept_dtype))
            for name, (a, b) in lora.factors.items()
        }
        if self.streaming:
            self.sums.push(factors, lora.scale)
        else:
            self.history.push(update, factors, lora.scale, score)
        self.count += 1
        if self.count % self.config.merge_every == 0 or self.count == 1:
            self._rebuild()

    def _rebuild(self) -> None:
        c = self.config
        if not self.small:
            self.recipe = list(self.history.entries), self.history.weights(c.weighting, c.ema_alpha)
            return
        if self.streaming:
            self.merged = self.sums.weights()
        else:
            base = {name: matrix.detach() for name, matrix in self.base.items()}
            options = dict(method=c.merge, weighting=c.weighting, alpha=c.ema_alpha)
            self.merged = merge_teacher(base, self.history, **options)
        self._weights = self._with(self.merged)

    def _with(self, merged: dict[str, Tensor]) -> Weights:
        return self.vlm.text.with_matrices(merged)

    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors and JSON-able data from which the very same teacher is restored."""
        tensors, data = self.history.state_dict()
        tensors = {f"history/{k}": v for k, v in tensors.items()}
        data = {"history": data, "count": self.count}
        if self.recipe is not None:  # of checkpoints that the history may have dropped since
            entries, shares = self.recipe
            kept = {e.number for e in self.history.entries}
            dropped = [e for e in entries if e.number not in kept]
            for entry in dropped:
                tensors |= {f"history/{k}": v for k, v in snapshot_tensors(entry).items()}
            data |= {"dropped": [snapshot_data(e) for e in dropped], "shares": shares}
        if self.streaming and self.count:
            tensors |= {f"sums/{k}": v for k, v in self.sums.state_dict().items()}
        if self.merged is not None:  # not the last checkpoint's merge when merge_every > 1
            tensors |= {f"merged/{k}": v for k, v in self.merged.items()}
        return tensors, data

    def load_state_dict(self, tensors: dict[str, Tensor], data: dict) -> None:
        """Restore what `state_dict` gave."""
        tensors, data = _numbered(tensors, data)
        self.count = data["count"]
        history = section(tensors, "history/")
        self.history.load_state_dict(history, data["history"])
        if self.streaming and self.count:
            self.sums.load_state_dict(section(tensors, "sums/"))
        if "shares" in data:
            dropped = [load_snapshot(entry, history) for entry in data["dropped"]]
            known = [*dropped, *self.history.entries]
            self.recipe = known[: len(data["shares"])], data["shares"]
        elif self.count:
            self.merged = section(tensors, "merged/")
            self._weights = self._with(self.merged)


def without(data: dict, lost: Collection[int]) -> dict:
    """What `state_dict` told of a teacher, less the entries of these numbers: their shares of what
    is merged go to the others. CheckpointError where nothing is left to merge."""
    history, dropped = data["history"], data.get("dropped", [])

    def left(entries: list[dict]) -> list[dict]:
        return [e for e in entries if e["number"] not in lost]

    known, entries = [*dropped, *history["entries"]], left(history["entries"])
    data = data | {"history": history | {"entries": entries}}
    if "shares" in data:
        merged = zip(known, data["shares"], strict=False)  # the newest may not be merged yet
        shares = [share for entry, share in merged if entry["number"] not in lost]
        whole = sum(shares)
        data |= {"dropped": left(dropped), "shares": [s / whole for s in shares if whole]}
    if not entries or not data.get("shares", True):
        raise CheckpointError(
            "nothing is left of the history that its teacher is merged from: make a model of the "
            "policy, `python -m turbo.export RUN --out DIR`, and begin a new run with --model DIR"
        )
    return data


def _numbered(tensors: dict[str, Tensor], data: dict) -> tuple[dict[str, Tensor], dict]:
    """A saved state whose entries have numbers.

    Once they were saved under their places, those that the history had dropped apart and first.
    """
    entries = data["history"]["entries"]
    if "pushed" in data["history"]:
        return tensors, data
    dropped, found = data.get("dropped", {}).get("entries", []), {}
    for key, tensor in tensors.items():
        place = re.fullmatch(r"(history|dropped)/(\d+)(\..*)", key)
        if place:
            first = len(dropped) if place[1] == "history" else 0
            key = f"history/{first + int(place[2])}{place[3]}"
        found[key] = tensor
    every = [entry | {"number": i} for i, entry in enumerate([*dropped, *entries])]
    history = data["history"] | {"entries": every[len(dropped) :], "pushed": len(every)}
    return found, data | {"history": history, "dropped": every[: len(dropped)]}
