"""Advantages over environment steps: generalised advantage estimation, and group baselines.

    delta_t = r_t + gamma * V(s_{t+1}) * (1 - terminated_t) - V(s_t)
    A_t     = delta_t + gamma * lambda * (1 - end_t) * A_{t+1},    end = terminated or truncated
    returns = A + V

Time is dimension 0, and any other dimension is a batch: [N] for episodes laid end to end, [T, E]
for T steps of E environments. The two ways to end an episode differ in one term only:

* a *terminated* step has no future, so it does not bootstrap;
* a *truncated* step has a future that was not played, so it bootstraps from `next_values`, the
  value of the episode's own final observation;
* after both, the recursion starts again: nothing crosses a reset.

`next_values` is therefore given for every step and never read off `values[t + 1]`, which after a
reset belongs to another episode. A step cut off by the end of a rollout counts as truncated.

Left out: which reward is used (format terms, guidance) and where values come from.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Advantages:
    """What the policy and the critic are trained on; both have the shape of the rewards."""

    advantages: Tensor
    returns: Tensor  # the critic's target


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> Advantages:
    """Generalised advantage estimation along dimension 0, in fp64 inside."""
    for name, tensor in (
        ("values", values),
        ("next_values", next_values),
        ("terminated", terminated),
        ("truncated", truncated),
    ):
        if tensor.shape != rewards.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, rewards {tuple(rewards.shape)}: "
                "give one entry for each step"
            )
    terminated, truncated = terminated.bool(), truncated.bool()
    # where, not a product: the next value of a terminated step may be anything, NaN included.
    future = torch.where(terminated, 0.0, next_values.double())
    # delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)
    delta = rewards.double() + gamma * future - values.double()
    # A_t = delta_t + gamma * lambda * (1 - end_t) * A_{t+1}
    decay = gamma * lam * (~(terminated | truncated)).double()
    advantages = _sum_backwards(delta, decay)
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    return Advantages(advantages.to(dtype), (advantages + values.double()).to(dtype))


def discounted_returns(rewards: Tensor, episode_end: Tensor, gamma: float) -> Tensor:
    """The discounted sum of rewards from each step to the end of its episode, without a critic."""
    if episode_end.shape != rewards.shape:
        raise ValueError(
            f"episode_end has shape {tuple(episode_end.shape)}, rewards {tuple(rewards.shape)}: "
            "give one flag for each step"
        )
    # G_t = r_t + gamma * (1 - end_t) * G_{t+1}
    decay = gamma * (~episode_end.bool()).double()
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    return _sum_backwards(rewards.double(), decay).to(dtype)


def group_advantages(episode_returns: Tensor, group: Tensor, baseline: str = "loo") -> Tensor:
    """Advantages without a critic: each initial state is played by a group of episodes.

    `episode_returns` [N] and `group` [N], equal integers for equal initial states. The baseline is
    the mean of the *other* episodes of the group ("loo", unbiased) or of all of them ("mean").
    An episode alone in its group has nothing to be compared with: advantage 0.
    """
    if baseline not in ("loo", "mean"):
        raise ValueError(f"baseline {baseline!r} is unknown: use 'loo' or 'mean'")
    if episode_returns.ndim != 1 or group.shape != episode_returns.shape:
        raise ValueError(
            f"episode_returns {tuple(episode_returns.shape)} and group {tuple(group.shape)} "
            "must be two vectors of one length"
        )
    returns = episode_returns.double()  # [N]
    _, index, size = torch.unique(group, return_inverse=True, return_counts=True)
    total = torch.zeros(len(size), dtype=returns.dtype, device=returns.device)
    mean = total.index_add(0, index, returns) / size  # [groups]
    size = size[index]  # [N]
    # "mean": A_i = R_i - mean
    advantages = returns - mean[index]  # [N]
    if baseline == "loo":
        # "loo", n episodes: A_i = R_i - (n * mean - R_i) / (n - 1) = (R_i - mean) * n / (n - 1)
        advantages = advantages * size / (size - 1).clamp(min=1)
    advantages = torch.where(size > 1, advantages, 0.0)
    return advantages.to(torch.promote_types(episode_returns.dtype, torch.float32))


def state_advantages(
    rewards: Tensor, lengths: Sequence[int], groups: Sequence[int], states: Sequence[Hashable]
) -> Tensor:
    """Advantages without a critic, step by step: episodes of a group are compared where they meet.

    `rewards` [N] and `states` (N, equal where the same was observed) of episodes laid end to end,
    their lengths and groups. From a state that other episodes of the group have passed too,

        A_t = G_t - mean of their returns from it,      G_t = r_t + r_{t+1} + ... to the end

    where each other episode counts with its first visit, and a state that no other has seen takes
    the advantage of the last one that was shared. So a step is credited with what it changed: where
    all that came by a state won, or lost, whatever they did there gets 0, though others of the
    group fared otherwise. The baseline knows nothing of the episode's own future, hence leaves the
    gradient unbiased, also where `states` tell less than was observed (`envs.base.MeetingEnv`). The
    grouping by state is that of GiGPO (arXiv 2505.10978), here leave-one-out and instead of the
    comparison of whole episodes.
    """
    if rewards.shape != (sum(lengths),) or len(states) != sum(lengths):
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and {len(states)} states: expected one for each of "
            f"{sum(lengths)} steps"
        )
    end = torch.zeros(len(states), dtype=torch.bool)
    end[torch.tensor(lengths).cumsum(0) - 1] = True
    to_go = discounted_returns(rewards, end, 1.0).tolist()
    episodes, start = [], 0  # per episode: state -> the return from its first visit
    totals: dict[Hashable, tuple[float, int]] = {}  # (group, state) -> sum of them, how many
    for length, group in zip(lengths, groups, strict=True):
        first: dict[Hashable, float] = {}
        for t in range(start, start + length):
            first.setdefault(states[t], to_go[t])
        for state, value in first.items():
            total, count = totals.get((group, state), (0.0, 0))
            totals[group, state] = total + value, count + 1
        episodes.append(first)
        start += length
    advantages, t = [], 0
    for first, length, group in zip(episodes, lengths, groups, strict=True):
        advantage = 0.0  # of an episode that nothing can be compared with
        for state in states[t : t + length]:
            total, count = totals[group, state]
            if count > 1:
                advantage = to_go[t] - (total - first[state]) / (count - 1)
            advantages.append(advantage)
            t += 1
    return torch.tensor(advantages, dtype=torch.promote_types(rewards.dtype, torch.float32))


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """The share of the returns' spread that the critic explains: 1 perfect, 0 a constant guess.

    NaN where all returns are equal: there was nothing to explain.
    """
    # 1 - Var(R - V) / Var(R)
    spread = returns.var(correction=0)
    share = 1.0 - (returns - values).var(correction=0) / spread
    return torch.where(spread > 0, share, torch.nan)


def _sum_backwards(x: Tensor, decay: Tensor) -> Tensor:
    """Solve y_t = x_t + decay_t * y_{t+1} along dimension 0, with y = 0 after the last step.

    By doubling: after k rounds y_t holds the first 2^k terms of its sum, and `decay` the factor
    that stands before the next one. log2(T) vector operations replace T scalar ones; no division,
    so an end (decay 0) is exact.
    """
    y, width = x.clone(), 1
    while width < len(y):
        # y_t <- y_t + decay_t * y_{t+width};   decay_t <- decay_t * decay_{t+width}
        # A NaN behind an end is not carried over it: 0 * NaN is one too.
        more = torch.where(decay[:-width] == 0, 0, decay[:-width] * y[width:])
        y = torch.cat([y[:-width] + more, y[-width:]])
        decay = torch.cat([decay[:-width] * decay[width:], torch.zeros_like(decay[-width:])])
        width *= 2
    return y
