"""turbo/merge.py: peft loads the result, and its logits are those of weights merged by hand.

Left out: how single adapters are read (`test_adapters.py`).
"""

import json
import math

import lora_folders
import pytest
import tiny_models
import torch
from lora_folders import deltas, dense, logits, with_adapters
from safetensors.torch import load_file

from turbo import checkpoint, merge
from turbo.hub import model_sha256
from turbo.kernels.reference import ties_merge_reference, trim
from turbo.parallel import Crew
from turbo.run import Run

RANKS = {"a": 4, "b": 3, "c": 6}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = lora_folders.save_base(tmp_path_factory.mktemp("merge") / "base")
    (folder / "tokenizer.json").write_text("{}")  # as one that is copied along
    return folder


@pytest.fixture(scope="module")
def adapters(base):
    """Three adapters of different ranks and scales; the last one on other modules as well."""
    options = {"b": dict(use_rslora=True), "c": dict(target_modules=["q_proj", "o_proj"])}
    for seed, (name, rank) in enumerate(RANKS.items()):
        folder = base.parent / name
        lora_folders.save_adapter(folder, base, seed, r=rank, **options.get(name, {}))
    return [base.parent / name for name in RANKS]


def run(out, *argv):
    """The record of a merge that succeeds."""
    assert merge.main([*map(str, argv), "--out", str(out)]) == 0
    return json.loads((out / "merge.json").read_text())


def by_hand(base, folders, weights, density=None):
    """M of every matrix, from peft's products and the fp64 reference; linear without a density."""
    model = with_adapters(base, *folders)
    each = [deltas(model, str(i)) for i in range(len(folders))]
    merged = {}
    for name in dict.fromkeys(n for d in each for n in d):
        shape = next(d[name].shape for d in each if name in d)
        tau = [d.get(name, torch.zeros(shape)).double() for d in each]
        if density is None:
            merged[name] = sum(w * t for w, t in zip(weights, tau, strict=True)) / sum(weights)
        else:
            zero = torch.zeros(shape, dtype=torch.float64)
            merged[name] = ties_merge_reference(zero, tau, weights, density)
    return merged


@pytest.mark.parametrize(
    ("flags", "density"),
    [("--density 0.6", 0.6), ("--method linear", None), ("--density 1 --weights 3 1 2", 1.0)],
)
def test_an_exact_merge_has_the_logits_of_dense_weights(base, adapters, tmp_path, flags, density):
    weights = [3.0, 1.0, 2.0] if "weights" in flags else [1.0] * 3
    record = run(tmp_path / "out", *adapters, *flags.split(), "--exact")
    whole = run(tmp_path / "model", *adapters, *flags.split(), "--exact", "--base", base)
    changes = by_hand(base, adapters, weights, density)
    wanted = logits(dense(base, changes))
    got = logits(with_adapters(base, tmp_path / "out"))
    assert (got - wanted).abs().max() < 1e-4
    model = lora_folders.open_base(tmp_path / "model")
    assert (logits(model) - wanted).abs().max() < 1e-4
    assert (logits(lora_folders.open_base(base)) - wanted).abs().max() > 0.1  # it can be told
    assert record["rank"] <= (13 if density is None else 32)  # linear: no more than the sum
    assert all(m["relative_error"] < 1e-5 for m in record["matrices"].values())
    assert record["matrices"].keys() == changes.keys() == whole["matrices"].keys()
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"


def test_a_truncated_merge_tells_its_error(base, adapters, tmp_path, capsys):
    """It is that of the best matrix of this rank (Eckart and Young), and that of the files."""
    record = run(tmp_path / "out", *adapters, "--rank", 5)
    found = deltas(with_adapters(base, tmp_path / "out"))
    for name, wanted in by_hand(base, adapters, [1.0] * 3, 0.8).items():
        told = record["matrices"][name]["relative_error"]
        error = ((found[name] - wanted).norm() / wanted.norm()).item()
        values = torch.linalg.svdvals(wanted)
        best = (values[5:].square().sum().sqrt() / wanted.norm()).item()
        assert told == pytest.approx(error, rel=1e-4) == pytest.approx(best, rel=1e-4)
        assert 0.05 < told < 1
    errors = {name: m["relative_error"] for name, m in record["matrices"].items()}
    worst = max(errors, key=errors.get)
    said = capsys.readouterr().out
    assert f"{sum(errors.values()) / len(errors):.2%} in the mean" in said
    assert f"{errors[worst]:.2%} in {worst}" in said
    more = run(tmp_path / "more", *adapters)["matrices"]
    assert all(m["relative_error"] < errors[name] for name, m in more.items())


