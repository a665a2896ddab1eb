"""turbo/parallel.py: two processes add up and share; an error in one ends the other."""

import ast
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from turbo.parallel import Barrier, Broken, Crew, cores, run_crew

ROOT = Path(__file__).resolve().parents[2]

# Programs for the workers: processes are spawned, so these must be found by name.


def add_and_share(crew, folder):
    """Everything a crew can do, twice, so that a round cannot be confused with the next."""
    out = []
    for turn in range(2):
        small = torch.full((3,), float(crew.rank + 1 + turn))
        large = torch.arange(1000.0).view(10, 100) * (crew.rank + 1)  # more than the board holds
        kept = small
        crew.sum_([small, large])
        total = crew.total(crew.rank + 0.5, 1)
        shared = crew.share({"rank": crew.rank, "turn": turn})
        out.append([small.tolist(), large[9, 99].item(), total, shared, kept is small])
        crew.wait()
    out.append([crew.rank, crew.size, crew.leads, os.getpid(), torch.get_num_threads()])
    Path(folder, f"{crew.rank}.txt").write_text(repr(out))
    return out


def fail_before_sharing(crew):
    if crew.rank == 1:
        raise ZeroDivisionError("the second worker fails")
    return crew.total(1)


def fail_before_a_sum(crew):
    if crew.rank == 1:
        raise ZeroDivisionError("the second worker fails")
    crew.sum_([torch.ones(1)])


def leader_fails(crew):
    if crew.leads:
        raise LookupError("the first worker fails")
    crew.total(1)


def begun(crew):
    """Which signals the second worker does not hear while it is still being started."""
    masks = []
    if crew.leads:
        (other,) = multiprocessing.active_children()
        status = Path(f"/proc/{other.pid}/status").read_text()
        masks = [int(mask, 16) for mask in re.findall(r"Sig(?:Blk|Ign):\s*(\w+)", status)]
    crew.total(1)
    return [n for n in range(1, 32) if any(mask >> (n - 1) & 1 for mask in masks)]


def same_bits(crew):
    """Sums of numbers whose order of addition matters."""
    generator = torch.Generator().manual_seed(crew.rank)
    x = torch.randn(5000, generator=generator) * 10.0 ** (8 * crew.rank)
    crew.sum_([x])
    return crew.share(x.numpy().tobytes())


def test_two_processes_add_and_share(tmp_path):
    first = run_crew(2, add_and_share, str(tmp_path), board=64)
    second = eval_literal(tmp_path / "1.txt")
    assert first == eval_literal(tmp_path / "0.txt")
    for turn in range(2):
        for small, large, total, shared, kept in (first[turn], second[turn]):
            assert small == [3.0 + 2 * turn] * 3 and large == 999 * 3
            assert total == [2.0, 2]
            assert shared == [{"rank": 0, "turn": turn}, {"rank": 1, "turn": turn}]
            assert kept
    assert first[2][:3] == [0, 2, True] and second[2][:3] == [1, 2, False]
    assert first[2][3] == os.getpid() != second[2][3]
    assert first[2][4] == second[2][4] == 1  # thread


def eval_literal(path):
    return ast.literal_eval(path.read_text())


def test_all_workers_hold_the_same_bits():
    one, two = run_crew(2, same_bits)
    assert one == two


@pytest.mark.parametrize("program", [fail_before_sharing, fail_before_a_sum])
def test_an_error_in_a_worker_surfaces_at_once(program, capfd):
    started = time.perf_counter()
    with pytest.raises(RuntimeError, match="another worker failed"):
        run_crew(2, program)
    assert time.perf_counter() - started < 120  # and not after the patience of half an hour
    assert "ZeroDivisionError: the second worker fails" in capfd.readouterr().err


def test_an_error_in_the_first_worker_ends_the_second(capfd):
    started = time.perf_counter()
    with pytest.raises(LookupError, match="the first worker fails"):
        run_crew(2, leader_fails)
    assert time.perf_counter() - started < 120
    assert "ZeroDivision" not in capfd.readouterr().err


def test_a_crew_of_one_needs_no_process(tmp_path):
    out = run_crew(1, add_and_share, str(tmp_path))
    assert out[0][:4] == [[1.0] * 3, 999.0, [0.5, 1], [{"rank": 0, "turn": 0}]]
    assert out[2][:4] == [0, 1, True, os.getpid()]


def test_cores():
    assert 1 <= cores() <= 4
    crew = Crew()
    crew.wait()
    assert crew.leads and crew.size == 1


def worker_killed(crew, number):
    if not crew.leads:
        os.kill(os.getpid(), number)
    return crew.total(1.0)[0]


def test_a_worker_that_is_killed_keeps_nobody_waiting(capfd):
    started = time.perf_counter()
    with pytest.raises(RuntimeError, match="another worker failed"):
        run_crew(2, worker_killed, signal.SIGKILL)
    assert time.perf_counter() - started < 60
    assert "worker 1 was ended by signal 9" in capfd.readouterr().err


def waiting_worker_killed(crew):
    """The second worker sleeps at the barrier when it is killed."""
    if crew.leads:
        time.sleep(3.0)
        (other,) = multiprocessing.active_children()
        os.kill(other.pid, signal.SIGKILL)
    crew.wait()  # it had come
    crew.wait()


def test_a_worker_that_is_killed_while_it_waits_keeps_nobody_waiting(capfd):
    started = time.perf_counter()
    with pytest.raises(RuntimeError, match="another worker failed"):
        run_crew(2, waiting_worker_killed)
    assert time.perf_counter() - started < 60
    assert "worker 1 was ended by signal 9" in capfd.readouterr().err


SENDER = """
import os, signal
from turbo.parallel import run_crew

def work(crew):
    if not crew.leads:
        os.kill(os.getpid(), signal.SIGKILL)
    crew.share(bytes(10_000_000))  # more than a pipe holds

if __name__ == "__main__":
    try:
        run_crew(2, work)
    except RuntimeError as error:
        print(error)
"""


def test_what_a_killed_worker_was_to_be_sent_does_not_keep_a_process_from_ending(tmp_path):
    file = tmp_path / "sender.py"
    file.write_text(SENDER)
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [sys.executable, str(file)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "another worker failed" in done.stdout, done.stderr


def test_a_worker_that_does_not_come_is_not_waited_for_any_longer():
    barrier = Barrier(2, multiprocessing.get_context("spawn"))
    with pytest.raises(Broken, match="another worker failed"):
        barrier.wait(0, 0.05)
    assert barrier.broken
    with pytest.raises(Broken):  # nor does the one who comes late wait
        barrier.wait(1, 60.0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_worker_hears_no_ctrl_c_from_its_very_start():
    assert {signal.SIGINT, signal.SIGHUP} <= set(run_crew(2, begun))
    assert not {signal.SIGINT, signal.SIGHUP} & signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_workers_leave_signals_to_the_first():
    """Ctrl-C, `timeout` or a closed terminal reach the whole process group."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        assert run_crew(2, worker_killed, number) == 2.0
