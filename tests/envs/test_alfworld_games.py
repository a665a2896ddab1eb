"""The command that makes games of ALFWorld: files, splits, going on, refusals."""

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from turbo.envs import alfworld_games
from turbo.envs.alfworld_games import (
    RECORD,
    Made,
    draw_games,
    generate,
    how_far,
    main,
    make_games,
    making,
)
from turbo.envs.alfworld_pddl import Planner
from turbo.envs.alfworld_process import GameProcess
from turbo.envs.alfworld_rooms import ROOMS, SPLITS, identity, room_text, split_of
from turbo.envs.alfworld_scene import TASKS

needs_engine = pytest.mark.skipif(
    importlib.util.find_spec("alfworld") is None,
    reason="needs the engine: pip install 'gtr-turbo[alfworld]'",
)


def first_game(split, number, seed=0, size="small"):
    task = list(TASKS)[number % len(TASKS)]
    return next(draw_games(seed, size, task, split, number, tuple(ROOMS)))


def all_files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def test_games_are_of_their_split_and_known_rooms_come_from_training():
    for number in range(60):
        drawn = {split: first_game(split, number) for split in SPLITS}
        assert all(split_of(game) == split for split, game in drawn.items())
        assert room_text(drawn["valid_seen"].room) == room_text(drawn["train"].room)


def test_draws_depend_on_seed_number_and_size_alone():
    assert identity(first_game("train", 3)) == identity(first_game("train", 3))
    others = [(0, 3, "small"), (1, 3, "small"), (0, 9, "small"), (0, 3, "medium")]
    drawn = {identity(first_game("train", n, seed, size)) for seed, n, size in others}
    assert len(drawn) == len(others)


@needs_engine
def test_several_makers_in_one_go_and_one_that_goes_on_make_the_same_games(
    alfworld_games, tmp_path, capsys
):
    written = all_files(alfworld_games)
    assert len(written) == 1 + 2 * 24

    # by one maker in two goes, the first of them cut short
    flags = ["--out", str(tmp_path), "--jobs", "1"]
    assert main([*flags, "--games", "6", "--held-out", "3"]) == 0
    assert "0 kept, 12 new" in capsys.readouterr().out
    torn = next(tmp_path.rglob("train/*-4/*/game.tw-pddl"))
    torn.write_text(torn.read_text()[:100])
    untouched = next(tmp_path.rglob("train/*-5/*/game.tw-pddl"))
    before = untouched.stat().st_mtime_ns
    assert main([*flags, "--games", "12", "--held-out", "6"]) == 0
    assert "11 kept, 13 new" in capsys.readouterr().out
    assert all_files(tmp_path) == written
    assert untouched.stat().st_mtime_ns == before


@needs_engine
def test_splits_keep_rooms_and_layouts_apart(alfworld_games):
    # as the files have it, by another way than `split_of`
    receptacles, layouts = {}, {}
    for split in SPLITS:
        for path in Path(alfworld_games, "json_2.1.1", split).rglob("game.tw-pddl"):
            problem = json.loads(path.read_text())["pddl_problem"]
            kinds = Counter(re.findall(r"\(receptacleType \w+ (\w+)Type\)", problem))
            receptacles.setdefault(split, set()).add(frozenset(kinds.items()))
            lies = frozenset(re.findall(r"\(inReceptacle (\w+) (\w+)\)", problem))
            layouts.setdefault(split, set()).add((frozenset(kinds.items()), lies))
    assert not receptacles["valid_unseen"] & receptacles["train"]
    assert receptacles["valid_seen"] <= receptacles["train"]
    assert not layouts["valid_seen"] & layouts["train"]


@needs_engine
def test_a_draw_without_a_plan_is_replaced(tmp_path, monkeypatch):
    solve, tried = Planner.solve, []

    def without_the_second(self, game):
        tried.append(identity(game))
        return [] if len(tried) == 2 else solve(self, game)

    monkeypatch.setattr(Planner, "solve", without_the_second)
    with making(1) as makers:
        made = list(make_games(tmp_path, 3, 0, "small", list(TASKS), "train", list(ROOMS), makers))
    assert [game.without_plan for game in made] == [0, 1, 0]
    assert len(tried) == len(set(tried)) == 4
    assert len(list(tmp_path.rglob("game.tw-pddl"))) == 3


