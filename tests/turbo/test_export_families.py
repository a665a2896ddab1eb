"""turbo/export.py: other families than the built-in one, and a base in 4 bits.

A fresh process runs the program of each card, and gives the logits of the prompt that it built.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import family_models
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from turbo import checkpoint, export
from turbo.hub import model_sha256
from turbo.parallel import Crew
from turbo.run import Run

pytestmark = pytest.mark.slow

RUNS = {  # name -> family, quantize
    "qwen2_5_vl": ("qwen2_5_vl", "none"),
    "qwen3_vl": ("qwen3_vl", "none"),
    "smolvlm": ("smolvlm", "none"),
    "nf4": ("qwen3_vl", "nf4"),
}
EXPORTS = {  # name -> run, part
    **{f"{run}-{what}": (run, what) for run in RUNS for what in ("policy", "teacher")},
    "qwen3_vl-adapter": ("qwen3_vl", "adapter"),
    "smolvlm-adapter": ("smolvlm", "adapter"),
}
FRESH = """
import json, os, runpy, sys
import torch
from safetensors.torch import save_file
out = {}
for name, folder in json.loads(sys.argv[1]).items():
    os.chdir(folder)
    left = runpy.run_path("example.py")
    with torch.inference_mode():
        out[name] = left["model"](**left["inputs"], **left["seen"]).logits[0].clone()
assert "turbo" not in sys.modules
save_file(out, sys.argv[2])
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Logits [L, V] of the examples' prompts: of plain transformers and peft, and of turbo."""
    root, runs = tmp_path_factory.mktemp("families"), {}
    for name, (family, quantize) in RUNS.items():
        config = tiny_models.new_config(
            model=str(family_models.folder(family)),
            quantize=quantize,
            engine="modules",
            device="cpu",
        )
        runs[name] = run = Run(config, root / name, Crew())
        checkpoint.create_run(run.path, config, model_sha256(config))
        for update in (1, 2):
            noise = tiny_models.noisy_lora(run.vlm, update, 0.2).state_dict()
            run.lora.load_state_dict(noise)
            run.teacher.push(update, run.lora)
        run.save()
    folders = {}
    for name, (run, what) in EXPORTS.items():
        folder = root / f"export-{name}"
        folders[name] = str(folder)
        assert export.main([str(root / run), "--what", what, "--out", str(folder)]) == 0
        program = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
        (folder / "example.py").write_text(program[1])
    command = [sys.executable, "-c", FRESH, json.dumps(folders), str(root / "out.safetensors")]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(root / "out.safetensors"), runs


@torch.no_grad()
def own_logits(run: Run, what: str) -> torch.Tensor:
    """Logits [L, V] of the prompt's changing part by turbo's own forward pass."""
    env, vlm = tiny_models.new_env(), run.vlm
    picture, _ = env.reset(seed=run.config.seed)
    prompt = env.prompt("short")
    teacher, base = what == "teacher", what == "base"
    weights = run.teacher.weights if teacher else vlm.weights(None if base else run.lora)
    features, grid = vlm.see([picture])
    prefix = vlm.prefix(weights, features, prompt.fixed, grid)
    ids = torch.tensor([vlm.encode(vlm.frame.suffix(prompt.state))])
    hidden = vlm.suffix(weights, ids, prefix)
    return F.linear(vlm.text.final_norm(weights, hidden), weights.head)[0]


def test_logits_are_those_of_turbo(made):
    """Float32 throughout; also the teacher in 4 bits, which is written as it is read."""
    logits, runs = made
    for name, (run, what) in EXPORTS.items():
        own = own_logits(runs[run], what)
        apart = (logits[name][-len(own) :] - own).abs().max()
        assert apart <= 1e-4, (name, apart)
        for other in {"policy", "teacher", "base"} - {what.replace("adapter", "policy")}:
            assert (own_logits(runs[run], other) - own).abs().max() > 1e-2  # the test can tell


@torch.no_grad()
def save_in_16_bits(vlm, folder):
    """Write a model as one that was saved in bfloat16."""
    for part in (family_models.load_plain(vlm).to(torch.bfloat16), vlm.tokenizer, vlm.processor):
        part.save_pretrained(folder)


@torch.no_grad()
def test_bfloat16_is_rounded_once(made, tmp_path):
    """A base that was saved in bfloat16 is merged in float32, and rounded at the end."""
    _, runs = made
    save_in_16_bits(runs["qwen3_vl"].vlm, tmp_path / "base")
    config = replace(runs["qwen3_vl"].config, model=str(tmp_path / "base"), guidance="none")
    run = Run(config, tmp_path / "run", Crew())
    checkpoint.create_run(run.path, config, model_sha256(config))
    run.lora.load_state_dict(tiny_models.noisy_lora(run.vlm, 1, 0.2).state_dict())
    run.save()
    assert export.main([str(run.path), "--out", str(tmp_path / "out")]) == 0
    base = load_file(tmp_path / "base" / "model.safetensors")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert base.keys() == got.keys() and all(t.dtype == torch.bfloat16 for t in got.values())
    for name, tensor in base.items():
        wanted = tensor.float()
        if (factors := run.lora.factors.get(name.removesuffix(".weight"))) is not None:
            wanted = torch.addmm(wanted, factors[1], factors[0], alpha=run.lora.scale)
        assert torch.equal(got[name], wanted.bfloat16()), name


@torch.no_grad()
@pytest.mark.parametrize("what", ["policy", "teacher"])
def test_a_change_that_bfloat16_loses_is_told(made, tmp_path, capsys, what):
    """On the console, in the card and in the record; also of a run that played sums of 16 bits,
    where what was lost cannot be seen in the teacher any more."""
    _, runs = made
    save_in_16_bits(runs["qwen3_vl"].vlm, tmp_path / "base")
    config = replace(
        runs["qwen3_vl"].config,
        model=str(tmp_path / "base"),
        dtype="bfloat16",
        play="merged",
        density=1.0,
    )
    run = Run(config, tmp_path / "run", Crew())
    checkpoint.create_run(run.path, config, model_sha256(config))
    run.lora.load_state_dict(tiny_models.noisy_lora(run.vlm, 1, 3e-4).state_dict())
    run.teacher.push(1, run.lora)
    run.save()
    out = tmp_path / "out"
    assert export.main([str(run.path), "--what", what, "--out", str(out)]) == 0
    along = whole = 0.0
    got = load_file(out / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    for name, (a, b) in run.lora.factors.items():
        change = run.lora.scale * (b.double() @ a.double())
        key = name + ".weight"
        along += ((got[key].double() - base[key].double()) * change).sum().item()
        whole += change.square().sum().item()
    kept = json.loads((out / export.RECORD).read_text())["kept"]
    assert 0.05 < kept < 0.9 and abs(kept - along / whole) < 0.02
    told = f"rounded, the weights keep {kept:.1%} of what training changed"
    assert told in capsys.readouterr().out and told in (out / "README.md").read_text()
