"""turbo/lock.py: one writer, its name in the error, and no lock that outlives its holder."""

import os
import signal
import subprocess
import sys

import pytest

from turbo import lock

HOLD = "import sys, time; from turbo.lock import acquire; from pathlib import Path; "
HOLD += "held = acquire(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def test_a_second_writer_is_refused_and_told_who_holds_it(tmp_path):
    run = tmp_path / "new" / "run"
    told = rf"in use by process {os.getpid()} on .* since 20"
    with lock.acquire(run), pytest.raises(ValueError, match=told):
        lock.acquire(run)
    with lock.acquire(run):  # free again
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {holder.pid} "):
            lock.acquire(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with lock.acquire(tmp_path):
            pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"process": 1}', "\x00" * 5000])
def test_a_lock_file_may_hold_anything(tmp_path, content):
    """Its text is for people: it decides nothing."""
    (tmp_path / "lock").write_text(content)
    with lock.acquire(tmp_path):
        (tmp_path / "lock").write_text(content)
        with pytest.raises(ValueError, match="in use by another process"):
            lock.acquire(tmp_path)
