"""turbo/gae.py against loops in fp64, and the ways in which episodes end."""

import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo.gae import (
    discounted_returns,
    explained_variance,
    gae,
    group_advantages,
    state_advantages,
)


def loop_gae(rewards, values, next_values, terminated, truncated, gamma, lam):
    """The definition, one step at a time, on Python floats."""
    advantages, following = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        if terminated[t] or truncated[t]:
            following = 0.0
        future = 0.0 if terminated[t] else next_values[t]
        following = rewards[t] + gamma * future - values[t] + gamma * lam * following
        advantages[t] = following
    return torch.tensor(advantages, dtype=torch.float64)


def random_steps(steps, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    rewards, values, next_values = torch.randn(3, steps, generator=generator, dtype=dtype)
    ending = torch.rand(steps, generator=generator)
    return rewards, values, next_values, ending < 0.15, (ending >= 0.15) & (ending < 0.3)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 70),
    seed=st.integers(0, 2**31),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
def test_gae_is_the_loop(steps, seed, gamma, lam):
    data = random_steps(steps, seed)
    result = gae(*data, gamma, lam)
    expected = loop_gae(*(x.tolist() for x in data), gamma, lam)
    torch.testing.assert_close(result.advantages, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.returns, expected + data[1], rtol=1e-12, atol=1e-12)


def test_a_grid_of_environments_is_each_of_its_columns():
    columns = [random_steps(33, seed) for seed in range(4)]
    grid = [torch.stack(parts, dim=1) for parts in zip(*columns, strict=True)]  # [T, E]
    result = gae(*grid, 0.9, 0.95)
    for e, column in enumerate(columns):
        alone = gae(*column, 0.9, 0.95)
        assert torch.equal(result.advantages[:, e], alone.advantages)
        assert torch.equal(result.returns[:, e], alone.returns)


def test_episodes_laid_end_to_end_are_each_episode_alone():
    first, second = random_steps(7, 1), random_steps(5, 2)
    for episode in (first, second):
        episode[3][:], episode[4][:] = False, False
        episode[4][-1] = True
    together = gae(*(torch.cat(parts) for parts in zip(first, second, strict=True)), 0.9, 0.95)
    apart = [gae(*episode, 0.9, 0.95).advantages for episode in (first, second)]
    torch.testing.assert_close(together.advantages, torch.cat(apart), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("ending", ["terminated", "truncated"])
def test_nothing_crosses_a_reset(ending):
    """The public implementation masks before truncation, so values bootstrap across a reset."""
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    values = torch.tensor([0.5, 0.25, 100.0, 200.0], dtype=torch.float64)
    next_values = torch.tensor([0.25, 7.0, 200.0, 0.0], dtype=torch.float64)
    end = torch.tensor([False, True, False, True])
    never = torch.zeros(4, dtype=torch.bool)
    flags = (end, never) if ending == "terminated" else (never, end)
    before = gae(rewards, values, next_values, *flags, 0.9, 0.95).advantages

    last = 2.0 - 0.25 + (0.9 * 7.0 if ending == "truncated" else 0.0)
    first = 1.0 + 0.9 * 0.25 - 0.5 + 0.9 * 0.95 * last
    torch.testing.assert_close(before[:2], torch.tensor([first, last], dtype=torch.float64))

    # Whatever the next episode brings, the first one does not notice.
    rewards[2:], values[2:], next_values[2:] = -1e6, 1e6, -1e6
    after = gae(rewards, values, next_values, *flags, 0.9, 0.95).advantages
    assert torch.equal(before[:2], after[:2])


def test_a_nan_stays_in_its_episode():
    rewards = torch.rand(7, generator=torch.Generator().manual_seed(0))
    end = torch.tensor([False, True, False, False, True, False, True])
    never = torch.zeros(7, dtype=torch.bool)
    values = torch.zeros(7)
    whole = gae(rewards, values, values, end, never, 0.9, 0.95).advantages
    to_go = discounted_returns(rewards, end, 0.9)
    rewards[3] = torch.nan
    for wanted, got in (
        (whole, gae(rewards, values, values, end, never, 0.9, 0.95).advantages),
        (to_go, discounted_returns(rewards, end, 0.9)),
    ):
        assert got.isnan().tolist() == [False, False, True, True, False, False, False]
        others = ~got.isnan()
        assert torch.equal(got[others], wanted[others])


def test_the_next_value_of_a_terminated_step_is_never_read():
    rewards, values = torch.ones(2), torch.zeros(2)
    next_values = torch.tensor([0.0, torch.nan])
    end = torch.tensor([False, True])
    result = gae(rewards, values, next_values, end, torch.zeros_like(end), 1.0, 1.0)
    assert result.advantages.tolist() == [2.0, 1.0]


def test_lambda_one_is_the_monte_carlo_return():
    rewards, values, _, terminated, _ = random_steps(40, 3)
    next_values = torch.cat([values[1:], values.new_zeros(1)])
    terminated[-1] = True
    result = gae(
        rewards, values, next_values, terminated, torch.zeros_like(terminated), gamma=0.9, lam=1.0
    )
    torch.testing.assert_close(result.returns, discounted_returns(rewards, terminated, 0.9))


def test_discounted_returns_by_hand():
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0])
    end = torch.tensor([False, True, False, True])
    assert discounted_returns(rewards, end, 0.5).tolist() == [2.0, 2.0, 8.0, 8.0]