@needs_engine
def test_a_maker_that_dies_is_told_of(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("turbo.envs.alfworld_games.GameProcess", dying)
    assert main(["--out", str(tmp_path), "--games", "20", "--jobs", "2"]) == 1
    error = capsys.readouterr().err
    assert "the process of an ALFWorld game ended (status 3)" in error and error.count("\n") == 1


def dying(kind):
    """A maker that ends when it is first asked for a game."""
    return GameProcess(kind, command=[sys.executable, "-c", "input(); raise SystemExit(3)"])


@needs_engine
def test_alfworlds_own_tool_finds_the_games(tmp_path, capsys):
    paths = generate(tmp_path, games=6)
    from alfworld.agents.environment.alfred_tw_env import AlfredTWEnv

    config = {
        "env": {"goal_desc_human_anns_prob": 0, "task_types": [1, 2, 3, 4, 5, 6]},
        "dataset": {"data_path": str(tmp_path / "json_2.1.1/train"), "num_train_games": -1},
    }
    assert sorted(AlfredTWEnv(config).game_files) == sorted(map(str, paths))
    folders = [path.parent.parent.name for path in paths]
    assert [name.split("-")[0] for name in folders] == list(TASKS)
    assert all(re.fullmatch(r"\w+-[A-Z]\w+-None-[A-Z]\w+-[1-6]", name) for name in folders)


@needs_engine
def test_tasks_and_rooms_can_be_chosen(tmp_path):
    paths = generate(
        tmp_path, games=3, tasks=["pick_clean_then_place_in_recep"], rooms=["bathroom"]
    )
    for path in paths:
        trajectory = json.loads((path.parent / "traj_data.json").read_text())
        assert trajectory["task_type"] == "pick_clean_then_place_in_recep"
        assert trajectory["made_by"]["room"].startswith("bathroom: ")


@needs_engine
def test_other_settings_need_another_folder_or_overwrite(tmp_path, capsys):
    flags = ["--out", str(tmp_path), "--games", "1", "--held-out", "0"]
    assert main(flags) == 0
    assert main([*flags, "--seed", "1"]) == 2
    assert "holds games of seed 0, not 1" in capsys.readouterr().err
    before = set(all_files(tmp_path))
    assert main([*flags, "--seed", "1", "--overwrite"]) == 0
    assert len(all_files(tmp_path)) == 3 and set(all_files(tmp_path)) != before

    (tmp_path / RECORD).unlink()
    for more in ([], ["--overwrite"]):
        assert main([*flags, *more]) == 2
        assert "were not made here" in capsys.readouterr().err
    assert len(all_files(tmp_path)) == 2


@needs_engine
def test_without_the_engine_nothing_is_overwritten(tmp_path, capsys, monkeypatch):
    flags = ["--out", str(tmp_path), "--games", "1", "--held-out", "0"]
    assert main(flags) == 0
    before = all_files(tmp_path)

    def missing():
        raise ImportError("pip install 'gtr-turbo[alfworld]'")

    monkeypatch.setattr("turbo.envs.alfworld_games.import_alfworld", missing)
    assert main([*flags, "--overwrite"]) == 1
    assert "pip install" in capsys.readouterr().err
    assert all_files(tmp_path) == before


@needs_engine
def test_the_games_of_all_are_told_of_and_kept_at_ctrl_c(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GTR_TURBO_CACHE", str(tmp_path))
    for name, value in {"DEFAULT_GAMES": 4, "DEFAULT_HELD_OUT": 1, "EVERY": 2}.items():
        monkeypatch.setattr(alfworld_games, name, value)
    own, written = alfworld_games.write_game, []

    def write(*arguments):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(arguments)
        own(*arguments)

    monkeypatch.setattr(alfworld_games, "write_game", write)
    with pytest.raises(KeyboardInterrupt):
        alfworld_games.default_games()
    out = tmp_path / "alfworld-small"
    told = capsys.readouterr().err.splitlines()
    assert told[0] == (
        f"making 6 small games of ALFWorld in {out}, once; it takes minutes, Ctrl-C keeps what is "
        "made"
    )
    assert len(told) == 2 and re.fullmatch(r"2 of 6 games, \d+\.\d minutes left", told[1])
    monkeypatch.setattr(alfworld_games, "write_game", own)
    assert alfworld_games.default_games() == out
    told = capsys.readouterr().err.splitlines()
    assert "3 kept, 3 new" in told[-1]
    assert [line.split(",")[0] for line in told[1:-1]] == ["4 of 6 games", "6 of 6 games"]
    alfworld_games.default_games()
    assert capsys.readouterr().err == ""


def test_the_minutes_left_count_new_games_alone():
    made = [Made(Path(), kept, 0) for kept in (True, True, False, False)]
    assert how_far(made, 10, 60.0) == "4 of 10 games, 3.0 minutes left"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--games", "0"], "--games must be at least 1"),
        (["--games", "5", "--held-out", "6"], "--games must be at least 1 and --held-out"),
        (["--held-out", "-1"], "not negative"),
        (["--seed", "-1"], "not negative"),
        (["--jobs", "-1"], "--jobs must be at least 0"),
        (["--tasks", "pick_nose"], "task 'pick_nose' is unknown: use pick_and_place_simple"),
        (["--rooms", "garage"], "room 'garage' is unknown: use kitchen"),
        (["--tasks", "look_at_obj_in_light", "--rooms", "kitchen"], "bedroom or livingroom"),
    ],
)
def test_bad_flags(flags, message, tmp_path, capsys):
    assert main(["--out", str(tmp_path / "new"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "new").exists()


@needs_engine
def test_a_folder_that_is_a_file_and_a_torn_record(tmp_path, capsys):
    flags = ["--games", "1", "--held-out", "0"]
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file"), *flags]) == 2
    (tmp_path / RECORD).write_text("{")
    assert main(["--out", str(tmp_path), *flags]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(error.startswith("error: ") for error in errors)
    assert "--overwrite" in errors[1]
    assert main(["--out", str(tmp_path), *flags, "--overwrite"]) == 0


def test_without_the_engine_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "alfworld.info", raising=False)
    monkeypatch.setitem(sys.modules, "alfworld", None)
    assert main(["--out", str(tmp_path / "new")]) == 1
    assert "pip install 'gtr-turbo[alfworld]'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_flags_that_are_not_there(tmp_path, capsys):
    for flags in (["--size", "huge"], ["--sise", "small"]):
        with pytest.raises(SystemExit) as stop:
            main(["--out", str(tmp_path), *flags])
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
