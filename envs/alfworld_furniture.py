"""Drawings of ALFWorld's receptacles: small for the overview, large with room for objects.

Every kind is a family with its colours: `FURNITURE["fridge"]`. A family draws on a `Pen`, in units
of a hundredth of the picture, and returns its stage: the part in which objects stand. A large
drawing gives most of its area to the stage; a small or a closed one has its natural proportions.
Left out: the objects (`alfworld_icons`), names, walls and floors (`alfworld_draw`).
"""

import zlib
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from PIL import Image

from turbo.envs.alfworld_icons import ICONS, plain_icon
from turbo.envs.alfworld_pen import EDGE, Pen

Stage = tuple[float, float, float, float]  # x0 y0 x1 y1
HOLLOW = "#3b3029"  # the dark inside


@dataclass(frozen=True)
class Look:
    """How a receptacle is seen: open or not; a large open one has room for objects."""

    large: bool = False
    is_open: bool = True
    rows: int = 2  # of objects, each on its board where there are boards


def _table(pen: Pen, look: Look, top: str, front: str, under: str = "legs") -> Stage:
    """A top seen from above its front edge, on legs, doors, drawers, wheels or one foot."""
    back, edge, thick, foot = (18, 76, 82, 99) if look.large else (26, 50, 58, 94)
    inset = 5 if look.large else 16
    if under == "legs":
        for x in (6, 88):
            pen.put("box", front, x, edge, x + 6, foot)
        for x in (inset + 6, 88 - inset):
            pen.put("box", front, x, edge, x + 4, foot - 8)
    elif under == "foot":
        pen.put("box", front, 44, edge, 56, foot)
        pen.put("oval", front, 26, foot - 7, 74, foot + 1)
    elif under == "one drawer":
        for x in (16, 78):
            pen.put("box", front, x, edge, x + 6, foot)
        pen.put("box", front, 14, edge, 86, foot - 10 if look.large else 74)
        pen.put("oval", "gold", 46, thick + 2, 54, thick + 8)
    elif under == "wheels":
        pen.put("box", front, 7, edge, 11, foot - 4)
        pen.put("box", front, 89, edge, 93, foot - 4)
        pen.put("box", top, 7, foot - 14, 93, foot - 8)
        for x in (6, 86):
            pen.put("oval", "#222222", x, foot - 9, x + 8, foot + 1)
    else:
        pen.put("box", front, 4, edge, 96, foot)
        _fronts(pen, under, (4, thick, 96, foot), front)
    if under == "foot":
        pen.put("oval", front, 3, back + thick - edge, 97, thick + 1)
        pen.put("oval", top, 3, back, 97, edge + 1)
    else:
        pen.put("box", front, 1, edge - 1, 99, thick)
        pen.put("poly", top, inset, back, 100 - inset, back, 99, edge, 1, edge)
    return (12, 10, 88, edge - 6) if under == "foot" else (3, 0, 97, edge - 2)


def _fronts(pen: Pen, under: str, frame: Stage, colour: str) -> None:
    """What is below a top: doors, drawers, drawers on one side, or open bays."""
    x0, y0, x1, y1 = frame
    middle = (x0 + x1) / 2
    if under == "doors":
        for left, right, knob in ((x0 + 3, middle - 1, -6), (middle + 1, x1 - 3, 6)):
            pen.put("box", colour, left, y0 + 4, right, y1 - 4)
            x, y = middle + knob, (y0 + y1) / 2
            pen.put("oval*", EDGE, x - 2, y - 3, x + 2, y + 3)
    elif under == "side drawers":
        pen.put("poly", HOLLOW, x0 + 4, y0, x1 - 38, y0, x1 - 38, y1, x0 + 4, y1)
        pen.put("rod*", EDGE, 3, x1 - 36, (y0 + y1) / 2, x1 - 2, (y0 + y1) / 2)
        for y in (0.25, 0.75):
            pen.put("rod*", "gold", 4, x1 - 24, y0 + y * (y1 - y0), x1 - 14, y0 + y * (y1 - y0))
    elif under == "drawers":
        rows = 3 if y1 - y0 > 30 else 1
        for i in range(rows):
            high = (y1 - y0) / rows
            top = y0 + i * high
            pen.put("box", colour, x0 + 2, top + 1, x1 - 2, top + high - 1)
            for x in (0.3, 0.7):
                knob, y = x0 + x * (x1 - x0), top + high / 2
                pen.put("oval*", "gold", knob - 2, y - 3, knob + 2, y + 3)
    else:
        for left, right in ((x0 + 5, middle - 3), (middle + 3, x1 - 5)):
            pen.put("box", HOLLOW, left, y0 + 3, right, y1 - 4)


