"""A loss of the policy head's outputs, its gradient formed beside it: three products, not five.

`policy_head` cannot know what becomes of its outputs. With many rows it keeps no logits, and forms
them a second time when the gradients arrive: both sides' logits, twice, and dz W. A loss that is a
sum over groups of sequences,

    loss = sum_g f(logprob_g, entropy_g, reverse_kl_g, ...)

needs no second time: a piece of the rows, of whole sequences, gets its logits, f, its gradient and
dz W, one after the other, and then its logits are given up. What is left is grad_hidden [T, D].
PPO's step-level ratio couples the tokens of a sequence and no others, so it is such a loss.

W is read once a piece and product, where `policy_head` reads it once for all rows: with few rows a
piece that would cost more than the products that are saved (kernels/README.md counts it). A head
that is trained has its gradient summed in fp32 [V, D], one pass over it a piece.

Left out: a loss whose gradient is not known until all rows are seen; second derivatives; scaling of
the loss in fp16, which comes after dz has been rounded: scale within `loss`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .policy_head import ALIGNED, CUDA_CHUNK_ELEMENTS, apply_head, checked
from .policy_head_sums import Head, Sides
from .reference import PolicyHeadOutput

# Logits of a piece, over a vocabulary of 151,936 those of 256 rows. On a CPU a row's products take
# 1.3 times as long in 220 rows as in 1,024, and 2.1 times in 64.
PIECE_ELEMENTS = CUDA_CHUNK_ELEMENTS
# 512 rows: on an H200, with 8,192 tokens in all, 256 take 1.3 times as long, and 1,024 save 5 %
CUDA_PIECE_ELEMENTS = 75 << 20
Loss = Callable[[PolicyHeadOutput, slice], Tensor]


def policy_head_loss(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [T] int64, -100 as in `policy_head`
    loss: Loss,
    *,
    lengths: Sequence[int] | None = None,  # rows of each sequence, end to end; None: one each
    teacher_hidden: Tensor | None = None,  # [T, D']
    bias: Tensor | None = None,  # [V]
    piece_elements: int | None = None,  # logits of a piece, for each of student and teacher
    **options,  # the others of `policy_head`; `chunk_elements`: logits of a part of a piece
) -> Tensor:
    """The sum of `loss(outputs of a piece, its sequences)` over pieces, a scalar in fp32 or wider.

    `loss` gets the outputs of some sequences, those of the slice, and returns their part of the
    whole: a sum, or a mean over a number that is known beforehand. It is called once a piece, in
    order, and may add up figures for a log. Gradients go to hidden, weight and bias; what else
    `loss` depends on gets none. A sequence that is longer than a piece has a piece of its own, and
    its logits are formed twice.
    """
    lengths = [1] * len(hidden) if lengths is None else list(lengths)
    if min(lengths, default=0) < 0 or sum(lengths) != len(hidden):
        raise ValueError(
            f"lengths: expected numbers of rows that add up to {len(hidden)}, got {sum(lengths)} "
            f"of {len(lengths)} sequences, the shortest {min(lengths, default=0)}"
        )
    sides, head, all_counted = checked(
        hidden, weight, targets, teacher_hidden=teacher_hidden, bias=bias, **options
    )
    if piece_elements is None:
        piece_elements = CUDA_PIECE_ELEMENTS if hidden.is_cuda else PIECE_ELEMENTS
    return loss_in_pieces(sides, head, loss, lengths, piece_elements, all_counted)


def loss_in_pieces(
    sides: Sides,
    head: Head,
    loss: Loss,
    lengths: list[int],
    piece_elements: int,
    all_counted: bool,
) -> Tensor:
    """`policy_head_loss` of checked arguments."""
    inputs = sides.hidden, sides.weight, sides.bias
    wanted = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in inputs]
    asked = [i for i, w in enumerate(wanted) if w]
    wide = torch.promote_types(sides.hidden.dtype, torch.float32)
    total = sides.hidden.new_zeros((), dtype=wide)
    dtypes = sides.hidden.dtype, wide, wide  # rows get their gradient from one piece each
    sums = [
        torch.zeros_like(x, dtype=dtype) if w else None
        for x, dtype, w in zip(inputs, dtypes, wanted, strict=True)
    ]
    first = 0
    for piece in pieces(lengths, piece_rows(piece_elements, len(sides.weight))):
        rows = slice(first, first + sum(lengths[piece]))
        first = rows.stop
        part = sides.at(rows)
        leaves = [
            None if x is None else x.detach().requires_grad_(w)
            for x, w in zip((part.hidden, part.weight, part.bias), wanted, strict=True)
        ]
        part = replace(part, hidden=leaves[0], weight=leaves[1], bias=leaves[2])
        keep = bool(asked) and part.targets.numel() * len(part.weight) <= piece_elements
        with torch.set_grad_enabled(bool(asked)):
            value = loss(apply_head(part, replace(head, keep=keep), all_counted), piece)
        if not isinstance(value, Tensor) or value.dim():
            raise ValueError(f"loss: expected a function that returns a scalar, got {value!r}")
        total += value.detach()
        if asked and value.requires_grad:
            given, places = [leaves[i] for i in asked], (rows, ..., ...)
            found = torch.autograd.grad(value, given, allow_unused=True)
            for i, grad in zip(asked, found, strict=True):
                if grad is not None:
                    sums[i][places[i]] += grad
            del given, found, grad
        del value, leaves, part  # the piece's logits and gradients, before there are others
    return _Formed.apply(total, *inputs, *sums) if asked else total


def piece_rows(elements: int, vocabulary: int) -> int:
    """Rows of a piece that has at most so many logits, in multiples of `ALIGNED` where it can."""
    rows = elements // vocabulary
    return rows - rows % ALIGNED if rows > ALIGNED else rows


def pieces(lengths: Sequence[int], rows: int) -> list[slice]:
    """Slices of whole sequences that have at most so many rows, or are one sequence."""
    out, first, held = [], 0, 0
    for i, length in enumerate(lengths):
        if held and held + length > rows:
            out.append(slice(first, i))
            first, held = i, 0
        held += length
    return [*out, slice(first, len(lengths))] if lengths else out


class _Formed(torch.autograd.Function):
    """A scalar whose gradients are known already."""

    @staticmethod
    def forward(ctx, total, hidden, weight, bias, *grads):
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, size):
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        grads = [None if g is None else (g * size).to(dtype) for g, dtype in pairs]
        return None, *grads, None, None, None
