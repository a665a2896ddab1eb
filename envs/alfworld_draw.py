"""First-person pictures of ALFWorld: the room, what the agent stands before, what it holds.

A picture shows `view(scene)` and nothing that is hidden. In the middle of the room it shows every
receptacle, small, with its name; before one it shows that one, large, open or closed, with what it
holds. A canvas with a side below 200 pixels gets the layout of `alfworld_compact`.

Left out: the single drawings (`alfworld_icons`, `alfworld_furniture`), image files, any randomness.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from turbo.envs.alfworld_compact import draw_compact
from turbo.envs.alfworld_furniture import Look, furniture
from turbo.envs.alfworld_icons import hand, holding_hand, icon
from turbo.envs.alfworld_pen import INK, PAPER, Pen, label
from turbo.envs.alfworld_scene import Place, Scene, Thing, view
from turbo.envs.picture import as_array, font

COMPACT = 200  # a canvas with a shorter side has the compact layout
HEAD, FOOT = 24, 62  # pixels of 300 above and below a receptacle: its name, the hand
OPEN, CLOSED, PLATE = "#1e8a3c", "#b3261e", "#2a3038"
ROOMS = {  # room -> (receptacles that tell it, wall, pattern of the wall, floor, its boards)
    "kitchen": ("fridge microwave stoveburner toaster", "#f6e9c8", "#ecd9ab", "#b98f66", "#a67d56"),
    "bathroom": ("toilet bathtubbasin towelholder", "#d7ecf2", "#bcdbe5", "#9fb0ba", "#8b9da8"),
    "bedroom": ("bed", "#e9e2f3", "#dacfea", "#b08968", "#9c7757"),
    "living room": ("sofa armchair tvstand ottoman", "#dfead9", "#cddcc4", "#a97f57", "#956d47"),
    "room": ("", "#e8e4dc", "#dcd6ca", "#ab8f74", "#987d63"),
}
Frame = tuple[float, float, float, float]  # x0 y0 x1 y1 in pixels


def draw_scene(scene: Scene, canvas: tuple[int, int] = (300, 300)) -> np.ndarray:
    """What the agent sees, [H, W, 3] uint8: the same read-only array for the same view."""
    seen = view(scene)
    return _picture(
        seen.here or seen.places, bool(seen.here), seen.held, _room(seen), tuple(canvas)
    )


@lru_cache(maxsize=128)
def _picture(
    places: tuple[Place, ...], near: bool, held: Thing | None, room: str, canvas: tuple[int, int]
) -> np.ndarray:
    """The picture of the places before the agent (`near`), or of all places in the room."""
    width, height = canvas
    unit, foot = min(canvas) / 300, height - FOOT * min(canvas) / 300
    if min(canvas) < COMPACT:
        image = draw_compact(places if near else (), held, canvas)
    else:
        image = _background(room, canvas).copy()
        if near:
            across = width / len(places)
            for i, place in enumerate(places):
                _draw_place(image, place, (i * across, 2 * unit, (i + 1) * across, foot), unit)
        else:
            _draw_room(image, places, (4 * unit, 4 * unit, width - 4 * unit, foot), unit)
        _draw_hand(image, held, foot, unit)
    picture = as_array(image)
    picture.setflags(write=False)
    return picture


def _room(scene: Scene) -> str:
    """The kind of room, by the receptacles in it."""
    kinds = {place.kind for place in scene.places}
    return next((room for room, (signs, *_) in ROOMS.items() if kinds & set(signs.split())), "room")


@lru_cache(maxsize=32)
def _background(room: str, canvas: tuple[int, int]) -> Image.Image:
    """Wall and floor of a room: tiles in the wet ones, stripes in the others."""
    _, wall, pattern, floor, boards = ROOMS[room]
    pen = Pen(*canvas, scale=2)
    pen.put("box*", wall, 0, 0, 100, 70)
    for x in range(0, 100, 10):
        if room in ("kitchen", "bathroom"):
            pen.put("rod*", pattern, 0.6, x, 0, x, 64)
            pen.put("rod*", pattern, 0.6, 0, x * 0.64, 100, x * 0.64)
        elif room != "room":
            pen.put("box*", pattern, x, 0, x + 4, 64)
    pen.put("box*", floor, 0, 64, 100, 100)
    for x in range(-100, 201, 20):
        pen.put("rod*", boards, 0.6, 50 + (x - 50) * 0.6, 64.5, x, 100)
    pen.put("box*", "#f7f4ee", 0, 62, 100, 64.5)
    return pen.result().convert("RGB")


def _paste(image: Image.Image, part: Image.Image, x: float, y: float) -> None:
    """Puts a part with its upper left corner at (x, y)."""
    image.paste(part, (round(x), round(y)), part)


def _write(image: Image.Image, text: str, size: float, x: float, y: float, width: float) -> None:
    """Text centred on (x, y), at most `width` wide."""
    drawn = label(text, _fit(text, width, size))
    _paste(image, drawn, x - drawn.width / 2, y - drawn.height / 2)


@lru_cache(maxsize=8_192)
def _breadth(text: str) -> float:
    """The width of a text in type of size 1."""
    return font(40).getlength(text) / 40


def _fit(text: str, width: float, size: float) -> int:
    """The size of type, `size` at most, at which the text and its rim are `width` wide."""
    return int(max(6, min(size, width / (_breadth(text) + 0.1))))


@lru_cache(maxsize=4_096)
def _grid(names: tuple[str, ...], width: int, height: int, unit: float) -> tuple[int, int, int]:
    """(columns, size of icons, size of type) that show all names, and icons, as large as fits."""
    options = []
    for columns in range(1, len(names) + 1):
        rows = -(-len(names) // columns)
        wide, high = width / columns, height / rows
        smallest = min(_fit(name, wide - 3, 13 * unit) for name in names)
        size = min(13 * unit, 1.3 * smallest, max(8 * unit, 0.3 * high))
        side = min(wide - 2, high - size - 3 * unit, 80 * unit)
        side = max(4, int(side) // 4 * 4)  # few sizes, so that few icons are drawn
        worth = side * min(smallest, 11 * unit) ** 2
        options.append((worth, columns, side, int(size)))
    return max(options)[1:]


def _draw_place(image: Image.Image, place: Place, frame: Frame, unit: float) -> None:
    """One receptacle, large, with its name above and its contents in or on it."""
    x0, y0, x1, y1 = frame
    width, height = round(x1 - x0 - 4 * unit), round(y1 - y0 - HEAD * unit)
    left, top = round(x0 + 2 * unit), round(y0 + HEAD * unit)
    names = tuple(thing.name for thing in place.contents)
    drawing, stage = furniture(place.kind, Look(True, place.shows), width, height)
    rows = 1
    if names:
        size = (int(stage[2] - stage[0]), int(stage[3] - stage[1]))
        columns, side, type_size = _grid(names, *size, unit)
        rows = -(-len(names) // columns)
        drawing, stage = furniture(place.kind, Look(True, place.shows, rows), width, height)
    _paste(image, drawing, left, top)
    _draw_head(image, place, ((x0 + x1) / 2, y0 + HEAD * unit / 2), x1 - x0, unit)
    x, y, wide, high = left + stage[0], top + stage[1], stage[2] - stage[0], stage[3] - stage[1]
    if not names:
        if place.shows:
            _write(image, "(empty)", 14 * unit, x + wide / 2, y + high * 0.6, wide)
        return
    for row in range(rows):
        line = place.contents[row * columns : (row + 1) * columns]
        base = y + (row + 1) * high / rows - type_size - 2 * unit
        for i, thing in enumerate(line):
            middle = x + wide * (i + 0.5 + (columns - len(line)) / 2) / columns
            _paste(image, icon(thing.kind, thing.flags, side), middle - side / 2, base - side)
            _write(image, thing.name, type_size, middle, base + type_size / 2, wide / columns - 3)


def _draw_head(
    image: Image.Image, place: Place, middle: tuple[float, float], wide: float, unit: float
) -> None:
    """The name of a receptacle, and whether it is open."""
    state = ("open" if place.is_open else "closed") if place.openable else ""
    size = _fit(f"{place.name} {state}", wide - 30 * unit, 16 * unit)
    name, sign = label(place.name, size, PAPER, ""), label(state, size, PAPER, "")
    (x, y), pad, draw = middle, 6 * unit, ImageDraw.Draw(image)
    left = x - (name.width + (sign.width + 2 * pad if state else 0)) / 2
    split, top, bottom = left + name.width + pad, y - 11 * unit, y + 11 * unit
    draw.rounded_rectangle([left - pad, top, split, bottom], 5 * unit, fill=PLATE)
    _paste(image, name, left, y - name.height / 2)
    if state:
        colour, right = OPEN if place.is_open else CLOSED, split + sign.width + 2 * pad
        draw.rounded_rectangle([split, top, right, bottom], 5 * unit, fill=colour)
        _paste(image, sign, split + pad, y - sign.height / 2)


def _draw_room(image: Image.Image, places: tuple[Place, ...], frame: Frame, unit: float) -> None:
    """Every receptacle of the room with its name, or in groups of a kind where there are many."""
    x0, y0, x1, y1 = frame
    if not places:
        return
    columns, side, size = _grid(tuple(place.name for place in places), *_size(frame), unit)
    wide = (x1 - x0) / columns
    if side < 34 * unit or min(_fit(place.name, wide, size) for place in places) < 9 * unit:
        _draw_groups(image, places, frame, unit)
        return
    rows = -(-len(places) // columns)
    for i, place in enumerate(places):
        x = x0 + (i % columns + 0.5) * wide
        y = y0 + (i // columns + 1) * (y1 - y0) / rows - size - 2 * unit
        drawing, _ = furniture(place.kind, Look(is_open=place.shows), side, side)
        _paste(image, drawing, x - side / 2, y - side)
        _write(image, place.name, size, x, y + size / 2, wide)


def _size(frame: Frame) -> tuple[int, int]:
    """Width and height."""
    return int(frame[2] - frame[0]), int(frame[3] - frame[1])


@lru_cache(maxsize=512)
def _lines(
    groups: tuple[tuple[str, int], ...], width: int, height: int, unit: float
) -> tuple[int, list[list[tuple[str, int, int, float]]]]:
    """(size of drawings, lines of (kind, first, past the last, width)), as large as fits."""
    size, gap = round(11 * unit), 8 * unit
    for side in range(round(16 * unit) * 4, 7, -2):
        most, parts = max(1, width // side), []
        for title, count in groups:
            heading = _breadth(title) * size + 3 * unit
            for first in range(0, count, most):
                past = min(first + most, count)
                parts.append((title, first, past, max(heading, (past - first) * side)))
        lines, left = [], []
        for part in sorted(parts, key=lambda part: -part[3]):  # the first line with room for it
            at = next((i for i, room in enumerate(left) if room >= part[3]), len(lines))
            if at == len(lines):
                lines.append([])
                left.append(width)
            lines[at].append(part)
            left[at] -= part[3] + gap
        if len(lines) * (side + size + 4 * unit) <= height:
            break
    return side, lines


def _draw_groups(image: Image.Image, places: tuple[Place, ...], frame: Frame, unit: float) -> None:
    """The receptacles by kinds: the kind above, the numbers on the drawings."""
    x0, y0, x1, y1 = frame
    same = {}
    for place in places:
        same.setdefault(place.kind, []).append(place)
    kinds = {group[0].name if len(group) == 1 else kind: group for kind, group in same.items()}
    groups = tuple((title, len(group)) for title, group in kinds.items())
    side, lines = _lines(groups, *_size(frame), unit)
    size, high = round(11 * unit), (y1 - y0) / len(lines)
    for row, line in enumerate(lines):
        x, y = x0, y0 + row * high
        spare = (x1 - x0 - sum(part[3] for part in line)) / len(line)
        for title, first, past, wide in line:
            _paste(image, label(title, size), x, y)
            for i, place in enumerate(kinds[title][first:past]):
                drawing, _ = furniture(place.kind, Look(is_open=place.shows), side, side)
                left, top = x + i * side, y + size + 3 * unit
                _paste(image, drawing, left, top)
                if len(kinds[title]) > 1:
                    number = place.name.rpartition(" ")[2]
                    _write(image, number, size, left + side / 2, top + side * 0.7, side)
            x += wide + min(spare, 30 * unit)


def _draw_hand(image: Image.Image, held: Thing | None, foot: float, unit: float) -> None:
    """The hand at the bottom and what it holds, with name and state in words."""
    side, middle = round(62 * unit), image.width * 0.3
    left, top, x = middle - side / 2, image.height - side + 2 * unit, middle + side * 0.55
    if held is None:
        _paste(image, hand(side), left, top)
        lines = ["nothing in the hand"]
    else:
        behind, before = holding_hand(side)
        inner = round(48 * unit)
        _paste(image, behind, left, top)
        _paste(image, icon(held.kind, held.flags, inner), middle - inner / 2, foot - 2 * unit)
        _paste(image, before, left, top)
        lines = [held.name, ", ".join(sorted(held.flags))] if held.flags else [held.name]
    y = foot + (32 - 9 * (len(lines) - 1)) * unit
    for i, line in enumerate(lines):
        drawn = label(line, _fit(line, image.width - x, (17 - 3 * i) * unit))
        _paste(image, drawn, x, y + 19 * i * unit - drawn.height / 2)


def contact_sheet(
    frames: Sequence[np.ndarray], captions: Sequence[str], columns: int
) -> Image.Image:
    """Frames of one size in a grid, each with its caption below, in lines as wide as the frame."""
    height, width = frames[0].shape[:2]
    size, gap = 14, 8
    blocks = [_wrapped(caption, width, size) for caption in captions]
    below = max(map(len, blocks)) * (size + 3) + gap
    rows = -(-len(frames) // columns)
    sheet = Image.new(
        "RGB", (columns * (width + gap) + gap, rows * (height + below + gap) + gap), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for i, (frame, block) in enumerate(zip(frames, blocks, strict=True)):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (height + below + gap)
        sheet.paste(Image.fromarray(frame), (x, y))
        for row, line in enumerate(block):
            draw.text((x, y + height + 4 + row * (size + 3)), line, font=font(size), fill=INK)
    return sheet


def _wrapped(text: str, width: int, size: int) -> list[str]:
    """The text in lines at most `width` wide, broken at spaces."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font(size).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
