"""Gradients of a loss over many rows in cache-sized pieces; prefix and weights run through once.

Autograd is cut at two places where many rows meet one tensor: at the runnable weights (fused, cast,
LoRA merged) and at the keys and values of the prompt prefixes. Rows are run forward and backward in
micro-batches small enough to stay in a core's cache; their gradients collect at the cuts; what lies
before each cut is then run backward once:

    rows    --> d(prefix KV), d(weights)
    prefix  --> d(weights), d(features)
    weights --> d(LoRA) or d(parameters)

Left out: the losses themselves (`turbo.train`, `turbo.sft`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from turbo.batch import TokenBatch, micro_batches, pad_rows, pad_to
from turbo.model import PrefixKV, TextWeights, VisionLanguageModel


def flatten(w: TextWeights) -> list[Tensor]:
    """All tensors of the weights, each once, in a fixed order."""
    tensors = [t for layer in w.layers for t in vars(layer).values()]
    return [*tensors, w.embed, w.norm, *([] if w.head is w.embed else [w.head])]


def cut(w: TextWeights) -> TextWeights:
    """The same weights as leaves of a new graph; those without a gradient keep none."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_(t.requires_grad)

    layers = [replace(layer, **{k: leaf(v) for k, v in vars(layer).items()}) for layer in w.layers]
    embed = leaf(w.embed)
    return TextWeights(embed, layers, leaf(w.norm), embed if w.head is w.embed else leaf(w.head))


def backward_rows(
    vlm: VisionLanguageModel,
    w: TextWeights,  # leaves (see `cut`); their .grad is added to
    prefix: PrefixKV,  # of U prompts, with its graph
    owner: Sequence[int],  # prefix of each row
    suffixes: Sequence[list[int]],
    answers: Sequence[list[int]],
    loss: Callable[[TextWeights, Tensor, TokenBatch, list[int]], Tensor | None],
) -> None:
    """Accumulate the gradient of a loss, summed over all micro-batches.

    `loss(w, hidden [R, L, D], batch, row numbers)` is called for each micro-batch.
    """
    kv = PrefixKV(
        [k.detach().requires_grad_(k.requires_grad) for k in prefix.keys],
        [v.detach().requires_grad_(v.requires_grad) for v in prefix.values],
        prefix.next_position,
    )
    lengths = [len(s) + len(a) for s, a in zip(suffixes, answers, strict=True)]
    for rows in micro_batches(lengths, vlm.batches.train):
        batch = pad_rows([suffixes[i] for i in rows], [answers[i] for i in rows], vlm.pad)
        own = pad_to(torch.tensor([owner[i] for i in rows]), batch.padded_rows)
        hidden = vlm.suffix(w, batch.ids, kv.select(own))
        value = loss(w, hidden, batch, rows)
        if value is not None:
            value.backward()
    ends = [t for t in (*prefix.keys, *prefix.values) if t.requires_grad]
    grads = [t.grad for t in (*kv.keys, *kv.values) if t.requires_grad]
    used = [(t, g) for t, g in zip(ends, grads, strict=True) if g is not None]
    if used:
        torch.autograd.backward([t for t, _ in used], [g for _, g in used])


def backward_weights(w: TextWeights, shards: Sequence[TextWeights], scale: float = 1.0) -> None:
    """Push the workers' summed gradients of the weights back to what they were made of."""
    tensors, grads = [], []
    for tensor, *parts in zip(flatten(w), *map(flatten, shards), strict=True):
        found = [p.grad for p in parts if p.grad is not None]
        if tensor.requires_grad and found:
            tensors.append(tensor)
            grads.append(sum(found[1:], start=found[0]).mul_(scale))
    torch.autograd.backward(tensors, grads)
