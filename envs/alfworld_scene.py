"""What is where in an ALFWorld room, read from the engine's facts, and how far the task is.

A `Scene` is the whole room; `view` keeps what the agent sees. The goal conditions are those of
ALFWorld's tasks (Shridhar et al. 2021): one for a placement, two for two objects or for an object
looked at under a lamp, three for one that is cleaned, heated or cooled and then placed.

Left out: the engine (`alfworld_engine`), pictures (`alfworld_draw`), the environment (`alfworld`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

TASKS = {  # task type -> number of goal conditions
    "pick_and_place_simple": 1,
    "look_at_obj_in_light": 2,
    "pick_two_obj_and_place": 2,
    "pick_clean_then_place_in_recep": 3,
    "pick_heat_then_place_in_recep": 3,
    "pick_cool_then_place_in_recep": 3,
}
FLAGS = {  # fact -> what it says of an object
    "ishot": "hot",
    "iscool": "cool",
    "isclean": "clean",
    "istoggled": "on",
    "issliced": "sliced",
}
TREATMENTS = {  # task type -> (verb, what becomes of the object, the place that does it)
    "pick_clean_then_place_in_recep": ("clean", "clean", "sinkbasin"),
    "pick_heat_then_place_in_recep": ("heat", "hot", "microwave"),
    "pick_cool_then_place_in_recep": ("cool", "cool", "fridge"),
}


@dataclass(frozen=True)
class Thing:
    """An object, such as "mug 1" of the kind "mug", and its state: hot, cool, clean, on, sliced."""

    name: str
    flags: frozenset[str] = frozenset()

    @property
    def kind(self) -> str:
        return kind_of(self.name)


@dataclass(frozen=True)
class Place:
    """A receptacle, such as "cabinet 2" of the kind "cabinet", and what is in it or on it."""

    name: str
    contents: tuple[Thing, ...] = ()  # sorted by name
    openable: bool = False
    is_open: bool = False

    @property
    def kind(self) -> str:
        return kind_of(self.name)

    @property
    def shows(self) -> bool:
        """Whether one who stands before it sees what it holds."""
        return self.is_open or not self.openable


@dataclass(frozen=True)
class Scene:
    """A room: its places in the order of their names, where the agent is, and what it holds."""

    places: tuple[Place, ...]
    at: tuple[str, ...] = ()  # names of the places before the agent; none in the middle of the room
    held: Thing | None = None

    @property
    def here(self) -> tuple[Place, ...]:
        """The places before the agent: mostly one."""
        return tuple(place for place in self.places if place.name in self.at)


@dataclass(frozen=True)
class Goal:
    """What is to be done: kinds in lower case, as they stand in names; "" where there is none."""

    task: str  # one of TASKS
    thing: str  # kind of the object
    place: str = ""  # kind of the receptacle that it belongs into
    lamp: str = ""  # kind of the lamp to look at it with


def kind_of(name: str) -> str:
    """The kind of a numbered name: "mug 1" is a "mug"."""
    return name.rsplit(" ", 1)[0]


def natural(name: str) -> tuple[str, int]:
    """Sorts "drawer 2" before "drawer 10"."""
    kind, _, number = name.rpartition(" ")
    return (kind, int(number)) if number.isdigit() else (name, 0)


def read_scene(facts: Iterable[tuple[str, ...]]) -> Scene:
    """The scene that facts such as ("inreceptacle", "mug 1", "cabinet 2") state."""
    where, inside, flags = {}, {}, {}
    openable, opened, position, held = set(), set(), None, None
    for name, *args in facts:
        if name == "receptacleatlocation":
            where[args[0]] = args[1]
        elif name == "inreceptacle":
            inside.setdefault(args[1], set()).add(args[0])
        elif name == "atlocation":
            position = args[1]
        elif name == "openable":
            openable.add(args[0])
        elif name == "opened":
            opened.add(args[0])
        elif name == "holds":
            held = args[1]
        elif name in FLAGS:
            flags.setdefault(args[0], set()).add(FLAGS[name])

    def thing(name: str) -> Thing:
        return Thing(name, frozenset(flags.get(name, ())))

    places = tuple(
        Place(
            name,
            tuple(thing(item) for item in sorted(inside.get(name, ()), key=natural)),
            name in openable,
            name in opened,
        )
        for name in sorted(where, key=natural)
    )
    at = tuple(place.name for place in places if where[place.name] == position)
    return Scene(places, at, None if held is None else thing(held))


def view(scene: Scene) -> Scene:
    """What the agent sees: the names of all places, the contents only of open ones before it."""
    here = set(scene.at)
    places = tuple(
        place if place.name in here and place.shows else replace(place, contents=())
        for place in scene.places
    )
    return replace(scene, places=places)


def conditions_met(scene: Scene, goal: Goal) -> tuple[int, int]:
    """(goal conditions that hold, all of them), by the rules of ALFWorld's own tasks."""
    placed = [
        sum(item.kind == goal.thing for item in place.contents)
        for place in scene.places
        if place.kind == goal.place
    ]
    total = TASKS[goal.task]
    if goal.task == "pick_and_place_simple":
        return min(1, max(placed, default=0)), total
    if goal.task == "pick_two_obj_and_place":
        return min(2, max(placed, default=0)), total
    if goal.task == "look_at_obj_in_light":
        lit = any(
            item.kind == goal.lamp and "on" in item.flags
            for place in scene.here
            for item in place.contents
        )
        return lit + (scene.held is not None and scene.held.kind == goal.thing), total
    _, wanted, _ = TREATMENTS[goal.task]
    everything = [(place.kind, item) for place in scene.places for item in place.contents]
    if scene.held is not None:
        everything.append(("", scene.held))
    own = [(kind, item) for kind, item in everything if item.kind == goal.thing]
    there = any(kind == goal.place for kind, _ in own)
    treated = any(wanted in item.flags for _, item in own)
    both = any(kind == goal.place and wanted in item.flags for kind, item in own)
    return there + treated + both, total
