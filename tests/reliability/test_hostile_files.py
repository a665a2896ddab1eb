"""Run folders that somebody changed: one line says what is wrong, nothing is run, nothing is lost.

A manifest that vouches for the changed files stands for one that was written by whoever changed
them.
"""

import json
import os
import pickle
import shutil

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from trainer import FLAGS, here

from turbo import checkpoint, train


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small run, to be copied."""
    path = tmp_path_factory.mktemp("hostile") / "run"
    status, _, err = here(path, "--updates", "1")
    assert status == 0, err
    return path


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def vouch(run):
    folder = run / "checkpoints" / "00000001"
    names = ("adapter.safetensors", "state.safetensors", "meta.json")
    files = {name: checkpoint._fingerprint(folder / name) for name in names}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


def refused(run, capsys):
    capsys.readouterr()
    assert train.main(["numberline", "--resume", str(run), "--updates", "2"]) == 2
    err = capsys.readouterr().err
    lines = [x for x in err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


class Bomb:
    """Says that it was unpickled."""

    def __reduce__(self):
        return os.system, ("touch unpickled",)


@pytest.mark.parametrize("name", ["adapter", "state"])
def test_a_pickle_is_not_read(run, capsys, monkeypatch, name):
    monkeypatch.chdir(run)
    for content in (pickle.dumps(Bomb()), None):
        file = run / "checkpoints" / "00000001" / f"{name}.safetensors"
        if content is None:
            torch.save({"a": Bomb()}, file)
        else:
            file.write_bytes(content)
        vouch(run)
        assert "cannot be read" in refused(run, capsys)
    assert not (run / "unpickled").exists()


def change_shape(tensors):
    name = next(iter(tensors))
    tensors[name] = torch.zeros(3, 3)


def change_name(tensors):
    tensors["../../outside"] = tensors.pop(next(iter(tensors)))


def change_kind(tensors):
    for name in tensors:
        tensors[name] = tensors[name].to(torch.complex64)


@pytest.mark.parametrize("name", ["adapter", "state"])
@pytest.mark.parametrize("change", [change_shape, change_name, change_kind, dict.clear])
def test_tensors_of_something_else_are_refused(run, capsys, name, change):
    file = run / "checkpoints" / "00000001" / f"{name}.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    vouch(run)
    assert "is not of these settings" in refused(run, capsys)


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"update": "many"},
        {"update": 1, "moments": 42, "env_steps": 1, "elapsed": 1, "beta": 1, "teacher": None},
        {"update": -7, "env_steps": None, "elapsed": 0, "beta": 0, "teacher": {"count": 3}},
    ],
)
def test_other_meta_data_are_refused(run, capsys, meta):
    (run / "checkpoints" / "00000001" / "meta.json").write_text(json.dumps(meta))
    vouch(run)
    assert "is not of these settings" in refused(run, capsys)


def test_a_damaged_newest_checkpoint_is_left_out_with_a_warning(run, capsys):
    newer = shutil.copytree(run / "checkpoints/00000001", run / "checkpoints/00000002")
    (newer / "state.safetensors").write_bytes(b"half of it")
    assert train.main(["numberline", "--resume", str(run), "--updates", "2"]) == 0
    err = capsys.readouterr().err
    assert "warning: " in err and "00000002/state.safetensors is not the file" in err
    assert f"going on from {run / 'checkpoints/00000001'}" in err
    folder, problems = checkpoint.newest(run)
    assert folder.name == "00000002" and problems == []  # written anew


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c["config"].update(learning_rate="fast"), "learning_rate cannot be 'fast'"),
        (lambda c: c["config"].update(model="/etc/passwd"), "model '/etc/passwd' is a file"),
        (
            lambda c: c["config"].update(env="blackjack"),
            "was begun with the environment blackjack, not numberline",
        ),
        (lambda c: c.update(config=[1]), "has no settings"),
        (lambda c: c.update(model_sha256=None), "was trained from another model"),
        (lambda c: c["config"].update(updates=-1), "--updates must be"),
    ],
)
def test_a_changed_config_is_refused(run, capsys, change, told):
    record = json.loads((run / "config.json").read_text())
    change(record)
    (run / "config.json").write_text(json.dumps(record))
    argv = ["numberline", "--resume", str(run)]
    assert train.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and told in err


def test_a_record_that_was_changed_is_named(run, capsys):
    (run / "metrics.jsonl").write_text('{"update": 1}\nnonsense\n')
    assert "metrics.jsonl, line 2 cannot be read" in refused(run, capsys)


def test_code_of_a_model_folder_is_not_run(tmp_path, capsys, monkeypatch):
    """A folder that brings a class of its own is refused: nothing asks for its code."""
    folder = shutil.copytree(tiny_models.fitted_folder(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForImageTextToText": "own.Model", "AutoConfig": "own.Config"}
    config["model_type"] = "of_its_own"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    flags = [*FLAGS.split(), "--model", str(folder), "--out", str(tmp_path / "run")]
    with pytest.raises((ValueError, SystemExit, KeyError)):
        status = train.main(["numberline", *flags])
        raise SystemExit(status)
    assert not (tmp_path / "ran").exists()
