"""The clipped objective of PPO on environment steps.

One action of the agent is a whole answer, so probabilities, ratios and advantages belong to a
*step*, not to a token. Thoughts are long and would drown the action; they enter with a coefficient
c < 1:

    log pi(y|s) = c * sum_{thought} log p  +  sum_{action} log p
    ratio       = pi(y|s) / pi_old(y|s)
    loss        = -mean( min(ratio * A, clamp(ratio, 1 - clip, 1 + clip) * A) )

Left out: where log-probabilities come from (kernels/policy_head.py), advantages (gae.py), the
guidance (kl.py, score.py, update.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# exp(20) is 5e8. Ratios beyond it carry no information, and infinities turn into NaN gradients.
LOG_RATIO_BOUND = 20.0


@dataclass(frozen=True)
class PPOLoss:
    """The loss, which carries the gradient, and detached figures for the log."""

    loss: Tensor  # scalar
    ratio: Tensor  # [R]
    clip_fraction: Tensor  # scalar: share of the steps with a ratio outside the clip range
    approx_kl: Tensor  # scalar: the k3 estimate of KL(old || new), never negative


def step_logprob(
    token_logprob: Tensor, is_thought: Tensor, row: Tensor, rows: int, thought_coef: float
) -> Tensor:
    """Add the log-probabilities of the tokens of each step; `row` says which step a token is of.

    Tokens are packed: `token_logprob`, `is_thought` and `row` are [N], the result is [rows].
    """
    # log pi(y|s) = c * sum_{thought} log p + sum_{action} log p
    weighted = torch.where(is_thought.bool(), thought_coef * token_logprob, token_logprob)  # [N]
    return weighted.new_zeros(rows).index_add(0, row, weighted)  # [R]


def ppo_loss(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, clip: float) -> PPOLoss:
    """The clipped surrogate over R steps; all three tensors are [R]."""
    if not logprob.shape == old_logprob.shape == advantage.shape:
        raise ValueError(
            f"logprob {tuple(logprob.shape)}, old_logprob {tuple(old_logprob.shape)} and advantage "
            f"{tuple(advantage.shape)} must have one entry for each step"
        )
    old_logprob, advantage = old_logprob.detach(), advantage.detach()
    # ratio = pi(y|s) / pi_old(y|s)
    log_ratio = (logprob - old_logprob).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)  # [R]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    # -mean( min(ratio * A, clamp(ratio) * A) ): pessimistic, so a step is only ever held back.
    loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
    with torch.no_grad():
        outside = (ratio < 1.0 - clip) | (ratio > 1.0 + clip)
        # E_old[ratio - 1 - log ratio] = KL(old || new); expm1 does not cancel where they are close
        approx_kl = (torch.expm1(log_ratio) - log_ratio).clamp(min=0.0).mean()
    return PPOLoss(loss, ratio.detach(), outside.to(ratio.dtype).mean(), approx_kl)


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """Half the mean squared error of the critic; both tensors are [R]."""
    # 1/2 * mean( (V - R)^2 )
    return 0.5 * (values - returns.detach()).square().mean()
