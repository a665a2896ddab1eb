"""Pictures of ALFWorld for the smallest canvases: cells of 28 pixels, one thing in each.

A vision token of the built-in model sees one cell. The first row is the receptacle before the
agent: its kind, its number, open or closed, empty. The next rows are its contents with their
numbers, on the colour of their state. The last row is the hand, what it holds, and a sign for each
state. Left out: names, and the other receptacles of the room, which the prompt lists.
"""

from functools import lru_cache

from PIL import Image

from turbo.envs.alfworld_furniture import Look, furniture
from turbo.envs.alfworld_icons import hand, holding_hand, icon
from turbo.envs.alfworld_pen import Pen, label
from turbo.envs.alfworld_scene import Place, Thing

CELL = 28
PLAIN, FIXED, OPEN, CLOSED, HAND = "#eef1f4", "#d3d9e0", "#bfe8c2", "#e58f80", "#f3e3c3"
GROUND = {"hot": "#ffc4ba", "cool": "#b9dcff", "clean": "#c4f5e3", "on": "#fff0a0"}
SIGNS = {
    "room": "poly #c9b79c 4 40 50 6 96 40; box #efe3cf 12 40 88 94; box #8a5a2b 40 58 60 94; box"
    " #8fc4ea 18 52 34 70; box #8fc4ea 66 52 82 70",
    "open": "arc #1e8a3c 9 44 10 92 60 180 350; box #1e8a3c 8 46 62 92 8; box white 28 60 42 80",
    "closed": "arc #8b1a1a 9 26 12 74 72 180 360; box #8b1a1a 14 46 86 92 8; box gold 43 60 57 80",
    "empty": "arc #6a7380 8 20 20 80 80 0 360; rod* #6a7380 9 22 80 78 20",
    "hot": "curve red 50 2 78 40 88 66 74 92 50 98 26 92 12 66 30 44 38 50; curve orange 52 44 68"
    " 70 62 90 50 94 36 88 34 70; curve* yellow 50 68 58 82 50 92 42 82",
    "cool": "rod #0a50e0 9 50 6 50 94; rod #0a50e0 9 12 28 88 72; rod #0a50e0 9 12 72 88 28;"
    " oval* #0a50e0 38 38 62 62",
    "clean": "poly #19d3a2 40 8 50 44 86 54 50 64 40 98 30 64 2 54 30 44; poly #19d3a2 80 2 85 18"
    " 98 23 85 28 80 44 75 28 62 23 75 18",
    "sliced": "poly gainsboro 4 16 76 16 76 46 30 46; rod #3a2416 14 84 24 92 24; box #fff1c9 8"
    " 60 24 94; box #fff1c9 34 60 50 94; box #fff1c9 60 60 92 94",
    "on": "rod #ffb400 7 50 3 50 14; rod #ffb400 7 10 20 20 28; rod #ffb400 7 90 20 80 28; oval"
    " #ffe34d 20 18 80 76; box gray 38 72 62 96 4",
}


def draw_compact(
    places: tuple[Place, ...], held: Thing | None, canvas: tuple[int, int]
) -> Image.Image:
    """The places before the agent, none in the middle of the room, and what it holds."""
    columns, rows = max(1, canvas[0] // CELL), max(1, canvas[1] // CELL)
    image = Image.new("RGB", canvas, PLAIN)
    for y, line in enumerate(_upper_rows(places, columns, rows - 1)):
        for x, cell in enumerate(line):
            image.paste(cell, (x * CELL, y * CELL))
    for x, cell in enumerate(_hand_cells(held)[:columns]):
        image.paste(cell, (x * CELL, (rows - 1) * CELL))
    return image


def _upper_rows(places: tuple[Place, ...], columns: int, rows: int) -> list[list[Image.Image]]:
    """The rows above the hand; where too little room is left, the last cell counts the rest."""
    lines = [] if places else [[_sign("room", FIXED)]]
    for place in places:
        head, contents = _place_cells(place), [_thing_cell(item) for item in place.contents]
        if len(places) == 1 and len(head) <= columns:
            lines.append(head)
        else:
            contents = head + contents
        lines += [contents[i : i + columns] for i in range(0, len(contents), columns)]
    if len(lines) <= rows:
        return lines
    cells = [cell for line in lines for cell in line]
    room = rows * columns
    if len(cells) > room > 0:
        cells[room - 1 :] = [_number_cell(f"+{len(cells) - room + 1}", FIXED)]
    return [cells[i : i + columns] for i in range(0, room, columns)]


def _place_cells(place: Place) -> list[Image.Image]:
    """The kind of a receptacle, its number, open or closed, and empty."""
    ground = FIXED
    if place.openable:
        ground = OPEN if place.is_open else CLOSED
    number = place.name.rpartition(" ")[2]
    cells = [_furniture_cell(place.kind, place.shows, ground), _number_cell(number, ground)]
    if place.openable:
        cells.append(_sign("open" if place.is_open else "closed", ground))
    return cells if place.contents or not place.shows else [*cells, _sign("empty", ground)]


def _hand_cells(held: Thing | None) -> list[Image.Image]:
    """The hand, what it holds, and a sign for each state."""
    if held is None:
        return [_hand_cell(False)]
    signs = [_sign(flag, GROUND.get(flag, PLAIN)) for flag in sorted(held.flags)]
    return [_hand_cell(True), _thing_cell(held), *signs]


def _in_cell(part: Image.Image, ground: str, x: int = 0, y: int = 0) -> Image.Image:
    """A part on the ground of a cell."""
    cell = Image.new("RGB", (CELL, CELL), ground)
    cell.paste(part, (x, y), part)
    return cell


@lru_cache(maxsize=512)
def _furniture_cell(kind: str, is_open: bool, ground: str) -> Image.Image:
    """A receptacle in a cell."""
    return _in_cell(furniture(kind, Look(is_open=is_open), CELL, CELL)[0], ground)


@lru_cache(maxsize=512)
def _number_cell(text: str, ground: str) -> Image.Image:
    """A number, as large as a cell allows."""
    drawn = label(text, 22 if len(text) < 2 else 18)
    return _in_cell(drawn, ground, (CELL - drawn.width) // 2, (CELL - drawn.height) // 2)


@lru_cache(maxsize=1_024)
def _thing_cell(thing: Thing) -> Image.Image:
    """An object in a cell, its number in the corner, on the colour of its state."""
    ground = next((GROUND[flag] for flag in GROUND if flag in thing.flags), PLAIN)
    cell = _in_cell(icon(thing.kind, thing.flags, CELL), ground)
    number = label(thing.name.removeprefix(thing.kind).strip(), 12)
    cell.paste(number, (CELL - number.width, CELL + 2 - number.height), number)
    return cell


@lru_cache(maxsize=2)
def _hand_cell(full: bool) -> Image.Image:
    """The hand: open when it is empty, else with its fingers closed."""
    if not full:
        return _in_cell(hand(CELL), HAND)
    large = 40
    behind, before = holding_hand(large)
    whole = Image.alpha_composite(behind, before)
    return _in_cell(whole, HAND, (CELL - large) // 2, CELL - large)


@lru_cache(maxsize=64)
def _sign(name: str, ground: str) -> Image.Image:
    """One of SIGNS in a cell."""
    pen = Pen(CELL, CELL)
    pen.put_all(SIGNS[name])
    return _in_cell(pen.result(), ground)
