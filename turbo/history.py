"""The policy's own past: LoRA factors of its checkpoints, with what merging them needs.

A checkpoint enters with its trim thresholds (one per matrix, they depend on it alone), unless it
holds a NaN or an infinity, and leaves when more than `history_max` are held. Merge weights over the
entries 1 (oldest) .. K (newest):

    sma    w_i = 1 / K
    ema    w_1 = (1 - alpha)^(K-1),  w_i = alpha (1 - alpha)^(K-i)     sums to 1, and is the
           recursion  merged_k = alpha * theta_k + (1 - alpha) * merged_{k-1}
    score  w_i = score_i / sum of scores,  equal weights if every score is 0

Left out: merging itself (merging.py), and files (checkpoint.py writes the state dict).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turbo.kernels.checks import check_alpha, check_density, check_finite
from turbo.kernels.ties import trim_threshold

Factors = dict[str, tuple[Tensor, Tensor]]  # module name -> (A [r, in], B [out, r])
PINNED_BLOCK = 64 << 20  # bytes of pinned memory that are allocated at once
ALIGNMENT = 64  # bytes: where a tensor in a block may begin


@dataclass
class Snapshot:
    """One checkpoint: the policy's LoRA factors after `update`, theta = base + scale * B A."""

    number: int  # how many had entered the history before it: it is saved under that
    update: int
    factors: Factors
    scale: float
    score: float
    thresholds: dict[str, Tensor]  # module name -> [], empty when the history does not trim


class History:
    """The checkpoints a teacher is merged from, oldest first.

    `density` is the fraction each matrix keeps in the trim; None computes no thresholds, for
    linear merging. `history_max` drops the oldest beyond that many; 0 keeps all.
    """

    def __init__(self, density: float | None = 0.8, history_max: int = 0):
        if density is not None:
            check_density(density)
        if history_max < 0:
            raise ValueError(f"history_max: expected >= 0 (0 keeps all), got {history_max}")
        self.density, self.history_max = density, history_max
        self.entries: list[Snapshot] = []
        self.pushed = 0  # how many ever entered

    def __len__(self) -> int:
        return len(self.entries)

    def push(self, update: int, factors: Factors, scale: float, score: float = 0.0) -> Snapshot:
        """Keep a CPU copy of the factors; thresholds are computed where the factors are."""
        self._check_names(factors)
        check_finite_factors(factors)
        snapshot = Snapshot(
            number=self.pushed,
            update=update,
            factors=cpu_copies(factors),
            scale=float(scale),
            score=float(score),
            thresholds=compute_thresholds(factors, scale, self.density),
        )
        self.entries.append(snapshot)
        self.pushed += 1
        if self.history_max:
            del self.entries[: -self.history_max]
        return snapshot

    def weights(self, mode: str = "sma", alpha: float = 0.5) -> list[float]:
        """Merge weights of the entries, oldest first, summing to 1."""
        count = len(self.entries)
        if count == 0:
            raise ValueError("history: expected at least one checkpoint, got an empty history")
        if mode == "sma":
            return [1 / count] * count
        if mode == "ema":
            return ema_weights(count, alpha)
        if mode == "score":
            return score_weights([entry.score for entry in self.entries])
        raise ValueError(f"mode: expected 'sma', 'ema' or 'score', got {mode!r}")

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Flat tensors for safetensors files, and metadata that json can write.

        The tensors of an entry have the same names for ever, its number first: so a checkpoint can
        share them with the one before.
        """
        tensors: dict[str, Tensor] = {}
        for entry in self.entries:
            tensors |= snapshot_tensors(entry)
        about = {"density": self.density, "history_max": self.history_max, "pushed": self.pushed}
        return tensors, about | {"entries": [snapshot_data(entry) for entry in self.entries]}

    def load_state_dict(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Replace the entries; the settings must be those that the state was saved with."""
        for name, own in (("density", self.density), ("history_max", self.history_max)):
            if metadata[name] != own:
                raise ValueError(f"{name}: expected {own} like this history, got {metadata[name]}")
        entries = [load_snapshot(data, tensors) for data in metadata["entries"]]
        self.entries, self.pushed = entries, metadata["pushed"]

    def _check_names(self, factors: Factors) -> None:
        if not factors:
            raise ValueError("factors: expected at least one matrix, got none")
        if self.entries and factors.keys() != self.entries[-1].factors.keys():
            changed = sorted(factors.keys() ^ self.entries[-1].factors.keys())
            raise ValueError(
                f"factors: expected the matrices of the last push, differ in {changed}"
            )


