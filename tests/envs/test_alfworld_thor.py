"""The contract with AI2-THOR: ALFWorld's real AlfredThorEnv, over a stand-in for the simulator."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from turbo.envs.alfworld import ALFWorld
from turbo.envs.alfworld_process import GameProcess

STUB = Path(__file__).with_name("thor_stub.py")


@pytest.mark.slow
def test_a_game_is_won_in_frames_of_the_simulator(alfworld_games, tmp_path):
    made = ALFWorld(alfworld_games, backend="thor", tasks=("pick_and_place_simple",))
    source = Path(made.games[0].path).parent
    trial = tmp_path / source.parent.name / source.name
    trial.mkdir(parents=True)
    (trial / "game.tw-pddl").write_text((source / "game.tw-pddl").read_text())
    trajectory = json.loads((source / "traj_data.json").read_text())
    trajectory["scene"] = {"scene_num": 1, "object_poses": [], "dirty_and_empty": False}
    trajectory["scene"] |= {"object_toggles": [], "init_action": {}}
    (trial / "traj_data.json").write_text(json.dumps(trajectory))

    text = ALFWorld(alfworld_games, own_process=False)
    _, wanted = text.reset(options={"game": str(source)})
    made.process = GameProcess("thor", command=[sys.executable, str(STUB)])
    picture, info = made.reset(options={"game": str(trial)})
    assert picture.shape == (300, 300, 3) and (picture == np.array([255, 0, 0])).all()
    assert info["admissible"] == wanted["admissible"] and info["goal_rate"] == 0.0
    assert made.task in json.loads((source / "game.tw-pddl").read_text())["grammar"]
    assert made.expert_answer(np.random.default_rng(0)) is None  # it has no facts to go by
    verdict = made.judge(made.read_answer('{"thoughts": "I look.", "action": "look"}'))
    assert not verdict.judged  # and none is right or wrong
    assert made.guess_answer('{"thou', None).startswith('{"thou')

    _, reward, _, _, info = made.step_illegal()
    assert reward == -1.0 and info["executed"] == ()
    for command in text.plan():
        _, reward, terminated, _, info = made.step(made.actions.index(command))
    assert terminated and info["won"] and info["goal_rate"] == 1.0 and reward == 51.0

    made.reset(options={"game": str(trial)})  # the same simulator, another episode
    for _ in range(5):
        _, reward, _, truncated, _ = made.step(made.actions.index("look"))
    assert truncated and reward == -3.0
    small = ALFWorld(alfworld_games, backend="thor", canvas=(168, 112))
    small.process = made.process
    assert small.reset(options={"game": str(trial)})[0].shape == (112, 168, 3)
    made.close()
