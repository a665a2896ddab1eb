"""From hidden states to log-probability, entropy and exact KL, without a [T, V] logits tensor.

With student logits z = (h W^T + bias) / temperature, teacher logits u likewise, p = softmax(z) and
q = softmax(u), the outputs per row and their gradients with respect to z are

    logprob    = log p[target]               d = onehot(target) - p
    entropy    = H = - sum p log p           d = - p (log p + H)
    reverse_kl = R = sum p (log p - log q)   d = p (log p - log q - R)
    forward_kl = sum q (log q - log p)       d = p - q

and then grad_hidden = (dz / temperature) W. The rows are taken in chunks: forward keeps only the
inputs and [T] numbers, backward computes the chunk's logits again. Small problems, of one chunk,
keep their [T, V] log-probabilities instead. The weight's gradient is computed only if the weight
requires one; the teacher's side never gets any. On a CPU the passes over [T, V] are what costs, so
banned entries enter as a bias of -1e30 of the matrix product: p is 0 there, log p - log q is 0, and
nothing has to be masked.

Left out: the Triton kernel, an online softmax over blocks of V (a chunk holds whole rows here),
and second derivatives. A NaN or infinity in the inputs propagates to its own row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import choose_impl
from .reference import IGNORED_TARGET, PolicyHeadOutput, policy_head_reference

STUDENT_OUTPUTS = ("logprob", "entropy")
TEACHER_OUTPUTS = ("teacher_logprob", "reverse_kl", "forward_kl")
OUTPUTS = STUDENT_OUTPUTS + TEACHER_OUTPUTS
CHUNK_ELEMENTS = 1 << 22  # logits held at once: 16 MB in fp32, for each of student and teacher
CUDA_CHUNK_ELEMENTS = 1 << 27  # a GPU needs taller chunks to be busy: 512 MB
KEPT_ELEMENTS = 1 << 22  # up to this many logits in all, keep the log-probabilities


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
    chunk_elements: int | None = None,  # bound on logits held at once; given, it always chunks
) -> PolicyHeadOutput:
    """The wanted outputs, in fp32 (fp64 for fp64 inputs); the others are None and cost nothing."""
    want = _check_want(want, teacher_hidden is not None)
    _check_inputs(hidden, weight, targets, temperature, bias, banned)
    if teacher_hidden is not None:
        teacher_weight = weight if teacher_weight is None else teacher_weight
        _check_teacher(hidden, weight, teacher_hidden, teacher_weight)
        teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()
    default = CUDA_CHUNK_ELEMENTS if hidden.is_cuda else CHUNK_ELEMENTS
    keep = chunk_elements is None and targets.numel() * weight.shape[0] <= KEPT_ELEMENTS
    head = _Head(temperature, banned, want, chunk_elements or default, keep)
    if choose_impl(impl, hidden.device) == "reference":
        return _reference(hidden, weight, targets, teacher_hidden, teacher_weight, bias, head)

    counted = (targets != IGNORED_TARGET).nonzero()[:, 0]  # [T'], rows that have a target
    rows = targets.numel()
    if counted.numel() < rows:
        hidden, targets = hidden[counted], targets[counted]
        teacher_hidden = None if teacher_hidden is None else teacher_hidden[counted]
    inputs = (hidden, weight, bias, targets, teacher_hidden, teacher_weight)
    values = _ChunkedHead.apply(*inputs, head)
    if counted.numel() < rows:
        values = [value.new_zeros(rows).index_copy(0, counted, value) for value in values]
    return PolicyHeadOutput(**dict(zip(want, values, strict=True)))


@dataclass(frozen=True)
class _Head:
    """What does not change from row to row."""

    temperature: float
    banned: Tensor | None
    want: tuple[str, ...]
    chunk_elements: int
    keep: bool  # the log-probabilities, for the backward

    @property
    def needs_teacher(self) -> bool:
        return any(name in TEACHER_OUTPUTS for name in self.want)


def _log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    head: _Head,
) -> tuple[Tensor, Tensor | None]:
    """log p and, if an output needs it, log q of the given rows.  # [t, V]"""
    ban = None if head.banned is None else ban_bias(head.banned, weight.dtype)
    log_p = _log_softmax(hidden, weight, bias, ban, head.temperature)
    if not head.needs_teacher:
        return log_p, None
    return log_p, _log_softmax(teacher_hidden, teacher_weight, bias, ban, head.temperature)


