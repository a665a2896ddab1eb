"""The kernels' benchmarks run on a GPU that is not there (pretend_gpu.py), at small sizes: what
`make gpu` calls has been called before. Left out: `bench.train_step`."""

import pytest
from pretend_gpu import pretend_gpu

from bench import ema, nf4, policy_head, ties
from turbo.kernels import dispatch

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """The GPU's, which take large products to measure."""
    for module in (ties, ema, nf4, policy_head):
        for name in ("product_rate", "copy_rate"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *a: 1e9)


def ran(main, flags: str, capsys) -> str:
    """What a benchmark prints; none of ours is left out, of the others only what is missing."""
    with pretend_gpu():
        assert main(flags.split()) == 0
    out = capsys.readouterr().out
    assert "a pretended GPU" in out
    assert not [line for line in out.splitlines() if "left out" in line and "ours" in line]
    return out


def test_ties(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "_installed", lambda: False)  # 3,360 merges, interpreted
    monkeypatch.setattr(ties, "QWEN_7B", {"q_proj": (64, 64), "k_proj": (16, 64)})
    monkeypatch.setattr(ties, "ODD", 0.05)  # every threshold is an entry, of few
    out = ran(ties.main, "--size 64 --rank 16 --checkpoints 2 --repeats 1 --no-save", capsys)
    assert "qwen2.5-vl-7b" in out and "pinned" in out


def test_ema(monkeypatch, capsys):
    monkeypatch.setattr(ema, "LISTS", {"three of 16x16": [(16, 16)] * 3})
    monkeypatch.setattr(ema, "FACTORS", {"cuda": (64, 64, 16)})
    assert "three of 16x16" in ran(ema.main, "--repeats 1 --no-save", capsys)


def test_nf4(capsys):
    ran(nf4.main, "--size 64 64 16 --checkpoints 2 --repeats 1 --no-save", capsys)


def test_policy_head(capsys):
    flags = "--rows 16 --widths 32 --vocabulary 300 --chunks 1024 --repeats 1 --no-save"
    ran(policy_head.main, flags, capsys)
