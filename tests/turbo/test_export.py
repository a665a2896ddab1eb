"""turbo/export.py: what plain transformers and peft make of an export, in a process of their own.

Left out: refusals and interruptions (`test_export_refusals.py`), pushing (`test_export_push.py`).
"""

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from kept_signals import kept_signals
from PIL import Image
from safetensors.torch import load_file

from turbo import checkpoint, export, train
from turbo.formats import Kept, loss_of_rounding, policy_matrices
from turbo.hub import model_sha256
from turbo.lora import effective, new_lora
from turbo.model import load
from turbo.saved import from_saved
from turbo.teacher import saved_teacher
from turbo.tiny import builtin_path

pytestmark = pytest.mark.slow  # runs are trained, and other processes start

GAME = tiny_models.GAME
SMALL = f"""{GAME}
    --workers 1 --dtype float32 --envs 8 --group-size 4 --steps-per-update 16 --max-new-tokens 40
    --minibatch 16 --lora-rank 4 --lora-alpha 8 --save-every 1 --keep 10 --epochs 1 --skip-certain 0
    --temperature 0.8 --learning-rate 0.01 --final-learning-rate 0.01 --kl-coef 0.5
    --teacher-sample 4
"""
ANSWER = '{"current number": "3", "target number": "5", "thoughts": "3 is less than 5, so +"'
RUNS = {
    "kl": "--updates 2 --eval-episodes 4",
    "folder": "--updates 1 --eval-episodes 0 --guidance none",
}
EXPORTS = {  # name -> run, options
    "policy": ("kl", "--what policy --dtype float32"),
    "policy-bf16": ("kl", "--what policy"),
    "teacher": ("kl", "--what teacher --dtype float32"),
    "adapter": ("kl", f"--what adapter --base {builtin_path(GAME)}"),
    "first": ("kl", "--what policy --dtype float32 --checkpoint 1"),
    "folder": ("folder", "--what policy"),
    "folder-adapter": ("folder", "--what adapter"),
}

# Plain transformers and peft: reads the exports, answers in logits. turbo is never imported.
FRESH = """
import json, runpy, sys, os, contextlib, io
import torch
from peft import AutoPeftModel, PeftModel
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers import GenerationConfig

jobs, out, told = json.loads(sys.argv[1]), {}, {}
for name, job in jobs["exports"].items():
    folder, base = job["folder"], job["base"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    if base:
        plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(plain, folder)
        told[name] = {"adapted": [n for n, m in model.named_modules() if hasattr(m, "lora_A")]}
        if base in open(os.path.join(folder, "adapter_config.json")).read():
            auto = AutoPeftModel.from_pretrained(folder)
            told[name]["auto"] = type(auto.get_base_model()).__name__
    else:
        dtypes = AutoModelForImageTextToText.from_pretrained(folder).parameters()
        told[name] = {"dtypes": sorted({str(p.dtype) for p in dtypes})}
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    content = [{"type": "image"}, {"type": "text", "text": jobs["question"]}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    picture = Image.open(os.path.join(folder, "example.png"))
    seen = image_processor(images=[picture], return_tensors="pt")
    pad = "<|image_pad|>"
    places = int(seen["image_grid_thw"].prod()) // image_processor.merge_size**2
    text = text.replace(pad, pad * places)
    for what, written in (("answer", text + jobs["answer"]), ("greedy", text)):
        ids = tokenizer(written, return_tensors="pt", add_special_tokens=False)
        kinds = (ids["input_ids"] == tokenizer.convert_tokens_to_ids(pad)).int()
        ids = {**ids, **seen, "mm_token_type_ids": kinds}
        with torch.inference_mode():
            if what == "answer":
                out[name] = model(**ids).logits[0]
                out[name + ".ids"] = ids["input_ids"][0]
            else:
                config = GenerationConfig.from_pretrained(folder)
                told[name]["generation"] = config.to_diff_dict()
                config.do_sample, config.temperature = False, None
                whole = model.generate(**ids, generation_config=config)[0]
                out[name + ".greedy"] = whole[kinds.shape[1] :]
for name, program in jobs["programs"].items():
    os.chdir(jobs["exports"][name]["folder"])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runpy.run_path(program)
    told[name]["said"] = said.getvalue()
assert "turbo" not in sys.modules
save_file({k: v.contiguous() for k, v in out.items()}, jobs["out"])
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Runs, their exports, and what a fresh process makes of them: once for all test processes."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "test_export"
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "told.json").exists():
            save_model(root / "model")
            with kept_signals():
                make_runs(root / "runs", root / "model")
                make_exports(root / "exports", root / "runs")
            told = load_exports(root)
            (root / "told.json").write_text(json.dumps(told))
    return root


def save_model(folder: Path) -> None:
    """The built-in model as a folder of one's own, in float32."""
    vlm = load(builtin_path(GAME), torch.float32)
    for part in (vlm.module, vlm.tokenizer, vlm.processor):
        part.save_pretrained(folder)


