"""The memory planner: what fits, what is proposed where nothing does, and the command.

That each term is right is tested in test_footprint.py.
"""

import functools
from dataclasses import fields, replace

import pytest
import torch
from transformers import SmolVLMConfig

from turbo import hub, memory, shapes
from turbo.config import TrainConfig
from turbo.memory import GB, PHASES, Settings, largest_envs, largest_micro_tokens, nearest, plan

CPU = torch.device("cpu")
NUMBERS = [f.name for f in fields(Settings) if f.type is int]
HARM = ("lora_rank", "quantize", "optimizer", "gradient_checkpointing", "envs", "micro_tokens")


@functools.cache
def shape(name: str = "qwen2.5-vl-7b") -> shapes.TextShape:
    """A published shape, counted once."""
    return shapes.text_shape(shapes.published(name), name)


def planned(gpu: float, **changes) -> memory.Plan:
    """A plan of 7B on a card of so many GB."""
    return plan(shape(), replace(Settings(), **changes), gpu * GB)


def test_what_the_project_promises():
    assert planned(24, quantize="nf4").fits
    assert planned(40).fits
    assert not planned(24).fits
    assert planned(80, gradient_checkpointing=False).fits


def test_the_refusal_proposes_nf4():
    assert memory.refuse(planned(40)) == ""
    said = memory.refuse(planned(24))
    assert said.startswith("qwen2.5-vl-7b needs 39.") and "the card has 24.0 GB" in said
    assert "it fits with --quantize nf4 (" in said and "\n" not in said


@pytest.mark.parametrize("name", shapes.NAMES)
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_every_term_grows_with_every_number(name, quantize):
    base = replace(Settings(), quantize=quantize)
    before = plan(shape(name), base, GB)
    for field in NUMBERS:
        more = {field: getattr(base, field) + 1}
        if field in (
            "prompt_tokens",
            "suffix_tokens",
            "max_new_tokens",
        ):  # the micro-batch must hold a row
            more["micro_tokens"] = base.micro_tokens
        after = plan(shape(name), replace(base, **more), GB)
        grown = 0
        for old, new in zip(before.terms, after.terms, strict=True):
            for phase in PHASES:
                difference = new.bytes.get(phase, 0) - old.bytes.get(phase, 0)
                assert difference >= 0, (field, new.name, phase)
                grown += difference
        host = sum(after.host.values()) - sum(before.host.values())
        assert grown > 0 or host > 0, f"{field} changes nothing"


@pytest.mark.parametrize("name", shapes.NAMES)
def test_each_frugal_choice_saves(name):
    def total(phase: str, **changes) -> int:
        return plan(shape(name), replace(Settings(), **changes), GB).totals[phase]

    assert total("train", gradient_checkpointing=False) > total("train")
    assert total("train", stream="float32") > total("train")
    assert total("step") > total("step", optimizer="adamw8bit")
    for phase in PHASES:
        assert total(phase) > total(phase, quantize="nf4")
        assert total(phase) > total(phase, lora_rank=64)


def test_totals():
    p = planned(40)
    assert p.total == max(p.totals.values()) == p.totals[p.phase]
    for phase in PHASES:
        assert p.totals[phase] == sum(term.bytes.get(phase, 0) for term in p.terms)
    assert {term.name for term in p.terms if term.counted} == {
        "base",
        "scratch",
        "LoRA",
        "optimizer",
        "gradients",
    }


def test_the_host_keeps_the_history():
    n = 2 * 128 * shape().covered_features  # in bf16
    kept = planned(40, history=7).host
    assert 7 * n < kept["factors of 7 checkpoints"] < 7 * 1.1 * n
    assert kept["teacher's hidden states of an update"] == 1024 * 256 * 3584 * 2


def test_a_history_beyond_the_host_is_refused():
    p = planned(40, history=30)
    needed, entry = sum(p.host.values()), p.host["factors of 30 checkpoints"] // 30
    assert memory.refuse_host(p, needed) == ""
    said = memory.refuse_host(p, needed - 1)
    assert "30 checkpoints" in said and said.endswith("it fits with --history-max 29")
    fewer = planned(40, history=12)
    said = memory.refuse_host(p, needed - 18 * entry)
    assert said.endswith("--history-max 12")
    assert memory.refuse_host(fewer, needed - 18 * entry) == ""
    assert memory.refuse_host(p, GB).endswith("it fits with fewer --steps-per-update")


def test_a_run_without_a_merged_teacher_keeps_no_history():
    c = TrainConfig(updates=29, history_max=0)
    assert (c.kept_checkpoints, replace(c, history_max=7).kept_checkpoints) == (30, 7)
    assert replace(c, history_max=99).kept_checkpoints == 30
    assert replace(c, epochs=3, checkpoint_each="epoch").kept_checkpoints == 88
    for own in (dict(guidance="none"), dict(guidance="gtr"), dict(teacher="initial")):
        assert replace(c, **own).kept_checkpoints == 0


