"""SIGINT and SIGTERM to real processes: saved within 10 seconds, said how to resume, conventional
status; a second one ends at once; a second writer is refused meanwhile."""

import signal
import time

import pytest
from trainer import SHORT, finish, here, result, start

BIG = ["--steps-per-update", "20000", "--envs", "64"]  # a rollout of some minutes


def wait_for(path, seconds=120.0):
    """Until a file is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


def running(path, *more):
    """A process in the midst of its first rollout."""
    process = start(path, *more)
    assert process.stdout.readline().startswith("numberline: ")
    time.sleep(0.5)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "workers"),
    [pytest.param(signal.SIGINT, "1", marks=pytest.mark.long), (signal.SIGTERM, "2")],
)
def test_a_long_rollout_is_abandoned_within_ten_seconds(tmp_path, number, workers):
    run = tmp_path / "run"
    process = running(run, *BIG, "--updates", "3", "--workers", workers)
    status, _, err = here(run, resume=True)
    assert status == 2 and f"in use by process {process.pid} " in err
    began = time.monotonic()
    process.send_signal(number)
    status, out, err = finish(process, timeout=20)
    assert time.monotonic() - began < 10
    assert status == 128 + number, err
    assert "stopping: saving what is done" in err and "Traceback" not in err
    assert f"continue with: python -m turbo.train numberline --resume {run}" in out
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["00000000"]


@pytest.mark.slow
def test_an_abandoned_evaluation_is_made_up_for(tmp_path):
    """Stopped while it is evaluated before training, a run ends as one that was not."""
    more = ["--updates", "1", "--eval-episodes", "32", "--envs", "8"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    status, _, err = here(whole, *more)
    assert status == 0, err
    process = running(run, *more)
    process.send_signal(signal.SIGTERM)
    status, _, err = finish(process)
    assert status == 143, err
    assert not (run / "metrics.jsonl").read_text()  # it was in its evaluation
    status, out, err = here(run, resume=True)
    assert status == 0 and "policy before training" in out, err
    assert result(run, 1) == result(whole, 1)
    status, out, _ = here(run, resume=True)  # nothing is left to do
    assert status == 0 and "is complete: 1 updates" in out
    assert result(run, 1) == result(whole, 1)


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path):
    run = tmp_path / "run"
    process = running(run, *BIG)
    process.send_signal(signal.SIGSTOP)  # so that both are there when it goes on
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.send_signal(signal.SIGCONT)
    status, _, err = finish(process, timeout=20)
    assert time.monotonic() - began < 5
    assert status in (130, 143) and "stopped at once, without saving" in err
    status, _, err = here(run, *SHORT, "--updates", "1", "--overwrite")
    assert status == 0, err  # and its lock is free