def _locker(
    pen: Pen, look: Look, body: str, inside: str, frame: Stage, sign: str, boards: bool = True
) -> Stage:
    """A box with one door: fridge, cabinet, microwave, safe."""
    x0, y0, x1, y1 = (22, 2, 98, 98) if look.large else frame
    if not look.is_open:
        pen.put("box", body, x0, y0, x1, y1, 3)
        _door_sign(pen, sign, (x0, y0, x1, y1), body)
        return x0, y0, x1, y1
    wide = x0 - 1 if look.large else 0.3 * (x1 - x0)
    if not look.large:
        x0 += max(0.6 * wide, wide - x0 + 2)
    pen.put("box", body, x0, y0, x1, y1, 3)
    in_x, in_y = 0.05 * (x1 - x0), 0.05 * (y1 - y0)
    hollow = (x0 + in_x, y0 + in_y, x1 - in_x, y1 - in_y)
    pen.put("box", inside, *hollow)
    if boards and not look.large:
        pen.put("rod*", body, 6, hollow[0], (y0 + y1) / 2, hollow[2], (y0 + y1) / 2)
    elif boards:
        _boards(pen, hollow, look.rows, body)
    lean = 0.06 * (y1 - y0)
    pen.put("poly", body, x0, y0, x0 - wide, y0 + lean, x0 - wide, y1 + 1, x0, y1)
    if sign == "fridge":
        for y in (0.3, 0.55, 0.8):
            y = y0 + y * (y1 - y0)
            pen.put("rod", "#9fc3da", 2, x0 - 0.55 * wide, y, x0 - 0.15 * wide, y)
    pen.put(
        "rod", "silver", 3, x0 - 0.8 * wide, (y0 + y1) / 2 - 8, x0 - 0.8 * wide, (y0 + y1) / 2 + 8
    )
    return hollow


def _boards(pen: Pen, stage: Stage, rows: int, colour: str) -> None:
    """A board below every row but the last, which stands on the floor of the stage."""
    x0, y0, x1, y1 = stage
    for row in range(1, rows):
        y = y0 + row * (y1 - y0) / rows
        pen.put("box", colour, x0, y - 1, x1, y + 1)


def _door_sign(pen: Pen, sign: str, frame: Stage, body: str) -> None:
    """What tells one closed door from another."""
    x0, y0, x1, y1 = frame

    def at(*shares: float) -> list[float]:
        return [(x0 + a * (x1 - x0), y0 + a * (y1 - y0))[i % 2] for i, a in enumerate(shares)]

    if sign == "fridge":
        pen.put("rod*", EDGE, 3, *at(0.02, 0.34, 0.98, 0.34))
        pen.put("rod", "#777777", 5, *at(0.16, 0.12, 0.16, 0.26))
        pen.put("rod", "#777777", 5, *at(0.16, 0.42, 0.16, 0.7))
    elif sign == "microwave":
        pen.put("box", "#1d2b38", *at(0.06, 0.14, 0.68, 0.86), 4)
        pen.put("poly*", "#3f5a70", *at(0.14, 0.24, 0.36, 0.24, 0.2, 0.76, 0.14, 0.76))
        pen.put("box*", "lime", *at(0.76, 0.16, 0.94, 0.32))
        for y in (0.45, 0.6, 0.75):
            pen.put("box*", "white", *at(0.77, y, 0.83, y + 0.08))
            pen.put("box*", "white", *at(0.88, y, 0.94, y + 0.08))
    elif sign == "safe":
        pen.put("box", body, *at(0.08, 0.09, 0.92, 0.91), 3)
        middle, r = at(0.5, 0.5), 17
        pen.put("oval", "silver", middle[0] - r, middle[1] - r, middle[0] + r, middle[1] + r)
        pen.put("rod", "black", 4, *at(0.5, 0.5, 0.5, 0.34))
        pen.put("rod", "gold", 6, *at(0.8, 0.4, 0.8, 0.6))
    else:
        pen.put("box", body, *at(0.12, 0.1, 0.88, 0.9))
        pen.put("oval", "gold", *at(0.7, 0.44, 0.82, 0.56))


