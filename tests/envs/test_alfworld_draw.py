"""The pictures of ALFWorld: what they show, what they hide, and that kinds can be told apart."""

import ast
import importlib.util
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from turbo.envs.alfworld_compact import CELL
from turbo.envs.alfworld_draw import contact_sheet, draw_scene
from turbo.envs.alfworld_furniture import FURNITURE, Look, furniture
from turbo.envs.alfworld_icons import ICONS, icon, plain_icon, split_kind
from turbo.envs.alfworld_scene import Place, Scene, Thing

CANVASES = [(300, 300), (168, 112), (140, 112)]
STATES = ("hot", "cool", "clean", "sliced", "on")
MOVABLE = ("bowl", "box", "cup", "mug", "pan", "plate", "pot")  # receptacles that are objects too
OTHER_NAMES = ("sink", "bathtub")  # of the sink basin and the bathtub basin
RECEPTACLES = [kind for kind in FURNITURE if kind not in OTHER_NAMES]
MUG, APPLE = Thing("mug 2"), Thing("apple 1")


def kitchen(*contents, is_open=True, held=None, at="fridge 1") -> Scene:
    places = (
        Place("cabinet 1", (Thing("cup 1"),), openable=True),
        Place("countertop 1", (Thing("knife 1"), Thing("pan 1"))),
        Place("fridge 1", contents, openable=True, is_open=is_open),
    )
    return Scene(places, (at,) if at else (), held)


def large_room(count: int) -> Scene:
    kinds = [*["cabinet"] * 12, *["drawer"] * 9, *RECEPTACLES, *["shelf"] * 9][:count]
    numbered = [f"{kind} {kinds[:i].count(kind) + 1}" for i, kind in enumerate(kinds)]
    return Scene(tuple(Place(name, openable=name.startswith(("cab", "draw"))) for name in numbered))


def cell(drawing) -> np.ndarray:
    """A drawing on a plain ground."""
    ground = np.full((drawing.height, drawing.width, 3), 230.0)
    pixels = np.asarray(drawing, dtype=float)
    share = pixels[..., 3:] / 255
    return ground * (1 - share) + pixels[..., :3] * share


def distance(one, other) -> float:
    return float(np.abs(cell(one) - cell(other)).mean())


def kinds_of_alfworld() -> tuple[set[str], set[str]]:
    """(objects, receptacles) in the installed package; read, since its import makes folders."""
    spec = importlib.util.find_spec("alfworld")
    if spec is None:
        pytest.skip("alfworld is not installed")
    source = Path(spec.origin).parent / "gen" / "constants.py"
    wanted = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
        if name in ("OBJECTS", "RECEPTACLES"):
            wanted[name] = {kind.lower() for kind in ast.literal_eval(node.value)}
    return wanted["OBJECTS"], wanted["RECEPTACLES"]


def test_every_kind_of_alfworld_has_a_drawing():
    objects, receptacles = kinds_of_alfworld()
    assert objects - set(FURNITURE) <= set(ICONS)
    assert receptacles - set(MOVABLE) <= set(FURNITURE)


def test_the_tables_are_as_large_as_alfworld():
    assert len(ICONS) >= 78 and len(RECEPTACLES) == 30
    assert set(MOVABLE) <= set(ICONS)


@pytest.mark.parametrize("kind", ICONS)
def test_objects_are_drawn_within_their_square(kind):
    for size in (CELL, 60):
        alpha = np.asarray(plain_icon(kind, size))[..., 3]
        assert alpha.shape == (size, size)
        assert (alpha > 128).mean() > 0.12, "too thin to be seen"
        assert (alpha == 0).any(), "no outline is seen"


def test_objects_differ_in_one_cell():
    closest = min(
        (distance(plain_icon(a, CELL), plain_icon(b, CELL)), a, b)
        for a, b in combinations(ICONS, 2)
    )
    assert closest[0] > 20, closest


