"""turbo/checkpoint.py: whole or not at all, and a message for everything that cannot be read."""

import copy
import dataclasses
import json
import os

import pytest
import torch

from turbo import checkpoint
from turbo.checkpoint import CheckpointError
from turbo.config import TrainConfig
from turbo.optimizer import load_optimizer, optimizer_tensors


def save(run, update, keep=2, value=1.0, entries=(), before=None, **meta):
    adapter = {"a": torch.full((2, 3), value)}
    state = {"teacher/x": torch.arange(4.0).view(2, 2).T, "optimizer/0/step": torch.tensor(3.0)}
    for n in entries:
        state |= {f"teacher/history/{n}.q.lora_{x}": torch.full((4, 4), value + n) for x in "ab"}
    meta = {"update": update, **meta}
    return checkpoint.save(run, update, adapter, state, meta, keep, before=before)


def histories(path):
    return sorted(p.name for p in path.glob("history-*"))


def test_what_is_saved_comes_back(tmp_path):
    path = save(tmp_path, 12, beta=0.1, elapsed=1 / 3)
    assert path == tmp_path / "checkpoints" / "00000012"
    assert sorted(os.listdir(path)) == [
        "adapter.safetensors",
        "manifest.json",
        "meta.json",
        "state.safetensors",
    ]
    found = checkpoint.load(tmp_path)
    assert found.folder == path
    assert torch.equal(found.adapter["a"], torch.ones(2, 3))
    assert torch.equal(found.state["teacher/x"], torch.arange(4.0).view(2, 2).T)
    assert found.meta == {"update": 12, "beta": 0.1, "elapsed": 1 / 3}


def test_the_newest_are_kept(tmp_path):
    for update in (1, 2, 10, 9):
        save(tmp_path, update, keep=2, value=float(update))
    names = [p.name for p in checkpoint.checkpoints(tmp_path)]
    assert names == ["00000009", "00000010"]
    assert checkpoint.load(tmp_path).meta["update"] == 10
    save(tmp_path, 10, value=-1.0)  # it is there and whole: left as it is
    assert checkpoint.load(tmp_path).adapter["a"][0, 0] == 10
    (tmp_path / "checkpoints" / "00000010" / "meta.json").write_text("{}")
    save(tmp_path, 10, value=-1.0)  # a damaged one is replaced
    assert checkpoint.load(tmp_path).adapter["a"][0, 0] == -1


def test_one_of_several_is_taken(tmp_path):
    for update in (1, 2):
        save(tmp_path, update, value=float(update))
    assert checkpoint.load(tmp_path, 1).meta["update"] == 1
    with pytest.raises(CheckpointError, match="no checkpoint of update 3; those kept: 1, 2"):
        checkpoint.load(tmp_path, 3)
    (checkpoint.find(tmp_path, 2) / "meta.json").write_text("{}")
    with pytest.raises(CheckpointError, match="its size differs"):  # asked for, so not passed over
        checkpoint.load(tmp_path, 2)


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*arguments):
        raise OSError("no space left on device")

    for name in ("write_json", "_sync", "save_file"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, full)
            with pytest.raises(OSError, match="no space"):
                save(tmp_path, 2)
        assert os.listdir(tmp_path / "checkpoints") == ["00000001"]  # and it takes no room
    assert checkpoint.load(tmp_path).meta["update"] == 1
    (tmp_path / "checkpoints" / "00000002.partial").mkdir()  # of a process that was killed
    assert checkpoint.load(tmp_path).meta["update"] == 1
    save(tmp_path, 2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["00000001", "00000002"]


def test_checkpoints_share_their_history(tmp_path):
    """What the one before has is linked, not written; what the history dropped is not kept."""
    one = save(tmp_path, 1, entries=(0, 1))
    two = save(tmp_path, 2, entries=(1, 2), before=one, value=5.0)
    assert histories(one) == [f"history-0000000{n}.safetensors" for n in (0, 1)]
    assert histories(two) == [f"history-0000000{n}.safetensors" for n in (1, 2)]
    assert (one / histories(one)[1]).samefile(two / histories(two)[0])
    for update, wanted in ((1, {0: 1, 1: 2}), (2, {1: 2, 2: 7})):
        state = checkpoint.load(tmp_path, update).state
        entries = {k: v for k, v in state.items() if k.startswith("teacher/history/")}
        assert {int(k.split("/")[2].split(".")[0]): v[0, 0] for k, v in entries.items()} == wanted
        assert "teacher/x" in state and len(entries) == 4
    save(tmp_path, 3, entries=(1, 2, 3), before=two, keep=1)  # drops those that it links to
    assert len(checkpoint.load(tmp_path).state) == 8


def test_what_cannot_be_shared_is_written(tmp_path, monkeypatch):
    one = save(tmp_path, 1, entries=(0, 1))
    (one / histories(one)[0]).write_bytes(b"shorter")
    two = save(tmp_path, 2, entries=(0, 1), before=one)
    own, shared = ((two / name).stat().st_nlink for name in histories(two))
    assert (own, shared) == (1, 2) and checkpoint.newest(tmp_path) == (two, [])

    def refuse(*names):
        raise PermissionError("no links on this file system")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "link", refuse)
        three = save(tmp_path, 3, entries=(0, 1), before=two)
    four = save(tmp_path, 4, entries=(0, 1), before=tmp_path / "checkpoints" / "00000009")  # gone
    for path in (three, four):
        assert [(path / name).stat().st_nlink for name in histories(path)] == [1, 1]
    assert checkpoint.load(tmp_path).state.keys() == checkpoint.load(tmp_path, 3).state.keys()


