"""turbo/sinks.py: the logs by flag, written by the real packages where they are installed, offline;
a missing package is refused before training, a log that fails stops nothing."""

import json
import socket
import sqlite3
import sys

import pytest
import tiny_models

from turbo import sinks, train
from turbo.config import TrainConfig
from turbo.log import read_jsonl
from turbo.sinks import TensorboardSink, check_packages, logger_id, open_sinks

FLAGS = """
    --workers 1 --dtype float32 --envs 8 --group-size 4 --steps-per-update 16 --max-new-tokens 40
    --minibatch 16 --lora-rank 4 --save-every 1 --eval-episodes 0 --teacher-sample 4
"""


@pytest.fixture
def no_network(monkeypatch):
    """A connection to anything but this machine's own sockets in files fails the test."""
    tried, own = [], socket.socket.connect

    def connect(self, address):
        if self.family != getattr(socket, "AF_UNIX", None):
            tried.append(address)
            raise ConnectionRefusedError(f"a test does not call {address}")
        return own(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)  # a user who is logged in
    yield
    assert not tried


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory):
    """Where trackio keeps its data: it reads the variable once, when it is imported."""
    if "trackio" in sys.modules:
        return sys.modules["trackio"].utils.TRACKIO_DIR
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        pytest.importorskip("trackio")
    return folder


def start(run, *more):
    """Train one update of a nano model, or go on to the second."""
    model = str(tiny_models.fitted_folder())
    new = ["numberline", "--model", model, "--out", str(run), *FLAGS.split(), "--updates", "1"]
    return train.main([*(more if "--resume" in more else [*new, *more])])


def trained_twice(run, *flags):
    """A run that was resumed; the steps and the numbers that it recorded."""
    assert start(run, *flags) == 0
    assert start(run, "--resume", str(run), "--updates", "2") == 0
    records = read_jsonl(run / "metrics.jsonl")
    assert [r["update"] for r in records] == [0, 1, 1, 2, 2]
    return records


def scalars(folder):
    """What TensorBoard shows of a folder: name -> [(step, value)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder), {"scalars": 0})
    shown.Reload()
    return {
        name: [(e.step, e.value) for e in shown.Scalars(name)] for name in shown.Tags()["scalars"]
    }


def test_tensorboard(tmp_path, no_network):
    pytest.importorskip("tensorboard")
    records = trained_twice(tmp_path / "run", "--tensorboard")
    shown = scalars(tmp_path / "run" / "tensorboard")
    updates = [r for r in records if "success_rate" in r]
    assert [step for step, _ in shown["success_rate"]] == [1, 2]
    for name in ("success_rate", "seconds_rollout", "teacher_kl"):
        assert [v for _, v in shown[name]] == pytest.approx([r[name] for r in updates])
    names = {k for r in records for k, v in r.items() if v is not None}
    assert set(shown) == names  # every metric, under its own name


def test_tensorboard_shows_no_update_twice(tmp_path):
    """What a killed run wrote behind its checkpoint is replaced by what the resumed one writes."""
    pytest.importorskip("tensorboard")
    for first, updates, value in ((None, (1, 2, 3), 0.25), (2, (2, 3, 4), 0.5)):
        sink = TensorboardSink(tmp_path, first)
        for update in updates:
            sink.write(update, {"success_rate": value})
        sink.close()
    assert scalars(tmp_path)["success_rate"] == [(1, 0.25), (2, 0.5), (3, 0.5), (4, 0.5)]


def test_wandb_offline(tmp_path, no_network, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = tmp_path / "run"
    trained_twice(run, "--wandb", "project")
    wandb.teardown()
    parts = sorted((run / "wandb").glob("offline-run-*"))
    known = json.loads((run / "logger.json").read_text())["id"]
    assert len(parts) == 2 and all(p.name.endswith(f"-{known}") for p in parts)
    for part in parts:
        written = (part / f"run-{known}.wandb").read_bytes()
        assert b"success_rate" in written and b"teacher_kl_coef" in written


def test_trackio_on_this_machine(tmp_path, trackio_folder, no_network, capsys):
    run = tmp_path / "a-run"
    records = trained_twice(run, "--trackio", "project", "--json")
    out = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in out] == records  # and trackio itself said nothing
    with sqlite3.connect(trackio_folder / "project.db") as data:
        rows = data.execute("select run_id, run_name, step, metrics from metrics order by id")
        rows = [row for row in rows if row[1].startswith("a-run-")]
    assert len({row[0] for row in rows}) == 1  # resumed, it is the same run
    assert {row[1] for row in rows} == {f"a-run-{logger_id(run)}"}
    assert [row[2] for row in rows] == [0, 1, 1, 2, 2]
    for row, record in zip(rows, records, strict=True):
        assert json.loads(row[3]) == {k: v for k, v in record.items() if v is not None}


@pytest.mark.parametrize("flags", [["--tensorboard"], ["--wandb", "p"], ["--trackio", "p"]])
def test_a_missing_package_is_refused_before_training(tmp_path, monkeypatch, capsys, flags):
    name = flags[0].removeprefix("--")
    monkeypatch.setitem(sys.modules, name, None)
    assert start(tmp_path / "run", *flags) == 2
    err = capsys.readouterr().err
    assert err == f"error: --{name} needs {name}: pip install 'gtr-turbo[loggers]'\n"
    assert not (tmp_path / "run").exists()


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    """Weights & Biases leaves a folder `wandb` behind, which could be imported as a package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="--wandb needs wandb"):
        check_packages(TrainConfig(wandb="p"))
    check_packages(TrainConfig())


def test_a_log_that_fails_midway_ends_no_run(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboard")
    own = TensorboardSink.write

    def write(self, update, record):
        if update == 1:
            self._writer.close()
            self._writer.file_writer.event_writer.close()
        own(self, update, record)

    monkeypatch.setattr(TensorboardSink, "write", write)
    run = tmp_path / "run"
    assert start(run, "--tensorboard", "--updates", "2") == 0
    assert [r["update"] for r in read_jsonl(run / "metrics.jsonl")] == [0, 1, 2, 2]
    out = capsys.readouterr().out
    assert out.count("tensorboard misses records") == 1
    assert "evaluate it with: " in out


def test_a_log_that_cannot_be_opened_is_left_out(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("in the way")
    told = []
    assert open_sinks(TrainConfig(tensorboard=True), tmp_path, 0, told.append) == []
    assert len(told) == 1 and told[0].startswith("the tensorboard log is left out")
    assert open_sinks(TrainConfig(), tmp_path, 0, told.append) == [] and len(told) == 1


def test_the_id_is_drawn_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = logger_id(tmp_path / "a")
    assert logger_id(tmp_path / "a") == first != logger_id(tmp_path / "b")
    assert len(first) == 8 and set(first) <= set("0123456789abcdef")


def test_every_log_is_a_flag():
    assert set(sinks.PACKAGES) <= set(TrainConfig.__dataclass_fields__)
