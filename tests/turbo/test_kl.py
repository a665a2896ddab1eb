"""turbo/kl.py: the estimators against their definitions and against the exact KL."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo.kl import HIGHEST, LOWEST, auto_coefficient, kl_estimate, mean_over

logprobs = st.floats(-30, 0)


def test_estimators_by_hand():
    policy = torch.tensor([-1.0, -3.0, -2.0], dtype=torch.float64)
    teacher = torch.tensor([-3.0, -1.0, -2.0], dtype=torch.float64)  # d = 2, -2, 0
    table = {
        "clip": [2.0, 0.0, 0.0],
        "abs": [2.0, 2.0, 0.0],
        "k1": [2.0, -2.0, 0.0],
        "k3": [math.exp(-2) + 1, math.exp(2) - 3, 0.0],
    }
    for kind, expected in table.items():
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(kl_estimate(policy, teacher, kind), expected)
    assert torch.equal(kl_estimate(policy, teacher), kl_estimate(policy, teacher, "clip"))


@settings(max_examples=100, deadline=None)
@given(logprobs, logprobs)
def test_estimators_and_their_order(policy, teacher):
    policy, teacher = torch.tensor([policy]), torch.tensor([teacher])
    clip, magnitude, k1, k3 = (
        kl_estimate(policy, teacher, kind) for kind in ("clip", "abs", "k1", "k3")
    )
    assert clip >= 0
    assert k3 >= 0
    assert k1 <= clip <= magnitude
    assert torch.equal(clip + (clip - k1), magnitude)  # |d| = max(d, 0) + max(-d, 0)
    assert k3.isfinite()


@pytest.mark.parametrize("seed", range(5))
def test_k1_and_k3_are_unbiased(seed):
    """The expectation over the policy is exact: a sum over a vocabulary of 11."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, 11, generator=generator, dtype=torch.float64)
    policy, teacher = logits.log_softmax(-1)
    exact = (policy.exp() * (policy - teacher)).sum()
    mean = {
        kind: (policy.exp() * kl_estimate(policy, teacher, kind)).sum()
        for kind in ("clip", "abs", "k1", "k3")
    }
    torch.testing.assert_close(mean["k1"], exact)
    torch.testing.assert_close(mean["k3"], exact)
    assert mean["abs"] > mean["clip"] > exact


def test_k3_keeps_small_differences():
    """In fp32 exp(-d) - 1 + d cancels to 0 or worse; the series is d^2 / 2."""
    d = torch.tensor([1e-3])
    torch.testing.assert_close(kl_estimate(d, torch.zeros(1), "k3"), d**2 / 2, rtol=2e-3, atol=0)


def test_k3_stays_finite_in_fp32():
    assert kl_estimate(torch.tensor([-500.0]), torch.zeros(1), "k3").isfinite()


def test_an_unknown_estimate_is_refused():
    with pytest.raises(ValueError, match="'k2'"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k2")


def test_mean_over_is_by_step_and_masked():
    tokens = torch.tensor([1.0, 2.0, torch.nan, 4.0, 8.0], requires_grad=True)
    mask = torch.tensor([True, True, False, False, True])
    result = mean_over(tokens, mask, torch.tensor([0, 0, 0, 1, 2]), rows=4)
    assert result.tolist() == [1.5, 0.0, 8.0, 0.0]
    result.sum().backward()
    assert tokens.grad.tolist() == [0.5, 0.5, 0.0, 0.0, 1.0]


def test_the_coefficient_reaches_the_chosen_share():
    beta = auto_coefficient(size=0.02, spread=4.0, share=0.1)
    assert beta * 0.02 == pytest.approx(0.1 * 4.0)
    beta = 1.0
    for _ in range(30):
        beta = auto_coefficient(0.02, 4.0, 0.1, previous=beta)
    assert beta == pytest.approx(20.0)


def test_the_coefficient_moves_smoothly_and_in_logarithms():
    beta = auto_coefficient(0.01, 1.0, 1.0, previous=1.0)
    assert beta == pytest.approx(10.0)  # halfway from 1 to 100


def test_the_coefficient_falls_at_once():
    """A KL that has grown a thousandfold has its share at once, not some updates later."""
    before = auto_coefficient(0.001, 1.0, 0.3)
    assert before == pytest.approx(300.0)
    assert auto_coefficient(1.0, 1.0, 0.3, previous=before) == pytest.approx(0.3)


@pytest.mark.parametrize("mean_kl", [0.0, -1.0, math.nan, math.inf])
def test_without_a_measurement_the_coefficient_stays(mean_kl):
    assert auto_coefficient(mean_kl, 1.0, 0.1, previous=7.0) == pytest.approx(7.0)
    assert auto_coefficient(mean_kl, 1.0, 0.1) == pytest.approx(1.0)
    assert auto_coefficient(0.1, mean_kl, 0.1, previous=7.0) == pytest.approx(7.0)


anything = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=200, deadline=None)
@given(anything, anything, st.floats(1e-300, 1e300), anything | st.none())
def test_the_coefficient_is_always_within_its_bounds(kl, std, share, previous):
    assert LOWEST <= auto_coefficient(kl, std, share, previous) <= HIGHEST


def test_no_share_is_no_guidance():
    assert auto_coefficient(0.1, 1.0, share=0.0, previous=3.0) == 0.0


@pytest.mark.parametrize("share", [-1.0, math.inf, math.nan])
def test_a_wrong_share_is_refused(share):
    with pytest.raises(ValueError, match="share"):
        auto_coefficient(0.1, 1.0, share)
