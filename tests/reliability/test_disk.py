"""A disk that is full, or not to be written: told before the start, and never at the cost of what
was saved before. A limit on the size of files stands for the full disk."""

import os
import subprocess
import sys

import pytest
from trainer import FLAGS, SHORT, finish, here, start

from turbo import checkpoint, train
from turbo.log import read_jsonl


@pytest.mark.slow
def test_a_failed_save_is_tried_again_and_told_and_loses_nothing(tmp_path):
    run = tmp_path / "run"
    status, _, err = here(run, *SHORT, "--updates", "1")
    assert status == 0, err
    size = (run / "checkpoints/00000001/state.safetensors").stat().st_size
    more = ["--updates", "3", "--save-every", "2"]
    limited = start(run, *more, resume=True, file_limit=size // 2)
    status, out, err = finish(limited)
    assert status == 1, err
    assert out.count("update 2 could not be saved: ") == 3  # tried three times
    assert "a checkpoint takes about" in out and "MB free" in out and "Traceback" not in err
    assert "2/3 " in out and "3/3 " in out  # it trained on
    assert [p.name for p in checkpoint.checkpoints(run)] == ["00000001"]
    assert not list((run / "checkpoints").glob("*.partial"))
    status, _, err = here(run, "--updates", "3", resume=True)
    assert status == 0, err
    assert [r["update"] for r in read_jsonl(run / "metrics.jsonl")] == [0, 1, 1, 2, 3, 3]


def test_too_little_space_is_told_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    import tiny_models

    usage = type("Usage", (), {"free": 12_345})
    monkeypatch.setattr("turbo.run.shutil.disk_usage", lambda path: usage)
    flags = [*FLAGS.split(), "--model", str(tiny_models.fitted_folder())]
    assert train.main(["numberline", "--out", str(tmp_path / "run"), *flags]) == 2
    err = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(err) == 1 and "has 0.0 MB free, and 4 checkpoints take about" in err[0]
    assert "--keep" in err[0] and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_a_checkpoint_takes_is_known(tmp_path):
    """The estimate is of the end of the run: never less than what is written, and not far more."""
    import tiny_models

    from turbo.parallel import Crew
    from turbo.run import Run

    for i, more in enumerate(
        (
            [],
            ["--guidance", "none", "--advantage", "gae"],
            ["--weighting", "score", "--merge", "linear"],
            ["--guidance", "sft", "--sft-rows", "8"],
        )
    ):
        flags = [*FLAGS.split(), *SHORT, "--model", str(tiny_models.fitted_folder())]
        path = tmp_path / str(i)
        assert train.main(["numberline", "--out", str(path), *flags, "--updates", "4", *more]) == 0
        c = train.TrainConfig(**checkpoint.read_run(path)["config"])
        written = sum(f.stat().st_size for f in (path / "checkpoints/00000004").iterdir())
        own, history, _ = Run(c, path, Crew()).checkpoint_bytes()
        assert 0.9 * written < own + history < 1.6 * written, more


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    ["", "--history-max 3", "--history-max 3 --save-every 2 --checkpoint-each epoch --epochs 2"],
)
def test_what_all_checkpoints_take_is_known(tmp_path, monkeypatch, more):
    """With a history that they share, and one more of them for the moment in which one is made."""
    import tiny_models

    from turbo.parallel import Crew
    from turbo.run import Run

    flags = [*FLAGS.split(), *SHORT, "--model", str(tiny_models.fitted_folder())]
    flags += ["--keep", "4", "--updates", "8", "--weighting", "score", *more.split()]
    assert train.main(["numberline", "--out", str(tmp_path), *flags]) == 0
    run = Run(train.TrainConfig(**checkpoint.read_run(tmp_path)["config"]), tmp_path, Crew())
    held = checkpoint.disk_bytes(tmp_path)
    assert len(checkpoint.checkpoints(tmp_path)) == 4
    usage = type("Usage", (), {"free": 0})
    monkeypatch.setattr("turbo.run.shutil.disk_usage", lambda path: usage)

    def is_enough(free):
        usage.free = free
        return not run.lack_of_space()

    asked = next(filter(is_enough, range(0, 3 * held, held // 100)))
    # what is there counts as room; with it there is room for one checkpoint more
    assert 0.05 * held < asked < 0.9 * held


def test_a_place_where_nothing_can_be_made_is_named(tmp_path, capsys):
    import tiny_models

    (tmp_path / "file").write_text("mine")
    out = str(tmp_path / "file" / "run")
    flags = [*FLAGS.split(), "--model", str(tiny_models.fitted_folder())]
    assert train.main(["numberline", "--out", out, *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --out {out} cannot be written: ") and err.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    import tiny_models

    tmp_path.chmod(0o500)
    flags = [*FLAGS.split(), "--model", str(tiny_models.fitted_folder())]
    assert train.main(["numberline", "--out", str(tmp_path / "run"), *flags]) == 2
    assert str(tmp_path / "run") in capsys.readouterr().err


def run_limited(program, path):
    """Run it in a process that may limit its files, as on a disk that fills and empties again."""
    begin = "import resource, sys; from pathlib import Path; file = Path(sys.argv[1])\n"
    begin += "_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
    begin += "def limit(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))\n"
    done = subprocess.run(
        [sys.executable, "-c", begin + program, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


RECORDS = """
from turbo.log import JsonlLogger
logger = JsonlLogger(file)
for update in range(20):
    limit(90 if 5 <= update < 15 else hard)
    logger.write({"update": update})
    lines = file.read_text()
    assert lines.endswith("\\n")  # never half a line
    assert bool(logger.problem) == (lines.count("\\n") <= update)
logger.close()
"""
EPISODES = """
from turbo.checkpoint import append_text
append_text(file, "one\\n")
limit(500)
try:
    append_text(file, "two\\n" * 300)
except OSError as error:
    assert "too large" in str(error)
else:
    raise AssertionError("there was room")
assert file.read_text() == "one\\n"
limit(hard)
append_text(file, "two\\n" * 300)
"""


def test_records_wait_for_room(tmp_path):
    run_limited(RECORDS, tmp_path / "m.jsonl")
    assert [r["update"] for r in read_jsonl(tmp_path / "m.jsonl")] == list(range(20))


def test_a_sample_of_episodes_is_written_whole_or_not_at_all(tmp_path):
    run_limited(EPISODES, tmp_path / "episodes.jsonl")
    assert (tmp_path / "episodes.jsonl").read_text() == "one\n" + "two\n" * 300
