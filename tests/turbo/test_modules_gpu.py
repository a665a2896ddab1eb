"""turbo/modules.py on a GPU: the same numbers as on the CPU, and a plan that tells the truth."""

import json

import pytest
import tiny_models
import torch
from family_models import FAMILIES, folder
from test_families import shown

from turbo import checkpoint, train
from turbo.coded import product
from turbo.hub import memory_plan
from turbo.kernels.nf4 import dequantize_nf4, quantize_nf4
from turbo.log import read_jsonl
from turbo.memory import GB
from turbo.model import Engine, load

pytestmark = pytest.mark.gpu
TEXT = '{"thoughts": "12+3=15, so 4", "action": "+"}'


@torch.no_grad()
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_cpu(family, quantize):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found = []
    for device in ("cpu", "cuda"):
        vlm = load(folder(family), torch.float32, Engine("modules", device, quantize))
        lora = tiny_models.noisy_lora(vlm)
        for merged in (False, True):
            rows = [vlm.encode(TEXT), vlm.encode("so 4")]
            length = max(map(len, rows))
            ids = torch.tensor([r + [vlm.pad] * (length - len(r)) for r in rows], device=device)
            weights = vlm.weights(lora)
            weights = vlm.merged(weights) if merged else weights
            features, grid = vlm.see(shown(2))
            prefix = vlm.prefix(weights, features, "the rules", grid)
            hidden = vlm.suffix(weights, ids, prefix)
            found.append(torch.nn.functional.linear(hidden, weights.head).cpu())
    exact = 2e-3 if quantize == "none" else 0.1  # sums in another order change single codes
    for one, two in zip(found[:2], found[2:], strict=True):
        assert (one - two).abs().max() < exact * max(1.0, float(one.std()))


@pytest.mark.parametrize("rows", [1, 4, 16, 64, 512, 2000])
@pytest.mark.parametrize("shape", [(3584, 18944), (18944, 3584), (512, 3584)])
def test_products_with_codes(shape, rows):
    torch.manual_seed(0)
    coded = quantize_nf4(torch.randn(shape, dtype=torch.bfloat16, device="cuda"))
    x = torch.randn(rows, shape[1], dtype=torch.bfloat16, device="cuda")
    bias = torch.randn(shape[0], dtype=torch.bfloat16, device="cuda")
    exact = x.double() @ dequantize_nf4(coded).double().T + bias.double()
    error = product(x, coded, bias).double() - exact
    assert error.abs().mean() < 2**-8 * exact.abs().mean()


@torch.no_grad()
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_decoding_samples_the_same_answers(family, quantize):
    """CUDA graphs against the same steps one by one; the cache moves on the way."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found = []
    for graphs in (False, True):
        engine = Engine("modules", "cuda", quantize, decode_graphs=graphs)
        vlm = load(folder(family), torch.float32, engine)
        assert (vlm.text.record is not None) == graphs
        lora = tiny_models.noisy_lora(vlm)
        played = tiny_models.play(vlm, lora, steps=48, envs=16, max_new_tokens=150)
        found.append(played.steps)
    assert [s.tokens for s in found[0]] == [s.tokens for s in found[1]]
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one.logprobs, two.logprobs, rtol=0, atol=1e-3)


def trained(out, *flags: str) -> list[dict]:
    """The records of a run on the GPU."""
    common = "--device cuda --engine modules --eval-episodes 0 --out"
    assert train.main(["numberline", *common.split(), str(out), *flags]) == 0
    return [r for r in read_jsonl(out / checkpoint.METRICS) if "episodes" in r]


@pytest.mark.parametrize(
    "flags", ["", "--quantize nf4 --optimizer adamw8bit", "--guidance sft", "--decode-graphs"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_on_the_gpu(tmp_path, family, flags):
    if "8bit" in flags:
        pytest.importorskip("bitsandbytes")
    small = "--lora-rank 4 --envs 8 --group-size 4 --steps-per-update 12 --max-new-tokens 16"
    small += " --updates 2 --epochs 1 --minibatch 8 --skip-certain 0 --micro-tokens 700"
    arguments = ["--model", str(folder(family)), "--advantage", "gae", *small.split()]
    records = trained(tmp_path / "run", *arguments, *flags.split())
    assert len(records) == 2
    assert all(r["skipped_batches"] == 0 and r["grad_norm"] > 0 for r in records)


@pytest.mark.long
@pytest.mark.parametrize("quantize,card", [("nf4", 24), ("none", 40)])
def test_a_plan_is_right_within_a_tenth(tmp_path, quantize, card):
    """One update of the published 7B shapes with the card capped, against `turbo.memory`."""
    if quantize == "nf4":  # without it, matrices are read back otherwise
        pytest.importorskip("bitsandbytes")
    if torch.cuda.mem_get_info()[1] < card * GB:
        pytest.skip(f"needs a card of {card} GB")
    flags = f"--model qwen2.5-vl-7b --random-weights --quantize {quantize} --gpu {card}"
    flags += " --preset paper --updates 1 --steps-per-update 64 --epochs 1"
    (record,) = trained(tmp_path / "run", *flags.split())
    planned = memory_plan(train.parse(["numberline", *flags.split()])).total / GB
    print(json.dumps({"planned": planned, "measured": record["peak_memory_gb"]}))
    assert abs(record["peak_memory_gb"] / planned - 1) < 0.1
