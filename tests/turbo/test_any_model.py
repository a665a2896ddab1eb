"""From a warm start to an evaluation with models of every family: the commands themselves."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from family_models import FAMILIES, folder, load_plain
from safetensors.torch import load_file
from tiny_models import new_config, noisy_lora, without_times

from turbo import checkpoint, demos, eval, finetune, hub, phases, sft, shapes, train
from turbo.envs.make import make, tiny_kwargs
from turbo.log import read_jsonl
from turbo.model import Engine, load
from turbo.shapes import published

pytestmark = pytest.mark.slow
COMMON = "--workers 1 --dtype float32 --device cpu"
SMALL = (
    f"{COMMON} --engine modules --lora-rank 4 --envs 4 --group-size 2 --steps-per-update 4 "
    "--max-new-tokens 16 --updates 2 --epochs 1 --minibatch 8 --eval-episodes 0 --teacher-sample 4 "
    "--save-every 1 --skip-certain 0 --micro-tokens 600 --advantage gae"
)
SFT = f"{COMMON} --steps 3 --deals 4 --states 1 --lora-rank 4 --eval-episodes 4 --max-new-tokens 16"


def do_train(model: Path, out: Path, *flags: str) -> list[dict]:
    """Train on numberline; the records of the updates."""
    arguments = ["numberline", "--model", str(model), "--out", str(out), *SMALL.split(), *flags]
    assert train.main(arguments) == 0
    return [r for r in read_jsonl(out / checkpoint.METRICS) if "episodes" in r]


@pytest.fixture(scope="module", params=FAMILIES)
def warm(request, tmp_path_factory):
    """A fine-tuned model, written merged."""
    out = tmp_path_factory.mktemp(request.param) / "warm"
    arguments = ["numberline", "--model", str(folder(request.param)), "--out", str(out)]
    assert sft.main([*arguments, *SFT.split()]) == 0
    return out


def test_a_fine_tuned_model_is_one_of_transformers(warm):
    record = json.loads((warm / "warm_start.json").read_text())
    assert record["observation"] == "small" and record["figures"]["loss"] > 0
    assert record["figures"]["kept"] == pytest.approx(1, abs=1e-3)  # in float32
    vlm = load(warm, torch.float32, Engine("modules"))
    base = load(Path(record["config"]["model"]), torch.float32, Engine("modules"))
    plain = load_plain(vlm).state_dict()
    moved = 0
    for name, matrix in base.module.state_dict().items():
        same = torch.equal(matrix, plain[name])
        adapted = name.removesuffix(".weight") in base.text.linears
        assert same or adapted, name
        moved += not same
    assert moved == len(base.text.linears)


def test_a_fine_tuning_tells_how_far_it_is(tmp_path, monkeypatch):
    """Its phases, as the bar shows them: counted where it is known how much there is to do."""
    seen, rising = {}, []

    class Watched(phases.Phases):
        def expect(self, total):
            super().expect(total)
            seen[self.name] = total

        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "done" and self.name == "steps":
                rising.append(value)

    monkeypatch.setattr(sft, "Phases", Watched)
    arguments = ["--model", str(folder("qwen2_5_vl")), "--out", str(tmp_path / "warm")]
    assert sft.main(["numberline", *arguments, *SFT.split()]) == 0
    assert seen == {"model": 0, "steps": 3, "evaluation": 4}
    assert rising[-2:] == [1, 2]


def test_ctrl_c_writes_what_was_learned(tmp_path, monkeypatch, capsys):
    """And the model learns from hands that are to be seen, in the words of large models."""
    asked = []

    def demonstrate(env, *arguments, **options):
        asked.append(env.dealt)
        if len(asked) == 3:  # in the second step
            os.kill(os.getpid(), signal.SIGINT)
        return demos.demonstrate(env, *arguments, **options)

    monkeypatch.setattr(finetune, "demonstrate", demonstrate)
    arguments = ["--model", str(folder("qwen3_vl")), "--out", str(tmp_path / "warm")]
    flags = SFT.replace("--steps 3 --deals 4", "--steps 9 --deals 2 --observation full")
    assert sft.main(["points24", *arguments, *flags.split()]) == 0
    out = capsys.readouterr().out
    assert "stopped after step 2: what was learned is evaluated and written" in out
    assert "the expert's answers have up to" in out and "16 tokens" not in out  # --max-new-tokens
    assert (tmp_path / "warm" / "warm_start.json").is_file()
    seen = make("points24", split="seen").dealt
    assert len(asked) == 4 and all(hands == seen for hands in asked)
    assert "; --resume goes on" in out and (tmp_path / "warm" / "unfinished").is_dir()
    assert sft.main(["points24", *arguments, *flags.split(), "--resume"]) == 0
    assert "going on after step 2" in capsys.readouterr().out and len(asked) == 18
    assert not (tmp_path / "warm" / "unfinished").exists()


def test_a_fine_tuning_that_was_killed_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys):
    model = folder("qwen2_5_vl")
    flags = SFT.replace("--steps 3", "--steps 5 --save-every 2").split()

    def tune(name, *more):
        out = ["--out", str(tmp_path / name)]
        return sft.main(["numberline", "--model", str(model), *out, *flags, *more])

    assert tune("whole") == 0
    assert not (tmp_path / "whole" / "unfinished").exists()
    count = 0

    def demonstrate(*arguments, **options):
        nonlocal count
        count += 1
        if count == 15:  # in the fourth step
            raise RuntimeError("killed")
        return demos.demonstrate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "demonstrate", demonstrate)
        with pytest.raises(RuntimeError, match="killed"):
            tune("part")
    capsys.readouterr()
    for more, said in (
        ([], "go on with --resume, or begin anew with --overwrite"),
        (["--resume", "--deals", "8"], "it was begun with --deals 4, now 8: give the same"),
        (["--resume", "--model", str(folder("qwen3_vl"))], "it was begun with another model"),
        (["--resume", "--workers", "2"], "it was begun with --workers 1, now 2"),
    ):
        assert tune("part", *more) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and said in err and err.count("\n") == 1
    free = ["--eval-episodes", "2", "--max-new-tokens", "12", "--model", os.path.relpath(model)]
    assert tune("part", "--resume", *free) == 0
    assert "going on after step 2" in capsys.readouterr().out
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "part"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert not (tmp_path / "part" / "unfinished").exists()
    assert tune("part", "--resume") == 2
    assert "--resume: nothing was begun in --out" in capsys.readouterr().err


def test_fine_tuning_goes_on_in_smaller_pieces_where_memory_runs_out(monkeypatch):
    vlm = load(folder("qwen2_5_vl"), torch.float32, Engine("modules"))
    vlm.batches.tokens = 4096
    lora = noisy_lora(vlm)
    env = make("numberline", **tiny_kwargs("numberline"))
    shown = [demos.demonstrate(env, vlm, seed) for seed in range(3)]

    def gradients():
        found = finetune.factor_gradients(vlm, lora, shown)
        return found, [p.grad.clone() for p in lora.parameters()]

    wanted = gradients()
    done = []

    def short_of_memory(vlm, *arguments, **options):
        found = backward(vlm, *arguments, **options)
        done.append(vlm.batches.train)
        if vlm.batches.train > 2:  # when the gradients are there
            raise torch.OutOfMemoryError("for a test")
        return found

    backward = finetune.backward_demos
    monkeypatch.setattr(finetune, "backward_demos", short_of_memory)
    found = gradients()
    assert done == [32, 16, 8, 4, 2] and found[0] == pytest.approx(wanted[0])
    assert vlm.batches.tokens == 256
    for one, two in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_training_and_evaluation(warm, tmp_path, capsys):
    records = do_train(warm, tmp_path / "run")
    assert len(records) == 2
    for r in records:
        assert r["skipped_batches"] == 0 and r["faulty_steps"] == 0 and r["grad_norm"] > 0
        assert r["trained_rows"] > 0 and r["teacher_legal_rate"] >= 0
    # Guided by the merged teacher: the second one is not the policy.
    assert records[0]["teacher_kl"] >= 0 and records[1]["teacher_kl"] > 0
    capsys.readouterr()
    figures = []
    for flags in ([], ["--teacher"]):
        arguments = [
            str(tmp_path / "run"),
            "--env",
            "numberline",
            "--episodes",
            "4",
            "--max-new-tokens",
            "16",
            *flags,
        ]
        assert eval.main([*arguments, "--json", "--workers", "1"]) == 0
        figures.append(json.loads(capsys.readouterr().out.strip().splitlines()[-1]))
    assert all(0 <= f["success_rate"] <= 1 for f in figures)


@pytest.mark.parametrize(
    "flags",
    [
        "--guidance sft --sft-rows 6 --sft-batch 4",
        "--kl-placement reward --kl-estimator k3 --merge linear",
        "--quantize nf4 --optimizer adamw8bit --lora-rank 64 --no-gradient-checkpointing",
        "--weighting score --merge-every 2 --history-max 2",
    ],
)
def test_methods_with_a_large_models_teacher(tmp_path, flags):
    """Each ends, and a run that is resumed after its first update gives the same bits."""
    model = folder("qwen3_vl")
    whole = do_train(model, tmp_path / "whole", *flags.split())
    part = ["--updates", "1", *flags.split()]
    records = do_train(model, tmp_path / "part", *part)
    assert train.main(["numberline", "--resume", str(tmp_path / "part"), "--updates", "2"]) == 0
    records = [r for r in read_jsonl(tmp_path / "part" / checkpoint.METRICS) if "episodes" in r]
    one, two = ([without_times(r) for r in x] for x in (whole, records))
    assert one[1].keys() == two[1].keys()
    odd = {k for k in one[1] if one[1][k] != two[1][k] and one[1][k] == one[1][k]}
    assert odd <= {"learning_rate"}, {k: (one[1][k], two[1][k]) for k in odd}


def test_a_quantised_run_of_every_family(tmp_path):
    for family in FAMILIES:
        flags = ("--quantize", "nf4", "--updates", "1")
        (record,) = do_train(folder(family), tmp_path / family, *flags)
        assert record["grad_norm"] > 0


@pytest.mark.parametrize("command", [train.main, sft.main, eval.main], ids=lambda m: m.__module__)
def test_nf4_on_a_gpu_without_bitsandbytes_is_refused(command, tmp_path, monkeypatch, capsys):
    """Before anything is loaded; PyTorch alone would read matrices back, on a CPU it may."""
    monkeypatch.setattr(hub, "find_bitsandbytes", lambda: None)
    monkeypatch.setattr(hub, "load", lambda *a: pytest.fail("it was loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model, out = str(folder("qwen3_vl")), str(tmp_path / "out")
    flags = ["numberline", "--model", model, "--out", out]
    if command is eval.main:
        flags = [model, "--env", "numberline"]
    assert command([*flags, "--quantize", "nf4", "--device", "cuda"]) == 2
    said = "--quantize nf4 on a GPU needs bitsandbytes: pip install bitsandbytes"
    assert said in capsys.readouterr().err
    hub.check_nf4(new_config(quantize="nf4", device="cpu"))


def test_models_that_cannot_be_used(tmp_path, capsys):
    """One line each, exit status 2, and no run directory is left behind."""

    def refused(command, model: Path) -> str:
        arguments = ["numberline", "--model", str(model), "--out", str(tmp_path / "out")]
        assert command([*arguments, "--workers", "1", "--device", "cpu"]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err.strip().splitlines()[-1]

    mute = tmp_path / "mute"
    shutil.copytree(folder("smolvlm"), mute)
    (mute / "chat_template.jinja").unlink()
    thinker = tmp_path / "thinker"
    shutil.copytree(folder("smolvlm"), thinker)
    template = (thinker / "chat_template.jinja").read_text()
    (thinker / "chat_template.jinja").write_text(template.rstrip() + "<think>\n")
    text = tmp_path / "text"
    shutil.copytree(folder("smolvlm"), text)
    (text / "config.json").write_text('{"model_type": "llama"}')
    for command in (train.main, sft.main):
        said = refused(command, tmp_path / "none")
        assert said.startswith("error: model") and "none" in said
        assert "takes no pictures" in refused(command, text)
        assert "has no usable chat template" in refused(command, mute)
        assert "opens every answer with <think>" in refused(command, thinker)
    arguments = ["--model", str(folder("smolvlm")), "--engine", "fused"]
    arguments += ["--out", str(tmp_path / "out"), "--workers", "1"]
    assert train.main(["numberline", *arguments]) == 2
    assert "engine fused runs Qwen2.5-VL" in capsys.readouterr().err


@pytest.mark.parametrize("game", ["points24", "blackjack"])
def test_full_observations(tmp_path, game):
    """Rules in words and large pictures, which transformers' processor resizes."""
    model = folder("qwen3_vl")
    flags = [
        "--observation",
        "full",
        "--updates",
        "1",
        "--max-new-tokens",
        "8",
        "--envs",
        "2",
        "--no-early-truncation",
    ]
    arguments = [game, "--model", str(model), "--out", str(tmp_path / "run"), *SMALL.split()]
    assert train.main([*arguments, *flags, "--micro-tokens", "4096"]) == 0
    (record,) = [r for r in read_jsonl(tmp_path / "run" / checkpoint.METRICS) if "episodes" in r]
    assert record["grad_norm"] > 0 and record["peak_memory_gb"] > 0.1
    vlm = load(model, torch.float32, Engine("modules"))
    env = make(game)
    features, _ = vlm.see([env.reset(seed=0)[0]])
    assert features.shape[1] > 60 and len(vlm.encode(env.prompt("full").fixed)) > 60


