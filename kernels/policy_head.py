"""From hidden states to log-probability, entropy and exact KL, without a [T, V] logits tensor.

With student logits z = (h W^T + bias) / temperature, teacher logits u likewise, p = softmax(z) and
q = softmax(u), the outputs per row and their gradients with respect to z are

    logprob    = log p[target]               d = onehot(target) - p
    entropy    = H = - sum p log p           d = - p (log p + H)
    reverse_kl = R = sum p (log p - log q)   d = p (log p - log q - R)
    forward_kl = sum q (log q - log p)       d = p - q

and then grad_hidden = (dz / temperature) W. With a = log sum e^z and b = log sum e^u,

    entropy    = a - sum p z
    reverse_kl = sum p (z - u) - a + b     forward_kl = sum q (u - z) - b + a

so running sums over the vocabulary suffice, kept relative to the largest logit seen so far
(policy_head_sums.py). The vocabulary is taken in parts of all rows at once: W is read once a
direction. Forward keeps only the inputs and [T] numbers, backward computes each part's logits
again; small problems keep their logits instead, and policy_head_loss.py, which is given the loss,
needs no second time. The weight's gradient is computed only if the weight requires one; the
teacher's side never gets any. Banned entries enter as a bias of -1e30 of the matrix product: p is 0
there, and nothing has to be masked.

On a GPU the products are the matrix library's too, and Triton kernels (policy_head_triton.py) form
the same sums and gradients in one pass over each part's logits. Left out: second derivatives. A NaN
or infinity in a hidden state propagates to its own row.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_head_inputs, check_head_teacher
from .dispatch import choose_impl
from .policy_head_sums import (
    OUTPUTS,
    STUDENT_OUTPUTS,
    Head,
    Sides,
    add_product,
    part_gradient,
    part_sums,
    stack,
)
from .reference import IGNORED_TARGET, PolicyHeadOutput, policy_head_reference

DIFFERENTIABLE = ("logprob", "entropy", "reverse_kl", "forward_kl")
CHUNK_ELEMENTS = 1 << 21  # logits held at once: 8 MB in fp32, for each of student and teacher
# A GPU needs larger chunks to be busy: 168 MB of fp32 logits a side, and 84 MB of dz in bf16. So
# 256 tokens over a vocabulary of 151,936 are one part.
CUDA_CHUNK_ELEMENTS = 5 << 23
KEPT_ELEMENTS = 1 << 22  # up to this many logits in all, keep them for the backward
ALIGNED = 128  # parts of the vocabulary are multiples of it, and rows of a piece


def policy_head(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [T] int64, -100 marks a row without a target: it costs nothing and gives 0
    *,
    temperature: float = 1.0,  # divides the logits of student and teacher alike
    teacher_hidden: Tensor | None = None,  # [T, D']
    teacher_weight: Tensor | None = None,  # [V, D'], default: weight
    bias: Tensor | None = None,  # [V], added to the logits of both
    banned: Tensor | None = None,  # [V] bool, True: the entry has probability 0 under both
    want: Sequence[str] | None = None,  # names of PolicyHeadOutput; default: all that can be
    impl: str | None = None,
    chunk_elements: int | None = None,  # bound on logits held at once; given, none are kept
) -> PolicyHeadOutput:
    """The wanted outputs, in fp32 (fp64 for fp64 inputs); the others are None and cost nothing."""
    sides, head, all_counted = checked(
        hidden,
        weight,
        targets,
        temperature=temperature,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        bias=bias,
        banned=banned,
        want=want,
        impl=impl,
        chunk_elements=chunk_elements,
    )
    if chunk_elements is None:
        kept = CUDA_CHUNK_ELEMENTS if hidden.is_cuda else KEPT_ELEMENTS
        head = replace(head, keep=targets.numel() * weight.shape[0] <= kept)
    return apply_head(sides, head, all_counted)


def checked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    bias: Tensor | None = None,
    banned: Tensor | None = None,
    want: Sequence[str] | None = None,
    impl: str | None = None,
    chunk_elements: int | None = None,
) -> tuple[Sides, Head, bool]:
    """The arguments of `policy_head`, checked, no logits kept; whether all rows have a target."""
    want = _check_want(want, teacher_hidden is not None)
    all_counted = check_head_inputs(hidden, weight, targets, temperature, bias, banned)
    if teacher_hidden is not None:
        teacher_weight = weight if teacher_weight is None else teacher_weight
        check_head_teacher(hidden, weight, teacher_hidden, teacher_weight)
        teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()
    how = choose_impl(impl, hidden.device, has_triton=True)
    if how == "triton" and hidden.dtype == torch.float64:
        how = "torch"
    chunk = chunk_elements or (CUDA_CHUNK_ELEMENTS if hidden.is_cuda else CHUNK_ELEMENTS)
    sides = Sides(hidden, weight, bias, targets, teacher_hidden, teacher_weight)
    return sides, Head(temperature, banned, want, chunk, keep=False, how=how), all_counted


def apply_head(sides: Sides, head: Head, all_counted: bool) -> PolicyHeadOutput:
    """The head of checked arguments; `all_counted`: every row is known to have a target."""
    if head.how == "reference":
        return _reference(sides, head)
    rows, counted = sides.targets.numel(), None
    if not all_counted:
        counted = (sides.targets != IGNORED_TARGET).nonzero()[:, 0]  # [T'], rows with a target
        if counted.numel() < rows:
            sides = sides.at(counted)
        else:
            counted = None
    teacher = sides.teacher_hidden, sides.teacher_weight
    if not head.needs_teacher:
        teacher = None, None
    inputs = sides.hidden, sides.weight, sides.bias, sides.targets, *teacher
    values = _OnlineHead.apply(*inputs, head)
    if counted is not None:
        values = [value.new_zeros(rows).index_copy(0, counted, value) for value in values]
    return PolicyHeadOutput(**dict(zip(head.want, values, strict=True)))


class _OnlineHead(torch.autograd.Function):
    """The head by online sums over parts of the vocabulary, with the gradients written out."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, teacher_hidden, teacher_weight, head):
        sides = Sides(hidden, weight, bias, targets, teacher_hidden, teacher_weight)
        ctx.head = head
        ctx.set_materialize_grads(False)  # an output that the loss does not use has gradient None
        parts, kept = _parts(hidden, weight, head), []

        def form(part: slice) -> tuple[Tensor, Tensor | None]:
            logits = sides.form(part, head)
            if head.keep:
                kept.extend(logits)
            return logits

        if head.triton:
            from .policy_head_triton import head_outputs

            values, rows = head_outputs(sides, head, parts, form)
        else:
            sums = None
            for part in parts:
                more = part_sums(*form(part), targets, part, head.want)
                sums = more if sums is None else stack(sums, more).join()
            never = None if head.banned is None else head.banned[targets]
            values, rows = sums.outputs(never)
        # Saved so that the backward gives the logits up, not whoever holds the loss.
        inputs = hidden, weight, bias, targets, teacher_hidden, teacher_weight
        ctx.save_for_backward(*inputs, rows, *kept)
        outputs = tuple(values[name] for name in head.want)
        teacher_only = [
            o for name, o in zip(head.want, outputs, strict=True) if name == "teacher_logprob"
        ]
        ctx.mark_non_differentiable(*teacher_only)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        saved = ctx.saved_tensors  # once: under checkpointing each reading computes them anew
        inputs, (rows, *kept) = saved[:6], saved[6:]
        sides, head = Sides(*inputs), ctx.head
        hidden, weight, bias, targets = inputs[:4]
        named = dict(zip(head.want, grad_outputs, strict=True))
        zero = torch.zeros_like(rows[0])
        grads = torch.stack([zero if named.get(n) is None else named[n] for n in DIFFERENTIABLE])
        if head.banned is not None:  # nothing makes a banned target likelier
            grads[0].masked_fill_(head.banned[targets], 0.0)
        # divided by the temperature: with respect to h W^T + bias
        rows = torch.cat([rows, grads / head.temperature])  # [8, T]
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=rows.dtype) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=rows.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=rows.dtype) if needs_bias else None
        parts = _parts(hidden, weight, head)

        def form(part: slice) -> tuple[Tensor, Tensor | None]:
            at = 2 * parts.index(part)
            return tuple(kept[at : at + 2]) if kept else sides.form(part, head)

        if head.triton:
            from .policy_head_triton import part_gradients

            gradient = part_gradients(sides, head, rows, form)
        else:

            def gradient(part: slice) -> Tensor:
                return part_gradient(*form(part), targets, part, rows)

        for part in parts:
            dz = gradient(part)
            if needs_bias:
                grad_bias[part] = dz.sum(0, dtype=rows.dtype)
            dz = dz.to(weight.dtype)
            if needs_hidden:
                add_product(grad_hidden, dz, weight[part])
            if needs_weight:
                add_product(grad_weight[part], dz.T, hidden)
            del dz  # before the next part's is formed
        grads = zip((grad_hidden, grad_weight, grad_bias), inputs, strict=False)
        return *(None if g is None else g.to(x.dtype) for g, x in grads), None, None, None, None


