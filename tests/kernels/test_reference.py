"""The reference itself: hand-computed values, limits, and gradcheck in fp64."""

import math

import pytest
import torch

from turbo.kernels import reference as ref


def test_trim_keeps_the_largest_and_everything_tied_with_the_last_of_them():
    tau = torch.tensor([3.0, -1.0, 2.0, -2.0, 0.5])
    assert ref.trim_threshold_reference(tau, 0.4) == 2.0
    torch.testing.assert_close(ref.trim(tau, 0.4), torch.tensor([3.0, 0.0, 2.0, -2.0, 0.0]))


def test_density_zero_keeps_nothing_and_one_keeps_all():
    tau = torch.tensor([3.0, 0.0, -1.0])
    assert ref.trim_threshold_reference(tau, 0.0) == math.inf
    assert torch.equal(ref.trim(tau, 0.0), torch.zeros(3))
    assert torch.equal(ref.trim(tau, 1.0), tau)


def test_elect_sign_and_disjoint_merge_by_hand():
    tau = torch.tensor([[1.0, 1.0, 2.0, 0.0], [-3.0, 3.0, -1.0, 0.0]])
    weights = torch.tensor([1.0, 2.0])
    sign = ref.elect_sign(tau, weights)
    assert sign.tolist() == [-1.0, 1.0, 0.0, 0.0]
    merged = ref.disjoint_merge(tau, weights, sign)
    torch.testing.assert_close(merged, torch.tensor([-3.0, 7 / 3, 0.0, 0.0]))


def test_linear_merge_is_the_weighted_mean():
    base, one, two = torch.randn(3, 4, 5, dtype=torch.float64)
    got = ref.linear_merge_reference(base, [one, two], [1.0, 3.0], lam=0.5)
    torch.testing.assert_close(got, base + 0.5 * (one / 4 + 3 * two / 4))


def make_head(rows=5, width=4, vocabulary=7):
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    hidden, teacher = torch.randn(2, rows, width, **double)
    weight = torch.randn(vocabulary, width, **double)
    bias = torch.randn(vocabulary, **double)
    targets = torch.tensor([0, 3, -100, 6, 2])
    banned = torch.zeros(vocabulary, dtype=torch.bool)
    banned[[1, 4]] = True
    return hidden, weight, targets, teacher, bias, banned


def test_policy_head_matches_torch_distributions():
    hidden, weight, targets, teacher, bias, _ = make_head()
    out = ref.policy_head_reference(hidden, weight, targets, 0.7, teacher, None, bias)
    p = torch.distributions.Categorical(logits=(hidden @ weight.T + bias) / 0.7)
    q = torch.distributions.Categorical(logits=(teacher @ weight.T + bias) / 0.7)
    kl = torch.distributions.kl_divergence
    rows = targets != -100
    torch.testing.assert_close(out.logprob[rows], p.log_prob(targets.clamp(min=0))[rows])
    torch.testing.assert_close(out.teacher_logprob[rows], q.log_prob(targets.clamp(min=0))[rows])
    torch.testing.assert_close(out.entropy[rows], p.entropy()[rows])
    torch.testing.assert_close(out.reverse_kl[rows], kl(p, q)[rows])
    torch.testing.assert_close(out.forward_kl[rows], kl(q, p)[rows])
    assert all(value[2] == 0 for value in vars(out).values())


def test_banned_entries_are_as_if_the_vocabulary_lacked_them():
    hidden, weight, targets, teacher, bias, banned = make_head()
    full = ref.policy_head_reference(hidden, weight, targets, 1.0, teacher, None, bias, banned)
    new_index = (~banned).cumsum(0) - 1
    fewer = torch.where(targets == -100, targets, new_index[targets.clamp(min=0)])
    small = ref.policy_head_reference(
        hidden, weight[~banned], fewer, 1.0, teacher, None, bias[~banned]
    )
    for name, value in vars(small).items():
        torch.testing.assert_close(vars(full)[name], value)


@pytest.mark.parametrize("with_ban", [False, True])
def test_gradcheck(with_ban):
    hidden, weight, targets, teacher, bias, banned = make_head()
    banned = banned if with_ban else None

    def own_outputs(hidden, weight, bias):
        out = ref.policy_head_reference(hidden, weight, targets, 0.7, bias=bias, banned=banned)
        return out.logprob, out.entropy

    def divergences(hidden):  # weight and bias stay constant: the teacher reads their values too
        out = ref.policy_head_reference(
            hidden, weight, targets, 0.7, teacher, bias=bias, banned=banned
        )
        return out.reverse_kl, out.forward_kl

    assert torch.autograd.gradcheck(divergences, [hidden.clone().requires_grad_()])
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(own_outputs, leaves)


def test_the_teacher_side_gets_no_gradient():
    hidden, weight, targets, teacher, bias, _ = make_head()
    teacher.requires_grad_()
    hidden.requires_grad_()
    out = ref.policy_head_reference(hidden, weight, targets, 1.0, teacher, bias=bias)
    (out.reverse_kl.sum() + out.forward_kl.sum() + out.teacher_logprob.sum()).backward()
    assert teacher.grad is None and hidden.grad is not None