@pytest.mark.parametrize("how", ["truncated", "one bit", "missing"])
def test_a_damaged_history_stops_the_teacher_alone(tmp_path, how):
    """A policy is loaded without it."""
    save(tmp_path, 1, entries=(0,))
    path = save(tmp_path, 2, entries=(0, 1))
    break_file(path / histories(path)[1], how)
    assert checkpoint.load(tmp_path).meta["update"] == 1
    with pytest.raises(CheckpointError, match=r"history-00000001\.safetensors"):
        checkpoint.load(tmp_path, 2)
    found = checkpoint.load(tmp_path, history=False)
    assert found.meta["update"] == 2 and sorted(found.state) == ["optimizer/0/step", "teacher/x"]


def test_to_go_on_damaged_history_is_left_out_where_it_is_so_in_all(tmp_path):
    one = save(tmp_path, 1, entries=(0, 1))
    two = save(tmp_path, 2, entries=(0, 1, 2), before=one)
    assert checkpoint.load_to_go_on(tmp_path).lost == {}
    break_file(two / histories(two)[2], "one bit")  # the first one has no such entry
    found = checkpoint.load_to_go_on(tmp_path)
    assert (found.folder, found.lost, len(found.problems)) == (one, {}, 1)
    shared = one / histories(one)[0]
    with shared.open("r+b") as file:  # in place: the file of both
        file.write(b"damaged")
    with pytest.raises(CheckpointError, match="no checkpoint that is whole"):
        checkpoint.load(tmp_path)
    found = checkpoint.load_to_go_on(tmp_path)
    assert found.folder == two and sorted(found.lost) == [0, 2]
    assert all(f"history-0000000{n}.safetensors" in why for n, why in found.lost.items())
    kept = {k.split("/")[2][0] for k in found.state if k.startswith("teacher/history/")}
    assert kept == {"1"}
    for folder in (one, two):
        break_file(folder / "adapter.safetensors", "one bit")
    with pytest.raises(CheckpointError, match=r"adapter.*history|history.*adapter"):
        checkpoint.load_to_go_on(tmp_path)


def break_file(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[:-3])
    elif how == "one bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "missing":
        path.unlink()
    else:
        path.write_bytes(b"\x80\x04\x95")  # a pickle begins so


@pytest.mark.parametrize("how", ["truncated", "one bit", "missing", "pickle"])
@pytest.mark.parametrize(
    "name", ["adapter.safetensors", "state.safetensors", "meta.json", "manifest.json"]
)
def test_a_damaged_checkpoint_is_left_out(tmp_path, name, how):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    break_file(path / name, how)
    folder, problems = checkpoint.newest(tmp_path)
    assert folder.name == "00000001" and len(problems) == 1 and name in problems[0]
    assert checkpoint.load(tmp_path).meta["update"] == 1
    break_file(folder / name, how)
    with pytest.raises(CheckpointError, match=r"no checkpoint that is whole: .*02.*01"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "{}",
        '{"files": {}}',
        '{"files": {"../../secret": {}, "state.safetensors": {}, "meta.json": {}}}',
        '{"files": {"adapter.safetensors": 1, "state.safetensors": 2, "meta.json": 3}}',
        '{"files": {"adapter.safetensors": 1, "state.safetensors": 2, "meta.json": 3, "x": 4}}',
        "[" * 100_000,
    ],
)
def test_a_hostile_manifest_is_a_damaged_checkpoint(tmp_path, manifest):
    path = save(tmp_path, 2)
    (path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"no checkpoint that is whole: .*00000002"):
        checkpoint.load(tmp_path)


