"""A loss with its gradient formed beside it: that of `policy_head` and autograd, in one forming."""

import pytest
import torch
from devices import device_of
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import LiveBytes
from torch.utils.checkpoint import checkpoint

from turbo.kernels.policy_head import policy_head
from turbo.kernels.policy_head_loss import pieces, policy_head_loss
from turbo.kernels.policy_head_sums import Sides

LENGTHS = [3, 1, 0, 4, 2]
SIZES = {"all rows": 1 << 20, "some sequences": 5 * 23, "less than a sequence": 2 * 23}


def make(lengths=LENGTHS, width=6, vocabulary=23, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = sum(lengths)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return normal(rows, width), normal(vocabulary, width), targets, normal(rows, width)


def of_sequences(lengths):
    """PPO's ratio of each sequence, and a mean over all rows of the others."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    advantage = torch.linspace(-1.0, 2.0, len(lengths), dtype=torch.float64)

    def loss(out, some):
        mine = owner[(owner >= some.start) & (owner < some.stop)] - some.start
        mine = mine.to(out.logprob.device)
        count = some.stop - some.start
        logprob = out.logprob.new_zeros(count).index_add(0, mine, out.logprob)
        gain = (advantage[some].to(logprob) * (0.1 * logprob).exp()).sum()
        rest = out.reverse_kl - 0.3 * out.entropy + out.forward_kl.square()
        return rest.sum() / sum(lengths) - gain

    return loss


@pytest.mark.parametrize("impl", ["torch", "reference", "triton"])
@pytest.mark.parametrize("size", SIZES)
def test_loss_and_every_gradient_are_those_of_autograd(size, impl):
    dtype = torch.float32 if impl == "triton" else torch.float64
    device = device_of(impl)
    hidden, weight, targets, teacher = (x.to(device) for x in make(dtype=dtype))
    targets[1] = -100
    bias = torch.linspace(-1, 1, len(weight), dtype=dtype, device=device)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    options = dict(temperature=0.7, teacher_hidden=teacher, teacher_weight=weight.detach() + 0.1)
    loss = of_sequences(LENGTHS)
    out = policy_head(hidden, weight, targets, bias=bias, impl="reference", **options)
    wanted = loss(out, slice(0, len(LENGTHS)))
    got = policy_head_loss(
        hidden,
        weight,
        targets,
        loss,
        lengths=LENGTHS,
        bias=bias,
        impl=impl,
        piece_elements=SIZES[size],
        **options,
    )
    near = dict(rtol=1e-4, atol=1e-5) if impl == "triton" else {}
    torch.testing.assert_close(got.double(), wanted.double(), **near)
    exact = torch.autograd.grad(3 * wanted, leaves)
    for one, two in zip(torch.autograd.grad(3 * got, leaves), exact, strict=True):
        torch.testing.assert_close(one, two, **near)
    assert all(leaf.grad is None for leaf in leaves)


def test_gradcheck():
    hidden, weight, targets, teacher = make([2, 1], 3, 5)
    loss = of_sequences([2, 1])

    def value(hidden):
        options = dict(lengths=[2, 1], teacher_hidden=teacher, piece_elements=10)
        return policy_head_loss(hidden, weight, targets, loss, **options)

    assert torch.autograd.gradcheck(value, hidden.requires_grad_())


@pytest.mark.parametrize(
    ("size", "formed"),
    [("some sequences", [4, 4, 2]), ("less than a sequence", [3, 3, 1, 4, 4, 2])],
)
def test_logits_are_formed_once_but_of_a_sequence_that_is_too_long(size, formed, monkeypatch):
    rows = []
    logits = Sides.logits

    def counted(sides, part, options):
        if part.start == 0:
            rows.append(len(sides.hidden))
        return logits(sides, part, options)

    monkeypatch.setattr(Sides, "logits", counted)
    hidden, weight, targets, teacher = make()
    policy_head_loss(
        hidden.requires_grad_(),
        weight,
        targets,
        of_sequences(LENGTHS),
        lengths=LENGTHS,
        teacher_hidden=teacher,
        piece_elements=SIZES[size],
    )
    assert rows == formed


def test_only_one_piece_of_logits_exists_whatever_the_number_of_rows():
    vocabulary, width = 4096, 4
    peaks = []
    for rows in (16, 256):
        hidden, weight, targets, teacher = make([1] * rows, width, vocabulary, torch.float32)
        hidden.requires_grad_()
        with LiveBytes(hidden, weight, targets, teacher) as live:
            loss = policy_head_loss(
                hidden,
                weight,
                targets,
                lambda out, some: (out.logprob - out.reverse_kl).sum(),
                teacher_hidden=teacher,
                want=("logprob", "reverse_kl"),
                piece_elements=8 * vocabulary,
            )
            assert live.now <= 4 * (hidden.numel() + 64), "logits outlive their piece"
            loss.backward()
        peaks.append(live.peak)
    assert peaks[1] - peaks[0] <= 8 * 240 * (width + 8)  # [T, D] and numbers a row
    assert peaks[0] < 6 * 4 * 8 * vocabulary


def test_under_checkpointing_they_are_formed_anew():
    hidden, weight, targets, teacher = make()
    hidden.requires_grad_()
    options = dict(teacher_hidden=teacher)
    loss = of_sequences(LENGTHS)

    def whole(h):
        return loss(policy_head(h, weight, targets, **options), slice(0, len(LENGTHS)))

    def pieces(h):
        more = dict(lengths=LENGTHS, piece_elements=5 * 23)
        return policy_head_loss(h, weight, targets, loss, **more, **options)

    wanted = torch.autograd.grad(whole(hidden), hidden)
    for function in (whole, pieces):
        value = checkpoint(function, hidden, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(value, hidden), wanted)


def test_banned_entries_and_a_piece_without_a_target():
    hidden, weight, targets, teacher = make()
    banned = torch.zeros(len(weight), dtype=torch.bool)
    banned[::3] = True
    targets[:] = 1
    targets[4:8] = -100  # all of the fourth sequence
    hidden.requires_grad_()
    options = dict(teacher_hidden=teacher, banned=banned)
    loss = of_sequences(LENGTHS)
    out = policy_head(hidden, weight, targets, impl="reference", **options)
    (wanted,) = torch.autograd.grad(loss(out, slice(0, len(LENGTHS))), hidden)
    value = policy_head_loss(
        hidden, weight, targets, loss, lengths=LENGTHS, piece_elements=5 * 23, **options
    )
    torch.testing.assert_close(torch.autograd.grad(value, hidden)[0], wanted)
    assert (wanted[4:8] == 0).all() and wanted.abs().sum() > 0


def test_without_gradient_no_logits_are_kept():
    hidden, weight, targets, teacher = make([1] * 64, 4, 2048, torch.float32)
    with LiveBytes(hidden, weight, targets, teacher) as live, torch.no_grad():
        policy_head_loss(
            hidden,
            weight,
            targets,
            lambda out, some: out.reverse_kl.sum(),
            teacher_hidden=teacher,
            chunk_elements=64 * 128,
        )
    assert live.peak < 64 * 2048 * 4 / 2


def test_what_needs_no_gradient_gets_none():
    hidden, weight, targets, teacher = make()
    weight.requires_grad_()
    loss = of_sequences(LENGTHS)
    options = dict(lengths=LENGTHS, teacher_hidden=teacher, piece_elements=5 * 23)
    with torch.no_grad():
        free = policy_head_loss(hidden, weight, targets, loss, **options)
    assert not free.requires_grad
    frozen = weight.detach()
    assert not policy_head_loss(hidden, frozen, targets, loss, **options).requires_grad
    teacher.requires_grad_()
    policy_head_loss(hidden, weight, targets, loss, **options).backward()
    assert weight.grad is not None and hidden.grad is None and teacher.grad is None


def test_a_loss_without_outputs_is_a_constant_with_zero_gradient():
    hidden, weight, targets, _ = make()
    hidden.requires_grad_()
    value = policy_head_loss(hidden, weight, targets, lambda out, some: torch.tensor(2.0))
    value.backward()
    assert value == 2.0 and (hidden.grad == 0).all()
    none = policy_head_loss(hidden[:0], weight, targets[:0], lambda out, some: out.logprob.sum())
    assert none == 0.0 and none.requires_grad


def test_bf16_gradients_are_as_exact_as_those_of_all_rows_at_once():
    hidden, weight, targets, teacher = make([5] * 8, 16, 300, torch.bfloat16)
    loss = of_sequences([5] * 8)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    options = dict(teacher_hidden=teacher, teacher_weight=weight.detach())
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = policy_head(*exact, targets, teacher_hidden=teacher.double())
    wanted = torch.autograd.grad(3 * loss(truth, slice(0, 8)), exact)
    out = policy_head(hidden, weight, targets, **options)
    usual = torch.autograd.grad(3 * loss(out, slice(0, 8)), leaves)
    value = policy_head_loss(
        hidden, weight, targets, loss, lengths=[5] * 8, piece_elements=3000, **options
    )
    assert value.dtype == torch.float32
    for got, other, true in zip(torch.autograd.grad(3 * value, leaves), usual, wanted, strict=True):
        assert got.dtype == torch.bfloat16
        error, theirs = ((g.double() - true).norm() for g in (got, other))
        assert error <= 1.5 * theirs


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(0, 20))
def test_pieces_are_whole_sequences_in_order(lengths, rows):
    found = pieces(lengths, rows)
    assert [i for p in found for i in range(p.start, p.stop)] == list(range(len(lengths)))
    for piece in found:
        mine = lengths[piece]
        assert mine and (sum(mine) <= rows or sum(n > 0 for n in mine) == 1)


BAD = {
    "lengths: expected numbers of rows that add up to 10": {"lengths": [3, 3]},
    "lengths: expected": {"lengths": [11, -1]},
    "loss: expected a function that returns a scalar": {"loss": lambda out, some: out.logprob},
    "loss: expected a function": {"loss": lambda out, some: None},
    "targets": {"targets": torch.zeros(10)},
    "temperature": {"temperature": 0.0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    hidden, weight, targets, _ = make()
    good = dict(hidden=hidden, weight=weight, targets=targets)
    good["loss"] = lambda out, some: out.logprob.sum()
    with pytest.raises(ValueError, match=message):
        policy_head_loss(**good | BAD[message])