def test_receptacles_differ_in_one_cell():
    def draw(kind):
        return furniture(kind, Look(), CELL, CELL)[0]

    closest = min((distance(draw(a), draw(b)), a, b) for a, b in combinations(RECEPTACLES, 2))
    assert closest[0] > 14, closest


@pytest.mark.parametrize(
    "kind", ["cabinet", "drawer", "fridge", "garbagecan", "laundryhamper", "microwave", "safe"]
)
def test_doors_and_lids_are_seen(kind):
    opened, closed = (furniture(kind, Look(is_open=state), CELL, CELL)[0] for state in (1, 0))
    assert distance(opened, closed) > 7


@pytest.mark.parametrize("kind", [*FURNITURE, "mug", "gizmo"])
def test_large_receptacles_have_room_for_objects(kind):
    for rows in (1, 2, 4):
        drawing, (x0, y0, x1, y1) = furniture(kind, Look(True, True, rows), 296, 212)
        assert drawing.size == (296, 212)
        assert 0 <= x0 < x1 <= 296 and 0 <= y0 < y1 <= 212
        assert (x1 - x0) * (y1 - y0) > 0.25 * 296 * 212


def test_unknown_kinds_are_drawn_and_differ():
    assert distance(plain_icon("gizmo", CELL), plain_icon("wotsit", CELL)) > 7
    one, other = (furniture(kind, Look(), CELL, CELL)[0] for kind in ("gizmo", "wotsit"))
    assert distance(one, other) > 3
    picture = draw_scene(Scene((Place("gizmo 1", (Thing("wotsit 1"),)),), ("gizmo 1",)))
    assert (picture != draw_scene(Scene((Place("gizmo 1"),), ("gizmo 1",)))).any()


def test_states_are_seen_alone_and_together():
    sets = [frozenset(chosen) for count in (0, 1, 2) for chosen in combinations(STATES, count)]
    for size, least in ((CELL, 3), (60, 3)):
        drawn = {flags: icon("potato", flags, size) for flags in sets}
        for a, b in combinations(sets, 2):
            assert distance(drawn[a], drawn[b]) > least, (sorted(a), sorted(b))


def test_a_sliced_kind_is_its_kind_in_slices():
    assert split_kind("applesliced") == ("apple", True) and split_kind("apple") == ("apple", False)
    slices = icon("applesliced", frozenset(), 40)
    assert slices == icon("apple", frozenset({"sliced"}), 40)
    assert slices != icon("apple", frozenset(), 40)


@pytest.mark.parametrize("canvas", [*CANVASES, (448, 336), (224, 224), (84, 84), (28, 28)])
def test_canvas(canvas):
    for scene in (kitchen(APPLE, MUG, held=MUG), kitchen(at=None), large_room(40), Scene(())):
        picture = draw_scene(scene, canvas)
        assert picture.shape == (canvas[1], canvas[0], 3) and picture.dtype == np.uint8


@pytest.mark.parametrize("canvas", CANVASES)
def test_what_is_there_is_seen(canvas):
    scenes = [
        kitchen(),
        kitchen(is_open=False),
        kitchen(APPLE),
        kitchen(replace(APPLE, name="apple 2")),
        kitchen(APPLE, MUG),
        *(kitchen(Thing("apple 1", frozenset({flag}))) for flag in STATES),
        kitchen(APPLE, held=MUG),
        *(kitchen(APPLE, held=Thing("mug 2", frozenset({flag}))) for flag in STATES),
        kitchen(APPLE, at="countertop 1"),
        kitchen(at="cabinet 1"),
        kitchen(at=None),
        kitchen(at=None, held=MUG),
    ]
    pictures = [draw_scene(scene, canvas) for scene in scenes]
    for a, b in combinations(range(len(scenes)), 2):
        assert (pictures[a] != pictures[b]).any(), (scenes[a], scenes[b])


