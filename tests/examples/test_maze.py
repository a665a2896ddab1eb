"""examples/maze.py: an environment from outside is learned, trained in, resumed and exported."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.maze import MOVES, Maze
from turbo import eval, export, sft, train
from turbo.envs.make import check_env

FILE = Path(__file__).resolve().parents[2] / "examples" / "maze.py"
NAME = "labyrinth:Maze"
LEARN = """--size nano --steps 3 --deals 4 --read-out-steps 2 --eval-episodes 2 --workers 1
    --max-new-tokens 24"""
TRAIN = """--updates 2 --envs 16 --group-size 4 --steps-per-update 16 --minibatch 16 --lora-rank 4
    --epochs 1 --max-new-tokens 12 --eval-episodes 4 --save-every 1 --workers 1 --skip-certain 0"""


def test_it_fits_and_the_expert_walks_the_shortest_way():
    assert len(FILE.read_text().splitlines()) <= 60
    check_env("examples.maze:Maze", needs_expert=True)
    env, lengths = Maze(), set()
    for seed in range(40):
        env.reset(seed=seed)
        for count in range(env.far[env.me], 0, -1):
            assert env.far[env.me] == count
            answer = env.read_answer(env.expert_answer(np.random.default_rng(0)))
            _, reward, won, truncated, info = env.step(env.actions.index(answer.action))
            assert won == info["success"] == (count == 1) and not truncated
            assert reward == 1.0  # a step closer
        lengths.add(count)
    env.reset(seed=0)
    y, x = env.me
    walls = [m for m, (dy, dx) in MOVES.items() if (y + dy, x + dx) not in env.far]
    before = env.render()
    assert env.step(env.actions.index(walls[0]))[1] == 0
    assert env.me == (y, x) and np.array_equal(env.render(), before)  # a wall stands


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder that is no part of the project, with the maze as a module of its own."""
    shutil.copy(FILE, tmp_path / "labyrinth.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_the_built_in_model_does_not_know_it(outside, capsys):
    for main, argv in ((train.main, [NAME]), (eval.main, ["tiny", "--env", NAME])):
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert "no warm start is built in for labyrinth:Maze" in err and err.count("\n") == 1
        assert "python -m turbo.sft labyrinth:Maze --out DIR`, then use --model DIR" in err
    assert [p.name for p in outside.iterdir() if p.suffix != ".py" and p.is_file()] == []


@pytest.mark.slow
def test_the_whole_way(outside, capsys):
    assert sft.main([NAME, "--out", "start", *LEARN.split()]) == 0
    said = capsys.readouterr().out
    assert f"python -m turbo.train {NAME} --model start" in said
    assert "tokens: add --max-new-tokens" in said and "nan" not in said
    record = json.loads((outside / "start" / "warm_start.json").read_text())
    assert record["config"]["env"] == NAME and record["command"].endswith("--max-new-tokens 24")
    assert train.main([NAME, "--model", "start", "--out", "run", *TRAIN.split()]) == 0
    saved = json.loads((outside / "run" / "config.json").read_text())["config"]
    assert saved["env"] == NAME
    assert train.main([NAME, "--resume", "run", "--updates", "3"]) == 0
    records = [json.loads(line) for line in (outside / "run" / "metrics.jsonl").open()]
    assert [r["update"] for r in records][-1] == 3 and records[-1]["env_steps"] >= 48
    right = [r["reasoning_score"] for r in records if "success_rate" in r]
    assert right == [None] * 3  # this maze judges no thoughts
    episode = json.loads((outside / "run" / "episodes.jsonl").read_text().splitlines()[0])
    assert episode["steps"][0]["verdict"] == dict.fromkeys(("perception", "aim", "follows"))
    assert "nan" not in capsys.readouterr().out
    flags = "--episodes 4 --workers 1 --max-new-tokens 12 --json"
    assert eval.main(["run", *flags.split()]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 4
    assert export.main(["run", "--out", "policy"]) == 0
    assert f"plays {NAME}" in (outside / "policy" / "README.md").read_text()
    assert eval.main(["policy", "--env", "labyrinth:Mase"]) == 2
    assert "has nothing of that name" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["labyrinth:Maze"], ["--steps", "3", "labyrinth:Maze"]])
def test_a_warm_start_needs_an_expert(outside, capsys, argv):
    text = (outside / "labyrinth.py").read_text()
    name = f"mute_{len(argv)}"
    (outside / f"{name}.py").write_text(text + "\n    expert_answer = base.no_expert\n")
    argv = [a.replace("labyrinth", name) for a in argv]
    assert sft.main([*argv, "--out", "start"]) == 2
    err = capsys.readouterr().err
    assert f"environment '{name}:Maze' has no expert" in err and err.count("\n") == 1
    assert not (outside / "start").exists()
