"""bench.train_step: the recipe in the same run, figures per turn, memory, what is refused."""

import contextlib
import csv

import pytest
import torch
from family_models import folder, roomy_folder

from bench import train_step
from bench.harness import COLUMNS
from bench.train_step import PRODUCT, RECIPE, UNITS, BenchConfig, Setting, compare, summaries
from turbo.footprint import matrix_bytes
from turbo.model import Engine, random_model
from turbo.parallel import Crew, run_crew
from turbo.shapes import find_config, text_shape

SMALL = BenchConfig(updates=2, workers=1, steps=8, envs=8, recipe_steps=1)


@pytest.fixture
def one_variant(monkeypatch):
    """Only the guided variant, at sizes that take a second; no trials."""
    monkeypatch.setattr(train_step, "VARIANTS", {"kl": train_step.VARIANTS["kl"]})
    monkeypatch.setattr(train_step, "pick_setting", lambda *a: Setting(torch.float32, 1, "cpu"))
    monkeypatch.setattr(train_step, "product_rate", lambda *a: 1e12)
    monkeypatch.setattr(train_step, "copy_rate", lambda *a: 1e9)


def test_every_phase_is_timed_for_both(one_variant, tmp_path):
    pytest.importorskip("peft")
    measured = train_step.updates(Crew(), SMALL, tmp_path)
    (ours,), (theirs,) = measured.turns["kl"], measured.turns[RECIPE]
    for figures in (ours, theirs):
        for phase in ("rollout", "score", "train", "merge", "checkpoint"):
            assert figures[f"seconds_{phase}"] > 0, phase
        assert figures["utilisation"] == figures["flops_per_second"] / 1e12
        seconds = figures["model_flops"] / figures["flops_per_second"]
        phases = sum(figures.get(f"seconds_{phase}", 0) for phase in train_step.PHASES)
        assert seconds == pytest.approx(phases, rel=1e-2)
    times = ours["steps_per_second"] / theirs["steps_per_second"]
    assert ours["times_the_recipe"] == times
    assert list((tmp_path / "kl").glob("checkpoints/*/manifest.json"))
    assert list((tmp_path / "recipe").glob("*/adapter_model.safetensors"))


def test_rows_of_a_whole_run(one_variant, tmp_path, monkeypatch, capsys):
    """Through the command line, less the endpoint and the processes whose memory is measured."""
    pytest.importorskip("peft")
    path = tmp_path / "cpu.csv"
    monkeypatch.setattr(train_step, "results_file", lambda name: path)
    monkeypatch.setattr(train_step, "corrector", lambda port: contextlib.nullcontext())
    monkeypatch.setattr(train_step, "memory", lambda *a: {"kl": 5, RECIPE: 7})
    flags = "--updates 2 --workers 1 --steps 8 --envs 8 --recipe-steps 1"
    assert train_step.main(flags.split()) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    found = {(row["variant"], row["metric"]): row for row in rows}
    assert len(found) == len(rows)
    assert found[RECIPE, "peak_bytes"]["median"] == "7"
    assert found["guidance=kl", "times_the_recipe"]["unit"] == "1"
    assert (RECIPE, "times_the_recipe") not in found and (PRODUCT, "flops_per_second") in found
    assert "envs=1 steps=1 dtype=float32" in found[RECIPE, "steps_per_second"]["shape"]
    assert "times_the_recipe" in capsys.readouterr().out


def test_a_run_that_is_killed_leaves_the_updates_that_it_had(one_variant, tmp_path, monkeypatch):
    path, found = tmp_path / "cpu.csv", []

    def update(*arguments) -> dict[str, float]:
        found.append(path.read_text().splitlines() if path.exists() else [])
        if len(found) == 4:
            raise KeyboardInterrupt
        return {"steps_per_second": len(found), "flops_per_second": 1e9, "seconds_train": 1.0}

    monkeypatch.setattr(train_step, "results_file", lambda name: path)
    monkeypatch.setattr(train_step, "one_update", update)
    flags = "--workers 1 --steps 8 --envs 8 --recipe-steps 0 --no-memory --updates"
    with pytest.raises(KeyboardInterrupt):
        train_step.main([*flags.split(), "9"])
    for repeats, lines in enumerate(found[1:]):  # the first one warms up
        rows = [r for r in csv.DictReader(lines) if r["variant"] == "guidance=kl"]
        assert len({r["metric"] for r in rows}) == len(rows) == (4 if repeats else 0)
        assert all(r["repeats"] == str(repeats) for r in rows)
        assert all(r["metric"] != "utilisation" or r["median"] == "0.001" for r in rows)
    assert train_step.main([*flags.split(), "4"]) == 0
    lines = path.read_text().splitlines()
    assert lines[: len(found[3])] == found[3]
    whole = list(csv.DictReader(lines))[len(found[3]) - 1 :]
    assert [r["metric"] for r in whole].count("utilisation") == 1 and len(whole) == 5
    assert all(r["repeats"] == "3" for r in whole)