def _drawer(pen: Pen, look: Look, front: str, inside: str) -> Stage:
    """Closed, a front with a handle; open, pulled out and seen from above."""
    if not look.is_open:
        pen.put("box", "#6e4a26", 2, 20, 98, 80)
        pen.put("box", front, 7, 29, 93, 71, 3)
        pen.put("rod", "silver", 7, 36, 50, 64, 50)
        return 2, 20, 98, 80
    back, edge = (3, 78) if look.large else (16, 62)
    pen.put("poly", front, 12, back, 88, back, 99, edge, 1, edge)
    pen.put("poly", inside, 16, back + 4, 84, back + 4, 93, edge - 1, 7, edge - 1)
    pen.put("box", front, 1, edge, 99, 98 if look.large else 90, 3)
    pen.put("rod", "silver", 6, 36, (edge + 94) / 2, 64, (edge + 94) / 2)
    return (12, back + 3, 88, edge - 2)


def _bin(pen: Pen, look: Look, body: str, stripe: str) -> Stage:
    """A can or a basket: its opening is seen from above; a closed one has a lid."""
    top, rim = (4, 72) if look.large else (10, 34)
    wide = 1 if look.large else 14
    low, middle = 99, (top + rim) / 2
    foot = wide + 12
    pen.put("poly", body, wide, middle, 100 - wide, middle, 100 - foot, low, foot, low)
    for x in (0.3, 0.5, 0.7):
        pen.put(
            "rod*", stripe, 4, wide + x * (100 - 2 * wide), rim + 8, 50 + (x - 0.5) * 60, low - 6
        )
    pen.put("oval", body, wide, top, 100 - wide, rim)
    if look.is_open:
        pen.put("oval", HOLLOW, wide + 5, top + 4, 95 - wide, rim - 3)
    else:
        pen.put("box", "black", 38, 2, 62, 16, 6)
        pen.put("chord", stripe, wide - 6, 8, 106 - wide, 2 * middle, 180, 360)
        pen.put("box", stripe, wide - 6, middle - 4, 106 - wide, middle + 7, 3)
    return (wide + 12, top + 6, 88 - wide, rim - 4)


def _basin(pen: Pen, look: Look, rim: str, inside: str, below: str) -> Stage:
    """A basin with its tap, seen from above: a sink in its counter or a tub on feet."""
    top, edge = (18, 80) if look.large else (34, 66)
    if below == "feet":
        for x in (14, 76):
            pen.put("oval", "goldenrod", x, edge + 8, x + 10, 99)
        pen.put("poly", rim, 2, top + 8, 98, top + 8, 88, 94, 12, 94)
    else:
        pen.put("box", below, 6, edge, 94, 99)
        pen.put("rod*", EDGE, 2, 50, edge + 8, 50, 99)
    pen.put("box", rim, 1, top - 4, 99, edge + 8, 6)
    pen.put("box", inside, 7, top + 4, 93, edge, 10)
    drain = (top + edge) / 2 + 6
    pen.put("oval", "#555555", 45, drain, 55, drain + 7)
    pen.put("rod", "silver", 6, 50, top + 3, 50, top - 14, 62, top - 14, 62, top - 4)
    pen.put("oval", "red", 36, top - 6, 43, top + 1)
    pen.put("oval", "blue", 70, top - 6, 77, top + 1)
    return (10, top + 4, 90, edge - 1)