def test_random_weights_of_published_shapes(tmp_path, monkeypatch, capsys):
    """The way of `--model qwen3-vl-8b --random-weights`, with fewer and narrower layers."""

    def small(name: str):
        config = published(name)
        text, vision = config.text_config, config.vision_config
        text.num_hidden_layers, vision.depth, text.vocab_size = 2, 2, 1024
        text.hidden_size = vision.out_hidden_size = 64
        text.intermediate_size, text.num_attention_heads, text.num_key_value_heads = 96, 2, 1
        vision.hidden_size, vision.intermediate_size, vision.num_heads = 32, 48, 2
        vision.deepstack_visual_indexes = [0]
        return config

    monkeypatch.setattr(shapes, "published", small)
    flags = ["--model", "qwen3-vl-8b", "--random-weights", "--observation", "small"]
    arguments = ["numberline", "--out", str(tmp_path / "run"), *SMALL.split(), *flags]
    assert train.main([*arguments, "--updates", "1", "--envs", "4", "--steps-per-update", "4"]) == 0
    assert train.main([*arguments, "--overwrite", "--gpu", "0.5", "--micro-tokens", "2048"]) == 2
    said = capsys.readouterr().err
    assert "qwen3-vl-8b needs" in said and "the card has 0.5 GB" in said
    assert train.main([*arguments, "--overwrite", "--model", "qwen9"]) == 2
    assert "qwen9" in capsys.readouterr().err


