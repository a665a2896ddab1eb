"""The history: weights, limits, copies, thresholds, and a state without pickle."""

import json
import math
from itertools import pairwise

import pytest
import torch

from turbo import footprint
from turbo import history as history_module
from turbo.history import History, cpu_copies, ema_weights
from turbo.kernels.ties import trim_threshold
from turbo.shapes import find_config, text_shape


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


def allocated(tensors):
    """Bytes of the storages of tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return list(storages.values())


def test_factors_share_blocks_of_memory(monkeypatch):
    monkeypatch.setattr(history_module, "PINNED_BLOCK", 1024)
    shapes = [(3, 50), (7, 5), (40, 10), (1, 1), (33, 3), (2, 64)]
    factors = {str(i): (torch.randn(s), torch.randn(s).bfloat16()) for i, s in enumerate(shapes)}
    copies = cpu_copies(factors)
    for name, pair in factors.items():
        for old, new in zip(pair, copies[name], strict=True):
            assert torch.equal(old, new) and new.is_contiguous()
            assert new.data_ptr() % 64 == 0
    flat = [t for pair in copies.values() for t in pair]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in flat)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    blocks = allocated(flat)
    assert sorted(blocks)[-1] == 1600  # a factor larger than a block has one of its own
    assert all(n <= 1024 for n in blocks if n != 1600)
    assert len(blocks) < len(flat)
    assert sum(blocks) < 1.5 * sum(t.nbytes for t in flat)


def test_a_planned_checkpoint_holds_its_blocks():
    """All factors of a 7B: what is planned is what pinned memory would take, about."""
    whole = text_shape(find_config("qwen2.5-vl-7b"))
    sides = [(3584, 3584), (512, 3584), (512, 3584), (3584, 3584)]
    sides += [(18944, 3584)] * 2 + [(3584, 18944)]
    factors = {
        f"{layer}.{i}": (
            torch.empty(128, columns, dtype=torch.bfloat16),
            torch.empty(rows, 128, dtype=torch.bfloat16),
        )
        for layer in range(whole.layers)
        for i, (rows, columns) in enumerate(sides)
    }
    blocks = allocated([t for pair in cpu_copies(factors).values() for t in pair])
    pinned = sum(1 << (n - 1).bit_length() for n in blocks)
    needed = sum(t.nbytes for pair in factors.values() for t in pair)
    assert needed < pinned <= footprint.host_entry_bytes(whole, 128) < 1.1 * needed


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