def test_the_default_rank_is_the_sum_and_exact_for_a_linear_merge(base, adapters, tmp_path):
    record = run(tmp_path / "out", *adapters, "--method", "linear", "--weights", 1, 0, 3)
    assert record["rank"] == sum(RANKS.values())
    assert all(m["relative_error"] < 1e-5 for m in record["matrices"].values())
    found = deltas(with_adapters(base, tmp_path / "out"))
    for name, wanted in by_hand(base, adapters, [1.0, 0.0, 3.0]).items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=0, atol=1e-5)


def test_matrices_that_some_adapters_lack(base, adapters, tmp_path, capsys):
    """In TIES the others decide alone; in a linear merge the matrix moves towards the base."""
    name = "model.layers.1.self_attn.o_proj"
    own = deltas(with_adapters(base, adapters[2]))[name]
    for flags, wanted in (("--density 1", own), ("--method linear", own / 3)):
        out = tmp_path / flags[-1]
        record = run(out, *adapters, *flags.split(), "--exact")
        assert record["matrices"][name]["adapters"] == 1
        torch.testing.assert_close(deltas(with_adapters(base, out))[name], wanted)
        assert "6 matrices are not in all adapters" in capsys.readouterr().out
    record = run(tmp_path / "none", *adapters, "--weights", 1, 1, 0, "--exact")
    assert not deltas(with_adapters(base, tmp_path / "none"))[name].any()
    assert record["matrices"][name]["relative_error"] == 0


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_copies_of_one_adapter_merge_to_it(base, adapters, tmp_path, method):
    folder = adapters[0]
    flags = ["--method", method, "--density", 1, "--rank", RANKS["a"]]
    run(tmp_path / "out", folder, folder, folder, "--weights", 1, 5, 0.5, *flags)
    own = deltas(with_adapters(base, folder))
    for name, found in deltas(with_adapters(base, tmp_path / "out")).items():
        torch.testing.assert_close(found, own[name], rtol=0, atol=2e-6)
    if method == "ties":  # trimmed, they merge to what trimming leaves of one
        run(tmp_path / "trimmed", folder, folder, "--density", 0.5, "--exact")
        for name, found in deltas(with_adapters(base, tmp_path / "trimmed")).items():
            torch.testing.assert_close(found, trim(own[name], 0.5), rtol=0, atol=2e-6)


def test_peft_merges_alike_where_all_weights_are_one(base, adapters, tmp_path):
    """Density 0.5 keeps as many entries in both: peft rounds their number down, we to the next."""
    two = adapters[:2]
    for weights, alike in (([1.0, 1.0], True), ([3.0, 1.0], False)):
        model = with_adapters(base, *two)
        options = dict(combination_type="ties_svd", density=0.5, svd_rank=32)
        model.add_weighted_adapter(["0", "1"], weights, "merged", **options)
        wanted = deltas(model, "merged")
        out = tmp_path / str(alike)
        run(out, *two, "--density", 0.5, "--exact", "--weights", *weights)
        found = deltas(with_adapters(base, out))
        assert found.keys() == wanted.keys()
        near = [torch.allclose(found[n], wanted[n], atol=1e-5) for n in wanted]
        assert all(near) if alike else not any(near)