def ban_bias(banned: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to logits so that `banned` [V] is never sampled; finite.  # [V]"""
    low = -3e4 if dtype == torch.float16 else -1e30
    return torch.zeros(banned.shape, dtype=dtype, device=banned.device).masked_fill_(banned, low)


def _log_softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ban: Tensor | None, temperature: float
) -> Tensor:
    """log softmax((h W^T + bias) / temperature), in fp32 or wider; about -1e30 where banned."""
    logits = F.linear(hidden, weight, ban)  # [t, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits += bias
    if temperature != 1.0:
        logits /= temperature
    return logits.log_softmax(-1)


def _row_outputs(
    log_p: Tensor, log_q: Tensor | None, targets: Tensor, head: _Head
) -> tuple[Tensor, ...]:
    """The wanted outputs, in the order of `want`.  # [t] each"""

    def of_target(logs: Tensor) -> Tensor:
        values = logs.gather(1, targets[:, None])[:, 0]
        return (
            values if head.banned is None else values.masked_fill(head.banned[targets], -torch.inf)
        )

    p = log_p.exp() if {"entropy", "reverse_kl"} & set(head.want) else None
    outputs = []
    for name in head.want:
        if name == "logprob":
            outputs.append(of_target(log_p))
        elif name == "entropy":
            outputs.append(-torch.linalg.vecdot(p, log_p))
        elif name == "teacher_logprob":
            outputs.append(of_target(log_q))
        elif name == "reverse_kl":
            outputs.append(torch.linalg.vecdot(p, log_p - log_q))
        else:  # forward_kl
            outputs.append(torch.linalg.vecdot(log_q.exp(), log_q - log_p))
    return tuple(outputs)


def _grad_logits(
    log_p: Tensor, log_q: Tensor | None, targets: Tensor, head: _Head, grads: dict[str, Tensor]
) -> Tensor:
    """d loss / d z of a chunk, from d loss / d output per row.  # [t, V]

    All four formulas are p times something, less what is added last:
    x - sum p x with x = - log p for the entropy and x = log p - log q for R, -1 for log p[target],
    +1 for the forward KL.
    """
    p, x = log_p.exp(), None
    if "reverse_kl" in grads:
        x = (log_p - log_q).mul_(grads["reverse_kl"][:, None])
    if "entropy" in grads:
        x = torch.zeros_like(p) if x is None else x
        x.addcmul_(grads["entropy"][:, None], log_p, value=-1)
    constant = p.new_zeros(len(p)) if x is None else -torch.linalg.vecdot(p, x)  # [t]
    constant = constant - grads.get("logprob", 0) + grads.get("forward_kl", 0)
    p_times = constant[:, None] if x is None else x.add_(constant[:, None])
    dz = p * p_times
    if "logprob" in grads:
        reached = grads["logprob"]
        if head.banned is not None:  # nothing makes a banned target likelier
            reached = reached.masked_fill(head.banned[targets], 0.0)
        dz.scatter_add_(1, targets[:, None], reached[:, None])
    if "forward_kl" in grads:
        dz.addcmul_(grads["forward_kl"][:, None], log_q.exp(), value=-1)
    return dz