def make_runs(folder: Path, model: Path) -> None:
    """Real runs: of the built-in model with a teacher, without one, and of a model in a folder."""
    for name, options in RUNS.items():
        argv = [*SMALL.split(), *options.split(), "--out", str(folder / name)]
        assert train.main([*argv, *(["--model", str(model)] if name == "folder" else [])]) == 0


def make_exports(folder: Path, runs: Path) -> None:
    """Every kind of export."""
    for name, (run, options) in EXPORTS.items():
        assert export.main([str(runs / run), *options.split(), "--out", str(folder / name)]) == 0


def load_exports(root: Path) -> dict:
    """Let a fresh process load them all: logits to out.safetensors, and what it says."""
    bases = {"adapter": builtin_path(GAME), "folder-adapter": root / "model"}
    exports = {
        name: dict(folder=str(root / "exports" / name), base=str(bases.get(name, "")))
        for name in EXPORTS
    }
    programs = {}
    for name in ("policy-bf16", "adapter"):
        card = (root / "exports" / name / "README.md").read_text()
        programs[name] = str(root / f"{name}.py")
        Path(programs[name]).write_text(re.search(r"```python\n(.*?)```", card, re.S)[1])
    jobs = dict(exports=exports, programs=programs, question=question(), answer=ANSWER)
    jobs["out"] = str(root / "out.safetensors")
    return in_fresh_process(FRESH, json.dumps(jobs), cwd=root)


@pytest.fixture(scope="module")
def runs(place) -> dict[str, Path]:
    """The folders of the runs."""
    return {name: place / "runs" / name for name in RUNS}


@pytest.fixture(scope="module")
def exported(place) -> dict[str, Path]:
    """The folders of the exports."""
    return {name: place / "exports" / name for name in EXPORTS}


@pytest.fixture(scope="module")
def fresh(place) -> tuple[dict[str, torch.Tensor], dict]:
    """What plain transformers and peft compute from the exports, and what they found there."""
    return load_file(place / "out.safetensors"), json.loads((place / "told.json").read_text())


def in_fresh_process(program: str, argument: str, cwd: Path) -> dict:
    """Run a program that does not see this project; what it prints last."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, argument]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def question() -> str:
    """The text of the first prompt."""
    env = tiny_models.new_env()
    env.reset(seed=0)
    return env.prompt("short").text


def own(run: Path, what: str, update: int | None = None, dtype=torch.float32):
    """turbo's model of a run and the runnable weights of its policy or teacher."""
    c = from_saved(checkpoint.read_run(run)["config"], "")
    vlm = load(builtin_path(GAME) if c.model == "tiny" else Path(c.model), torch.float32)
    saved = checkpoint.load(run, update)
    lora = new_lora(vlm.matrices, c.lora_rank, c.lora_alpha, 0)
    lora.load_state_dict(saved.adapter)
    with torch.no_grad():
        if what == "teacher":
            return vlm, saved_teacher(vlm, lora, c, saved).weights
        matrices = effective(vlm.matrices, lora if what == "policy" else None)
        rounded = {n: m.to(dtype).float() for n, m in matrices.items()}
        return vlm, vlm.text.text_weights(rounded)


@torch.no_grad()
def own_logits(vlm, weights, picture: np.ndarray, rest: list[int]) -> torch.Tensor:
    """Logits [L, V] by turbo's own forward pass, from the state's first token on.

    `rest` [L] are the ids behind the prompt's unchanging part.
    """
    env = tiny_models.new_env()
    env.reset(seed=0)
    features, grid = vlm.see([picture])
    prefix = vlm.prefix(weights, features, env.prompt("short").fixed, grid)
    hidden = vlm.suffix(weights, torch.tensor([rest]), prefix)
    return (vlm.text.final_norm(weights, hidden) @ weights.head.T)[0]