@pytest.mark.parametrize("gpu", [21.5, 24, 32, 48])
def test_the_largest_batches_fit_and_the_next_do_not(gpu):
    s = replace(Settings(), quantize="nf4")
    envs, tokens = (f(shape(), s, gpu * GB) for f in (largest_envs, largest_micro_tokens))
    assert plan(shape(), replace(s, envs=envs), gpu * GB).fits
    assert not plan(shape(), replace(s, envs=envs + 1), gpu * GB).fits
    assert plan(shape(), replace(s, micro_tokens=tokens), gpu * GB).fits
    assert not plan(shape(), replace(s, micro_tokens=tokens + 64), gpu * GB).fits


def test_nothing_fits_a_small_card():
    assert largest_envs(shape(), Settings(), 10 * GB) == 0
    assert largest_micro_tokens(shape(), Settings(), 10 * GB) == 0
    assert nearest(shape(), Settings(), 10 * GB) is None
    said = memory.refuse(planned(10))
    assert "no settings make it fit" in said and "smaller model" in said and "\n" not in said


@pytest.mark.parametrize("gpu", [13.5, 14, 15, 17, 19, 20, 21, 30, 34, 36, 37, 38, 39, 39.2])
@pytest.mark.parametrize(
    "asked", [{}, dict(gradient_checkpointing=False), dict(optimizer="adamw8bit")]
)
def test_the_nearest_settings(gpu, asked):
    s = replace(Settings(), **asked)
    found = nearest(shape(), s, gpu * GB)
    assert plan(shape(), found, gpu * GB).fits
    least = replace(s, **memory.SMALLEST, micro_tokens=s.row)
    for i, name in enumerate(HARM):  # a change is made only where milder ones do not do
        if getattr(found, name) == getattr(s, name):
            continue
        milder = {n: getattr(least, n) for n in HARM[i + 1 :]}
        kept = replace(found, **milder, **{name: getattr(s, name)})
        assert not plan(shape(), kept, gpu * GB).fits, name
    said = memory.refuse(plan(shape(), s, gpu * GB))
    for name in HARM:
        flag = "--" + name.replace("_", "-")
        assert (flag in said) == (getattr(found, name) != getattr(s, name))


def test_mild_changes_come_first():
    def changed(gpu: float, **asked) -> set[str]:
        s = replace(Settings(), **asked)
        found = nearest(shape(), s, gpu * GB)
        return {name for name in HARM if getattr(found, name) != getattr(s, name)}

    assert changed(39.2, micro_tokens=4096) == {"micro_tokens"}
    assert changed(38) == {"micro_tokens", "envs"}  # decoding needs most
    assert changed(39, envs=8, micro_tokens=6144) == {"micro_tokens"}
    assert changed(40, envs=8, gradient_checkpointing=False) == {"gradient_checkpointing"}
    assert "optimizer" in changed(36) and "quantize" not in changed(36)
    assert "lora_rank" in changed(13.5)


@pytest.mark.parametrize("field", NUMBERS)
def test_numbers_below_one_are_refused(field):
    with pytest.raises(ValueError, match=rf"--{field.replace('_', '-')} must be at least 1, got 0"):
        planned(24, **{field: 0})


@pytest.mark.parametrize(
    ("gpu", "asked", "least", "most", "fits"),
    [
        (80, 0, 8192, 8192, True),  # more keeps no card busier
        (42, 0, 4096, 5120, True),
        (24, 0, 2048, 2048, False),  # the refusal says what would fit
        (0, 0, 2048, 2048, True),  # nothing is planned on a CPU
        (80, 3000, 3000, 3000, True),
    ],
)
def test_tokens_of_a_micro_batch_that_are_left_open(gpu, asked, least, most, fits):
    own = dict(envs=64, max_new_tokens=256, lora_rank=128, updates=29, steps_per_update=1024)
    c = TrainConfig(model="qwen2.5-vl-7b", random_weights=True, gpu=gpu, micro_tokens=asked, **own)
    assert (hub.lack_of_memory(c) == "") == fits and c.micro_tokens == asked
    found = hub.memory_plan(c)
    tokens = hub.planned_tokens(found) if gpu else memory.Settings.micro_tokens
    assert (found is None) == (not gpu) and least <= tokens <= most
    if gpu and fits and not asked:
        more = replace(found.settings, micro_tokens=tokens + memory.STEP)
        assert found.total <= 0.95 * gpu * GB
        assert most == 8192 or plan(shape(), more, gpu * GB).total > 0.95 * gpu * GB


