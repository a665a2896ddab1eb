"""The benchmarks run on a GPU that is not there (pretend_gpu.py), at small sizes: what `make gpu`
and `make gpu-model` call has been called before."""

import pytest
from family_models import roomy_folder
from pretend_gpu import pretend_gpu

from bench import ema, nf4, policy_head, ties, train_step

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """The GPU's, which take large products to measure."""
    for module in (ties, ema, nf4, policy_head, train_step):
        for name in ("product_rate", "copy_rate"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *a: 1e9)


def ran(main, flags: str, capsys, triton: bool = True) -> str:
    """What a benchmark prints; none of ours is left out, of the others only what is missing."""
    with pretend_gpu(triton):
        assert main(flags.split()) == 0
    out = capsys.readouterr().out
    assert "a pretended GPU" in out
    assert not [line for line in out.splitlines() if "left out" in line and "ours" in line]
    return out


def test_ties(monkeypatch, capsys):
    monkeypatch.setattr(ties, "QWEN_7B", {"q_proj": (64, 64), "k_proj": (16, 64)})
    monkeypatch.setattr(ties, "ODD", 0.05)  # every threshold is an entry, of few
    flags = "--size 64 --rank 16 --checkpoints 2 --repeats 1 --no-save"
    out = ran(ties.main, flags, capsys, triton=False)  # 3,360 merges
    assert "qwen2.5-vl-7b" in out and "pinned" in out


def test_ema(monkeypatch, capsys):
    monkeypatch.setattr(ema, "LISTS", {"three of 16x16": [(16, 16)] * 3})
    monkeypatch.setattr(ema, "GPU_LISTS", {})
    monkeypatch.setattr(ema, "FACTORS", {"cuda": (64, 64, 16)})
    assert "three of 16x16" in ran(ema.main, "--repeats 1 --no-save", capsys)


def test_nf4(capsys):
    ran(nf4.main, "--size 64 64 16 --checkpoints 2 --repeats 1 --no-save", capsys)


def test_policy_head(capsys):
    flags = "--rows 16 --widths 32 --vocabulary 300 --chunks 1024 --repeats 1 --no-save"
    ran(policy_head.main, flags, capsys)


def test_train_step(tmp_path, monkeypatch, capsys):
    """A model of random weights, and the published recipe beside it."""
    pytest.importorskip("peft")
    places, device_of = [], train_step.device_of
    monkeypatch.setattr(
        train_step, "device_of", lambda run: places.append(device_of(run)) or places[-1]
    )
    model = roomy_folder("qwen2_5_vl", tmp_path / "model")
    flags = f"--model {model} --random-weights --only kl --recipe-steps 2 --no-memory --no-save"
    flags += " --steps 4 --envs 4 --max-new-tokens 8 --updates 2 --workers 1"
    with pretend_gpu(triton=False):  # whole runs with it: test_pretend_gpu.py
        assert train_step.main(flags.split()) == 0
    assert places == ["cuda"]
    assert "published recipe" in capsys.readouterr().out