def check_finite_factors(factors: Factors) -> None:
    """No NaN or infinity in any factor: looked at once, here, and not again at every merge."""
    check_finite(
        {
            f"{name}.{side}": factor
            for name, pair in factors.items()
            for side, factor in zip(("lora_a", "lora_b"), pair, strict=True)
        }
    )


def compute_thresholds(factors: Factors, scale: float, density: float | None) -> dict[str, Tensor]:
    """Trim thresholds of one checkpoint on the CPU, none if density is None.

    The factors are finite: `check_finite_factors` comes first.
    """
    if density is None:
        return {}
    return {
        name: trim_threshold(a.detach(), b.detach(), scale, density, check_finite=False).cpu()
        for name, (a, b) in factors.items()
    }


def ema_weights(count: int, alpha: float) -> list[float]:
    """The closed form of the EMA recursion, oldest first; the first checkpoint starts it."""
    check_alpha(alpha)
    newer = [alpha * (1 - alpha) ** (count - i) for i in range(2, count + 1)]
    return [(1 - alpha) ** (count - 1), *newer]


def score_weights(scores: list[float]) -> list[float]:
    """Shares of the total score; nothing to tell checkpoints apart means equal shares."""
    if not all(0 <= score < math.inf for score in scores):
        raise ValueError(f"score: expected finite numbers >= 0 to weight by, got {scores}")
    total = sum(scores)
    return [score / total for score in scores] if total > 0 else [1 / len(scores)] * len(scores)


def cpu_copies(factors: Factors) -> Factors:
    """Copies on the CPU, in pinned memory where there is a GPU to bring them back to.

    PyTorch rounds a pinned allocation up to a power of two, which for a 7B's factors one by one is
    half as much again. So all factors of a checkpoint share blocks of `PINNED_BLOCK` bytes.
    """
    pinned = torch.cuda.is_available()
    todo = sum(_padded(t) for pair in factors.values() for t in pair)
    block, used = torch.empty(0, dtype=torch.uint8), 0

    def copy(tensor: Tensor) -> Tensor:
        nonlocal block, used, todo
        size = _padded(tensor)
        if used + size > block.numel():
            room = max(size, min(PINNED_BLOCK, todo))
            block, used = torch.empty(room, dtype=torch.uint8, pin_memory=pinned), 0
        part = block[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        used, todo = used + size, todo - size
        return part.copy_(tensor.detach())

    return {name: (copy(a), copy(b)) for name, (a, b) in factors.items()}


def _padded(tensor: Tensor) -> int:
    """Bytes of a tensor with those up to where the next one may begin."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def snapshot_tensors(entry: Snapshot) -> dict[str, Tensor]:
    """An entry's tensors, by names that begin with its number."""
    tensors = {}
    for name, (a, b) in entry.factors.items():
        tensors[f"{entry.number}.{name}.lora_a"] = a
        tensors[f"{entry.number}.{name}.lora_b"] = b
    for name, threshold in entry.thresholds.items():
        tensors[f"{entry.number}.{name}.threshold"] = threshold
    return tensors


def snapshot_data(entry: Snapshot) -> dict[str, Any]:
    """What else there is of an entry, as json can write it."""
    plain = {k: getattr(entry, k) for k in ("number", "update", "scale", "score")}
    return plain | {"names": list(entry.factors)}


def load_snapshot(data: dict[str, Any], tensors: dict[str, Tensor]) -> Snapshot:
    """An entry of its `snapshot_data`, and of tensors among which its own are."""
    number, names = data["number"], data["names"]

    def factor(name: str, side: str) -> Tensor:
        key = f"{number}.{name}.{side}"
        if key not in tensors:
            raise ValueError(f"tensors: expected an entry {key!r} that the metadata names")
        return tensors[key]

    trims = [name for name in names if f"{number}.{name}.threshold" in tensors]
    entry = Snapshot(
        number=number,
        update=data["update"],
        factors=cpu_copies({n: (factor(n, "lora_a"), factor(n, "lora_b")) for n in names}),
        scale=data["scale"],
        score=data["score"],
        thresholds={name: factor(name, "threshold").clone() for name in trims},
    )
    check_finite_factors(entry.factors)
    return entry