def test_a_run_is_planned_for_the_prompts_that_it_has_where_they_are_longer():
    own = dict(envs=64, max_new_tokens=256, lora_rank=128, updates=29, steps_per_update=1024)
    c = TrainConfig(model="qwen2.5-vl-7b", random_weights=True, gpu=24, quantize="nf4", **own)
    usual, longer = hub.memory_plan(c), hub.memory_plan(c, 700, 60)
    assert hub.memory_plan(c, 512, 128) == hub.memory_plan(c, 100, 20) == usual
    assert (longer.settings.prompt_tokens, longer.settings.suffix_tokens) == (700, 128)
    assert longer.fits and longer.settings.micro_tokens < usual.settings.micro_tokens
    assert "it fits with --envs" in memory.refuse(hub.memory_plan(c, 450, 1500))


def test_the_host_too_is_asked_with_the_prompts_that_there_are(monkeypatch):
    own = dict(envs=64, max_new_tokens=256, lora_rank=128, updates=29, steps_per_update=1024)
    c = TrainConfig(model="qwen2.5-vl-7b", random_weights=True, gpu=80, **own)
    usual, longer = hub.memory_plan(c), hub.memory_plan(c, 900, 60)
    monkeypatch.setattr(hub, "device_of", lambda c: torch.device("cuda"))
    monkeypatch.setattr(hub, "host_bytes", lambda: sum(usual.host.values()))
    assert hub.refusal(c, usual) == ""
    assert "GB: it fits with --history-max 25" in hub.refusal(c, longer)


def test_a_row_is_always_in_a_micro_batch():
    for tokens in (4000, 8000):
        long = replace(Settings(), envs=4, max_new_tokens=tokens)
        for gpu in (1, 40, 140):
            found = memory.good_micro_tokens(shape(), long, gpu * GB)
            assert found >= long.row and plan(shape(), replace(long, micro_tokens=found), gpu * GB)


def test_a_larger_card_has_no_smaller_micro_batch():
    s, last = replace(Settings(), quantize="nf4"), 0
    for gpu in range(2050, 2700, 5):
        found = memory.good_micro_tokens(shape(), s, gpu / 100 * GB)
        fits = plan(shape(), replace(s, micro_tokens=found), gpu / 100 * GB).fits
        assert found >= last or not last
        last = found if fits else 0
    assert last > 4096


# ------------------------------------------------------------------------------- what is measured


# -------------------------------------------------------------------------------- the command


def run(capsys, *argv: str) -> tuple[int, str, str]:
    """Exit status, output and errors of the command."""
    status = memory.main(list(argv))
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command_prints_every_term(capsys):
    status, out, err = run(capsys, "--quantize", "nf4", "--gpu", "24")
    assert (status, err) == (0, "")
    for term in planned(24).terms:
        assert term.name in out
    assert "Environments that can decode at once: " in out and "Tokens of a micro-batch: " in out
    assert "not measured" in out and "modelled" in out and "Memory of the host" in out


def test_a_plan_that_does_not_fit(capsys):
    status, out, err = run(capsys, "--gpu", "24", "--model", "Qwen/Qwen2.5-VL-7B-Instruct")
    assert status == 1 and "it does not fit" in out
    assert err.count("\n") == 1 and "--quantize nf4" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "qwen2.5-vl-9b"], "did you mean qwen2.5-vl-"),
        (["--gpu", "0"], "--gpu must be"),
        (["--gpu", "nan"], "--gpu must be"),
        (["--gpu", "inf"], "--gpu must be"),
        (["--gpu", "big"], "--gpu"),
        (["--lora-rank", "0"], "--lora-rank must be at least 1"),
        (["--envs", "-4"], "--envs must be at least 1"),
        (["--micro-tokens", "100"], "one row"),
        (["--quantize", "int3"], "--quantize"),
        (["--optimizer", "sgd"], "'adamw8bit'"),
        (["--envs", "many"], "--envs"),
        (["--colour", "red"], "--colour"),
        (["--gpu"], "--gpu"),
    ],
)
def test_bad_flags(capsys, argv, said):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert not set(err) & set("│╭╰─")


def test_help_is_no_error(capsys):
    with pytest.raises(SystemExit) as ended:
        memory.main(["--help"])
    assert not ended.value.code
    assert "--micro-tokens" in capsys.readouterr().out


def test_local_folders(capsys, tmp_path):
    assert run(capsys, "--model", str(tmp_path))[0] == 2
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    status, _, err = run(capsys, "--model", str(tmp_path))
    assert status == 2 and "is a bert" in err and err.count("\n") == 1
    SmolVLMConfig().save_pretrained(tmp_path)
    status, out, err = run(capsys, "--model", str(tmp_path), "--gpu", "80")
    assert (status, err) == (0, "") and str(tmp_path) in out.replace("\n", "")