def _seat(pen: Pen, look: Look, cloth: str, cushion: str, frame: Stage, parts: int) -> Stage:
    """A sofa or an armchair: back, arms and cushions."""
    x0, y0, x1, y1 = (0, 2, 100, 98) if look.large else frame
    w, h = x1 - x0, y1 - y0
    arm, seat = 0.1 * w if look.large else 0.17 * w, y0 + (0.3 if look.large else 0.46) * h
    for x in (x0 + 0.06 * w, x1 - 0.12 * w):
        pen.put("box", "#3b2a1a", x, y1 - 8, x + 0.06 * w, y1)
    pen.put("box", cloth, x0 + 0.06 * w, y0, x1 - 0.06 * w, y1 - 6, 10)
    low = y0 + (0.8 if look.large else 0.72) * h
    pen.put("box", cloth, x0 + 2, low, x1 - 2, y1 - 5, 3)
    for i in range(parts):
        left, wide = x0 + arm + i * (w - 2 * arm) / parts, (w - 2 * arm) / parts
        pen.put("box", cushion, left, seat, left + wide, low + 3, 5)
    for x in (x0, x1 - arm - 1):
        pen.put("box", cloth, x, y0 + 0.26 * h, x + arm + 1, y1 - 5, 8)
    return (x0 + arm / 2, y0 + 0.05 * h, x1 - arm / 2, low)


def _bed(pen: Pen, look: Look, wood: str, sheet: str, cover: str) -> Stage:
    """Headboard, pillows, mattress and cover."""
    back, edge, inset = (17, 86, 8) if look.large else (34, 74, 14)
    pen.put("box", wood, inset - 4, 2 if look.large else 12, 104 - inset, edge - 20, 5)
    pen.put("poly", sheet, inset, back, 100 - inset, back, 99, edge, 1, edge)
    fold = back + 0.42 * (edge - back)
    lean = inset - 0.42 * (inset - 1)
    pen.put("poly", cover, lean, fold, 100 - lean, fold, 99, edge, 1, edge)
    for x in (inset + 6, 54):
        pen.put("box", "white", x, back + 2, x + 34 - inset, back + 0.3 * (edge - back), 7)
    pen.put("box", cover, 1, edge, 99, edge + 9)
    pen.put("box", wood, 1, edge + 7, 8, 99)
    pen.put("box", wood, 92, edge + 7, 99, 99)
    return (8, 4, 92, edge - 2)


def _ottoman(pen: Pen, look: Look, cloth: str, top: str) -> Stage:
    """A round stool with a soft top."""
    back, edge = (8, 70) if look.large else (26, 58)
    pen.put("box", "#3b2a1a", 16, 88, 24, 99)
    pen.put("box", "#3b2a1a", 76, 88, 84, 99)
    pen.put("box", cloth, 2, (back + edge) / 2, 98, 94, 12)
    pen.put("oval", top, 2, back, 98, edge)
    pen.put("oval*", cloth, 47, (back + edge) / 2 - 3, 53, (back + edge) / 2 + 3)
    return (12, back, 88, edge - 4)


def _shelf(pen: Pen, look: Look, wood: str) -> Stage:
    """Boards on the wall."""
    rows = look.rows if look.large else 2
    for row in range(1, rows + 1):
        y = row * 92 / rows - (0 if look.large else 14)
        for x in (14, 82):
            pen.put("poly", "#4b4b4b", x, y, x + 5, y, x, min(y + 18, 100))
        pen.put("box", wood, 1, y - 2, 99, y + (4 if look.large else 9))
    return (3, 0, 97, 93)


def _fixed(pen: Pen, look: Look, drawing: str, stage: Stage, large: str = "") -> Stage:
    """What is drawn in the pen's language; `large` where it differs with room for objects."""
    pen.put_all(large if large and look.large else drawing)
    return stage


def _burner(pen: Pen, look: Look, hob: str, glow: str) -> Stage:
    """A hob with one ring and its knobs."""
    back, edge, inset = (10, 76, 8) if look.large else (12, 74, 10)
    pen.put("box", "#7c828a", 1, edge, 99, 98)
    pen.put("poly", hob, inset, back, 100 - inset, back, 99, edge, 1, edge)
    for x, y, ink in ((24, 8, glow), (31, 14, hob), (37, 19, glow), (43, 24, hob)):
        pen.put("oval*", ink, x, back + y, 100 - x, edge - y)
    for x in (14, 38, 56, 80):
        pen.put("oval", "#222222", x, edge + 5, x + 8, 95)
    return (10, 4, 90, edge - 2)


