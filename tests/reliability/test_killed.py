"""Killed at any moment: what is resumed ends in the very bits of a run that nobody disturbed.

`make test-faults` kills a run 40 times, by SIGKILL, at random moments and while a checkpoint is
being written. One kill of the latter kind is among the other tests.
"""

import random
import time
from pathlib import Path

import pytest
from trainer import SHORT, finish, here, result, start

UPDATES = 160


def kill(process, run: Path, rng: random.Random, while_saving: bool) -> bool:
    """Kill the process at a random moment of training; False if it came to its end before."""
    seen = (run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else 0
    moment, folder = None, run / "checkpoints"
    while process.poll() is None:
        if while_saving:
            if list(folder.glob("*.partial")):
                time.sleep(rng.uniform(0, 0.004))
                break
        elif moment is None:
            file = run / "metrics.jsonl"
            if file.exists() and file.stat().st_size > seen:  # it trains
                moment = time.monotonic() + rng.uniform(0, 1.2)
        elif time.monotonic() > moment:
            break
        time.sleep(0 if while_saving else 0.002)
    alive = process.poll() is None
    process.kill()
    process.communicate(timeout=60)
    return alive


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run without an interruption."""
    run = tmp_path_factory.mktemp("whole") / "run"
    status, _, err = here(run, *SHORT, "--updates", "4")
    assert status == 0, err
    return result(run, 4)


@pytest.mark.slow
@pytest.mark.parametrize("while_saving", [pytest.param(False, marks=pytest.mark.long), True])
def test_one_kill(tmp_path, undisturbed, while_saving):
    run = tmp_path / "run"
    assert kill(start(run, *SHORT, "--updates", "4"), run, random.Random(1), while_saving)
    fresh = not list((run / "checkpoints").glob("????????"))  # killed before the first one
    anew = [*SHORT, "--overwrite"] if fresh else []
    status, _, err = here(run, "--updates", "4", *anew, resume=not fresh)
    assert status == 0, err
    assert result(run, 4) == undisturbed


@pytest.mark.long
def test_forty_kills(tmp_path):
    whole, run, rng = tmp_path / "whole", tmp_path / "run", random.Random(0)
    flags = [*SHORT, "--updates", str(UPDATES)]
    status, _, err = finish(start(whole, *flags), timeout=900)
    assert status == 0, err
    kills, saving, damaged, resume = 0, 0, 0, False
    while True:
        anew = [*flags, "--overwrite"] if run.exists() else flags
        process = start(run, *([] if resume else anew), resume=resume)
        while_saving = kills % 2 == 1
        if kills >= 40:
            status, _, err = finish(process, timeout=900)
            assert status == 0, err
            damaged += err.count("warning: ")
            break
        assert kill(process, run, rng, while_saving), "the run ended before it was killed 40 times"
        kills += 1
        saving += while_saving and bool(list((run / "checkpoints").glob("*.partial")))
        resume = bool(list((run / "checkpoints").glob("????????")))
    print(f"{kills} kills, {saving} left an unfinished checkpoint; {damaged} damaged ones were met")
    assert saving >= 5
    assert result(run, UPDATES) == result(whole, UPDATES)
