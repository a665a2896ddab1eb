"""Rooms of ALFWorld drawn at random. ALFWorld itself is not needed here."""

import random
from collections import Counter

import pytest
from sampled_games import sample_game

from turbo.envs.alfworld_rooms import (
    LAMP,
    ROOMS,
    ROOMS_OF_TASK,
    SIZES,
    THINGS,
    TREATABLE,
    WHERE,
    identity,
    is_held_out,
    layout_text,
    room_text,
    sample_room,
    split_of,
)
from turbo.envs.alfworld_scene import TASKS, TREATMENTS, conditions_met, kind_of


def games(task, size="small", number=200, seed=0):
    rng = random.Random(seed)
    return [sample_game(rng, task, size) for _ in range(number)]


@pytest.mark.parametrize("task", TASKS)
def test_a_thousand_distinct_games_of_a_type(task):
    drawn = games(task, number=1_100)
    distinct = {identity(game) for game in drawn}
    assert len(distinct) >= 1_000
    # by another way than the hash
    assert len({(game.scene, game.goal) for game in drawn}) == len(distinct)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("task", TASKS)
def test_a_game_can_be_won_and_is_not_won(task, size):
    limits = SIZES[size]
    for game in games(task, size, number=100):
        goal, places = game.goal, game.scene.places
        lies = [(thing, place) for place in places for thing in place.contents]
        own = [place.kind for thing, place in lies if thing.kind == goal.thing]
        kinds = {place.kind for place in places}

        assert game.room.kind in ROOMS_OF_TASK[task]
        assert conditions_met(game.scene, goal)[0] == 0
        assert len(own) >= (2 if task == "pick_two_obj_and_place" else 1)
        assert goal.place not in own
        if task == "look_at_obj_in_light":
            assert (goal.place, goal.lamp) == ("", LAMP)
            assert any(thing.kind == LAMP for thing, _ in lies)
        else:
            assert goal.place in kinds and goal.place in WHERE[goal.thing] and not goal.lamp
        if task in TREATMENTS:
            assert TREATMENTS[task][2] in kinds - {goal.place}
            assert goal.thing in TREATABLE[task]
        assert len({thing.kind for thing, _ in lies}) > 2, "nothing to be mistaken for it"

        assert limits.places[0] <= len(places) <= limits.places[1]
        assert limits.things[0] <= len(lies) <= limits.things[1]
        assert all(place.kind in WHERE[thing.kind] for thing, place in lies)
        assert max(len(place.contents) for place in places) <= limits.crowd
        assert game.room.places == tuple(place.name for place in places)


@pytest.mark.parametrize("size", SIZES)
def test_things_of_a_kind_are_numbered_from_one(size):
    for game in games("pick_and_place_simple", size, number=50):
        names = [place.name for place in game.scene.places]
        names += [thing.name for place in game.scene.places for thing in place.contents]
        for kind, number in Counter(map(kind_of, names)).items():
            assert {f"{kind} {i}" for i in range(1, number + 1)} <= set(names)
        assert len(set(names)) == len(names)


def test_small_rooms_have_few_kinds():
    drawn = [game for task in TASKS for game in games(task)]
    things = {t.kind for game in drawn for place in game.scene.places for t in place.contents}
    assert 20 <= len(things) <= 30
    assert len({place.kind for game in drawn for place in game.scene.places}) <= 20


def test_the_seed_decides():
    for task in TASKS:
        assert games(task, number=5) == games(task, number=5)
        assert games(task, number=5) != games(task, number=5, seed=1)


def test_no_layout_and_no_held_out_room_is_in_two_splits():
    rooms, layouts = {}, {}
    drawn = [game for task in TASKS for game in games(task, number=1_000)]
    for game in drawn:
        rooms.setdefault(split_of(game), set()).add(room_text(game.room))
        layouts.setdefault(split_of(game), set()).add(layout_text(game))
    assert not rooms["valid_unseen"] & (rooms["train"] | rooms["valid_seen"])
    assert not layouts["train"] & (layouts["valid_seen"] | layouts["valid_unseen"])
    share = Counter(map(split_of, drawn))
    assert 0.1 < share["valid_unseen"] / len(drawn) < 0.3
    assert 0.04 < share["valid_seen"] / len(drawn) < 0.16


def test_every_kind_of_room_is_held_out_now_and_then():
    for size in SIZES:
        for kind in ROOMS:
            drawn = [
                sample_room(random.Random(i), "pick_and_place_simple", size, [kind])
                for i in range(60)
            ]
            assert {is_held_out(room) for room in drawn} == {True, False}, (size, kind)


def test_a_task_without_its_room():
    with pytest.raises(ValueError, match="takes place in kitchen"):
        sample_game(random.Random(0), "pick_heat_then_place_in_recep", rooms=["bedroom"])


def test_the_tables_agree_with_each_other():
    places = {place for room in ROOMS.values() for place in room}
    assert {place for usual in WHERE.values() for place in usual} == places
    for room, kinds in THINGS.items():
        for kind in " ".join(kinds).split():
            assert set(WHERE[kind]) & set(ROOMS[room]), f"{kind} can lie nowhere in a {room}"