BOARDED = ("cabinet", "fridge", "shelf")  # with one board for each row of objects
OAK, PINE, WALNUT = "#c68a4a", "#e0b878", "#7a4a26"
FURNITURE = {
    "armchair": partial(_seat, cloth="#b5462f", cushion="#d8694f", frame=(14, 14, 86, 94), parts=1),
    "bathtubbasin": partial(_basin, rim="#fdfdfd", inside="#9fd8ef", below="feet"),
    "bed": partial(_bed, wood=WALNUT, sheet="#f2f4fa", cover="#5f7fd0"),
    "cabinet": partial(_locker, body=OAK, inside="#5b3d22", frame=(14, 6, 86, 94), sign="cabinet"),
    "cart": partial(_table, top="#d9dee4", front="#8d959e", under="wheels"),
    "coffeemachine": partial(
        _fixed,
        drawing="box #3a3a3f 20 20 80 92; box #b3202c 16 3 84 34 5; box #777777 40 34 60 44; oval"
        " red 22 12 32 22; box #9be7ff 54 9 76 25; box #b3202c 16 88 84 98 3",
        large="box #3a3a3f 10 20 90 92; box #b3202c 6 3 94 34 5; box #777777 43 34 57 42; oval red"
        " 13 14 19 23; box #9be7ff 64 10 86 25; box #b3202c 6 88 94 98 3",
        stage=(12, 36, 88, 88),
    ),
    "coffeetable": partial(_table, top=PINE, front="#a87b3e", under="foot"),
    "countertop": partial(_table, top="#d6d2cb", front="#5d83a6", under="doors"),
    "desk": partial(_table, top="#b3723a", front="#8a5528", under="side drawers"),
    "diningtable": partial(_table, top=OAK, front="#8d5a2b", under="legs"),
    "drawer": partial(_drawer, front="#cf9a5b", inside="#8c6238"),
    "dresser": partial(_table, top="#b9d3b0", front="#86ab86", under="drawers"),
    "fridge": partial(
        _locker, body="#e3e9ee", inside="#f4fbff", frame=(24, 1, 76, 98), sign="fridge"
    ),
    "garbagecan": partial(_bin, body="#6c7a72", stripe="#465049"),
    "handtowelholder": partial(
        _fixed,
        drawing="box #8b8f98 38 2 62 20 3; arc #d9dde2 8 16 18 84 92 0 360",
        large="box #8b8f98 43 2 57 20 3; arc #d9dde2 6 27 14 73 92 0 360",
        stage=(8, 22, 92, 96),
    ),
    "laundryhamper": partial(_bin, body="#dcc08d", stripe="#b08b52"),
    "microwave": partial(
        _locker,
        body="#4d5560",
        inside="#fff3c4",
        frame=(3, 22, 97, 84),
        sign="microwave",
        boards=False,
    ),
    "ottoman": partial(_ottoman, cloth="#7c4f9e", top="#a67cc6"),
    "paintinghanger": partial(
        _fixed,
        drawing="oval #8b8f98 32 4 68 40; rod #c9a227 10 50 22 50 70 70 84 84 62",
        stage=(8, 22, 92, 96),
    ),
    "safe": partial(
        _locker, body="#6f7f8c", inside="#2b3238", frame=(9, 10, 91, 92), sign="safe", boards=False
    ),
    "shelf": partial(_shelf, wood=PINE),
    "sidetable": partial(_table, top="#f4efe4", front="#c3b49a", under="one drawer"),
    "sinkbasin": partial(_basin, rim="#cfd4da", inside="#8f99a3", below="#6d8f73"),
    "sofa": partial(_seat, cloth="#2f7d6d", cushion="#4da692", frame=(0, 24, 100, 92), parts=3),
    "stoveburner": partial(_burner, hob="#25282c", glow="#ff5a1f"),
    "toaster": partial(
        _fixed,
        drawing="box #c3cad1 5 30 88 94 14; box #222222 14 34 78 39 2; box #222222 14 44 78 49 2;"
        " rod black 6 94 56 94 40; oval orange 60 72 74 86",
        large="box #c3cad1 5 56 88 96 14; box #222222 14 60 78 64 2; box #222222 14 69 78 73 2; rod"
        " black 6 94 80 94 66; oval orange 64 80 72 92",
        stage=(10, 2, 86, 64),
    ),
    "toilet": partial(
        _fixed,
        drawing="poly #f6f8fa 30 52 70 52 64 98 36 98; box #f6f8fa 22 4 78 44 5; oval silver 45 10"
        " 55 18; oval #f6f8fa 16 36 84 82; oval #8fd0ee 27 44 73 74",
        large="poly #f6f8fa 30 78 70 78 64 98 36 98; box #f6f8fa 4 48 96 80 4; poly #fbfdff 6 20"
        " 94 20 99 50 1 50; box #e9edf2 1 50 99 56; oval silver 47 24 53 29; oval #f6f8fa 20 62 80"
        " 97; oval #8fd0ee 29 68 71 91",
        stage=(4, 0, 96, 50),
    ),
    "toiletpaperhanger": partial(
        _fixed,
        drawing="box #8b8f98 4 14 32 54 4; rod #d9dde2 10 18 32 18 72 90 72 90 56",
        large="box #8b8f98 6 6 26 40 4; rod #d9dde2 7 16 24 16 52 92 52 92 40",
        stage=(8, 22, 92, 96),
    ),
    "towelholder": partial(
        _fixed,
        drawing="box #8b8f98 2 30 20 66 3; box #8b8f98 80 30 98 66 3; rod #d9dde2 12 12 48 88 48",
        large="box #8b8f98 4 8 12 26 3; box #8b8f98 88 8 96 26 3; rod #d9dde2 7 8 17 92 17",
        stage=(8, 16, 92, 96),
    ),
    "tvstand": partial(_table, top="#f4f4f4", front="#c4c6ca", under="bays"),
}
FURNITURE |= {"sink": FURNITURE["sinkbasin"], "bathtub": FURNITURE["bathtubbasin"]}