def test_a_download_that_was_cut_off_is_not_taken_for_a_model(tmp_path, monkeypatch, capsys):
    """The cache of the Hub holds what had arrived: one of five files of weights."""
    import huggingface_hub

    whole = folder("qwen3_vl")
    model = shutil.copytree(whole, tmp_path / "cached")
    (model / "model.safetensors").rename(model / "model-00001-of-00005.safetensors")
    names = {f"w{i}": f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    c = train.parse(["numberline", "--model", "owner/model"])
    asked = []

    def download(name, allow_patterns, local_files_only=False):
        asked.append(local_files_only)
        if not local_files_only:
            raise OSError("no network")
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=r"is not whole in the cache, model-00002-of-00005.*could"):
        hub.model_folder(c)
    assert asked == [True, False]
    assert "model-00002-of-00005.safetensors is missing: downloading" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"model-00002\S+ is missing; its index names it"):
        hub.model_sha256(train.parse(["numberline", "--model", str(model)]))
    assert hub.missing_files(whole) == []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="model 'runs/mistyped' does not exist"):
        hub.model_folder(train.parse(["numberline", "--model", "runs/mistyped"]))
    assert asked == [True, False]  # nobody was asked for it


def test_folders_that_hold_no_model_say_what_they_are(tmp_path):
    """A run, an adapter, an empty folder, and what is not there; each with its own remedy."""
    run, adapter, empty = (tmp_path / name for name in ("run", "adapter", "empty"))
    checkpoint.create_run(run, new_config(), "")
    adapter.mkdir()
    empty.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    told = {
        run: f"is a run of turbo.train: .*turbo.export {run} --what policy --out DIR",
        adapter: f"is an adapter .*turbo.merge {adapter} --exact --base BASE --out DIR.*export",
        empty: "model.safetensors is missing; give a folder that holds a model, or make one",
        tmp_path / "absent": "does not exist: give a folder with a model",
        tmp_path / "file": "is a file: give a folder with a model",
    }
    for path, message in told.items():
        c = new_config(model=str(path))
        for opened in (hub.model_sha256, hub.model_folder)[: 2 - (path == empty)]:
            with pytest.raises(ValueError, match=message) as error:
                opened(c)
            assert "\n" not in str(error.value)
