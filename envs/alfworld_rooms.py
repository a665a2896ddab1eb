"""Rooms of ALFWorld drawn at random: which receptacles stand there, what lies where, what is asked.

A room is its kind and its receptacles; a layout is a room and what lies where; a game is a layout
and a goal. `split_of` says by their hashes which split a game belongs to, whatever the seed:

    valid_unseen   one room of five, never used in training
    valid_seen     one layout of ten of the other rooms
    train          all other layouts

The tables are a choice among what ALFWorld's own tables allow. No receptacle stands more often in a
room than in one of its floor plans. Left out: floor lamps, slices, and objects within objects;
files, PDDL and plans (`alfworld_games`). ALFWorld itself is not needed.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from turbo.envs.alfworld_scene import TASKS, TREATMENTS, Goal, Place, Scene, Thing, kind_of, natural

SPLITS = ("train", "valid_seen", "valid_unseen")
LAMP = "desklamp"
OPENABLE = {"cabinet", "drawer", "fridge", "microwave", "safe"}

# Kind of room -> kind of receptacle -> (the fewest, the most)
ROOMS = {
    "kitchen": {
        "fridge": (1, 1),
        "microwave": (1, 1),
        "sinkbasin": (1, 1),
        "countertop": (1, 4),
        "cabinet": (0, 28),
        "drawer": (0, 27),
        "diningtable": (0, 3),
        "shelf": (0, 3),
        "garbagecan": (0, 1),
        "stoveburner": (0, 4),
        "coffeemachine": (0, 1),
        "sidetable": (0, 1),
    },
    "bedroom": {
        "bed": (1, 2),
        "desk": (1, 2),
        "drawer": (0, 14),
        "shelf": (0, 14),
        "dresser": (0, 2),
        "sidetable": (0, 2),
        "cabinet": (0, 4),
        "armchair": (0, 3),
        "garbagecan": (0, 1),
        "laundryhamper": (0, 1),
        "safe": (0, 1),
    },
    "bathroom": {
        "sinkbasin": (1, 2),
        "toilet": (1, 1),
        "countertop": (1, 2),
        "cabinet": (0, 9),
        "drawer": (0, 8),
        "shelf": (0, 4),
        "garbagecan": (0, 1),
        "bathtubbasin": (0, 1),
        "cart": (0, 1),
        "handtowelholder": (0, 2),
        "towelholder": (0, 2),
        "toiletpaperhanger": (0, 1),
        "sidetable": (0, 1),
        "dresser": (0, 1),
    },
    "livingroom": {
        "sofa": (1, 2),
        "sidetable": (1, 5),
        "coffeetable": (0, 2),
        "armchair": (0, 3),
        "drawer": (0, 19),
        "shelf": (0, 14),
        "cabinet": (0, 8),
        "dresser": (0, 2),
        "diningtable": (0, 2),
        "tvstand": (0, 2),
        "ottoman": (0, 1),
        "desk": (0, 1),
        "garbagecan": (0, 1),
        "safe": (0, 1),
    },
}
ROOMS_OF_TASK = {task: tuple(ROOMS) for task in TASKS} | {
    "look_at_obj_in_light": ("bedroom", "livingroom"),
    "pick_clean_then_place_in_recep": ("kitchen", "bathroom"),
    "pick_heat_then_place_in_recep": ("kitchen",),
    "pick_cool_then_place_in_recep": ("kitchen",),
}

TOPS = "countertop diningtable sidetable coffeetable"
SEATS = "sofa armchair ottoman"
STORES = "cabinet shelf drawer"
BATH = "toilet cart"
# Kinds of objects -> where they may lie, and be put
_WHERE = {
    "apple egg potato tomato": f"{TOPS} fridge microwave sinkbasin garbagecan",
    "bread": f"{TOPS} fridge microwave garbagecan",
    "lettuce": f"{TOPS} fridge sinkbasin garbagecan",
    "mug": f"{TOPS} cabinet shelf fridge microwave sinkbasin coffeemachine desk dresser",
    "bowl cup plate": f"{TOPS} cabinet shelf fridge microwave sinkbasin desk dresser",
    "pan": f"{TOPS} cabinet fridge sinkbasin stoveburner",
    "pot": f"{TOPS} cabinet shelf fridge sinkbasin stoveburner",
    "kettle": f"{TOPS} cabinet shelf sinkbasin stoveburner",
    "butterknife fork knife spatula spoon": f"{TOPS} drawer sinkbasin",
    "ladle": f"{TOPS} cabinet drawer sinkbasin",
    "glassbottle": f"{TOPS} cabinet shelf fridge sinkbasin",
    "winebottle": f"{TOPS} cabinet shelf fridge garbagecan dresser",
    "peppershaker saltshaker": f"{TOPS} {STORES}",
    "dishsponge": f"{TOPS} {STORES} {BATH} sinkbasin bathtubbasin garbagecan",
    "soapbar": f"{TOPS} {STORES} {BATH} sinkbasin bathtubbasin garbagecan",
    "soapbottle": f"{TOPS} {STORES} {BATH} garbagecan",
    "spraybottle": f"{TOPS} {STORES} {BATH} dresser garbagecan",
    "cloth": f"{TOPS} {STORES} {BATH} {SEATS} sinkbasin bathtubbasin dresser laundryhamper",
    "handtowel": f"{TOPS} {STORES} {BATH} sinkbasin bathtubbasin handtowelholder",
    "towel": "towelholder",
    "toiletpaper": f"{TOPS} {STORES} {BATH} dresser toiletpaperhanger garbagecan",
    "tissuebox": f"{TOPS} {STORES} {BATH} desk dresser tvstand garbagecan",
    "candle": f"{TOPS} {STORES} {BATH} desk dresser",
    "plunger": "cabinet cart",
    "book": f"{TOPS} {STORES} {SEATS} desk dresser bed",
    "newspaper": f"{TOPS} {STORES} {SEATS} desk dresser bed toilet garbagecan",
    "pillow": f"{SEATS} bed",
    "laptop": f"{TOPS} {SEATS} desk dresser bed",
    "cellphone": f"{TOPS} {SEATS} shelf drawer desk dresser bed safe",
    "creditcard keychain": f"{TOPS} {SEATS} shelf drawer desk dresser safe",
    "remotecontrol": f"{TOPS} {SEATS} shelf drawer desk dresser",
    "watch": f"{TOPS} shelf drawer desk dresser safe",
    "pen pencil": f"{TOPS} shelf drawer desk dresser garbagecan",
    "cd": f"{TOPS} {STORES} desk dresser safe garbagecan",
    "alarmclock": f"{TOPS} shelf desk dresser",
    "statue": f"{TOPS} shelf desk dresser safe",
    "vase": f"{TOPS} cabinet shelf desk dresser safe",
    "box": f"{TOPS} {SEATS} cabinet shelf desk dresser",
    "wateringcan": f"{TOPS} {STORES} desk dresser",
    "basketball": f"{TOPS} {SEATS} desk dresser bed",
    "baseballbat": f"{TOPS} bed",
    "tennisracket": f"{TOPS} desk dresser bed",
    LAMP: f"{TOPS} shelf desk dresser",
}
WHERE = {kind: places.split() for kinds, places in _WHERE.items() for kind in kinds.split()}

# Kind of room -> what lies there; (in rooms of every size, only in those that are not small)
THINGS = {
    "kitchen": (
        "apple bread egg lettuce potato tomato bowl cup mug plate fork pan",
        "pot kettle butterknife knife spatula spoon ladle glassbottle winebottle peppershaker "
        "saltshaker dishsponge soapbottle book creditcard cellphone vase statue",
    ),
    "bedroom": (
        "book pillow laptop cellphone keychain pen alarmclock",
        "creditcard pencil cd watch mug bowl box cloth tissuebox remotecontrol statue vase "
        "basketball baseballbat tennisracket",
    ),
    "bathroom": (
        "cloth soapbar toiletpaper spraybottle candle",
        "soapbottle handtowel towel tissuebox plunger dishsponge newspaper",
    ),
    "livingroom": (
        "remotecontrol newspaper book pillow laptop keychain",
        "creditcard watch statue vase box tissuebox candle wateringcan cellphone pen pencil plate "
        "bowl",
    ),
}
# Small rooms have few kinds of receptacles, so that a tiny model can learn to tell them apart
_SMALL_PLACES = (
    "fridge microwave sinkbasin countertop cabinet drawer diningtable shelf garbagecan bed desk "
    "dresser sidetable toilet sofa coffeetable armchair"
)
SMALL_PLACES = set(_SMALL_PLACES.split())
TREATABLE = {  # task -> what can be treated so
    task: set(kinds.split())
    for task, kinds in {
        "pick_clean_then_place_in_recep": (
            "apple bowl butterknife cloth cup dishsponge egg fork kettle knife ladle lettuce mug "
            "pan plate pot potato soapbar spatula spoon tomato"
        ),
        "pick_heat_then_place_in_recep": "apple bread cup egg mug plate potato tomato",
        "pick_cool_then_place_in_recep": (
            "apple bowl bread cup egg lettuce mug pan plate pot potato tomato winebottle"
        ),
    }.items()
}


@dataclass(frozen=True)
class Size:
    """How large a room is; ranges are (the fewest, the most)."""

    places: tuple[int, int]  # receptacles
    things: tuple[int, int]  # objects
    same_places: int  # the most receptacles of a kind
    same_things: int  # the most objects of a kind
    crowd: int  # the most objects in or on a receptacle


SIZES = {
    "small": Size((6, 8), (6, 9), 2, 2, 4),
    "medium": Size((13, 17), (18, 22), 5, 3, 6),
    "realistic": Size((33, 38), (42, 48), 28, 5, 9),
}


@dataclass(frozen=True)
class Room:
    """The kind of a room and its receptacles."""

    kind: str  # one of ROOMS
    places: tuple[str, ...]  # names such as "cabinet 2", in their order

    @property
    def kinds(self) -> list[str]:
        """The kinds of its receptacles, each once."""
        return list(dict.fromkeys(kind_of(name) for name in self.places))


@dataclass(frozen=True)
class Game:
    """What is where at the start, and what is to be done."""

    room: Room
    scene: Scene  # everything is closed, and the agent stands in the middle of the room
    goal: Goal
    wording: int  # which of ALFWorld's two sentences asks for it, 0 or 1


def sample_room(
    rng: random.Random, task: str, size: str, rooms: Sequence[str] = tuple(ROOMS)
) -> Room:
    """A room in which the task can be set."""
    limits, possible = SIZES[size], [kind for kind in ROOMS_OF_TASK[task] if kind in rooms]
    if not possible:
        raise ValueError(
            f"the task {task} takes place in {' or '.join(ROOMS_OF_TASK[task])}: "
            f"add one of these to the rooms {', '.join(rooms)}"
        )
    while True:
        kind = rng.choice(possible)
        counts, further = Counter(), []
        for place, (least, most) in ROOMS[kind].items():
            if size == "small" and place not in SMALL_PLACES:
                continue
            counts[place] = least
            further += [place] * (min(most, max(limits.same_places, least)) - least)
        wanted = rng.randint(*limits.places) - counts.total()
        counts.update(rng.sample(further, min(wanted, len(further))))
        names = [f"{place} {i}" for place, n in counts.items() for i in range(1, n + 1)]
        room = Room(kind, tuple(sorted(names, key=natural)))
        if targets(room, task, size):
            return room


def targets(room: Room, task: str, size: str) -> dict[str, list[str]]:
    """What may be asked for in a room: kind of object -> kinds of receptacles it may go to.

    It can lie elsewhere, and is not asked to where it is treated. [""] for a look under a lamp.
    """
    found = {}
    for thing in things_of(room, size):
        usual = [place for place in room.kinds if place in WHERE[thing]]
        if task == "look_at_obj_in_light":
            goals = [""] * bool(usual)
        elif task in TREATMENTS and thing not in TREATABLE[task]:
            goals = []
        else:
            treated_at = TREATMENTS[task][2] if task in TREATMENTS else ""
            goals = [place for place in usual if place != treated_at and len(usual) > 1]
        if goals:
            found[thing] = goals
    return found


def things_of(room: Room, size: str) -> list[str]:
    """The kinds of objects that can lie in a room, lamps aside."""
    always, larger = THINGS[room.kind]
    kinds = always.split() + larger.split() * (size != "small")
    return [kind for kind in kinds if set(WHERE[kind]) & set(room.kinds)]


def fill_room(rng: random.Random, room: Room, task: str, size: str) -> Game:
    """A game in a given room: a goal, what it takes, and other objects."""
    limits = SIZES[size]
    possible = targets(room, task, size)
    target = rng.choice(list(possible))
    place = rng.choice(possible[target])
    lies: dict[str, list[str]] = {name: [] for name in room.places}  # receptacle -> kinds there

    def lay(thing: str, not_at: str = "") -> bool:
        """Lay an object where it may lie and is room for it."""
        free = [
            name
            for name, there in lies.items()
            if (kind := kind_of(name)) in WHERE[thing]
            and kind != not_at
            and len(there) < limits.crowd
        ]
        if free:
            lies[rng.choice(free)].append(thing)
        return bool(free)

    wanted = rng.randint(*limits.things)
    for _ in range((2 if task == "pick_two_obj_and_place" else 1) + (rng.random() < 0.3)):
        wanted -= lay(target, not_at=place)
    if room.kind in ROOMS_OF_TASK["look_at_obj_in_light"]:
        wanted -= lay(LAMP)
    others = [thing for thing in things_of(room, size) if thing != target] * limits.same_things
    rng.shuffle(others)
    for thing in others:
        if wanted <= 0:
            break
        wanted -= lay(thing)
    lamp = LAMP if task == "look_at_obj_in_light" else ""
    return Game(room, _scene(lies), Goal(task, target, place, lamp), rng.randrange(2))


def _scene(lies: dict[str, list[str]]) -> Scene:
    """The scene; objects of a kind are numbered in the order of where they lie."""
    counts, places = Counter(), []
    for name, kinds in lies.items():
        things = []
        for kind in sorted(kinds):
            counts[kind] += 1
            things.append(Thing(f"{kind} {counts[kind]}"))
        places.append(Place(name, tuple(things), kind_of(name) in OPENABLE))
    return Scene(tuple(places))


# --- what makes two rooms, layouts or games the same


def room_text(room: Room) -> str:
    """The kind of the room and how many receptacles of each kind it has."""
    counts = Counter(kind_of(name) for name in room.places)
    return f"{room.kind}: " + ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))


def layout_text(game: Game) -> str:
    """The room and what lies where."""
    lies = (
        f"{place.name}: {', '.join(thing.name for thing in place.contents)}"
        for place in game.scene.places
    )
    return "\n".join([room_text(game.room), *lies])


def digest(text: str) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def identity(game: Game) -> str:
    """A hash of the layout and the goal; how the task is worded makes no other game."""
    goal = game.goal
    return digest(f"{layout_text(game)}\n{goal.task} {goal.thing} {goal.place} {goal.lamp}")


def is_held_out(room: Room) -> bool:
    """Whether a room is one of the fifth that is never used in training."""
    return int(digest(room_text(room))[:8], 16) % 5 == 0


def split_of(game: Game) -> str:
    """The split that a game belongs to: a layout is never in two of them."""
    if is_held_out(game.room):
        return "valid_unseen"
    return "valid_seen" if int(digest(layout_text(game))[:8], 16) % 10 == 0 else "train"