@pytest.mark.parametrize("canvas", CANVASES)
def test_what_is_hidden_is_not_seen(canvas):
    def same(one, other):
        return draw_scene(one, canvas) is draw_scene(other, canvas)

    assert same(kitchen(is_open=False), kitchen(APPLE, is_open=False))
    assert same(kitchen(at="countertop 1"), kitchen(APPLE, at="countertop 1"))
    assert same(kitchen(at=None), kitchen(APPLE, MUG, at=None))
    assert not same(kitchen(), kitchen(APPLE))


def test_the_same_view_is_the_same_read_only_array():
    first = draw_scene(kitchen(APPLE))
    assert draw_scene(kitchen(APPLE)) is first and draw_scene(kitchen(APPLE), (300, 300)) is first
    assert draw_scene(kitchen(APPLE), (168, 112)) is not first
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 0


@pytest.mark.parametrize("count", [6, 8, 20, 40])
def test_every_receptacle_is_in_the_overview(count):
    room = large_room(count)
    whole = draw_scene(room)
    for place in room.places:
        fewer = replace(room, places=tuple(other for other in room.places if other != place))
        assert (draw_scene(fewer) != whole).any()
        door = replace(place, is_open=True)
        changed = tuple(door if other == place else other for other in room.places)
        if place.openable:
            assert (draw_scene(replace(room, places=changed)) != whole).any()


def test_two_places_at_one_spot_are_both_seen():
    both = replace(kitchen(APPLE), at=("countertop 1", "fridge 1"))
    for canvas in CANVASES:
        pictures = [draw_scene(replace(both, at=at), canvas) for at in (both.at, *zip(both.at))]
        assert all((a != b).any() for a, b in combinations(pictures, 2))


def test_compact_cells_hold_one_thing_each():
    things = tuple(Thing(f"{kind} 1") for kind in ("apple", "book", "mug", "pen", "pot", "vase"))
    scene = kitchen(*things, held=Thing("egg 3", frozenset({"hot"})))
    picture = draw_scene(scene, (168, 112))
    cells = picture.reshape(4, CELL, 6, CELL, 3).swapaxes(1, 2)
    full = cells.reshape(4, 6, -1, 3).std(2).max(-1) > 5  # more than one colour
    assert full.tolist() == [
        [True] * 3 + [False] * 3,
        [True] * 6,
        [False] * 6,
        [True] * 3 + [False] * 3,
    ]
    for i, thing in enumerate(things):
        alone = draw_scene(kitchen(thing), (168, 112))
        assert (alone[CELL : 2 * CELL, :CELL] == cells[1, i]).all()


def test_what_has_no_cell_is_counted():
    many = [Thing(f"mug {i}") for i in range(1, 20)]
    for canvas in ((168, 112), (84, 84)):
        pictures = {draw_scene(kitchen(*many[:n]), canvas).tobytes() for n in range(20)}
        assert len(pictures) == 20


def test_drawing_is_fast():
    scenes = [kitchen(APPLE, Thing("egg 1"), held=Thing(f"mug {i}")) for i in range(20)]
    for canvas, most in (((300, 300), 0.05), ((168, 112), 0.01)):
        draw_scene(kitchen(APPLE), canvas)
        start = time.process_time()
        for scene in scenes:
            draw_scene(scene, canvas)
        assert (time.process_time() - start) / len(scenes) < most


def test_a_contact_sheet_holds_every_frame_and_its_caption():
    frames = [draw_scene(kitchen(at=None)), draw_scene(kitchen(APPLE)), draw_scene(kitchen(MUG))]
    sheet = np.asarray(contact_sheet(frames, ["go", "take the apple " * 6, "put it down"], 2))
    assert (sheet[8:308, 8:308] == frames[0]).all()
    assert (sheet[8:308, 316:616] == frames[1]).all()
    row = (sheet.shape[0] - 8) // 2
    assert (sheet[8 + row : 308 + row, 8:308] == frames[2]).all()
    plain = np.asarray(contact_sheet(frames, ["go", "", ""], 2))
    assert plain.shape[0] < sheet.shape[0], "a long caption takes several lines"
    assert (sheet[308:row, 8:308] != 255).any()
