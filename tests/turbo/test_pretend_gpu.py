"""Whole runs on a GPU that is not there: every tensor is where it has to be (pretend_gpu.py)."""

import numpy as np
import pytest
import torch
from family_models import folder
from pretend_gpu import OnGpu, pretend_gpu

from turbo import checkpoint, eval, train
from turbo.log import read_jsonl

SMALL = """--device cuda --engine modules --workers 1 --lora-rank 4 --envs 2 --group-size 2
    --steps-per-update 2 --max-new-tokens 4 --updates 1 --epochs 1 --minibatch 4 --skip-certain 0
    --micro-tokens 700 --eval-episodes 0 --teacher-sample 2"""


def test_a_tensor_on_the_wrong_device_is_refused():
    with pretend_gpu():
        x, here = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
        assert isinstance(x, OnGpu) and x.device.type == "cuda" and x.is_cuda
        for wrong in (
            lambda: x + here,
            lambda: x @ here.T,
            lambda: torch.cat([x, here]),
            lambda: here.index_select(0, torch.tensor([0], device="cuda")),
            lambda: here[torch.tensor([0], device="cuda")],
            lambda: torch.where(x > 0, here, here),
        ):
            with pytest.raises(RuntimeError, match="not all on one device"):
                wrong()
        with pytest.raises(RuntimeError, match="expected a generator on cuda:0"):
            torch.rand(2, device="cuda", generator=torch.Generator())
        with pytest.raises(TypeError, match="copy it to the host first"):
            np.asarray(x)
        assert (x + 1.0).sum().item() == 12 and (x * torch.tensor(2.0)).tolist() == [[2.0] * 3] * 2
        assert x[torch.tensor([1])].device.type == "cuda"
        assert x.to("cuda") is x and type(x.cpu()) is torch.Tensor
        here.copy_(2 * x)
        assert type(here) is torch.Tensor and here.sum() == 12
        part = x[0]
        part.zero_()
        assert x.sum() == 3


def whole(family: str, flags: str):
    """With the Triton kernels, interpreted, resumed and evaluated: minutes."""
    return pytest.param(family, flags, True, marks=pytest.mark.long)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "flags", "more"),
    [
        ("qwen2_5_vl", "--quantize nf4 --advantage gae", False),
        whole("qwen2_5_vl", "--advantage gae"),
        whole("qwen2_5_vl", "--quantize nf4 --guidance sft"),
        whole("qwen3_vl", "--quantize nf4 --optimizer adamw8bit"),
        whole("qwen3_vl", "--merge linear --weighting score"),
        whole("smolvlm", "--dtype float32"),
    ],
)
def test_a_run(tmp_path, family, flags, more):
    run, model = tmp_path / "run", str(folder(family))
    with pretend_gpu(triton=more):
        argv = ["numberline", "--model", model, "--out", str(run), *SMALL.split(), *flags.split()]
        assert train.main(argv) == 0
        if more:
            assert train.main(["numberline", "--resume", str(run), "--updates", "2"]) == 0
            played = ["--env", "numberline", "--episodes", "2", "--device", "cuda"]
            assert eval.main([str(run), *played]) == 0
    records = [r for r in read_jsonl(run / checkpoint.METRICS) if "episodes" in r]
    assert [r["update"] for r in records] == ([1, 2] if more else [1])
    assert all(r["skipped_batches"] == 0 and r["grad_norm"] > 0 for r in records)