def differences(exported, fresh, name: str, vlm, weights) -> torch.Tensor:
    """|logits of plain transformers - turbo's| over state and answer."""
    env = tiny_models.new_env()
    env.reset(seed=0)
    picture = np.asarray(Image.open(exported[name] / export.PICTURE))
    rest = vlm.encode(vlm.frame.suffix(env.prompt("short").state)) + vlm.encode(ANSWER)
    tensors, _ = fresh
    assert tensors[name + ".ids"][-len(rest) :].tolist() == rest  # template and tokens are turbo's
    got = tensors[name][-len(rest) :]
    return (got - own_logits(vlm, weights, picture, rest)).abs()


# name -> what it must equal: run, part, update
@pytest.mark.parametrize(
    ("name", "run", "what", "update"),
    [
        ("policy", "kl", "policy", None),
        ("adapter", "kl", "policy", None),
        ("teacher", "kl", "teacher", None),
        ("first", "kl", "policy", 1),
        ("folder", "folder", "policy", None),
        ("folder-adapter", "folder", "policy", None),
    ],
)
def test_logits_are_those_of_turbo(runs, exported, fresh, name, run, what, update):
    vlm, weights = own(runs[run], what, update)
    assert differences(exported, fresh, name, vlm, weights).max() <= 1e-4
    _, untrained = own(runs[run], "base")  # the test can tell: the base answers otherwise
    assert differences(exported, fresh, name, vlm, untrained).max() > 1e-2


def test_bfloat16_is_the_float32_merge_rounded_once(runs, exported, fresh):
    """Sharply: the logits are those of turbo's policy with each weight rounded to bfloat16.

    Loosely, against the policy as it is: only the matrices with factors are no bfloat16 numbers
    before, and a rounding changes each of their entries by up to 2^-9 of it. Measured: 0.003, of
    logits up to 6; 0.05 is allowed, about 2^-9 of a logit for each of the model's 14 matrices.
    """
    vlm, rounded = own(runs["kl"], "policy", dtype=torch.bfloat16)
    assert differences(exported, fresh, "policy-bf16", vlm, rounded).max() <= 1e-4
    vlm, exact = own(runs["kl"], "policy")
    loose = differences(exported, fresh, "policy-bf16", vlm, exact).max()
    assert 1e-4 < loose <= 0.05
    assert fresh[1]["policy-bf16"]["dtypes"] == ["torch.bfloat16"]  # as the base was saved
    assert fresh[1]["folder"]["dtypes"] == fresh[1]["policy"]["dtypes"] == ["torch.float32"]


def test_what_rounding_loses_is_told(exported):
    """By the files themselves: how much of the change from the base they have."""
    base, exact, rounded = (
        load_file(folder / "model.safetensors")
        for folder in (builtin_path(GAME), exported["policy"], exported["policy-bf16"])
    )
    along = whole = 0.0
    for name, before in base.items():
        change = exact[name].double() - before.double()
        along += ((rounded[name].double() - before.double()) * change).sum().item()
        whole += change.square().sum().item()
    told = {
        name: json.loads((exported[name] / export.RECORD).read_text())["kept"]
        for name in ("policy", "policy-bf16", "teacher", "adapter")
    }
    assert told["policy-bf16"] == pytest.approx(along / whole, abs=1e-4) and whole > 0
    assert any(not torch.equal(exact[name], rounded[name].float()) for name in base)
    for name in ("policy", "teacher"):
        assert told[name] == pytest.approx(1, abs=1e-4)
    assert told["adapter"] == 1


@torch.no_grad()
def test_small_changes_do_not_survive_bfloat16():
    for size, share in ((1e-4, 0.0), (2e-3, 0.0), (5e-3, 1.5625), (2.0, 1.0)):  # 2^-7 is a step
        kept, base = Kept(), torch.ones(8, 8)
        change = torch.full_like(base, size)
        kept.add(base, change, (base + change).bfloat16())
        assert kept.share == pytest.approx(share, rel=1e-3)
    kept.add(base, torch.zeros_like(base), base)
    assert kept.share == pytest.approx(1.0) and Kept().share == 1.0
    assert "keep 6.0% of what" in loss_of_rounding(0.06)
    vlm = load(builtin_path(GAME), torch.float32)
    shares = []
    for size in (1e-1, 1e-4, 1e-6):
        kept, lora = Kept(), tiny_models.noisy_lora(vlm, 0, size)
        policy_matrices(vlm, lora, torch.bfloat16, kept)
        shares.append(kept.share)
    assert 0.99 < shares[0] < 1.01 and 0.1 < shares[1] < 0.95 and shares[2] < 0.02, shares