def test_five_thousand_steps_in_a_blink():
    data = random_steps(5000, 0, torch.float32)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        gae(*data, 0.9, 0.95)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.02


def test_low_precision_is_computed_and_returned_in_fp32_at_least():
    data = random_steps(9, 0, torch.bfloat16)
    assert gae(*data, 0.9, 0.95).advantages.dtype == torch.float32


def test_shapes_must_agree():
    data = list(random_steps(4, 0))
    data[2] = data[2][:3]
    with pytest.raises(ValueError, match="next_values has shape"):
        gae(*data, 0.9, 0.95)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-50, 50)), min_size=1, max_size=30))
def test_group_advantages_are_the_loop(episodes):
    group = torch.tensor([g for g, _ in episodes])
    returns = torch.tensor([float(r) for _, r in episodes], dtype=torch.float64)
    loo, mean = [], []
    for i, (g, r) in enumerate(episodes):
        others = [s for j, (h, s) in enumerate(episodes) if h == g and j != i]
        loo.append(r - sum(others) / len(others) if others else 0.0)
        mean.append(r - (sum(others) + r) / (len(others) + 1))
    for baseline, expected in (("loo", loo), ("mean", mean)):
        result = group_advantages(returns, group, baseline)
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-11)


def test_a_group_of_one_has_no_advantage():
    result = group_advantages(torch.tensor([5.0, 1.0, 3.0]), torch.tensor([9, 2, 2]))
    assert result.tolist() == [0.0, -2.0, 2.0]


def test_an_unknown_baseline_is_refused():
    with pytest.raises(ValueError, match="'median'"):
        group_advantages(torch.ones(2), torch.zeros(2, dtype=torch.int64), "median")


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.full((3,), 5.0), returns).item() == pytest.approx(0.0, abs=1e-6)
    assert explained_variance(returns, torch.ones(3)).isnan()


def brute_force_state_advantages(rewards, lengths, groups, states):
    starts = [sum(lengths[:i]) for i in range(len(lengths))]

    def first_return(i, state):
        steps = range(starts[i], starts[i] + lengths[i])
        at = next((t for t in steps if states[t] == state), None)
        return None if at is None else sum(rewards[at : starts[i] + lengths[i]])

    out = []
    for i, length in enumerate(lengths):
        for t in range(starts[i], starts[i] + length):
            advantage = 0.0
            for u in range(starts[i], t + 1):  # the last state up to here that others have seen
                returns = [
                    first_return(j, states[u])
                    for j in range(len(lengths))
                    if j != i and groups[j] == groups[i]
                ]
                returns = [r for r in returns if r is not None]
                if returns:
                    own = sum(rewards[u : starts[i] + length])
                    advantage = own - sum(returns) / len(returns)
            out.append(advantage)
    return out


@given(st.integers(0, 10_000))
def test_state_advantages_equal_brute_force(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 5) for _ in range(draw.randint(1, 7))]
    groups = [draw.randint(0, 1) for _ in lengths]
    count = sum(lengths)
    states = [draw.choice("abc") for _ in range(count)]
    rewards = [float(draw.randint(-1, 3)) for _ in range(count)]
    got = state_advantages(torch.tensor(rewards), lengths, groups, states)
    expected = brute_force_state_advantages(rewards, lengths, groups, states)
    torch.testing.assert_close(got, torch.tensor(expected))


def test_state_advantages_credit_the_step_that_decided():
    # One group begins at s. Two go by a and win, one goes by b and loses, one goes by c alone.
    states = ["s", "a", "s", "a", "s", "b", "s", "c"]
    rewards = torch.tensor([0.0, 10, 0, 10, 0, 0, 0, 10])
    got = state_advantages(rewards, [2] * 4, [0] * 4, states)
    by_episode = [10 - 20 / 3, 10 - 20 / 3, -10.0, 10 - 20 / 3]
    expected = [by_episode[0], 0.0, by_episode[1], 0.0, -10.0, -10.0, by_episode[3], by_episode[3]]
    torch.testing.assert_close(got, torch.tensor(expected))
    apart = state_advantages(rewards, [2] * 4, [0, 1, 2, 3], states)
    assert apart.eq(0).all()
    with pytest.raises(ValueError, match="expected one for each of 8 steps"):
        state_advantages(rewards[:3], [2] * 4, [0] * 4, states)
