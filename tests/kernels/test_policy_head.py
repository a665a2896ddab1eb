"""The policy head: eager and chunked paths against the fp64 reference, all gradients, errors."""

import math

import pytest
import torch

from turbo.kernels.policy_head import OUTPUTS, policy_head
from turbo.kernels.reference import policy_head_reference

PATHS = {"kept": None, "one entry a part": 1, "parts of six": 6 * 11, "one part": 1 << 20}


def make(rows=11, width=6, vocabulary=23, dtype=torch.float64, seed=0, ignored=True):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    targets = torch.randint(vocabulary, (rows,), generator=generator)
    if ignored:
        targets[::4] = -100
    banned = torch.zeros(vocabulary, dtype=torch.bool)
    banned[1::5] = True
    hidden, weight = normal(rows, width), normal(vocabulary, width)
    teacher, teacher_weight = normal(rows, width + 2), normal(vocabulary, width + 2)
    return hidden, weight, targets, teacher, teacher_weight, normal(vocabulary), banned


def gradients(outputs, leaves):
    """Gradients of a sum that gives every row of every output its own coefficient."""
    loss = 0.0
    for i, name in enumerate(OUTPUTS):
        value = vars(outputs)[name]
        if value is not None and value.requires_grad:
            coefficients = torch.linspace(0.5, 1.5 + i, value.numel(), dtype=value.dtype)
            # a banned target has log-probability -inf, whose gradient is finite all the same
            loss = loss + (coefficients * value.masked_fill(value.isinf(), 0.0)).sum()
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("with_ban", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_values_and_all_gradients_match_the_reference(path, with_ban, ignored):
    hidden, weight, targets, teacher, teacher_weight, bias, banned = make(ignored=ignored)
    banned = banned if with_ban else None
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    got = policy_head(
        hidden,
        weight,
        targets,
        temperature=0.6,
        teacher_hidden=teacher,
        teacher_weight=teacher_weight,
        bias=bias,
        banned=banned,
        chunk_elements=PATHS[path],
    )
    expected = policy_head_reference(
        hidden, weight, targets, 0.6, teacher, teacher_weight, bias, banned
    )
    for name in OUTPUTS:
        torch.testing.assert_close(vars(got)[name], vars(expected)[name], msg=name)
    for one, two in zip(gradients(got, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("with_ban", [False, True])
def test_gradcheck_of_the_chunked_function(with_ban):
    hidden, weight, targets, teacher, teacher_weight, bias, banned = make(5, 3, 7)
    banned = banned if with_ban else None
    targets[targets == 1] = 2
    targets[targets == 6] = 5

    def divergences(hidden):
        out = policy_head(
            hidden,
            weight,
            targets,
            temperature=0.7,
            teacher_hidden=teacher,
            teacher_weight=teacher_weight,
            bias=bias,
            banned=banned,
            chunk_elements=14,
        )
        return out.logprob, out.entropy, out.reverse_kl, out.forward_kl

    def own_outputs(hidden, weight, bias):
        out = policy_head(hidden, weight, targets, bias=bias, banned=banned, chunk_elements=14)
        return out.logprob, out.entropy

    assert torch.autograd.gradcheck(divergences, [hidden.clone().requires_grad_()])
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(own_outputs, leaves)


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("path", PATHS)
def test_each_output_alone(path, name):
    hidden, weight, targets, teacher, teacher_weight, *_ = make()
    hidden.requires_grad_()
    teach = {"teacher_hidden": teacher, "teacher_weight": teacher_weight}
    got = policy_head(hidden, weight, targets, want=(name,), chunk_elements=PATHS[path], **teach)
    full = policy_head(hidden, weight, targets, impl="reference", **teach)
    torch.testing.assert_close(vars(got)[name], vars(full)[name])
    assert [key for key, value in vars(got).items() if value is not None] == [name]
    if name == "teacher_logprob":
        assert not got.teacher_logprob.requires_grad
        return
    (one,) = torch.autograd.grad(vars(got)[name].sum(), hidden)
    (two,) = torch.autograd.grad(vars(full)[name].sum(), hidden)
    torch.testing.assert_close(one, two)


def test_an_unused_output_does_not_disturb_the_gradient():
    hidden, weight, targets, *_ = make()
    hidden.requires_grad_()
    both = policy_head(hidden, weight, targets, chunk_elements=50)
    alone = policy_head(hidden, weight, targets, want=("logprob",), chunk_elements=50)
    (one,) = torch.autograd.grad(both.logprob.sum(), hidden)
    (two,) = torch.autograd.grad(alone.logprob.sum(), hidden)
    assert torch.equal(one, two)


@pytest.mark.parametrize("chunk_elements", [None, 40])
def test_frozen_weight_and_teacher_get_no_gradient(chunk_elements):
    hidden, weight, targets, teacher, teacher_weight, *_ = make()
    for leaf in (hidden, teacher, teacher_weight):
        leaf.requires_grad_()
    out = policy_head(
        hidden,
        weight,
        targets,
        teacher_hidden=teacher,
        teacher_weight=teacher_weight,
        chunk_elements=chunk_elements,
    )
    (out.reverse_kl.sum() + out.forward_kl.sum() + out.logprob.sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is None and teacher.grad is None and teacher_weight.grad is None


@pytest.mark.parametrize("chunk_elements", [None, 40])
def test_ignored_rows_are_zero_and_not_even_read(chunk_elements):
    hidden, weight, targets, teacher, teacher_weight, *_ = make()
    hidden[targets == -100] = float("nan")
    hidden.requires_grad_()
    teach = {"teacher_hidden": teacher, "teacher_weight": teacher_weight}
    out = policy_head(hidden, weight, targets, chunk_elements=chunk_elements, **teach)
    assert all((value[targets == -100] == 0).all() for value in vars(out).values())
    out.reverse_kl.sum().backward()
    assert (hidden.grad[targets == -100] == 0).all() and hidden.grad.isfinite().all()
    none = policy_head(hidden, weight, torch.full_like(targets, -100), chunk_elements=40, **teach)
    assert all(torch.equal(value, torch.zeros_like(value)) for value in vars(none).values())


@pytest.mark.parametrize("chunk_elements", [None, 40])
def test_banned_targets_have_probability_zero_and_finite_gradients(chunk_elements):
    hidden, weight, targets, *_, banned = make(ignored=False)
    targets[:] = 1
    hidden.requires_grad_()
    out = policy_head(hidden, weight, targets, banned=banned, chunk_elements=chunk_elements)
    assert (out.logprob == -math.inf).all() and out.entropy.isfinite().all()
    out.entropy.sum().backward()
    assert hidden.grad.isfinite().all()


def test_the_same_side_twice_has_no_divergence():
    hidden, weight, targets, *_ = make()
    out = policy_head(hidden, weight, targets, teacher_hidden=hidden, temperature=0.2)
    zero = torch.zeros_like(out.reverse_kl)
    torch.testing.assert_close(out.reverse_kl, zero)
    torch.testing.assert_close(out.forward_kl, zero)
    assert torch.equal(out.logprob, out.teacher_logprob)


@pytest.mark.parametrize("rows, width, vocabulary", [(1, 1, 1), (1, 5, 507), (127, 7, 33)])
def test_odd_shapes_in_fp32(rows, width, vocabulary):
    hidden, weight, targets, *_ = make(rows, width, vocabulary, torch.float32, ignored=False)
    hidden.requires_grad_()
    teacher = hidden.detach().flip(0)
    got = policy_head(hidden, weight, targets, teacher_hidden=teacher, chunk_elements=100)
    expected = policy_head(hidden, weight, targets, teacher_hidden=teacher, impl="reference")
    for name in OUTPUTS:
        want = vars(expected)[name].float()
        torch.testing.assert_close(vars(got)[name], want, rtol=1e-4, atol=1e-5)
    (one,), (two,) = gradients(got, [hidden]), gradients(expected, [hidden])
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk_elements", [None, 100])
def test_bf16_inputs_give_fp32_outputs_as_exact_as_eager_bf16(chunk_elements):
    hidden, weight, targets, *_ = make(33, 16, 50, torch.bfloat16, ignored=False)
    teacher = (hidden + 0.1).bfloat16()
    got = policy_head(
        hidden, weight, targets, teacher_hidden=teacher, chunk_elements=chunk_elements
    )
    expected = policy_head(hidden, weight, targets, teacher_hidden=teacher, impl="reference")
    assert got.logprob.dtype == torch.float32
    eager = (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    error = (got.logprob - expected.logprob).abs().max()
    assert error <= (eager - expected.logprob).abs().max() + 1e-6


def test_no_tensor_of_the_full_logits_size_is_kept():
    hidden, weight, targets, *_ = make(64, 8, 100, torch.float32)
    hidden.requires_grad_()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        policy_head(hidden, weight, targets, teacher_hidden=hidden.detach(), chunk_elements=500)
    assert max(sizes) < 64 * 100 / 2


def test_runs_repeat_bit_for_bit():
    hidden, weight, targets, *_ = make()
    one = policy_head(hidden, weight, targets, chunk_elements=60)
    two = policy_head(hidden, weight, targets, chunk_elements=60)
    assert torch.equal(one.logprob, two.logprob) and torch.equal(one.entropy, two.entropy)


HIDDEN, WEIGHT, TARGETS = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
BAD = {
    "temperature": {"temperature": 0.0},
    "hidden": {"hidden": torch.zeros(3)},
    "weight": {"weight": torch.zeros(5, 6)},
    "weight: expected": {"weight": torch.zeros(5, 4).double()},
    "targets": {"targets": torch.zeros(2, dtype=torch.int64)},
    "targets: expected": {"targets": torch.zeros(3)},
    "targets: expected -100 or 0..4": {"targets": torch.tensor([0, 5, -1])},
    "bias": {"bias": torch.zeros(4)},
    "banned": {"banned": torch.zeros(5)},
    "banned: expected at least one": {"banned": torch.ones(5, dtype=torch.bool)},
    "teacher_hidden": {"teacher_hidden": torch.zeros(2, 4)},
    "teacher_weight": {"teacher_hidden": HIDDEN, "teacher_weight": torch.zeros(6, 4)},
    "teacher_hidden: expected a tensor": {"want": ("reverse_kl",)},
    "want": {"want": ("perplexity",)},
    "impl": {"impl": "cuda"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    good = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS}
    with pytest.raises(ValueError, match=message):
        policy_head(**good | BAD[message])
