"""The free teacher: the policy's past checkpoints, merged in weight space after every update.

    teacher_k = base + merge(s B_1 A_1, ..., s B_k A_k)

(GTR-Turbo, section 3; TIES: arXiv 2306.01708).

Kept either as a history of LoRA factors (any weighting, any bound on its length) or, when all
checkpoints count and weights are equal or decay with age, as running sums whose update costs the
same at the hundredth checkpoint as at the first.

Left out: the merge itself (`turbo.kernels.ties`), and how the teacher guides (`turbo.train`).
"""

import torch
from torch import Tensor

from turbo.checkpoint import section
from turbo.config import TrainConfig
from turbo.history import History
from turbo.lora import Lora
from turbo.merge import StreamingTeacher, merge_teacher
from turbo.model import TextWeights, VisionLanguageModel


class Teacher:
    """Checkpoints in, runnable teacher weights out; `weights` is None before the first one.

    With `--teacher initial` it is the warm start for ever, whatever comes in.
    """

    def __init__(self, vlm: VisionLanguageModel, lora: Lora, config: TrainConfig):
        self.vlm, self.config = vlm, config
        self.base = {name: vlm.matrices[name + ".weight"].detach() for name in lora.factors}
        self.streaming = config.history_max == 0 and config.weighting != "score"
        self.history = History(
            config.density if config.merge == "ties" else None, config.history_max
        )
        options = dict(method=config.merge, weighting=config.weighting, alpha=config.ema_alpha)
        self.sums = None
        if self.streaming:
            self.sums = StreamingTeacher(self.base, density=config.density, **options)
        self.count = 0
        self.merged: dict[str, Tensor] | None = None  # dense weights by module name
        self.weights: TextWeights | None = None
        if config.teacher == "initial":
            self._load({})

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
        factors = {name: (a.detach(), b.detach()) for name, (a, b) in lora.factors.items()}
        if self.streaming:
            self.sums.push(factors, lora.scale)
        else:
            self.history.push(update, factors, lora.scale, score)
        self.count += 1
        if self.count % self.config.merge_every == 0 or self.merged is None:
            self._rebuild()

    def _rebuild(self) -> None:
        if self.streaming:
            self.merged = self.sums.weights()
        else:
            c = self.config
            options = dict(method=c.merge, weighting=c.weighting, alpha=c.ema_alpha)
            self.merged = merge_teacher(self.base, self.history, **options)
        self._load(self.merged)

    def _load(self, merged: dict[str, Tensor]) -> None:
        matrices = {n: m.detach() for n, m in self.vlm.matrices.items()}
        matrices |= {name + ".weight": m for name, m in merged.items()}
        self.weights = self.vlm.text.text_weights(matrices)

    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors and JSON-able data from which the very same teacher is restored."""
        tensors, data = self.history.state_dict()
        tensors = {f"history/{k}": v for k, v in tensors.items()}
        if self.streaming and self.count:
            tensors |= {f"sums/{k}": v for k, v in self.sums.state_dict().items()}
        if self.merged is not None:  # not the last checkpoint's merge when merge_every > 1
            tensors |= {f"merged/{k}": v for k, v in self.merged.items()}
        return tensors, {"history": data, "count": self.count}

    def load_state_dict(self, tensors: dict[str, Tensor], data: dict) -> None:
        """Restore what `state_dict` gave."""
        self.count = data["count"]
        self.history.load_state_dict(section(tensors, "history/"), data["history"])
        if self.streaming and self.count:
            self.sums.load_state_dict(section(tensors, "sums/"))
        if self.count:
            self.merged = section(tensors, "merged/")
            self._load(self.merged)
