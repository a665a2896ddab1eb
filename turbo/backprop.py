"""Gradients of a loss over many rows in small pieces; prefixes and weights run through once.

Autograd is cut where many rows meet one tensor: at the keys and values of the prompt prefixes and,
in the fused engine, at the runnable weights (fused, cast, LoRA merged). Rows are run forward and
backward in micro-batches; their gradients collect at the cuts; what lies before each cut is then
run backward once:

    rows    --> d(prefix KV), d(weights)
    prefix  --> d(weights), d(features)
    weights --> d(LoRA) or d(parameters)

A small model runs all prefixes at once and rows in pieces that fit a core's cache. A large one runs
groups of pictures, each with its rows, within a budget of tokens.

Left out: the losses themselves (`turbo.update`, `turbo.demos`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from turbo.attend import PrefixKV
from turbo.batch import TokenBatch, micro_batches, pad_rows, pad_to
from turbo.model import VisionLanguageModel, Weights


def rows_of(
    vlm: VisionLanguageModel, suffixes: Sequence[list[int]], answers: Sequence[list[int]]
) -> TokenBatch:
    """Rows padded for this model, where it runs."""
    exact = not vlm.text.small
    return pad_rows(suffixes, answers, vlm.pad, vlm.device, exact)


def pictures_at_once(vlm: VisionLanguageModel, features: Tensor, fixed: str) -> int:
    """How many of the pictures' prefixes run together: all of them for a small model."""
    if vlm.text.small or not vlm.batches.tokens:
        return max(1, len(features))
    return max(1, vlm.batches.half // vlm.prefix_length(fixed, features.shape[1]))


def backward_rows(
    vlm: VisionLanguageModel,
    w: Weights,  # leaves (see `cut`); their .grad is added to
    features: Tensor,  # [U, tokens, D'] of U pictures
    fixed: str,  # the prompts' unchanging text
    grid: Tensor,
    owner: Sequence[int],  # picture of each row
    suffixes: Sequence[list[int]],
    answers: Sequence[list[int]],
    loss: Callable[[Weights, Tensor, TokenBatch, list[int]], Tensor | None],
) -> None:
    """Accumulate the gradient of a loss, summed over all micro-batches.

    `loss(w, hidden [R, L, D], batch, row numbers)` is called for each micro-batch.
    """
    count, size = len(features), pictures_at_once(vlm, features, fixed)
    for first in range(0, count, size):
        pictures = range(first, min(first + size, count))
        rows = [i for i, picture in enumerate(owner) if picture in pictures]
        prefix = vlm.prefix(w, features[pictures.start : pictures.stop], fixed, grid)
        _backward_group(vlm, w, prefix, first, rows, owner, suffixes, answers, loss)


def _backward_group(vlm, w, prefix: PrefixKV, first: int, mine, owner, suffixes, answers, loss):
    """The rows `mine`, whose prefixes are those from number `first` on."""
    kv = PrefixKV(
        [k.detach().requires_grad_(k.requires_grad) for k in prefix.keys],
        [v.detach().requires_grad_(v.requires_grad) for v in prefix.values],
        prefix.next_position,
    )
    lengths = [len(suffixes[i]) + len(answers[i]) for i in mine]
    for group in micro_batches(lengths, vlm.batches.train, tokens=vlm.batches.half):
        rows = [mine[i] for i in group]
        if not vlm.text.small:  # often each has a picture of its own
            rows.sort(key=owner.__getitem__)
        batch = rows_of(vlm, [suffixes[i] for i in rows], [answers[i] for i in rows])
        own = pad_to(torch.tensor([owner[i] - first for i in rows]), batch.padded_rows)
        one_each = own.tolist() == list(range(len(kv.keys[0])))  # then no copies are needed
        hidden = vlm.suffix(w, batch.ids, kv if one_each else kv.select(own.to(vlm.device)))
        value = loss(w, hidden, batch, rows)
        if value is not None:
            value.backward()
    ends = [t for t in (*prefix.keys, *prefix.values) if t.requires_grad]
    grads = [t.grad for t in (*kv.keys, *kv.values) if t.requires_grad]
    used = [(t, g) for t, g in zip(ends, grads, strict=True) if g is not None]
    if used:
        torch.autograd.backward([t for t, _ in used], [g for _, g in used])