def furniture(kind: str, look: Look, width: int, height: int) -> tuple[Image.Image, Stage]:
    """(a receptacle on a transparent ground, its stage in pixels)"""
    if kind not in BOARDED or not look.is_open:
        look = replace(look, rows=2)
    return _drawn(kind, look, width, height)


@lru_cache(maxsize=1_024)
def _drawn(kind: str, look: Look, width: int, height: int) -> tuple[Image.Image, Stage]:
    """`furniture`, drawn once."""
    if look.large and not look.is_open:
        side = min(width, height)
        whole = Image.new("RGBA", (width, height))
        drawing, _ = furniture(kind, replace(look, large=False), side, side)
        whole.alpha_composite(drawing, ((width - side) // 2, height - side))
        return whole, (0.0, 0.0, float(width), float(height))
    pen = Pen(width, height, 2 if look.large else 4)
    if kind in FURNITURE:
        stage = FURNITURE[kind](pen, look)
    else:
        stage = _other(pen, look, kind)
    x0, y0, x1, y1 = stage
    pixels = (x0 * width / 100, y0 * height / 100, x1 * width / 100, y1 * height / 100)
    return pen.result(), pixels


def _other(pen: Pen, look: Look, kind: str) -> Stage:
    """A receptacle that is an object too, such as a bowl, or one of an unknown kind: a crate."""
    if kind in ICONS:
        width, height = pen.image.size
        side = min(width, height) // (2 if look.large else 1)
        pen.image.alpha_composite(plain_icon(kind, side), ((width - side) // 2, height - side))
        return 8, 4, 92, 60
    hue = zlib.crc32(kind.encode()) % 360
    stage = _table(pen, look, f"hsl({hue},40%,72%)", f"hsl({hue},40%,52%)", "bays")
    if not look.large:
        pen.write(50, 40, kind[:2], 34, "black")
    return stage