class _ChunkedHead(torch.autograd.Function):
    """The head over chunks of rows, with the gradients written out above."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, teacher_hidden, teacher_weight, head):
        ctx.head = head
        ctx.set_materialize_grads(False)  # an output that the loss does not use has gradient None
        ctx.save_for_backward(hidden, weight, bias, targets, teacher_hidden, teacher_weight)
        chunks = []
        for rows in _chunks(targets.numel(), weight.shape[0], head.chunk_elements):
            inputs = _take(rows, hidden, weight, bias, targets, teacher_hidden, teacher_weight)
            logs = _log_probs(*inputs, head)
            chunks.append(_row_outputs(*logs, targets[rows], head))
        ctx.logs = logs if head.keep and len(chunks) == 1 else None
        outputs = tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))
        teacher_only = [
            o for name, o in zip(head.want, outputs, strict=True) if name == "teacher_logprob"
        ]
        ctx.mark_non_differentiable(*teacher_only)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        hidden, weight, bias, targets, teacher_hidden, teacher_weight = ctx.saved_tensors
        head = ctx.head
        named = zip(head.want, grad_outputs, strict=True)
        grads = {name: grad for name, grad in named if grad is not None}
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        for rows in _chunks(targets.numel(), weight.shape[0], head.chunk_elements):
            inputs = _take(rows, hidden, weight, bias, targets, teacher_hidden, teacher_weight)
            # divided by the temperature: with respect to h W^T + bias
            row_grads = {name: grad[rows] / head.temperature for name, grad in grads.items()}
            logs = ctx.logs or _log_probs(*inputs, head)
            dz = _grad_logits(*logs, targets[rows], head, row_grads)
            if needs_bias:
                grad_bias += dz.sum(0)
            dz = dz.to(weight.dtype)
            if needs_hidden:
                grad_hidden[rows] = dz @ weight
            if needs_weight:
                grad_weight += dz.T @ hidden[rows]
        grad_weight = grad_weight.to(weight.dtype) if needs_weight else None
        grad_bias = grad_bias.to(bias.dtype) if needs_bias else None
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _chunks(rows: int, vocabulary: int, elements: int) -> list[slice]:
    """At least one chunk, even of no rows, so that outputs always have something to join."""
    step = max(1, elements // vocabulary)
    return [slice(start, start + step) for start in range(0, max(rows, 1), step)]


def _take(rows, hidden, weight, bias, targets, teacher_hidden, teacher_weight):
    teacher_rows = None if teacher_hidden is None else teacher_hidden[rows]
    return hidden[rows], weight, bias, targets[rows], teacher_rows, teacher_weight


def _reference(hidden, weight, targets, teacher_hidden, teacher_weight, bias, head):
    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    full = policy_head_reference(
        wide(hidden),
        wide(weight),
        targets,
        head.temperature,
        wide(teacher_hidden),
        wide(teacher_weight),
        wide(bias),
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


def _check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    got = (tuple(tensor.shape), tensor.dtype, tensor.device)
    if got != (shape, dtype, device):
        raise ValueError(f"{name}: expected {shape}, {dtype} on {device}, got {got}")


def _check_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    bias: Tensor | None,
    banned: Tensor | None,
) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature}")
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(
                f"{name}: expected a floating point matrix, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    dtype, device = hidden.dtype, hidden.device
    _check_tensor("weight", weight, (vocabulary, width), dtype, device)
    _check_tensor("targets", targets, (rows,), torch.int64, device)
    if bias is not None:
        _check_tensor("bias", bias, (vocabulary,), dtype, device)
    if banned is not None:
        _check_tensor("banned", banned, (vocabulary,), torch.bool, device)
        if banned.all():
            raise ValueError("banned: expected at least one entry that is not banned, got none")
    good = (targets == IGNORED_TARGET) | ((targets >= 0) & (targets < vocabulary))
    if not good.all():
        raise ValueError(
            f"targets: expected {IGNORED_TARGET} or 0..{vocabulary - 1}, "
            f"got {targets[~good][:5].tolist()}"
        )


def _check_teacher(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> None:
    if teacher_weight.dim() != 2:
        raise ValueError(f"teacher_weight: expected [V, D'], got {tuple(teacher_weight.shape)}")
    dtype, device = hidden.dtype, hidden.device
    shape = (weight.shape[0], teacher_weight.shape[1])
    _check_tensor("teacher_weight", teacher_weight, shape, dtype, device)
    shape = (hidden.shape[0], teacher_weight.shape[1])
    _check_tensor("teacher_hidden", teacher_hidden, shape, dtype, device)
