"""The history: weights, limits, copies, thresholds, and a state without pickle."""

import json
import math

import pytest
import torch

from turbo.history import History, ema_weights
from turbo.kernels.ties import trim_threshold


def make_factors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.q": (torch.randn(2, 5, generator=generator), torch.randn(4, 2, generator=generator)),
        "layer.v": (torch.randn(3, 7, generator=generator), torch.randn(6, 3, generator=generator)),
    }


def make_history(count=3, **options):
    history = History(**options)
    for k in range(count):
        history.push(k, make_factors(k), 2.0, score=float(k))
    return history


def test_push_copies_and_computes_thresholds_once():
    history, factors = History(density=0.5), make_factors(0)
    snapshot = history.push(7, factors, 2.0, 0.25)
    before = snapshot.factors["layer.q"][0].clone()
    factors["layer.q"][0].zero_()
    assert torch.equal(snapshot.factors["layer.q"][0], before)
    a, b = snapshot.factors["layer.v"]
    assert snapshot.thresholds["layer.v"] == trim_threshold(a, b, 2.0, 0.5)
    assert (snapshot.update, snapshot.scale, snapshot.score) == (7, 2.0, 0.25)


def test_transposed_parameters_are_kept_contiguous_and_detached():
    factors = {"x": (torch.randn(5, 2, requires_grad=True).T, torch.randn(4, 2))}
    a, _ = History().push(0, factors, 1.0).factors["x"]
    assert a.is_contiguous() and not a.requires_grad


def test_history_max_drops_the_oldest():
    assert [entry.update for entry in make_history(5, history_max=2).entries] == [3, 4]
    assert len(make_history(5, history_max=0)) == 5


def test_no_density_means_no_thresholds():
    assert make_history(1, density=None).entries[0].thresholds == {}


def test_weights_sum_to_one_and_follow_their_mode():
    history = make_history(4)
    assert history.weights("sma") == [0.25] * 4
    assert history.weights("score") == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6])
    assert history.weights("ema", 0.5) == [0.125, 0.125, 0.25, 0.5]
    assert make_history(1).weights("ema", 0.3) == [1.0]
    assert make_history(1).weights("score") == [1.0]  # its score is 0: equal weights


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9, 1.0])
def test_ema_weights_are_the_recursion(alpha):
    values = [3.0, -1.0, 4.0, 1.5, 9.0]
    merged = values[0]
    for k, value in enumerate(values[1:], start=2):
        merged = alpha * value + (1 - alpha) * merged
        weights = ema_weights(k, alpha)
        assert sum(weights) == pytest.approx(1.0)
        assert sum(w * v for w, v in zip(weights, values, strict=False)) == pytest.approx(merged)


def test_state_goes_through_safetensors_and_json(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    history = make_history(3, density=0.5, history_max=2)
    tensors, metadata = history.state_dict()
    safetensors.save_file(tensors, tmp_path / "history.safetensors")
    loaded = History(density=0.5, history_max=2)
    loaded.load_state_dict(
        safetensors.load_file(tmp_path / "history.safetensors"), json.loads(json.dumps(metadata))
    )
    assert len(loaded) == 2
    for one, two in zip(history.entries, loaded.entries, strict=True):
        assert (one.update, one.scale, one.score) == (two.update, two.scale, two.score)
        for name, (a, b) in one.factors.items():
            assert torch.equal(a, two.factors[name][0]) and torch.equal(b, two.factors[name][1])
            assert torch.equal(one.thresholds[name], two.thresholds[name])


def test_errors():
    with pytest.raises(ValueError, match="density"):
        History(density=1.5)
    with pytest.raises(ValueError, match="history_max"):
        History(history_max=-1)
    with pytest.raises(ValueError, match="empty history"):
        History().weights("sma")
    history = make_history(2)
    with pytest.raises(ValueError, match="mode"):
        history.weights("median")
    with pytest.raises(ValueError, match="alpha"):
        history.weights("ema", 1.5)
    with pytest.raises(ValueError, match="differ in"):
        history.push(3, {"other": make_factors(0)["layer.q"]}, 1.0)
    with pytest.raises(ValueError, match="got none"):
        history.push(3, {}, 1.0)
    history.push(3, make_factors(0), 1.0, math.nan)
    with pytest.raises(ValueError, match="score"):
        history.weights("score")
    tensors, metadata = history.state_dict()
    with pytest.raises(ValueError, match="density"):
        History(density=0.1).load_state_dict(tensors, metadata)
    tensors.pop("0.layer.q.lora_a")
    with pytest.raises(ValueError, match=r"0\.layer\.q\.lora_a"):
        History().load_state_dict(tensors, metadata)


@pytest.mark.parametrize("density", [0.8, None], ids=["trimmed", "linear"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_never_enters_a_history(value, density):
    history, factors = History(density), make_factors(0)
    factors["layer.v"][1][2, 0] = value
    with pytest.raises(ValueError, match=r"layer\.v\.lora_b: expected finite values, got NaN"):
        history.push(0, factors, 1.0)
    assert len(history) == 0
    history.push(0, make_factors(0), 1.0)
    tensors, metadata = history.state_dict()
    tensors["0.layer.q.lora_a"] = tensors["0.layer.q.lora_a"] * value
    with pytest.raises(ValueError, match=r"layer\.q\.lora_a: expected finite"):
        history.load_state_dict(tensors, metadata)
    assert history.entries[0].factors["layer.q"][0].isfinite().all()