def test_kinds_are_told_apart(fresh):
    tensors, _ = fresh
    assert (tensors["policy"] - tensors["adapter"]).abs().max() <= 1e-4
    for other in ("teacher", "first"):
        assert (tensors["policy"] - tensors[other]).abs().max() > 1e-2


def test_generation_is_turbos_own(runs, exported, fresh):
    """Greedy answers, with the cache and what is banned, are the best tokens of turbo's policy."""
    env = tiny_models.new_env()
    env.reset(seed=0)
    vlm, weights = own(runs["kl"], "policy")
    suffix = vlm.encode(vlm.frame.suffix(env.prompt("short").state))
    picture = np.asarray(Image.open(exported["policy"] / export.PICTURE))
    for name in ("policy", "adapter"):
        answer = fresh[0][name + ".greedy"].tolist()
        logits = own_logits(vlm, weights, picture, [*suffix, *answer])[len(suffix) - 1 : -1]
        assert logits.masked_fill(vlm.banned, -1e30).argmax(-1).tolist() == answer
        assert len(answer) > 5 and answer[-1] == vlm.end
        known = fresh[1][name]["generation"]
        assert (known["temperature"], known["max_new_tokens"]) == (0.2, 40)
        assert (known["eos_token_id"], known["pad_token_id"]) == (vlm.end, vlm.pad)


def test_the_adapter_leaves_the_vision_tower_alone(place, exported, fresh):
    vlm = load(builtin_path(GAME), torch.float32)
    wanted = new_lora(vlm.matrices, 4, 8.0, 0).factors
    for name in ("adapter", "folder-adapter"):
        assert set(fresh[1][name]["adapted"]) == {f"base_model.model.{n}" for n in wanted}
    assert fresh[1]["folder-adapter"]["auto"] == "Qwen2_5_VLForConditionalGeneration"
    known = json.loads((exported["folder-adapter"] / "adapter_config.json").read_text())
    assert known["base_model_name_or_path"] == str(place / "model")
    assert (known["r"], known["lora_alpha"], known["peft_type"]) == (4, 8, "LORA")


def test_the_cards_example_runs_as_it_stands(fresh):
    for name in ("policy-bf16", "adapter"):
        assert len(fresh[1][name]["said"].strip()) > 10


def test_an_export_can_be_trained_again(exported):
    """A policy is a model folder like that of turbo.sft."""
    again, base = load(exported["policy"], torch.float32), load(builtin_path(GAME), torch.float32)
    odd = [n for n, m in again.matrices.items() if not torch.equal(m, base.matrices[n])]
    factors = new_lora(base.matrices, 1, 1.0, 0).factors
    assert odd and set(odd) <= {n + ".weight" for n in factors}
    tower, before = again.module.model.visual, base.module.model.visual.state_dict()
    assert all(torch.equal(value, before[n]) for n, value in tower.state_dict().items())


def test_the_card(runs, exported):
    records = [json.loads(x) for x in (runs["kl"] / checkpoint.METRICS).read_text().splitlines()]
    last = records[-1]
    card = (exported["policy-bf16"] / "README.md").read_text()
    assert f"| policy, after 2 updates | {last['eval_success_rate']:.1%} | " in card
    interval = f"{last['eval_teacher_success_low']:.1%} to {last['eval_teacher_success_high']:.1%}"
    assert f"merged teacher, after 2 updates | {last['eval_teacher_success_rate']:.1%}" in card
    assert interval in card and "4 episodes a row at temperature 0.2" in card
    assert f"{last['env_steps']:,} environment steps" in card
    config = train.parse([*SMALL.split()])
    assert model_sha256(config) in card and "TIES at density 0.8" in card
    assert "base_model:" not in card  # a path is no name on the Hub, and would be refused there
    assert "has no figures yet" not in card
    assert "has no figures yet" in (exported["first"] / "README.md").read_text()
    for path in exported.values():
        text = (path / "README.md").read_text() + (path / export.RECORD).read_text()
        assert str(runs["kl"].parent) not in text


def test_files_can_be_read_by_others(exported):
    for path in exported.values():
        modes = {p.stat().st_mode for p in path.iterdir()}
        assert len(modes) == 1


def test_saved_tensors_are_all_there(exported):
    """A complete model has every tensor of the base, under the same names."""
    base = load_file(builtin_path(GAME) / "model.safetensors")
    for name in ("policy", "policy-bf16", "teacher"):
        got = load_file(exported[name] / "model.safetensors")
        assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in base.items()}