def _parts(hidden: Tensor, weight: Tensor, head: Head) -> list[slice]:
    """Parts of the vocabulary whose logits may exist at once."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    width = max(1, head.chunk_elements // max(rows, 1))
    if width >= vocabulary:
        return [slice(0, vocabulary)]
    if width >= ALIGNED:
        width -= width % ALIGNED
    return [slice(at, min(at + width, vocabulary)) for at in range(0, vocabulary, width)]


def _reference(sides: Sides, head: Head) -> PolicyHeadOutput:
    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    full = policy_head_reference(
        wide(sides.hidden),
        wide(sides.weight),
        sides.targets,
        head.temperature,
        wide(sides.teacher_hidden),
        wide(sides.teacher_weight),
        wide(sides.bias),
        head.banned,
    )
    return PolicyHeadOutput(**{name: vars(full)[name] for name in head.want})


def _check_want(want: Sequence[str] | None, has_teacher: bool) -> tuple[str, ...]:
    possible = OUTPUTS if has_teacher else STUDENT_OUTPUTS
    want = possible if want is None else tuple(want)
    if not want or len(set(want)) < len(want) or not set(want) <= set(OUTPUTS):
        raise ValueError(f"want: expected different names out of {OUTPUTS}, got {want}")
    if not set(want) <= set(possible):
        raise ValueError(f"teacher_hidden: expected a tensor for want={want}, got None")
    return want
