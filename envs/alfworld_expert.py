"""Who plays ALFWorld knowing no more than a player: a search, step by step, and its thoughts.

The planner knows where everything is; who imitates it learns to guess. This expert sees what the
player sees: the picture, the task, the commands given so far and those that are admissible. It goes
to the places that may hold the object, in the order of the list, opens what is closed, takes the
object where it sees it, treats it, and brings it to where it belongs. Its next command follows from
these alone, so a policy without a memory of earlier pictures can learn it.

    thought   "see shelf 2 with pen 1, mug 2; hold nothing; want mug; so take mug 2 from shelf 2"

Left out: the planner (`alfworld_engine`), rewards (`alfworld`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from turbo.envs.alfworld_scene import TREATMENTS, Goal, Place, Scene, kind_of

SO = "; so "
HOLD, WANT = "; hold ", "; want "
_AND = re.compile(r",? and |, ")
OPEN, TAKE, GO, PUT = "open ", "take ", "go to ", "move "


@dataclass(frozen=True)
class Situation:
    """What a player knows: the task, what is seen, the commands so far and the possible ones."""

    goal: Goal
    scene: Scene  # as `view` leaves it
    history: tuple[str, ...]
    actions: tuple[str, ...]
    holds: dict[str, list[str]]  # kind of place -> kinds of things it may hold


def perception(scene: Scene) -> str:
    """What is seen and held, in words."""
    seen = " and ".join(_seen(place) for place in scene.here) or "the room"
    return f"see {seen}{HOLD}{_named(scene.held) if scene.held else 'nothing'}"


def _seen(place: Place) -> str:
    if not place.shows:
        return f"{place.name} closed"
    if not place.contents:
        return f"{place.name} empty"
    return f"{place.name} with {', '.join(_named(thing) for thing in place.contents)}"


def _named(thing) -> str:
    """ "hot clean mug 1"."""
    return " ".join([*sorted(thing.flags), thing.name])


def wanted(goal: Goal) -> str:
    """What is looked for or carried, in words: "hot mug"."""
    if goal.task in TREATMENTS:
        return f"{TREATMENTS[goal.task][1]} {goal.thing}"
    return goal.thing


def next_actions(now: Situation) -> list[str]:
    """Commands that lead on, the expert's own first; none where it knows no way.

    While it searches, any unvisited place that may hold the object is as good as another.
    """
    goal, scene = now.goal, now.scene
    if scene.held is not None:
        if scene.held.kind != goal.thing:
            return _put_down(now)
        return _deliver(now)
    return _find(now)


def _find(now: Situation) -> list[str]:
    """Nothing is held: take the object if it is here, else look where it may be."""
    goal = now.goal
    for place in now.scene.here:
        if not place.shows:
            if place.kind != goal.place or goal.task in TREATMENTS or _may_hold(now, place.name):
                return _possible(now, [OPEN + place.name])
        elif place.kind != goal.place or not _is_done(now, place):
            own = [t for t in place.contents if t.kind == goal.thing and not _is_placed(now, t)]
            if own:
                # what is treated already comes first
                own.sort(key=lambda thing: -len(thing.flags))
                return _possible(now, [f"take {thing.name} from {place.name}" for thing in own])
    return _search(now)


def _is_done(now: Situation, place: Place) -> bool:
    """Whether what lies at the goal may stay there."""
    return now.goal.task not in TREATMENTS and place.kind == now.goal.place


def _is_placed(now: Situation, thing) -> bool:
    """Whether this thing was brought here as the task wants it."""
    return any(c.startswith(f"move {thing.name} to {now.goal.place} ") for c in now.history)


def _search(now: Situation) -> list[str]:
    """Places not visited yet that may hold the object, in the list's order; else all again."""
    goal = now.goal
    visited = {name for command in now.history for name in goes_to(command)}
    here = set(now.scene.at)
    places = [p.name for p in now.scene.places if p.name not in here and _may_hold(now, p.name)]
    if goal.task not in TREATMENTS:  # what is there already need not be brought
        places = [name for name in places if kind_of(name) != goal.place]
    new = [name for name in places if name not in visited]
    if new:
        return _possible(now, [GO + name for name in new])
    # all were visited: again, the one longest ago first
    last = {name: i for i, command in enumerate(now.history) for name in goes_to(command)}
    places.sort(key=lambda name: last.get(name, -1))
    return _possible(now, [GO + name for name in places])[:1]