def test_figures_are_compared_turn_by_turn():
    turns = {
        "kl": [dict(steps_per_second=n, flops_per_second=n) for n in (30.0, 20.0)],
        RECIPE: [dict(steps_per_second=n, flops_per_second=1.0) for n in (3.0, 1.0)],
        PRODUCT: [dict(flops_per_second=n) for n in (60.0, 100.0)],
    }
    out = compare(turns)
    assert [f["times_the_recipe"] for f in out["kl"]] == [10.0, 20.0]
    assert [f["utilisation"] for f in out["kl"]] == [0.5, 0.2]
    assert "times_the_recipe" not in out[RECIPE][0] and out[PRODUCT] == turns[PRODUCT]
    figures = summaries(out)
    assert figures["kl"]["times_the_recipe"].median == 15.0
    assert set(figures[PRODUCT]) == {"flops_per_second"}
    begun = compare({"kl": turns["kl"], RECIPE: turns[RECIPE][:1], PRODUCT: turns[PRODUCT]})
    assert "times_the_recipe" not in begun["kl"][1]  # the recipe's second turn is to come
    assert summaries(begun)["kl"]["times_the_recipe"].repeats == 1
    assert summaries({"kl": []}) == {"kl": {}}
    assert "times_the_recipe" not in compare({k: turns[k] for k in ("kl", PRODUCT)})["kl"][0]


def test_what_is_shown_and_how():
    assert list(UNITS) == list(train_step.REPORTED)
    shown = [train_step.number(n) for n in (0.0123, 12.34, 480.4, 1.5e6, 2.25e11, 3.1e13)]
    assert shown == ["0.012", "12.3", "480", "1.500M", "225G", "31.0T"]
    shapes = train_step.describe(BenchConfig(steps=64), 2, Setting(torch.float32, 1, "cpu"))
    assert train_step.settings(BenchConfig(port=99))["gtr"].teacher_url.endswith(":99/v1")
    assert "workers=2" in shapes["gtr"] and "steps=64" in shapes["none"]
    for part in ("envs=1", "steps=64", "dtype=float32", "threads=1"):
        assert part in shapes[RECIPE]


@pytest.mark.parametrize(
    "flag,why",
    [
        ("--updates 1", "--updates must be"),
        ("--recipe-steps -1", "--recipe-steps must be"),
        ("--model absent", "absent"),
        ("--only all", "--only must be one of none; kl"),
        ("--decode-graphs", "needs a GPU"),
    ],
)
def test_what_cannot_be_measured_is_refused(flag, why, capsys):
    assert train_step.main(flag.split()) == 2
    assert why in capsys.readouterr().err


@pytest.mark.long
def test_a_model_of_random_weights(tmp_path, monkeypatch, capsys):
    """One variant of one family's configuration, as a GPU measures the published shapes."""
    pytest.importorskip("peft")
    monkeypatch.setattr(train_step, "results_file", lambda name: tmp_path / "cpu.csv")
    monkeypatch.setattr(train_step, "product_rate", lambda *a: 1e12)
    monkeypatch.setattr(train_step, "copy_rate", lambda *a: 1e9)
    monkeypatch.setattr(train_step, "pick_setting", lambda *a: Setting(torch.float32, 1, "cpu"))
    model = roomy_folder("qwen2_5_vl", tmp_path / "model")
    flags = f"--model {model} --random-weights --only kl --recipe-steps 2 --no-memory"
    flags += " --steps 8 --envs 8 --max-new-tokens 8 --updates 2 --workers 1"
    assert train_step.main(flags.split()) == 0
    with (tmp_path / "cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["variant"] for row in rows} == {"guidance=kl", RECIPE, PRODUCT}
    found = {(row["variant"], row["metric"]): float(row["median"]) for row in rows}
    figures = {metric: n for (variant, metric), n in found.items() if variant == "guidance=kl"}
    assert figures["trained_rows"] >= 8 and figures["seconds_train"] > 0
    vlm = random_model(str(model), torch.float32, Engine("modules", "cpu"))
    # one token of all 8 environments for every time that the weights are read
    floor = figures["tokens_per_second"] / 8 * train_step.weight_bytes(vlm) / 1e9
    assert figures["decode_floor_share"] == pytest.approx(floor, rel=1e-5)  # six digits are written
    assert figures["times_the_recipe"] > 0 and (RECIPE, "decode_floor_share") not in found
    assert all("answers=8" in row["shape"] for row in rows if row["variant"] == "guidance=kl")
    assert RECIPE in capsys.readouterr().out


def test_bytes_of_the_weights_that_a_token_needs():
    """Those of the matrices and the head, in the form in which they lie in memory."""
    shape = text_shape(find_config(str(folder("qwen2_5_vl"))))
    for quantize in ("none", "nf4"):
        vlm = random_model(str(folder("qwen2_5_vl")), torch.bfloat16, Engine(quantize=quantize))
        head = 2 * shape.vocabulary * shape.hidden
        expected = matrix_bytes(shape.covered_weights, quantize == "nf4") + head
        assert train_step.weight_bytes(vlm) == expected


def test_without_peft_the_recipe_is_refused_by_name(monkeypatch, capsys):
    monkeypatch.setattr(train_step.importlib.util, "find_spec", lambda name: None)
    assert train_step.main([]) == 2
    assert "--recipe-steps 0" in capsys.readouterr().err


def test_the_memory_of_a_variant_is_its_own_processes(one_variant, tmp_path):
    assert run_crew(1, train_step.most_held, SMALL, "kl", None, tmp_path) > 1 << 20