def test_the_names_of_modules_stay_short_where_all_agree(base, adapters, tmp_path):
    run(tmp_path / "same", *adapters[:2])
    config = json.loads((tmp_path / "same" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(lora_folders.TARGETS)
    assert config["base_model_name_or_path"] == str(base) and config["task_type"] == "CAUSAL_LM"
    run(tmp_path / "other", *adapters)
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 8 and config["r"] == config["lora_alpha"] == 13
    assert "model.layers.0.self_attn.o_proj" in config["target_modules"]


def test_factors_are_saved_as_the_first_adapter_was(base, adapters, tmp_path):
    for flags, dtype in (([], torch.float32), (["--dtype", "bfloat16"], torch.bfloat16)):
        out = tmp_path / str(dtype)
        record = run(out, *adapters[:2], "--method", "linear", *flags)
        assert {t.dtype for t in load_file(out / "adapter_model.safetensors").values()} == {dtype}
        errors = [m["relative_error"] for m in record["matrices"].values()]
        assert max(errors) < 1e-5 if not flags else 1e-3 < max(errors) < 1e-2  # rounding is told
    again = run(tmp_path / "again", tmp_path / str(torch.bfloat16))
    assert again["dtype"] == "bfloat16"


def test_a_large_matrix_is_decomposed_nearly_as_well_as_can_be():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 60, generator=generator) for n in (300, 260))
    matrix = left @ right.T + torch.randn(300, 260, generator=generator)
    found = merge.truncate(matrix, 24)  # few enough of 260 for the faster way
    values = torch.linalg.svdvals(matrix)
    best = (values[24:].square().sum().sqrt() / matrix.norm()).item()
    assert best <= found.error * (1 + 1e-5) < 1.01 * best
    assert found.error == merge.truncate(matrix, 24).error  # the same at every call
    assert merge.truncate(matrix, 0).a.shape == (260, 260)
    assert merge.truncate(left @ right.T, 0).a.shape == (60, 260)
    zero = merge.truncate(torch.zeros(4, 6), 2)
    assert zero.error == 0 and not (zero.b @ zero.a).any()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with two checkpoints, of which only the factors are not those of a start."""
    path = tmp_path_factory.mktemp("merge-runs") / "run"
    config = tiny_models.new_config(model=str(tiny_models.random_folder()), guidance="none")
    checkpoint.create_run(path, config, model_sha256(config))
    own = Run(config, path, Crew())
    for update in (1, 2):
        own.lora.load_state_dict(tiny_models.noisy_lora(own.vlm, update, 0.3).state_dict())
        own.update = update
        own.save()
    return path


def test_checkpoints_of_a_run_merge_too(runs, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    folders = sorted((runs / "checkpoints").iterdir())
    record = run(tmp_path / "out", *folders, "--density", 0.7, "--exact")
    newest = run(tmp_path / "newest", runs, "--method", "linear")
    assert newest["rank"] == 4 and record["base"] == str(tiny_models.random_folder())
    vlm = tiny_models.random_model()
    loras = [tiny_models.noisy_lora(vlm, update, 0.3) for update in (1, 2)]
    plain = AutoModelForImageTextToText.from_pretrained(tiny_models.random_folder())
    found = deltas(PeftModel.from_pretrained(plain, tmp_path / "out", adapter_name="0"))
    assert found.keys() == loras[0].factors.keys()  # none of the vision tower's
    for name, got in found.items():
        tau = [x.scale * (x.factors[name][1] @ x.factors[name][0]).double() for x in loras]
        wanted = ties_merge_reference(torch.zeros_like(tau[0]), tau, [1.0, 1.0], 0.7)
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--density 0", "--density must be more than 0 and at most 1, got 0.0"),
        ("--density nan", "--density must be more than 0"),
        ("--weights 1 2", "--weights: expected 3 (one per adapter), got 2"),
        ("--weights 1 -1 1", "--weights: expected finite, >= 0 and not all 0"),
        ("--rank -1", "--rank must be 1 or more"),
        ("--rank 4 --exact", "--exact finds the rank itself"),
        ("--base BASE", "--base is for --exact"),
        ("--exact --base ABSENT", "is not a folder with a Hugging Face model"),
    ],
)
def test_what_cannot_be_merged_is_refused(base, adapters, tmp_path, capsys, flags, message):
    flags = [str(base) if f == "BASE" else f for f in flags.split()]
    argv = [*map(str, adapters), "--out", str(tmp_path / "out"), *flags]
    assert merge.main(argv) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("error: ") and err.count("\n") == 1 and out == ""
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_replaced_only_if_it_is_a_merge(base, adapters, tmp_path, capsys):
    out, pair = tmp_path / "out", [str(a) for a in adapters[:2]]
    first = run(out, *pair)
    assert merge.main([*pair, "--out", str(out)]) == 2
    assert "is there already: choose another --out, or add --overwrite" in capsys.readouterr().err
    assert run(out, *pair, "--rank", 2, "--overwrite")["rank"] == 2 < first["rank"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter").write_text("dear")
    assert merge.main([*pair, "--out", str(other), "--overwrite"]) == 2
    assert "is no merge" in capsys.readouterr().err and (other / "letter").exists()
    argv = [*pair, str(out / "x" / ".."), "--out", str(out), "--overwrite"]
    assert merge.main(argv) == 2 and (out / "merge.json").exists()


def test_a_base_that_is_another_model(base, adapters, tmp_path, capsys):
    vlm = str(tiny_models.random_folder())
    argv = [*map(str, adapters), "--exact", "--base", vlm, "--out", str(tmp_path / "out")]
    assert merge.main(argv) == 2
    assert "has no module 'model.layers.0" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_one_adapter_is_compressed(base, adapters, tmp_path):
    record = run(tmp_path / "out", adapters[2], "--method", "linear", "--rank", 2)
    assert record["rank"] == 2 and math.isclose(record["weights"][0], 1.0)
    errors = [m["relative_error"] for m in record["matrices"].values()]
    assert min(errors) > 0.1 and max(errors) < 1
