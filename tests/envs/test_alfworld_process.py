"""A game in a process of its own: it fails, dies, hangs, and talks."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from turbo.envs.alfworld import ALFWorld
from turbo.envs.alfworld_process import GameProcess, Gone, LastingGame


def process_that(code, timeout=20.0):
    return GameProcess(timeout=timeout, command=[sys.executable, "-c", code])


def test_a_failure_is_told_and_the_process_lives_on():
    code = (
        "from turbo.envs.alfworld_engine import serve\n"
        "class Game:\n"
        "    def reset(self, game): raise ValueError('no such room ' + game)\n"
        "    def step(self, action): print('noise'); return {'said': action}\n"
        "serve(Game)"
    )
    process = process_that(code)
    process.send({"do": "reset", "game": "attic"})
    with pytest.raises(RuntimeError, match="ValueError: no such room attic"):
        process.receive()
    process.send({"do": "step", "action": "look"})
    assert process.receive() == {"said": "look"}  # what it printed is not an answer
    process.close()


def test_a_process_that_dies_is_named_with_its_last_words():
    process = process_that("import sys; input(); print('out of room', file=sys.stderr); exit(3)")
    process.send({"do": "plan"})
    with pytest.raises(RuntimeError, match=r"ended \(status 3\); its last words: out of room"):
        process.receive()
    with pytest.raises(RuntimeError, match="ended"):
        for _ in range(100):  # the pipe may take a few lines more
            process.send({"do": "plan"})
            process.receive()


def test_a_process_that_hangs_is_given_up():
    process = process_that("import time; print('{}', flush=True); time.sleep(600)", timeout=0.3)
    assert process.receive() == {}
    started = time.monotonic()
    process.send({"do": "plan"})
    with pytest.raises(RuntimeError, match="gave no answer for 0 seconds"):
        process.receive()
    assert time.monotonic() - started < 20
    assert process.child.poll() is not None


def test_the_process_is_in_a_session_of_its_own_and_what_it_started_ends_with_it():
    """Ctrl-C reaches the trainer alone, which ends its games when it is done with them."""
    code = (
        "import json, subprocess; c = subprocess.Popen(['sleep', '600']);"
        "print(json.dumps({'pid': c.pid}), flush=True); input()"
    )
    process = process_that(code)
    other = process.receive()["pid"]
    assert os.getsid(process.child.pid) == os.getsid(other) != os.getsid(0)
    process.close()
    for _ in range(200):  # an orphan is gone, or waits for somebody to read its status
        status = Path(f"/proc/{other}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        raise AssertionError("it lives on")


def walk(games, harm=lambda env: None):
    """What is seen of a won game; a step before its end something may happen to its process."""
    env = ALFWorld(games, own_process=True, timeout=20.0)
    env.reset(seed=3)
    plan, told = env.plan(), []
    for number, command in enumerate(plan):
        if number == len(plan) - 1:
            harm(env)
        picture, reward, won, _, info = env.step(env.actions.index(command))
        told.append((picture.tobytes(), reward, won, env.actions, info["executed"]))
    env.close()
    assert told[-1][2]
    return told


def killed(env):
    os.kill(env.process.process.child.pid, signal.SIGKILL)


def stopped(env):
    env.process.process.timeout = 0.5
    os.kill(env.process.process.child.pid, signal.SIGSTOP)


def stopped_while_it_plans(env):
    env.process.send({"do": "plan"})
    killed(env)
    assert env.process.receive()["plan"] == env.plan()


@pytest.mark.parametrize("harm", [killed, stopped, stopped_while_it_plans])
def test_an_episode_goes_on_in_another_process(alfworld_games, harm, capfd):
    assert walk(alfworld_games, harm) == walk(alfworld_games)
    assert capfd.readouterr().err.count("another one takes its place") == 1


def test_a_process_that_always_dies_is_not_begun_for_ever(capfd):
    game = LastingGame(command=[sys.executable, "-c", "input(); exit(3)"])
    game.send({"do": "reset", "game": "attic"})
    with pytest.raises(Gone, match=r"ended \(status 3\)"):
        game.receive()
    assert capfd.readouterr().err.count("warning: ") == 1
    game.close()
