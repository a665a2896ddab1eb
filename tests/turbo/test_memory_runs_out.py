"""Out of memory: a phase goes on in smaller micro-batches, gives the same result, and remembers.

An allocator that gives up beyond some number of rows is put in the place of the forward pass.
"""

import pytest
import tiny_models
import torch

from turbo.backprop import backward_rows
from turbo.batch import BatchSizes, fits, run_batches
from turbo.fused import FusedText
from turbo.parallel import Crew
from turbo.score import read_answers, teacher_kl
from turbo.update import Learner, StepData, old_logprobs


@pytest.fixture
def small(fitted, monkeypatch):
    """Let passes of more than `limit[0]` rows run out of memory, some of them half done."""
    monkeypatch.setattr(fitted, "batches", BatchSizes())
    limit, own, calls = [10**9], FusedText.forward, []

    def forward(self, w, x, *rest):
        calls.append(len(x))
        if len(x) <= limit[0]:
            return own(self, w, x, *rest)
        if len(calls) % 2:
            own(self, w, x, *rest)  # keys and values are written before it fails
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FusedText, "forward", forward)
    return limit


def test_batches_are_halved_and_stay_so():
    sizes, seen = BatchSizes(score=8), []

    def work(rows):
        if len(rows) > 3:
            raise torch.OutOfMemoryError
        seen.append(rows)

    run_batches([1] * 20, sizes, "score", work)
    assert sorted(i for rows in seen for i in rows) == list(range(20))
    assert sizes == BatchSizes(score=2) and max(map(len, seen)) == 2
    sizes = BatchSizes(tokens=600, decode_tokens=600)
    assert sizes.halve("decode", 20, tokens=400) == 10
    assert sizes == BatchSizes(tokens=600, decode_tokens=200)  # the other phases hold less
    assert sizes.halve("train", 20) == 10
    assert sizes == BatchSizes(tokens=300, decode_tokens=200, train=10)
    with pytest.raises(torch.OutOfMemoryError, match=r"not even one row .* 'train'"):
        sizes.halve("train", 1)


def test_other_errors_pass():
    assert fits(lambda: None)
    with pytest.raises(RuntimeError, match="another"):
        fits(lambda: (_ for _ in ()).throw(RuntimeError("another")))


def test_what_is_sampled_does_not_depend_on_memory(fitted, small):
    whole = tiny_models.play(fitted, steps=60, envs=32)
    small[0] = 8
    parts = tiny_models.play(fitted, steps=60, envs=32)
    assert fitted.batches.decode <= 8
    assert [s.tokens for s in parts.steps] == [s.tokens for s in whole.steps]
    for one, two in zip(parts.steps, whole.steps, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.logprobs), torch.tensor(two.logprobs), rtol=0, atol=1e-5
        )


def test_scores_do_not_depend_on_memory(fitted, small):
    rollout = tiny_models.play(fitted, steps=40)
    with torch.no_grad():
        policy = fitted.weights()
        teacher = fitted.weights(tiny_models.noisy_lora(fitted, 3, 0.05))
    rows = list(range(len(rollout.steps)))
    options = dict(estimator="full", token_range="thought", temperature=0.7)
    kl = teacher_kl(fitted, policy, teacher, rollout, **options)
    reading = read_answers(fitted, teacher, rollout, rows).of(rows)
    small[0] = 16
    assert torch.allclose(teacher_kl(fitted, policy, teacher, rollout, **options), kl, atol=1e-6)
    parts = read_answers(fitted, teacher, rollout, rows).of(rows)
    torch.testing.assert_close(parts, reading, rtol=0, atol=1e-5)
    assert fitted.batches.score <= 16


def test_gradients_do_not_depend_on_memory(fitted, small):
    rollout = tiny_models.play(fitted, steps=40)
    config, lora = tiny_models.new_config(), tiny_models.noisy_lora(fitted, 2, 0.05)
    with torch.no_grad():
        teacher = fitted.weights(tiny_models.noisy_lora(fitted, 3, 0.05))
    n = len(rollout.steps)
    noise = torch.randn(2, n, generator=torch.Generator().manual_seed(0))
    data = StepData(*noise, old_logprobs(rollout.steps, 0.5), list(range(n)), 1.0, 0.0)
    rows = list(range(30))
    reading = read_answers(fitted, teacher, rollout, rows)
    learner = Learner(fitted, lora, None, Crew(), config)

    def gradients():
        sums = learner.gradients(rollout, data, rows, 30, reading, 2.0)
        return sums, [p.grad.clone() for p in learner.parameters()]

    sums, whole = gradients()
    assert fitted.batches.train == 32
    small[0] = 16
    again, parts = gradients()
    assert fitted.batches.train == 16
    for one, two in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)
    for name, value in sums.items():
        assert again[name].item() == pytest.approx(value.item(), abs=1e-5)
    small[0] = 0
    with pytest.raises(torch.OutOfMemoryError, match="not even one row"):
        gradients()


def test_a_backward_pass_takes_the_size_that_is_remembered(fitted, small):
    fitted.batches.train = 4
    rollout = tiny_models.play(fitted, steps=12)
    weights, seen = fitted.weights(), []
    steps = rollout.steps[:10]
    backward_rows(
        fitted,
        weights,
        rollout.features,
        rollout.fixed,
        rollout.grid,
        [s.picture for s in steps],
        [s.suffix for s in steps],
        [s.tokens for s in steps],
        lambda w, hidden, batch, rows: seen.append(len(rows)),
    )
    assert seen == [4, 4, 2]