def test_other_names_are_no_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        checkpoint.load(tmp_path)
    save(tmp_path, 3)
    for name in ("00000004.partial", "4", "٠٠٠٠٠٠٠٤", "newest"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["00000003"]


def test_a_run_records_settings_and_versions(tmp_path):
    run = tmp_path / "deep" / "run"
    config = TrainConfig(seed=7)
    checkpoint.create_run(run, config, "abc")
    record = checkpoint.read_run(run)
    assert record["config"] == dataclasses.asdict(config) and record["model_sha256"] == "abc"
    assert record["versions"]["torch"] == torch.__version__
    assert {"gtr-turbo", "commit", "python", "transformers", "numpy", "processor"} <= set(
        record["versions"]
    )
    assert TrainConfig(**json.loads((run / "config.json").read_text())["config"]) == config


def test_an_existing_run_is_refused_or_replaced(tmp_path):
    run = tmp_path / "run"
    checkpoint.create_run(run, TrainConfig(), "a")
    save(run, 5)
    with pytest.raises(CheckpointError, match=r"already exists.*--resume.*--overwrite"):
        checkpoint.create_run(run, TrainConfig(), "a")
    assert checkpoint.load(run).meta["update"] == 5
    checkpoint.create_run(run, TrainConfig(overwrite=True), "b")
    assert checkpoint.checkpoints(run) == [] and checkpoint.read_run(run)["model_sha256"] == "b"


def test_overwrite_leaves_other_folders_alone(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="is not a run directory"):
        checkpoint.create_run(home, TrainConfig(overwrite=True), "a")
    assert (home / "letter.txt").read_text() == "dear"
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(CheckpointError):
        checkpoint.create_run(file, TrainConfig(overwrite=True), "a")
    assert file.read_text() == "x"
    empty = tmp_path / "empty"
    empty.mkdir()
    checkpoint.create_run(empty, TrainConfig(), "a")  # nothing to lose


def test_what_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a run directory: it has no config\.json"):
        checkpoint.read_run(tmp_path / "absent")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')  # a model's config
    with pytest.raises(CheckpointError, match="has no settings"):
        checkpoint.read_run(tmp_path)
    (tmp_path / "config.json").write_text("nonsense")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read_run(tmp_path)


def test_the_optimizer_goes_on_with_the_same_bits():
    def new():
        p = [torch.nn.Parameter(torch.full((3,), 0.5)), torch.nn.Parameter(torch.ones(2, 2))]
        return p, torch.optim.AdamW(p, lr=0.1, eps=1e-7, weight_decay=0.0)

    def steps(p, optimizer, first, last):
        for k in range(first, last):
            for i, x in enumerate(p):
                x.grad = torch.sin(x.detach() * (k + i + 1))
            optimizer.step()

    p, optimizer = new()
    steps(p, optimizer, 0, 3)
    tensors = optimizer_tensors(optimizer)
    assert all(k.startswith("optimizer/") for k in tensors) and len(tensors) == 6
    assert all(v.device.type == "cpu" for v in tensors.values())
    q, other = new()
    with torch.no_grad():
        for a, b in zip(q, p, strict=True):
            a.copy_(b)
    kept = [x.detach().clone() for x in p], copy.deepcopy(optimizer.state_dict())
    steps(p, optimizer, 3, 5)  # what was taken is not what goes on
    with torch.no_grad():
        for a, b in zip(p, kept[0], strict=True):
            a.copy_(b)
    optimizer.load_state_dict(kept[1])
    load_optimizer(other, {**tensors, "teacher/x": torch.zeros(1)})
    steps(p, optimizer, 3, 6)
    steps(q, other, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(p, q, strict=True))
    r, fresh = new()
    with torch.no_grad():
        for a, b in zip(r, q, strict=True):
            a.copy_(b)
    steps(r, fresh, 6, 7)
    steps(q, other, 6, 7)
    assert not torch.equal(r[0], q[0])  # the moments matter


def test_a_trial_of_a_folder_leaves_no_trace(tmp_path):
    """Also where its parents could be made, and it could not."""
    checkpoint.try_folder(tmp_path / "a" / "b")
    with pytest.raises(OSError, match="too long"):
        checkpoint.try_folder(tmp_path / "c" / ("d" * 300))
    assert list(tmp_path.iterdir()) == []