def _may_hold(now: Situation, place: str) -> bool:
    kinds = now.holds.get(kind_of(place))
    return kinds is None or now.goal.thing in kinds


def _deliver(now: Situation) -> list[str]:
    """The object is held: treat it, then bring it to its place, or under the lamp."""
    goal, scene, held = now.goal, now.scene, now.scene.held
    if goal.task in TREATMENTS and TREATMENTS[goal.task][1] not in held.flags:
        verb, _, machine = TREATMENTS[goal.task]
        for place in scene.here:
            if place.kind == machine:
                return _possible(now, [f"{verb} {held.name} with {place.name}"])
        return _go(now, machine)
    if goal.lamp:
        lamps = [a for a in now.actions if a.startswith(f"use {goal.lamp} ")]
        return lamps or _look_for_lamp(now)
    goals = [place for place in scene.here if place.kind == goal.place]
    if goals:
        place = _fullest(now, goals)
        if not place.shows:
            return _possible(now, [OPEN + place.name])
        return _possible(now, [f"move {held.name} to {place.name}"])
    return _go(now, goal.place)


def _fullest(now: Situation, places: Sequence[Place]) -> Place:
    """Two objects belong into one receptacle: the one that has one already."""
    return max(places, key=lambda p: sum(t.kind == now.goal.thing for t in p.contents))


def _go(now: Situation, kind: str) -> list[str]:
    """To a place of a kind: the one that an object was brought to before, else any."""
    found = [p.name for p in now.scene.places if p.kind == kind and p.name not in now.scene.at]
    before = [c.rpartition(" to ")[2] for c in now.history if c.startswith(PUT)]
    again = [name for name in found if name in before]
    return _possible(now, [GO + name for name in again or found])


def _look_for_lamp(now: Situation) -> list[str]:
    """Places not seen since the object was taken; a lamp stands on what has no door."""
    taken = [i for i, c in enumerate(now.history) if c.startswith(TAKE)]
    since = now.history[taken[-1] :] if taken else now.history
    seen = {name for command in since for name in goes_to(command)} | set(now.scene.at)
    places = [p.name for p in now.scene.places if not p.openable and p.name not in seen]
    return _possible(now, [GO + name for name in places])


def _put_down(now: Situation) -> list[str]:
    """Something else is held: leave it where it may lie."""
    here = [a for a in now.actions if a.startswith(f"move {now.scene.held.name} to ")]
    kind = now.scene.held.kind
    places = [
        p.name
        for p in now.scene.places
        if p.name not in now.scene.at and kind in now.holds.get(p.kind, [kind])
    ]
    return here[:1] or _possible(now, [GO + name for name in places])


def goes_to(command: str) -> list[str]:
    """The places that a command goes to: "go to bed 1 and desk 2" names those side by side."""
    return _AND.split(command.removeprefix(GO)) if command.startswith(GO) else []


def _possible(now: Situation, commands: list[str]) -> list[str]:
    ways = {name: action for action in now.actions for name in goes_to(action)}
    found = [ways.get(c.removeprefix(GO)) if c.startswith(GO) else c for c in commands]
    return [command for command in dict.fromkeys(found) if command in now.actions]


def thought(now: Situation, action: str) -> str:
    """What the expert thinks before `action`."""
    return f"{perception(now.scene)}{WANT}{wanted(now.goal)}{SO}{action}"
