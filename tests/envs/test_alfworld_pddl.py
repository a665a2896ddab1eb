"""Drawn games in ALFWorld's terms, against its own tables and in TextWorld's own environment."""

import importlib.util
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from sampled_games import sample_game

from turbo.envs.alfworld_games import draw_games, game_folder, generate
from turbo.envs.alfworld_pddl import (
    Planner,
    entities,
    import_alfworld,
    problem,
    relevant,
    sentence,
    spelling,
)
from turbo.envs.alfworld_rooms import (
    LAMP,
    OPENABLE,
    ROOMS,
    ROOMS_OF_TASK,
    TREATABLE,
    WHERE,
)
from turbo.envs.alfworld_scene import TASKS, Goal, conditions_met, read_scene

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("alfworld") is None,
    reason="needs the engine: pip install 'gtr-turbo[alfworld]'",
)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def planner():
    return Planner()


def open_stock(path):
    """TextWorld's own environment, as ALFWorld opens it."""
    import_alfworld()
    import textworld
    import textworld.gym
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos

    wishes = textworld.EnvInfos(
        won=True, admissible_commands=True, facts=True, extras=["gamefile", "walkthrough"]
    )
    name = textworld.gym.register_games(
        [str(path)],
        wishes,
        batch_size=1,
        asynchronous=False,
        max_episode_steps=50,
        wrappers=[AlfredDemangler, AlfredInfos],
    )
    return textworld.gym.make(name)


def scene_of(infos):
    facts = infos["facts"][0]
    return read_scene((f.name, *(argument.name.strip() for argument in f.arguments)) for f in facts)


def play(path, game):
    """Play the stored walkthrough; the scene and the goal conditions must agree on the way."""
    env = open_stock(path)
    texts, infos = env.reset()
    assert f"Your task is to: {sentence(game)}." in texts[0]
    assert scene_of(infos) == game.scene
    for command in infos["extra.walkthrough"][0]:
        assert not infos["won"][0]
        met, total = conditions_met(scene_of(infos), game.goal)
        assert met < total
        assert command in infos["admissible_commands"][0]
        _, _, _, infos = env.step([command])
    assert infos["won"][0]
    met, total = conditions_met(scene_of(infos), game.goal)
    assert met == total
    env.close()


def drawn_again(path, size, number):
    """The game that was written at `path`: its name holds the hash of what was drawn."""
    task = list(TASKS)[number % len(TASKS)]
    for game in draw_games(0, size, task, "train", number, tuple(ROOMS)):
        if game_folder(path.parents[4], game, "train", number) == path.parent:
            return game


def test_walkthroughs_of_all_types_win(alfworld_games):
    for number in range(len(TASKS)):
        (path,) = Path(alfworld_games).glob(f"json_*/train/*-{number + 1}/*/game.tw-pddl")
        play(path, drawn_again(path, "small", number))


@pytest.mark.slow
@pytest.mark.long
def test_walkthroughs_win_in_large_rooms(tmp_path):
    path = generate(tmp_path, games=3, size="realistic")[2]  # two objects; it takes seconds
    play(path, drawn_again(path, "realistic", 2))


@pytest.mark.parametrize("size", ["small", "realistic"])
def test_every_type_has_a_plan(planner, size):
    arguments = list(sys.argv)
    for seed in range(5):
        for task in TASKS:
            game = sample_game(random.Random(seed), task, size)
            assert planner.solve(game), (seed, game.goal)
    assert sys.argv == arguments


def test_no_plan_where_there_is_none(planner):
    rng, task = random.Random(0), "pick_heat_then_place_in_recep"
    while True:  # a kitchen with a mug and a garbage can, into which no mug fits
        game = sample_game(rng, task)
        kinds = {thing.kind for place in game.scene.places for thing in place.contents}
        if "mug" in kinds and "garbagecan" in game.room.kinds:
            break
    assert planner.solve(replace(game, goal=Goal(task, "mug", "garbagecan"))) == []
    assert planner.solve(replace(game, goal=Goal(task, "mug", "bed"))) == []
    assert planner.solve(game), "the planner is of use afterwards"


def test_the_tables_are_within_those_of_alfworld():
    import_alfworld()
    from alfworld.gen import constants

    for kind, places in WHERE.items():
        for place in places:
            fits = constants.VAL_RECEPTACLE_OBJECTS[spelling(place)]
            assert kind == LAMP or spelling(kind) in fits, f"no {kind} fits in a {place}"
    for task, rooms in ROOMS_OF_TASK.items():
        assert set(rooms) == {room.lower() for room in constants.GOALS_VALID[task]}
    abilities = dict(zip(TREATABLE, ("Cleanable", "Heatable", "Coolable"), strict=True))
    for task, ability in abilities.items():
        able = constants.VAL_ACTION_OBJECTS[ability]
        assert TREATABLE[task] == {kind for kind in WHERE if spelling(kind) in able}
    places = {place for room in ROOMS.values() for place in room}
    assert {p for p in places if spelling(p) in constants.OPENABLE_CLASS_SET} == OPENABLE


def test_a_part_names_things_as_the_whole_does():
    game = sample_game(random.Random(3), "pick_clean_then_place_in_recep", "medium")
    whole, part = problem(game), problem(game, relevant(game))
    assert set(part.splitlines()) < set(whole.splitlines())
    assert any(line.endswith("_bar_SinkBasin - receptacle") for line in part.splitlines())
    assert len(set(entities(game).values())) == len(entities(game))


def test_the_home_is_left_alone(tmp_path):
    code = "from turbo.envs.alfworld_pddl import spelling; import os; print(spelling('cd')); "
    code += "assert 'ALFWORLD_DATA' not in os.environ"
    environment = {k: v for k, v in os.environ.items() if k != "ALFWORLD_DATA"}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "CD\n"
    assert not (tmp_path / ".cache" / "alfworld").exists()
