"""The mathematics of the kernels, in plain PyTorch: the definition that every fast path must match.

TIES (arXiv 2306.01708), for task vectors tau_1..tau_K of one weight matrix and weights w_i >= 0:

    trim        tau_i <- tau_i * [|tau_i| >= threshold_i],  threshold_i = k-th largest |tau_i|
    elect sign  s      = sign( sum_i w_i tau_i )
    merge       merged = sum_i w_i tau_i [sign tau_i = s] / sum_i w_i [sign tau_i = s], 0 if s = 0
    result      base + lam * merged

EMA: average + alpha * (new - average), which is (1 - alpha) * average + alpha * new.

NF4: code = the nearest of 16 levels to x / max |x|, in blocks of 64 values.

Policy head, for student logits z and teacher logits u over the vocabulary (both / temperature):

    p = softmax(z)   q = softmax(u)   logprob = log p[target]   entropy = - sum p log p
    reverse_kl = sum p (log p - log q)                          forward_kl = sum q (log q - log p)

What is left out: speed and memory. Everything here is dense; use fp64 tensors to get the truth.
Nothing is validated: the public functions in ties.py and policy_head.py do that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED_TARGET = -100


# ---------------------------------------------------------------------------------------- TIES


def kept_count(numel: int, density: float) -> int:
    """k = round(density * numel): how many entries the trim means to keep."""
    return round(density * numel)


def trim_threshold_reference(task_vector: Tensor, density: float) -> Tensor:
    """|tau| of the k-th largest entry, as a 0-dim tensor; +inf when k = 0 (nothing is kept)."""
    k = kept_count(task_vector.numel(), density)
    if k == 0:
        return task_vector.new_tensor(float("inf"))
    return task_vector.abs().flatten().sort(descending=True).values[k - 1]


def trim_at(task_vector: Tensor, threshold: Tensor | float) -> Tensor:
    """Zero every entry smaller than the threshold.

    Entries *at* the threshold are all kept, so equal magnitudes there can keep more than k
    entries. The rule needs no order among equals, hence gives the same answer on every device.
    """
    return torch.where(task_vector.abs() >= threshold, task_vector, 0.0)


def trim(task_vector: Tensor, density: float) -> Tensor:
    """Keep the `density` fraction of largest |tau|, zero the rest."""
    return trim_at(task_vector, trim_threshold_reference(task_vector, density))


def _per_checkpoint(weights: Tensor, stacked: Tensor) -> Tensor:
    return weights.to(stacked).reshape(-1, *[1] * (stacked.dim() - 1))  # [K, 1, ..., 1]


def elect_sign(trimmed: Tensor, weights: Tensor) -> Tensor:
    """sign( sum_i w_i tau_i ): -1, 0 or +1 per entry, for trimmed task vectors [K, ...]."""
    return (_per_checkpoint(weights, trimmed) * trimmed).sum(0).sign()


def disjoint_merge(trimmed: Tensor, weights: Tensor, sign: Tensor) -> Tensor:
    """Weighted mean over only those checkpoints whose entry agrees with the elected sign."""
    agrees = (trimmed.sign() == sign) & (sign != 0)  # [K, ...]
    agreeing_weight = _per_checkpoint(weights, trimmed) * agrees  # [K, ...]
    total = agreeing_weight.sum(0)
    mean = (agreeing_weight * trimmed).sum(0) / total
    return torch.where(total > 0, mean, 0.0)


def ties_merge_reference(
    base: Tensor,
    task_vectors: Sequence[Tensor],
    weights: Sequence[float],
    density: float,
    lam: float = 1.0,
) -> Tensor:
    """base + lam * TIES(task_vectors); task vectors have base's shape, of any rank."""
    trimmed = torch.stack([trim(task_vector, density) for task_vector in task_vectors])
    return merge_trimmed(base, trimmed, torch.as_tensor(weights, dtype=trimmed.dtype), lam)


def merge_trimmed(base: Tensor, trimmed: Tensor, weights: Tensor, lam: float = 1.0) -> Tensor:
    """The last two steps of TIES, for task vectors [K, ...] that are trimmed already."""
    return base + lam * disjoint_merge(trimmed, weights, elect_sign(trimmed, weights))


