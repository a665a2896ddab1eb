"""How far the policy is from its teacher, from the sampled tokens alone, and how much that counts.

With d = log p_policy - log p_teacher of a token that the *policy* sampled:

    k1   = d                    unbiased for KL(policy || teacher); either sign
    k3   = exp(-d) - 1 + d      unbiased too, never negative, smaller spread
    clip = max(d, 0)            biased: speaks only where the policy is surer than the teacher
    abs  = |d|                  biased: also pulls back where the teacher is surer

A step's guidance is the mean over its thought tokens. It enters the reward with a coefficient beta.

Left out: the exact KL over the whole vocabulary (kernels/policy_head.py) and where the guidance is
applied (score.py, update.py).
"""

import math

import torch
from torch import Tensor

# exp(20) is 5e8: k3 stays finite where the teacher is all but certain of a token that the policy
# hardly ever samples.
LOG_RATIO_BOUND = 20.0
SMOOTHING = 0.5  # of the coefficient where it rises
LOWEST, HIGHEST = 1e-3, 1e4  # coefficient


def kl_estimate(logprob: Tensor, teacher_logprob: Tensor, kind: str = "clip") -> Tensor:
    """An estimate for each token, of the shape of `logprob`: "clip", "abs", "k1" or "k3"."""
    d = logprob - teacher_logprob
    if kind == "clip":
        return d.clamp(min=0.0)
    if kind == "abs":
        return d.abs()
    if kind == "k1":
        return d
    if kind == "k3":
        # expm1(x) = exp(x) - 1 without the cancellation at small x. Rounding may still leave -1e-9.
        return (torch.expm1((-d).clamp(max=LOG_RATIO_BOUND)) + d).clamp(min=0.0)
    raise ValueError(f"KL estimate {kind!r} is unknown: use 'clip', 'abs', 'k1' or 'k3'")


def mean_over(tokens: Tensor, mask: Tensor, row: Tensor, rows: int) -> Tensor:
    """The mean of the masked tokens of each step, [N] packed tokens to [rows]; 0 where none is.

    `row` says which step a token is of; for the guidance `mask` marks the thought tokens.
    """
    mask = mask.bool()
    kept = torch.where(mask, tokens, 0.0)  # [N]; where, since a masked token may hold inf or NaN
    total = kept.new_zeros(rows).index_add(0, row, kept)  # [R]
    count = kept.new_zeros(rows).index_add(0, row, mask.to(kept.dtype))  # [R]
    return total / count.clamp(min=1.0)


def auto_coefficient(
    size: float, spread: float, share: float, previous: float | None = None
) -> float:
    """The coefficient beta that makes the guidance a chosen share of what it stands beside.

        target = share * spread / size,  within [LOWEST, HIGHEST]
        beta   = target                                          where it falls
                 previous^SMOOTHING * target^(1 - SMOOTHING)     where it rises

    `size` is how large the KL is that beta multiplies, `spread` that of the returns or advantages.
    KL moves over decades during a run: so the average is taken on logarithms, and beta falls at
    once, since yesterday's coefficient on a KL a hundred times as large ruins a policy in one
    update. Without a usable measurement (no teacher yet, all returns equal, a NaN) beta stays as
    it was, or 1, where a run begins.
    """
    if not 0.0 <= share < math.inf:
        raise ValueError(f"share {share} must be a finite number >= 0, such as 0.1")
    if share == 0.0:
        return 0.0
    known = previous is not None and math.isfinite(previous) and previous > 0.0
    log_previous = math.log(min(max(previous if known else 1.0, LOWEST), HIGHEST))
    log_beta = log_previous
    if all(math.isfinite(x) and x > 0.0 for x in (size, spread)):
        # In logarithms no quotient can overflow. Clamped before it is averaged, so that one KL of
        # 1e-30 does not hold beta at its bound for many updates.
        log_target = math.log(share) + math.log(spread) - math.log(size)
        log_target = min(max(log_target, math.log(LOWEST)), math.log(HIGHEST))
        rises = known and log_target > log_previous  # where none came before, it is taken as it is
        weight = SMOOTHING if rises else 0.0
        log_beta = weight * log_previous + (1.0 - weight) * log_target
    return min(max(math.exp(log_beta), LOWEST), HIGHEST)
