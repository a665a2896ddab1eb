"""ALFWorld as an environment: rewards, both truncations, goal rates, prompts, answers, seeds."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from turbo.envs.alfworld import MAX_ACTIONS, ALFWorld, find_games, games_folder, read_game
from turbo.envs.alfworld_expert import Situation, goes_to, next_actions
from turbo.envs.alfworld_scene import TASKS, Goal, Place, Scene, Thing
from turbo.envs.base import LabelledEnv, MeetingEnv, SlowEnv
from turbo.envs.make import register_envs, tiny_kwargs


@pytest.fixture(scope="module")
def env(alfworld_games):
    made = ALFWorld(alfworld_games, own_process=False)
    yield made
    made.close()


def do(env, command):
    return env.step(env.actions.index(command))


def game_of(env, task):
    return next(game for game in env.games if game.goal.task == task)


def test_gymnasium_checks_it(alfworld_games):
    register_envs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = gym.make("gtr_turbo/ALFWorld-v0", games=alfworld_games, render_mode="rgb_array")
        check_env(made.unwrapped)
        observation, info = made.reset(seed=1)
    assert observation.shape == (300, 300, 3) and observation.dtype == np.uint8
    assert info["action_mask"].sum() == len(info["admissible"]) <= MAX_ACTIONS
    made.close()


def test_seeds_decide_the_sequence_of_games(env, alfworld_games):
    other = ALFWorld(alfworld_games, own_process=False)
    first = [env.reset(seed=5)[1]["game"]] + [env.reset()[1]["game"] for _ in range(6)]
    again = [other.reset(seed=5)[1]["game"]] + [other.reset()[1]["game"] for _ in range(6)]
    assert first == again and len(set(first)) > 2
    held_out = {game.path for game in find_games(alfworld_games, "valid_unseen")}
    assert len(held_out) == 6 and held_out.isdisjoint(game.path for game in env.games)


@pytest.mark.parametrize("task", TASKS)
def test_the_planner_wins_every_task_and_the_goal_rate_rises_to_one(env, task):
    env.reset(options={"game": game_of(env, task).path})
    plan, rates, rewards = env.plan(), [env.rate], []
    for command in plan:
        _, reward, terminated, truncated, info = do(env, command)
        rates.append(info["goal_rate"])
        rewards.append(reward)
    assert terminated and not truncated and info["won"] and info["success"]
    assert info["executed"] == tuple(plan) and info["task_type"] == task
    assert rates[-1] == 1.0 and rewards[-1] == 51.0
    assert rewards[:-1] == rates[1:-1]  # the share that is met, and nothing else
    assert len(set(rates)) > 1 and all(rate * TASKS[task] % 1 == 0 for rate in rates)


@pytest.mark.parametrize("task", TASKS)
def test_the_searching_expert_wins_and_finds_its_own_thoughts_right(env, task):
    rng = np.random.default_rng(0)
    for game in env.games:
        if game.goal.task != task:
            continue
        env.reset(options={"game": game.path})
        done = False
        while not done:
            text = env.expert_answer(rng)
            answer = env.read_answer(text)
            assert answer.error is None and env.judge(answer).right
            assert env.guess_answer("", None) == text == env.guess_answer(text[:40], None)
            _, _, won, truncated, _ = do(env, answer.action)
            done = won or truncated
        assert won, (env.task, env.history)


def test_the_expert_knows_no_more_than_the_player(env):
    """Moving what is hidden changes neither its thought nor its command."""
    env.reset(options={"game": game_of(env, "pick_and_place_simple").path})
    before = env.expert_answer(np.random.default_rng(0))
    places = tuple(replace(place, contents=()) for place in env.scene.places)
    assert any(place.contents for place in env.scene.places)
    blind = env.snapshot()
    blind.scene = replace(env.scene, places=places)
    assert blind.expert_answer(np.random.default_rng(0)) == before


def test_the_expert_goes_to_places_that_stand_side_by_side():
    """Official rooms have some; one command goes to all of a location."""
    names = ("bed 1", "desk 1", "shelf 1")
    both, one = "go to bed 1 and desk 1", "go to shelf 1"
    assert goes_to("go to bed 1, desk 1, and shelf 1") == list(names)
    assert goes_to(both) == list(names[:2]) and goes_to("open bed 1") == []
    scene = Scene(tuple(Place(name) for name in names))
    goal = Goal("pick_and_place_simple", "pen", "shelf")
    now = Situation(goal, scene, (), (both, one, "look"), {})
    assert next_actions(now) == [both]  # once; and not to the goal, which has no pen to fetch
    held = replace(now, scene=replace(scene, held=Thing("pen 1")), goal=replace(goal, place="desk"))
    assert next_actions(held) == [both]


def test_an_illegal_answer_leaves_the_world_as_it_is(env):
    picture, _ = env.reset(seed=3)
    actions, scene = env.actions, env.scene
    for step in (env.step_illegal, lambda: env.step(len(actions)), lambda: env.step(-1)):
        seen, reward, terminated, truncated, info = step()
        assert seen is picture and env.scene == scene and env.actions == actions
        assert reward == info["goal_rate"] - 1.0 and not (terminated or truncated)
        assert info["executed"] == ()
    for text in ("go to nowhere 1", "go to", actions[0] + "0"):
        answer = env.read_answer(json.dumps({"thoughts": "", "action": text}))
        assert answer.action is None and "not in the list" in answer.error
    same = f"  {actions[0].upper()} ".replace(" ", "  ")
    read = env.read_answer(json.dumps({"thoughts": "", "action": same}))
    assert read.action == actions[0] and read.error is None
    assert env.read_answer(json.dumps({"action": same})).action is None  # a key is missing


def test_both_truncations(alfworld_games):
    made = ALFWorld(alfworld_games, own_process=False, max_history=7)
    made.reset(seed=0)
    for number in range(5):
        _, reward, terminated, truncated, _ = do(made, "look")
        assert truncated == (number == 4) and not terminated
    assert reward == -3.0
    made.reset(seed=0)
    for number in range(8):
        _, reward, _, truncated, _ = do(made, ("look", "help")[number % 2])
        assert truncated == (number == 7)
    assert reward == -3.0 and len(made.history) == 8
    made.reset(seed=0)
    for number in range(5):  # illegal ones count too
        _, reward, _, truncated, _ = made.step_illegal()
        assert truncated == (number == 4)


def test_options_of_the_reward(alfworld_games):
    made = ALFWorld(
        alfworld_games,
        own_process=False,
        goal_reward="change",
        success_reward=10.0,
        illegal_penalty=-2.0,
        tasks=("pick_heat_then_place_in_recep",),
    )
    made.reset(seed=0)
    assert made.step_illegal()[1] == -2.0
    rewards = [do(made, command)[1] for command in made.plan()]
    assert sum(rewards) == pytest.approx(11.0) and rewards[-1] >= 10.0


def test_prompts_carry_the_task_the_history_and_the_possible_commands(env, alfworld_games):
    env.reset(options={"game": game_of(env, "pick_two_obj_and_place").path})
    fixed = env.prompt("full").fixed
    for command in env.plan()[:3]:
        do(env, command)
    prompt = env.prompt("full")
    assert prompt.fixed == fixed and env.task in prompt.state
    assert all(f'"{command}"' in prompt.state for command in (*env.actions, *env.history))
    assert len(env.prompt("short").text) < len(prompt.text)
    seen = env.scene.here[0]
    assert "see " not in prompt.state  # no words about the scene
    options = tiny_kwargs("alfworld") | {"history_length": 1, "scene_text": True}
    small = ALFWorld(alfworld_games, **options)
    small.reset(options={"game": env.game.path})
    for command in env.history:
        do(small, command)
    state = small.prompt("short").state
    assert f"done: {env.history[-1]}\n" in state
    assert f"see {seen.name}" in state
    assert not any(c.startswith(("look", "examine", "help", "inventory")) for c in small.actions)
    assert len(small.longest_prompt("short").state) > 2 * len(state)


def test_pictures_are_kept_while_nothing_changes_and_labels_say_what_they_show(env):
    picture, _ = env.reset(seed=2)
    assert isinstance(env, SlowEnv) and isinstance(env, LabelledEnv) and not env.is_remote
    assert do(env, "inventory")[0] is picture
    assert env.picture_labels() == ["-", "", "room", *"-" * 11]
    command = next(c for c in env.actions if c.startswith("go to "))
    assert do(env, command)[0] is not picture
    state, flags, kind, number, *others = env.picture_labels()
    assert state in ("shows", "closed") and flags == "" and command == f"go to {kind} {number}"
    assert len(others) == 10 and others[:2] == ["-", "-"]
    plan = env.plan()
    take = next(i for i, command in enumerate(plan) if command.startswith("take "))
    for command in plan[: take + 1]:
        do(env, command)
    thing = " ".join(env.picture_labels()[4:6])
    assert plan[take].startswith(f"take {thing} from ")


def test_episodes_meet_in_a_place_however_they_came_there(env):
    """What was done before is in the prompt alone; what is held, and what is met, counts."""
    env.reset(options={"game": game_of(env, "pick_and_place_simple").path})
    assert isinstance(env, MeetingEnv)
    at_start, plan = env.snapshot(), env.plan()
    take = next(i for i, command in enumerate(plan) if command.startswith("take "))
    for command in plan[:take]:
        do(env, command)
    before, text = env.snapshot(), env.prompt("short").text
    assert before.meeting() != at_start.meeting()
    env.step_illegal()
    do(env, plan[take])
    holding = env.meeting()
    do(env, plan[take].replace("take", "move").replace(" from ", " to "))
    assert env.meeting() == before.meeting() != holding  # also where it could have been different
    assert env.prompt("short").text != text
    assert len({at_start.meeting(), before.meeting(), holding}) == 3


def test_a_process_of_its_own_plays_the_same_game(env, alfworld_games):
    apart = ALFWorld(alfworld_games)
    assert apart.is_remote
    a, b = env.reset(seed=4), apart.reset(seed=4)
    assert np.array_equal(a[0], b[0]) and a[1]["admissible"] == b[1]["admissible"]
    for command in env.plan():
        a, b = do(env, command), do(apart, command)
        assert np.array_equal(a[0], b[0]) and a[1:4] == b[1:4]
    apart.close()


def test_games_that_alfworld_leaves_out_are_left_out(tmp_path, alfworld_games):
    """Sliced objects, games without a way to the goal, tasks that are not played."""
    source = Path(read_game(find_games(alfworld_games, "train")[0].path).path).parent
    task = source.parent.name.split("-")[0]
    names = [
        f"{task}-Book-None-Desk-1",
        f"{task}-AppleSliced-None-Desk-2",
        f"{task}-Mug-None-Bed-3",
    ]
    for number, name in enumerate([*names, "pick_and_place_with_movable_recep-Pen-Cup-Bed-4"]):
        trial = tmp_path / "json_2.1.1" / "train" / name / "trial_T1"
        shutil.copytree(source, trial)
        if number == 2:
            content = json.loads((trial / "game.tw-pddl").read_text())
            (trial / "game.tw-pddl").write_text(json.dumps(content | {"solvable": False}))
    (game,) = find_games(str(tmp_path), "train")
    assert Path(game.path).parent.parent.name == names[0]


def test_what_is_no_game_is_refused(tmp_path, alfworld_games):
    with pytest.raises(ValueError, match=r"holds no ALFWorld game in train: make some with"):
        ALFWorld(str(tmp_path))
    with pytest.raises(ValueError, match=r"task 'dance' is unknown: use pick_and_place_simple"):
        ALFWorld(alfworld_games, tasks=("dance",))
    with pytest.raises(ValueError, match=r"split 'test' is unknown: use train"):
        ALFWorld(alfworld_games, split="test")
    with pytest.raises(ValueError, match=r"is no ALFWorld game"):
        read_game(str(tmp_path / "game.tw-pddl"))


def test_a_variable_that_leads_to_no_games_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"ALFWORLD_DATA=.* holds no games.*unset it"):
        games_folder("")
    (tmp_path / "json_2.1.1").mkdir()
    assert games_folder("") == tmp_path and games_folder("x") == Path("x")