def linear_merge_reference(
    base: Tensor, task_vectors: Sequence[Tensor], weights: Sequence[float], lam: float = 1.0
) -> Tensor:
    """base + lam * sum_i w_i tau_i / sum_i w_i."""
    stacked = torch.stack(list(task_vectors))
    w = _per_checkpoint(torch.as_tensor(weights, dtype=stacked.dtype), stacked)
    return base + lam * (w * stacked).sum(0) / w.sum()


# ----------------------------------------------------------------------------------------- EMA


def ema_reference(average: Tensor, new: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) * average + alpha * new."""
    return average + alpha * (new - average)


# ----------------------------------------------------------------------------------------- NF4

# The levels of NF4 (arXiv 2305.14314, appendix E): quantiles of a normal distribution.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def nf4_reference(values: Tensor, block: int = 64) -> tuple[Tensor, Tensor]:
    """(level of each value / its block's largest magnitude, that magnitude), by nearest distance.

    values [n], n a multiple of `block` -> levels 0..15 [n], magnitudes [n / block]
    """
    blocks = values.view(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = blocks / absmax.clamp(min=1e-38)[:, None]
    distance = (scaled[..., None] - torch.tensor(NF4_LEVELS).to(values)).abs()  # [., block, 16]
    return distance.argmin(-1).view(-1), absmax


# --------------------------------------------------------------------------------- policy head


@dataclass
class PolicyHeadOutput:
    """One number per row; None where an output was not asked for or has no teacher."""

    logprob: Tensor | None = None  # [T]
    entropy: Tensor | None = None  # [T]
    teacher_logprob: Tensor | None = None  # [T]
    reverse_kl: Tensor | None = None  # [T]
    forward_kl: Tensor | None = None  # [T]


def head_log_softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, banned: Tensor | None, temperature: float
) -> Tensor:
    """log softmax((h W^T + bias) / temperature) with banned entries at -inf.  # [T, V]

    The matrix product runs in the dtype of its inputs; everything after it in fp32 or wider.
    """
    logits = hidden @ weight.T  # [T, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits = logits + bias
    if temperature != 1.0:
        logits = logits / temperature
    if banned is not None:
        logits = logits.masked_fill(banned, float("-inf"))
    return logits.log_softmax(-1)


def policy_head_reference(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [T], -100 marks a row without a target
    temperature: float = 1.0,
    teacher_hidden: Tensor | None = None,  # [T, D']
    teacher_weight: Tensor | None = None,  # [V, D'], default: weight
    bias: Tensor | None = None,  # [V], added on both sides
    banned: Tensor | None = None,  # [V] bool, True: the entry cannot be sampled
) -> PolicyHeadOutput:
    """All five outputs on dense [T, V] logits. Rows with target -100 give 0 and no gradient."""
    counted = targets != IGNORED_TARGET  # [T]
    index = targets.clamp(min=0)[:, None]  # [T, 1]

    def per_row(values: Tensor) -> Tensor:
        return torch.where(counted, values, 0.0)

    log_p = head_log_softmax(hidden, weight, bias, banned, temperature)  # [T, V]
    p = log_p.exp()
    # 0 * log 0 = 0: a banned entry has p = q = 0, and any finite log keeps the product 0
    finite_log_p = log_p if banned is None else log_p.masked_fill(banned, 0.0)
    output = PolicyHeadOutput(
        logprob=per_row(log_p.gather(1, index)[:, 0]), entropy=per_row(-(p * finite_log_p).sum(-1))
    )
    if teacher_hidden is None:
        return output
    with torch.no_grad():
        teacher_weight = weight if teacher_weight is None else teacher_weight
        log_q = head_log_softmax(teacher_hidden, teacher_weight, bias, banned, temperature)
        q = log_q.exp()
        finite_log_q = log_q if banned is None else log_q.masked_fill(banned, 0.0)
    output.teacher_logprob = per_row(log_q.gather(1, index)[:, 0])
    output.reverse_kl = per_row((p * (finite_log_p - finite_log_q)).sum(-1))
    output.forward_kl = per_row((q * (finite_log_q - finite_log_p)).sum(-1))
    return output
