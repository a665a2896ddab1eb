"""The fast engine plays what TextWorld's own environment plays, command by command."""

import json
import random
import sys
from pathlib import Path

import pytest

from turbo.envs import alfworld_engine as engine
from turbo.envs.alfworld_process import GameProcess, OwnGame


@pytest.fixture(scope="module")
def game_files(alfworld_games):
    return sorted(str(path) for path in Path(alfworld_games).glob("json_*/train/*/*/game.tw-pddl"))


def stock_environment(game):
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from textworld.envs import PddlEnv

    infos = dict(admissible_commands=True, won=True, facts=True, policy_commands=True)
    stock = AlfredDemangler(PddlEnv(textworld.EnvInfos(**infos)))
    stock.load(game)
    return stock


@pytest.mark.slow
@pytest.mark.parametrize("number", range(0, 12, 2))
def test_every_step_is_that_of_textworld(game_files, number):
    """Admissible commands, facts, plans and the end, on a way half planned and half random."""
    game = game_files[number]
    stock, own = stock_environment(game), engine.TextGame()
    theirs, ours = stock.reset(), own.reset(game)
    assert ours["task"] in theirs.feedback
    rng = random.Random(number)
    won = 0
    for _ in range(18):
        assert ours["actions"] == list(theirs["admissible_commands"])
        told = {(f.name, *(a.name.strip() for a in f.arguments)) for f in theirs["facts"]}
        assert {tuple(f) for f in ours["facts"]} == {f for f in told if f[0] in engine.TOLD}
        assert ours["won"] == theirs["won"]
        plan = own.plan()["plan"]
        assert plan == theirs["policy_commands"]
        won += ours["won"]
        lost = rng.random() < 0.4 or not plan
        command = rng.choice([*ours["actions"], "fly"]) if lost else plan[0]
        ours, (theirs, _, _) = own.step(command), stock.step(command)
        assert ours["done"] == (command != "fly")
    assert won


def test_a_reset_begins_anew_and_the_translation_is_kept(game_files, monkeypatch):
    own = engine.TextGame()
    first = own.reset(game_files[0])
    for command in own.plan()["plan"]:
        last = own.step(command)
    assert last["won"] and last != first
    assert own.reset(game_files[0]) == first
    monkeypatch.setattr(engine, "translate", lambda game: pytest.fail("it was translated again"))
    monkeypatch.setattr(engine, "translate_apart", lambda game: pytest.fail("translated again"))
    assert engine.TextGame().reset(game_files[0]) == first


def test_a_translation_made_apart_is_the_same_and_a_broken_cache_is_made_anew(
    game_files, monkeypatch, tmp_path
):
    game = Path(game_files[1])
    known = engine.translation(game)
    monkeypatch.setenv("GTR_TURBO_CACHE", str(tmp_path))
    assert engine.translation(game) == known  # in a process of its own
    (kept,) = (tmp_path / "alfworld-games").iterdir()
    kept.write_text(kept.read_text()[:50])
    assert engine.translation(game, apart=False) == known
    assert json.loads(kept.read_text()) == known


def test_a_goal_out_of_reach_is_told(game_files, tmp_path, monkeypatch):
    monkeypatch.setenv("GTR_TURBO_CACHE", str(tmp_path))
    content = json.loads(Path(game_files[0]).read_text())
    content["pddl_problem"] = content["pddl_problem"].replace("(pickupable ", "(cleanable ")
    path = tmp_path / "game.tw-pddl"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"cannot be reached"):
        engine.translation(path, apart=False)
    with pytest.raises(ValueError, match=r"game\.tw-pddl could not be translated.*reached"):
        engine.translation(path)


def test_a_process_and_a_game_of_ones_own_say_the_same(game_files):
    apart, own = GameProcess(), OwnGame()
    questions = [{"do": "reset", "game": game_files[2]}, {"do": "plan"}]
    for question in questions:
        apart.send(question)
        own.send(question)
        told = apart.receive()
        assert told == own.receive()
    for command in [*told["plan"], "open the sky"]:
        apart.send({"do": "step", "action": command})
        own.send({"do": "step", "action": command})
        assert apart.receive() == own.receive()
    apart.close()
    apart.close()


def test_a_game_that_is_over_leaves_its_library_to_the_next(game_files):
    """A new one is a copy of 33 MB on disk and in memory, which nothing frees."""
    first = engine.TextGame()
    library = first.library
    wanted = first.reset(game_files[0])
    first.step(first.plan()["plan"][0])
    del first
    second = engine.TextGame()
    assert second.library is library and second.reset(game_files[0]) == wanted
    assert engine.TextGame().library is not library


def test_a_translation_leaves_the_surroundings_as_they_are(game_files, monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    before = list(sys.argv)
    engine.translate(json.loads(Path(game_files[0]).read_text()))
    assert "ALFWORLD_DATA" not in engine.os.environ and sys.argv == before


def test_games_are_translated_by_one_copy_of_the_planner(game_files):
    """2,600 games with a copy of 33 MB each filled a disk. What went before changes nothing."""

    def copies():
        lines = Path("/proc/self/maps").read_text().splitlines()
        return len({line.split()[4] for line in lines if "libdownward" in line})  # by their inodes

    games = [Path(file) for file in game_files[:3]]
    first = engine.translate(json.loads(games[0].read_text()))
    before = copies()
    later = [engine.translate(json.loads(game.read_text())) for game in games]
    assert copies() == before > 0
    assert later[0] == first
    for game, found in zip(games, later, strict=True):
        assert engine.translate_apart(game) == json.loads(json.dumps(found))


def test_without_the_engine_it_says_what_to_install(monkeypatch):
    engine.check_engine()
    monkeypatch.setitem(sys.modules, "textworld", None)
    with pytest.raises(ValueError, match=r"not installed: pip install 'gtr-turbo\[alfworld\]'"):
        engine.check_engine()
