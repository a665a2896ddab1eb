"""The teacher: changes at every push, full strength, streaming equal to batch, exact resume."""

import itertools

import pytest
import torch

from turbo.history import History
from turbo.merging import StreamingTeacher, merge_teacher

SHAPES = {"layer.q": (24, 40), "layer.up": (70, 24)}


def make_factors(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(4, columns, generator=generator, dtype=dtype),
            torch.randn(rows, 4, generator=generator, dtype=dtype),
        )
        for name, (rows, columns) in SHAPES.items()
    }


def make_base(dtype=torch.float32):
    generator = torch.Generator().manual_seed(99)
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()
    }


def close(one, two, **tolerance):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], **tolerance)


@pytest.mark.parametrize("method", ["ties", "linear"])
@pytest.mark.parametrize("weighting", ["sma", "ema", "score"])
def test_the_teacher_changes_at_every_push_and_leaves_the_base_alone(method, weighting):
    base, history, seen = make_base(), History(), []
    for k in range(5):
        history.push(k, make_factors(k), 2.0, score=0.5)
        seen.append(merge_teacher(base, history, method=method, weighting=weighting))
    for one, two in itertools.pairwise(seen):
        assert all(not torch.equal(one[name], two[name]) for name in base)
    close(base, make_base(), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["ties", "linear"])
@pytest.mark.parametrize("count", [1, 4])
def test_identical_checkpoints_give_that_checkpoint_at_full_strength(method, count):
    base, history, factors = make_base(), History(density=1.0), make_factors(0)
    for k in range(count):
        history.push(k, factors, 2.0, score=1.0 + k)
    expected = {name: base[name] + 2.0 * (b @ a) for name, (a, b) in factors.items()}
    for weighting in ("sma", "ema", "score"):
        got = merge_teacher(base, history, method=method, weighting=weighting)
        close(got, expected, rtol=1e-4, atol=1e-4)


def test_linear_ema_is_the_recursion_on_whole_models():
    base, history, theta = make_base(torch.float64), History(), []
    for k in range(4):
        factors = make_factors(k, torch.float64)
        history.push(k, factors, 2.0)
        theta.append({name: base[name] + 2.0 * (b @ a) for name, (a, b) in factors.items()})
    merged = theta[0]
    for newer in theta[1:]:
        merged = {name: 0.3 * newer[name] + 0.7 * merged[name] for name in merged}
    close(merge_teacher(base, history, method="linear", weighting="ema", alpha=0.3), merged)


def test_bf16_base_gives_bf16_teacher():
    base, history = make_base(torch.bfloat16), History()
    history.push(0, make_factors(0, torch.bfloat16), 2.0)
    got = merge_teacher(base, history)
    assert all(matrix.dtype == torch.bfloat16 for matrix in got.values())


@pytest.mark.parametrize("method", ["ties", "linear"])
@pytest.mark.parametrize("weighting", ["sma", "ema"])
def test_streaming_equals_the_batch_merge_at_every_push(method, weighting):
    base, history = make_base(torch.float64), History(density=0.7)
    options = {"method": method, "weighting": weighting, "alpha": 0.4}
    teacher = StreamingTeacher(base, density=0.7, **options)
    for k in range(6):
        factors = make_factors(k, torch.float64)
        history.push(k, factors, 2.0)
        teacher.push(factors, 2.0)
        close(teacher.weights(), merge_teacher(base, history, **options))


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_streaming_resumes_with_the_same_bits(method):
    base = make_base()
    whole = StreamingTeacher(base, method=method, weighting="ema")
    for k in range(3):
        whole.push(make_factors(k), 2.0)
    resumed = StreamingTeacher(base, method=method, weighting="ema")
    resumed.load_state_dict({key: value.clone() for key, value in whole.state_dict().items()})
    for teacher in (whole, resumed):
        teacher.push(make_factors(3), 2.0)
    close(whole.weights(), resumed.weights(), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_factors_are_looked_at_when_they_enter_and_not_again(method, monkeypatch):
    base, looked = make_base(), []
    monkeypatch.setattr("turbo.kernels.checks.check_finite", lambda tensors: looked.append(tensors))
    history, streaming = History(), StreamingTeacher(base, method=method)
    history.push(0, make_factors(0), 2.0)
    streaming.push(make_factors(0), 2.0)
    merge_teacher(base, history, method=method)
    assert not looked  # history.py holds its own name for it: nothing below it has looked
    monkeypatch.undo()
    broken = make_factors(1)
    broken["layer.up"][0][0, 0] = torch.nan
    for push in (lambda: history.push(1, broken, 2.0), lambda: streaming.push(broken, 2.0)):
        with pytest.raises(ValueError, match=r"layer\.up\.lora_a: expected finite"):
            push()
    close(streaming.weights(), merge_teacher(base, history, method=method))


def test_errors():
    base, history = make_base(), History()
    with pytest.raises(ValueError, match="empty history"):
        merge_teacher(base, history)
    with pytest.raises(ValueError, match="nothing was pushed"):
        StreamingTeacher(base).weights()
    history.push(0, make_factors(0), 2.0)
    with pytest.raises(ValueError, match="method"):
        merge_teacher(base, history, method="svd")
    with pytest.raises(ValueError, match="mode"):
        merge_teacher(base, history, weighting="median")
    with pytest.raises(ValueError, match="weighting"):
        StreamingTeacher(base, weighting="score")
    with pytest.raises(ValueError, match=r"layer\.up"):
        merge_teacher({"layer.q": base["layer.q"]}, history)
    with pytest.raises(ValueError, match="density"):
        StreamingTeacher(base, density=2.0)
    untrimmed = History(density=None)
    untrimmed.push(0, make_factors(0), 2.0)
    with pytest.raises(ValueError, match="density"):
        merge_teacher(base, untrimmed)
    merge_teacher(base, untrimmed, method="linear")
