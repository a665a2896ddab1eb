"""How much arithmetic an update asks of the model, and how fast this device multiplies.

For n tokens of a row, p of which predict a token of an answer:

    forward     2 W n                   W entries in the matrices of the text layers
              + 4 layers H hd sum_i c_i attention: token i attends to c_i keys, itself included
              + 2 V D p                 the head, where a token is predicted
    vision      2 (W_patch + W_merge / 4) patches     the tower and its merger of 4 patches to 1
    training    3 times the layers and the attention, twice the frozen head, the frozen vision once

A token is counted each time the program has to read it: a prompt prefix that many rows share, once;
a prompt that is read again for every answer, every time. Not counted is what the answer does not
depend on: padding, guesses that were refused, work done again for want of memory. So utilisation,

    model arithmetic / seconds of the update / rate of a plain product of square matrices,

is the share of the machine that the update puts to use, not the share that it keeps busy.

Left out: attention and norms of the vision tower, everything elementwise, the merge; the products
with adapters that stand beside the weights, and the training of a merged weight as against that of
its factors alone, which would need no gradient of the matrix (both count as 3 times the forward
pass, which is in favour of adapters); answers that the merged teacher writes only to be measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from turbo.modules import AdaptedLinear
from turbo.rollout import Episode, Rollout, Step
from turbo.run import Run
from turbo.score import TeacherReading
from turbo.update import Imitated

Row = tuple[int, list[int], list[int]]  # picture, suffix and answer tokens


@dataclass(frozen=True)
class Sizes:
    """What the formula needs of a model."""

    text: int  # entries in the matrices of the text layers, W
    width: int  # layers * H * hd
    head: int  # V * D
    patch: int  # entries in the vision tower's matrices that meet every patch
    merge: int  # entries of those that meet every token of a picture
    merged: int  # patches of such a token

    @classmethod
    def of(cls, module: nn.Module) -> "Sizes":
        """The sizes of a Qwen2.5-VL without adapters."""
        text, vision = module.config.text_config, module.config.vision_config
        matrices = {n: p.numel() for n, p in module.named_parameters() if p.dim() > 1}
        for name, part in module.named_modules():
            if isinstance(part, AdaptedLinear):  # in NF4 its matrix is no parameter
                matrices[f"{name}.weight"] = part.base.numel()

        def total(part: str) -> int:
            return sum(count for name, count in matrices.items() if part in name)

        merge = total("visual.merger.")
        return cls(
            text=total("language_model.layers."),
            width=text.num_hidden_layers * text.hidden_size,
            head=text.vocab_size * text.hidden_size,
            patch=total("visual.") - merge,
            merge=merge,
            merged=vision.spatial_merge_size**2,
        )


def text_flops(s: Sizes, tokens: int, pairs: int, predicted: int, trained: bool = False) -> int:
    """Operations on `tokens` that attend to `pairs` keys in all and predict `predicted` tokens."""
    layers = 2 * s.text * tokens + 4 * s.width * pairs
    head = 2 * s.head * predicted
    return 3 * layers + 2 * head if trained else layers + head


def vision_flops(s: Sizes, patches: int) -> float:
    """Operations on the patches of pictures."""
    return 2 * (s.patch + s.merge / s.merged) * patches


def causal_pairs(past: int, length: int) -> int:
    """Keys that `length` tokens attend to behind `past` others: sum of past + i, i = 1..length."""
    return length * past + length * (length + 1) // 2


class Tally:
    """Counts what a run of turbo asks of the model, on one worker.

    It listens to rollouts, minibatches (with the KL as a loss, or none) and imitated thoughts.
    """

    def __init__(self, run: Run):
        self.run, self.sizes, self.flops = run, Sizes.of(run.vlm.module), 0.0
        self.fixed, self.grid = "", None  # of the last rollout
        self.known: TeacherReading | None = None  # the last reading that was counted
        collect, gradients, add = run.table.collect, run.learner.gradients, run.examples.add

        def counted_collect(*args, **options) -> Rollout:
            rollout = collect(*args, **options)
            self.fixed, self.grid = rollout.fixed, rollout.grid
            self.flops += vision_flops(self.sizes, len(rollout.features) * int(self.grid.prod()))
            self.steps(rollout.steps)
            return rollout

        def counted_gradients(rollout, data, rows, total, teacher, *others) -> dict[str, Tensor]:
            chosen = rollout.select(rows)
            self.minibatch(chosen, *others)
            if teacher is not None and teacher is not self.known:
                self.known = teacher
                self.steps(rollout.select(teacher.hidden), predicted=False)
            if teacher is not None:  # its layers have read the answers, its head reads them now
                read = sum(len(s.tokens) for s in chosen)
                self.flops += text_flops(self.sizes, 0, 0, read)
            return gradients(rollout, data, rows, total, teacher, *others)

        def counted_add(rollout: Rollout, written: Sequence[Episode], crew) -> None:
            if run.config.guidance == "sft":  # what an external model computes is not ours
                self.steps([s for e in written for s in e.steps])
            add(rollout, written, crew)

        run.table.collect, run.learner.gradients = counted_collect, counted_gradients
        run.examples.add = counted_add

    def take(self) -> float:
        """Operations since the last call."""
        flops, self.flops = self.flops, 0.0
        return flops

    def steps(self, steps: Sequence[Step], predicted: bool = True) -> None:
        """Answers are sampled or read; `predicted` says whether the head is asked too."""
        self.rows([(s.picture, s.suffix, s.tokens) for s in steps], predicted)

    def minibatch(self, steps: Sequence[Step], beta: float, imitated: Imitated | None) -> None:
        """Forward and backward over steps, and over examples beside them."""
        self.rows([(s.picture, s.suffix, s.tokens) for s in steps], trained=True)
        if imitated is not None:
            self.rows([imitated.examples.rows[i] for i in imitated.rows], trained=True)

    def rows(self, rows: Sequence[Row], predicted: bool = True, trained: bool = False) -> None:
        """Rows are read: each picture's prefix once, then every row's suffix and answer."""
        vlm, pictures = self.run.vlm, len({picture for picture, _, _ in rows})
        text = vlm.frame.prefix(self.fixed, int(self.grid.prod()) // self.sizes.merged)
        prefix = len(vlm.encode(text))
        lengths = [len(suffix) + len(answer) - 1 for _, suffix, answer in rows]  # none is read last
        tokens = pictures * prefix + sum(lengths)
        pairs = pictures * causal_pairs(0, prefix) + sum(causal_pairs(prefix, n) for n in lengths)
        asked = sum(len(answer) for _, _, answer in rows) if predicted else 0
        self.flops += text_flops(self.sizes, tokens, pairs, asked, trained)
