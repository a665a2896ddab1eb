"""turbo/ppo.py against tables worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo.ppo import ppo_loss, step_logprob, value_loss


def test_step_logprob_weighs_the_thoughts():
    token = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0])
    thought = torch.tensor([True, True, False, True, False])
    row = torch.tensor([0, 0, 0, 2, 2])
    result = step_logprob(token, thought, row, rows=3, thought_coef=0.5)
    assert result.tolist() == [0.5 * -3.0 - 4.0, 0.0, 0.5 * -8.0 - 16.0]


@pytest.mark.parametrize(("coef", "expected"), [(0.0, -4.0), (0.2, -4.6), (1.0, -7.0)])
def test_step_logprob_coefficient(coef, expected):
    token, thought = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([True, True, False])
    result = step_logprob(token, thought, torch.zeros(3, dtype=torch.int64), 1, coef)
    torch.testing.assert_close(result, torch.tensor([expected]))


def test_step_logprob_gradient_is_the_coefficient():
    token = torch.zeros(3, requires_grad=True)
    thought = torch.tensor([True, True, False])
    step_logprob(token, thought, torch.tensor([0, 1, 1]), 2, 0.2).sum().backward()
    torch.testing.assert_close(token.grad, torch.tensor([0.2, 0.2, 1.0]))


def test_equal_logprobs_give_ratio_one_and_the_plain_policy_gradient():
    logprob = torch.tensor([-3.0, -50.0, -0.1], requires_grad=True)
    advantage = torch.tensor([1.0, -2.0, 4.0])
    result = ppo_loss(logprob, logprob.detach(), advantage, clip=0.1)
    assert result.ratio.tolist() == [1.0, 1.0, 1.0]
    assert result.clip_fraction == 0.0
    assert result.approx_kl == 0.0
    assert result.loss.item() == pytest.approx(-1.0)
    result.loss.backward()
    torch.testing.assert_close(logprob.grad, -advantage / 3)


# ratio, advantage, what the step contributes to the objective, whether it still has a gradient.
CLIP_TABLE = [
    (1.00, 2.0, 2.0, True),
    (1.05, 2.0, 2.1, True),  # inside
    (1.50, 2.0, 2.2, False),  # already likelier: no further
    (0.50, 2.0, 1.0, True),  # became unlikelier by mistake: pulled back
    (0.95, -2.0, -1.9, True),  # inside
    (0.50, -2.0, -1.8, False),  # already unlikelier: no further
    (1.50, -2.0, -3.0, True),  # became likelier by mistake: pulled back
]


@pytest.mark.parametrize(("ratio", "advantage", "objective", "has_gradient"), CLIP_TABLE)
def test_clipping_table(ratio, advantage, objective, has_gradient):
    logprob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(1, dtype=torch.float64)
    result = ppo_loss(logprob, old, torch.tensor([advantage], dtype=torch.float64), clip=0.1)
    assert result.loss.item() == pytest.approx(-objective)
    assert result.clip_fraction.item() == float(abs(ratio - 1.0) > 0.1)
    result.loss.backward()
    expected = -ratio * advantage if has_gradient else 0.0
    assert logprob.grad.item() == pytest.approx(expected)


def test_approx_kl_is_the_kl_in_expectation_over_the_old_policy():
    old = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    new = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    exact = (old * (old / new).log()).sum()
    one = torch.ones(1, dtype=torch.float64)
    estimates = [
        ppo_loss(n.log()[None], o.log()[None], one, 0.1) for o, n in zip(old, new, strict=True)
    ]
    mean = sum(o * e.approx_kl for o, e in zip(old, estimates, strict=True))
    torch.testing.assert_close(mean, exact)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-2000, 0), st.floats(-2000, 0), st.floats(-100, 100)),
        min_size=1,
        max_size=8,
    )
)
def test_the_loss_and_its_gradient_are_always_finite(steps):
    logprob, old, advantage = (torch.tensor(column) for column in zip(*steps, strict=True))
    logprob.requires_grad_()
    result = ppo_loss(logprob, old, advantage, clip=0.2)
    result.loss.backward()
    assert result.loss.isfinite()
    assert result.approx_kl >= 0.0
    assert 0.0 <= result.clip_fraction <= 1.0
    assert logprob.grad.isfinite().all()


def test_no_gradient_reaches_the_old_policy_or_the_advantage():
    logprob, old, advantage = (torch.ones(2, requires_grad=True) for _ in range(3))
    result = ppo_loss(logprob, old, advantage, clip=0.2)
    result.loss.backward()
    assert old.grad is None
    assert advantage.grad is None
    assert not result.ratio.requires_grad


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one entry for each step"):
        ppo_loss(torch.ones(2), torch.ones(2), torch.ones(2, 2), clip=0.1)


def test_value_loss_by_hand():
    values, returns = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 5.0])
    assert value_loss(values, returns).item() == pytest.approx(0.5 * (1.0 + 4.0) / 2)
