"""Small drawings of ALFWorld's objects, one for each kind, with marks for their states.

`alfworld_pen` explains the language of the table. Left out: receptacles (`alfworld_furniture`),
names and places in the picture (`alfworld_draw`).
"""

import zlib
from functools import lru_cache

import numpy as np
from PIL import Image, ImageColor

from turbo.envs.alfworld_pen import Pen

ICONS = {
    # food
    "apple": "rod saddlebrown 7 50 32 56 8; curve crimson 50 30 66 20 90 32 92 58 78 86 62 94 50"
    " 90 38 94 22 86 8 58 10 32 34 20; curve limegreen 56 20 68 4 88 6 76 22; curve* pink 22 40"
    " 32 32 32 46 22 58",
    "tomato": "oval orangered 3 18 97 94; poly green 50 46 30 56 34 36 12 30 36 24 50 4 64 24 88"
    " 30 66 36 70 56",
    "potato": "curve #b07d43 8 62 16 34 44 18 76 14 94 36 90 66 64 86 30 90; oval* #7d5527 30 44"
    " 38 52; oval* #7d5527 60 34 68 42; oval* #7d5527 52 64 60 72; oval* #d9ae78 26 30 44 38",
    "egg": "curve #fff3d6 50 3 76 24 88 58 76 88 50 97 24 88 12 58 24 24; oval* white 30 30 46 54",
    "lettuce": "oval forestgreen 2 36 46 92; oval forestgreen 54 36 98 92; oval limegreen 12 10"
    " 58 60; oval limegreen 44 8 90 60; oval yellowgreen 22 34 78 94; rod* honeydew 6 50 92 50"
    " 50; rod* honeydew 4 50 74 34 56; rod* honeydew 4 50 74 66 56",
    "bread": "curve peru 5 54 8 34 26 22 50 24 74 22 92 34 95 54 90 86 50 88 10 86; rod* #f6d9a0"
    " 7 28 34 22 54; rod* #f6d9a0 7 52 34 46 54; rod* #f6d9a0 7 76 34 70 54",
    # crockery
    "mug": "arc royalblue 11 54 32 96 76 -90 90; box royalblue 8 16 70 94 10; oval navy 8 8 70 26",
    "cup": "poly turquoise 12 14 88 14 74 96 26 96; oval paleturquoise 12 4 88 24; box* white 34"
    " 36 44 84 4",
    "bowl": "chord darkorange 2 -10 98 92 0 180; oval bisque 2 30 98 54; box chocolate 34 86 66 95",
    "plate": "oval white 1 1 99 99; oval lightskyblue 16 16 84 84; oval white 26 26 74 74",
    "pan": "rod #222222 14 60 60 94 94; oval #444444 1 1 78 78; oval #8a8a8a 12 12 67 67",
    "pot": "rod #333333 10 4 54 96 54; box slategray 13 34 87 94 10; oval lightslategray 13 22 87"
    " 46; oval black 40 10 60 28",
    "kettle": "arc black 8 24 4 76 66 180 360; poly firebrick 66 56 98 26 99 38 78 78; curve"
    " firebrick 26 42 50 32 74 42 86 76 76 93 24 93 14 76; oval black 44 24 56 36",
    "glassbottle": "box palegreen 36 2 64 44 4; curve palegreen 30 38 70 38 80 54 78 94 22 94 20"
    " 54; box* white 30 52 40 86 4; box seagreen 36 2 64 12",
    "winebottle": "box #4a0f22 39 2 61 46 4; curve #4a0f22 36 38 64 38 76 56 74 96 26 96 24 56;"
    " box wheat 25 58 75 84; box gold 39 2 61 20 3",
    "knife": "poly gainsboro 2 6 22 2 70 54 58 66 34 60; rod #3a2416 18 66 62 90 88",
    "butterknife": "curve lightgray 40 4 56 6 60 40 56 60 42 60 38 40; rod gold 17 50 62 50 90",
    "fork": "rod silver 7 22 16 34 40; rod silver 7 36 8 44 34; rod silver 7 50 4 52 32; rod"
    " silver 12 36 42 54 38; rod crimson 16 48 42 68 92",
    "spoon": "curve lightsteelblue 70 4 92 10 94 32 78 44 60 40 54 22; rod mediumblue 13 62 42 14"
    " 92",
    "ladle": "rod darkgreen 11 76 6 60 62; chord silver 6 34 70 96 0 180; oval dimgray 6 56 70 74",
    "spatula": "rod darkorange 14 40 50 10 92; poly #505a64 42 30 68 2 98 28 68 62; rod* white 5"
    " 56 34 72 18; rod* white 5 68 46 84 30",
    "peppershaker": "poly #303030 28 34 72 34 82 96 18 96; box silver 28 6 72 36 14; oval* black"
    " 38 14 46 22; oval* black 54 14 62 22; box* gray 34 52 66 80",
    "saltshaker": "poly white 28 34 72 34 82 96 18 96; box #5c6b8a 28 6 72 36 14; oval* white 38"
    " 14 46 22; oval* white 54 14 62 22; box* powderblue 34 52 66 80",
    # paper and gadgets
    "alarmclock": "oval goldenrod 8 4 46 36; oval goldenrod 54 4 92 36; rod black 8 24 84 14 96;"
    " rod black 8 76 84 86 96; oval red 10 16 90 94; oval white 22 28 78 82; rod* black 6 50 55"
    " 50 36; rod* black 6 50 55 64 62",
    "book": "poly mediumvioletred 12 10 76 2 90 86 26 96; poly ivory 26 96 90 86 94 92 34 99;"
    " rod* gold 5 34 30 66 25; rod* gold 5 37 44 69 39; rod* #6d0d50 6 20 12 32 92",
    "cd": "oval silver 3 3 97 97; pie* violet 8 8 92 92 200 260; pie* aqua 8 8 92 92 20 80; pie*"
    " khaki 8 8 92 92 110 150; oval white 32 32 68 68; oval dimgray 42 42 58 58",
    "cellphone": "box black 24 2 76 98 10; box* deepskyblue 31 12 69 80; box* lime 36 20 48 32;"
    " box* yellow 52 20 64 32; oval* white 45 85 55 94",
    "creditcard": "box gold 3 20 97 80 8; box* #2b2b2b 4 32 96 46; box* crimson 60 60 88 70; box*"
    " white 12 60 40 70",
    "laptop": "poly #5d6670 12 62 88 62 99 90 1 90; box #3a424b 14 8 86 64 4; box* #2f8fe8 20 14"
    " 80 57; poly* #b8c0c8 20 68 80 68 86 80 14 80",
    "newspaper": "poly #e9e6da 8 12 86 4 94 88 14 96; rod* black 9 20 24 78 18; rod* gray 4 22 40"
    " 50 37; rod* gray 4 23 52 51 49; rod* gray 4 24 64 52 61; rod* gray 4 25 76 84 70; box*"
    " darkgray 58 34 82 58",
    "pen": "rod #1b3fd6 16 78 14 32 66; poly black 20 64 36 78 6 96; rod #0c1a5a 16 90 4 72 24",
    "pencil": "rod gold 17 22 22 66 66; poly burlywood 58 74 74 58 96 96; poly* black 84 86 88 82"
    " 97 97; rod lightcoral 17 8 8 20 20",
    "remotecontrol": "box #2c2c34 30 2 70 98 12; oval red 42 8 58 22; box* #d0d0d0 37 30 47 40;"
    " box* #d0d0d0 53 30 63 40; box* #d0d0d0 37 46 47 56; box* #d0d0d0 53 46 63 56; box* orange"
    " 37 64 63 74; box* lime 37 80 63 90",
    "television": "rod #222222 8 30 92 50 78; rod #222222 8 70 92 50 78; box #1a1a1a 1 12 99 80"
    " 4; box* #4b6cb7 7 18 93 74; poly* #86a8e7 7 18 50 18 14 74 7 74",
    "watch": "box #8b5a2b 36 1 64 99 4; oval gold 14 20 86 80; oval white 24 29 76 71; rod* black"
    " 5 50 50 50 34; rod* black 5 50 50 62 56",
    # soft things
    "cloth": "curve orchid 4 26 30 14 54 22 94 10 97 60 86 90 50 82 18 94 6 60; rod* white 5 18"
    " 40 86 28; rod* white 5 18 66 86 58; rod* white 5 36 22 40 84; rod* white 5 66 20 70 84",
    "handtowel": "box coral 22 4 78 82; box* white 24 56 76 63; box* white 24 67 76 72; rod coral"
    " 5 28 92 28 84; rod coral 5 44 92 44 84; rod coral 5 58 92 58 84; rod coral 5 74 92 74 84",
    "towel": "box darkturquoise 4 4 96 96 4; box* white 6 16 94 26; box* teal 6 34 94 42; box*"
    " white 6 66 94 82",
    "pillow": "curve mistyrose 3 18 50 26 97 18 92 50 97 84 50 76 3 84 8 50; oval* lightpink 42"
    " 44 58 58",
    "teddybear": "oval sienna 12 2 42 30; oval sienna 58 2 88 30; oval sienna 2 50 30 84; oval"
    " sienna 70 50 98 84; oval sienna 18 42 82 98; oval sienna 18 6 82 62; oval wheat 34 30 66"
    " 56; oval* black 32 22 41 31; oval* black 59 22 68 31; oval* black 45 34 55 42",
    "boots": "poly #5a3a1a 8 6 42 6 42 60 48 92 2 92; poly #5a3a1a 54 6 88 6 88 60 99 92 54 92;"
    " box* tan 10 12 41 20; box* tan 55 12 86 20",
    # washing
    "dishsponge": "box yellow 4 28 96 84 12; box forestgreen 4 24 96 46 8; oval* goldenrod 20 54"
    " 32 64; oval* goldenrod 46 64 56 74; oval* goldenrod 70 54 80 62",
    "soapbar": "box hotpink 4 34 96 86 24; box* lightpink 16 42 78 56 8; oval azure 58 8 82 32;"
    " oval azure 80 22 96 38",
    "soapbottle": "rod #eeeeee 8 24 14 56 14 56 34; box violet 22 34 90 97 16; box* white 34 54"
    " 78 80 6",
    "spraybottle": "poly dodgerblue 12 46 70 46 84 97 4 97; box white 30 24 54 48; poly red 16 4"
    " 74 4 96 20 66 26 22 26; rod red 6 66 26 76 42",
    "scrubbrush": "poly lightcyan 4 54 80 54 86 92 2 92; rod* #5aa 4 20 58 18 90; rod* #5aa 4 42"
    " 58 42 90; rod* #5aa 4 64 58 66 90; box steelblue 2 38 82 58 8; rod steelblue 15 80 42 92 10",
    "plunger": "rod burlywood 13 50 4 50 60; chord #c62828 10 40 90 136 180 360; box #8e1b1b 6 84"
    " 94 97 4",
    "papertowel": "box white 18 14 82 94 4; oval white 18 4 82 26; oval saddlebrown 40 10 60 20;"
    " rod* lightblue 4 20 40 80 40; rod* lightblue 4 20 60 80 60; rod* lightblue 4 20 80 80 80",
    "papertowelroll": "box ivory 32 16 84 92 4; poly ivory 34 24 34 92 4 97 4 40; oval ivory 32 6"
    " 84 26; oval peru 48 11 68 21; oval* salmon 46 44 56 54; oval* salmon 62 64 72 74",
    "toiletpaper": "box white 40 36 94 97; oval white 6 10 94 68; oval #9a7b5a 34 28 66 50",
    "toiletpaperroll": "box #c4a27a 14 22 86 78; oval #c4a27a 2 22 26 78; oval #6b4f30 7 34 21"
    " 66; oval #c4a27a 74 22 98 78",
    "tissuebox": "curve white 34 48 30 18 48 30 60 6 70 26 68 48; box mediumaquamarine 4 42 96 94"
    " 4; oval darkslategray 28 38 72 50; poly* #bff0dd 14 88 30 62 46 88; poly* #bff0dd 54 88 70"
    " 62 86 88",
    # keeping and ornament
    "box": "poly #a9783f 4 40 50 52 50 98 4 84; poly #c99a5b 96 40 50 52 50 98 96 84; poly"
    " #e3bd85 4 40 40 24 2 10 -4 22; poly #e3bd85 96 40 60 24 98 10 104 22; poly #6b4822 4 40 46"
    " 28 96 40 50 52",
    "candle": "curve orange 50 1 62 20 56 34 44 34 38 20; oval* yellow 45 16 55 32; rod black 4"
    " 50 34 50 44; box lavender 30 42 70 90 4; curve* white 32 44 68 44 62 62 54 50 44 70; box"
    " darkgoldenrod 12 86 88 98 6",
    "keychain": "arc gold 8 4 2 56 54 0 360; rod silver 10 46 46 88 84; rod silver 8 74 72 88 60;"
    " rod #b87333 10 30 50 32 95; rod #b87333 8 32 78 50 78",
    "statue": "box gray 16 82 84 98; poly darkkhaki 24 82 36 46 64 46 76 82; oval darkkhaki 32 6"
    " 68 52; rod* #7c7440 4 40 24 46 24; rod* #7c7440 4 54 24 60 24; rod* #7c7440 4 44 40 56 40",
    "vase": "curve rebeccapurple 34 4 66 4 60 24 90 52 74 94 26 94 10 52 40 24; rod* plum 6 18 50"
    " 82 50; rod* plum 6 20 62 80 62",
    "wateringcan": "arc darkcyan 8 4 20 50 84 90 270; rod darkcyan 9 68 74 92 24; poly darkcyan"
    " 78 22 99 14 99 34; box darkcyan 22 36 72 94 6; oval #023 22 30 72 44",
    "houseplant": "curve green 50 60 14 52 2 26 30 28; curve green 50 60 86 52 98 26 70 28; curve"
    " mediumseagreen 50 64 30 30 50 1 70 30; poly #c1562f 22 58 78 58 70 98 30 98",
    "painting": "box #9c6b1e 2 10 98 90; box skyblue 12 20 88 80; poly* seagreen 13 79 36 44 56"
    " 66 68 54 87 79; oval* yellow 64 26 80 42",
    "poster": "poly indigo 12 3 86 6 90 97 8 94; poly* yellow 50 18 58 40 80 42 62 54 70 78 50 64"
    " 30 78 38 54 20 42 42 40",
    "basketball": "oval #ef7f1a 3 3 97 97; arc* black 5 -52 3 34 97 -58 58; arc* black 5 66 3 152"
    " 97 122 238; rod* black 5 50 4 50 96; rod* black 5 4 50 96 50",
    "baseballbat": "poly burlywood 78 2 98 22 40 76 30 68; rod #b22222 12 34 72 12 92; oval black"
    " 2 86 16 99",
    "tennisracket": "rod black 11 58 56 90 94; oval greenyellow 2 2 70 72; oval #f4fbe8 11 11 61"
    " 63; rod* gray 3 26 13 26 61; rod* gray 3 44 13 44 61; rod* gray 3 12 28 60 28; rod* gray 3"
    " 12 46 60 46",
    # lamps and fittings
    "desklamp": "rod #444444 8 34 90 22 56 56 34; box #2f2f2f 8 84 66 97 6; poly limegreen 44 12"
    " 66 4 97 44 58 56; oval white 64 42 92 58",
    "floorlamp": "rod #7a5a2a 8 50 40 50 92; box #7a5a2a 24 90 76 98 4; poly moccasin 32 3 68 3"
    " 88 46 12 46; rod* darkorange 5 15 40 85 40",
    "lightswitch": "box linen 22 6 78 94 8; box whitesmoke 38 30 62 70; poly* silver 39 50 61 50"
    " 61 69 39 69",
    "mirror": "oval #8c6a2f 14 2 86 98; oval aliceblue 24 12 76 88; poly* lightblue 34 62 58 22"
    " 68 26 42 74",
    "window": "box saddlebrown 4 4 96 96; box lightskyblue 12 12 46 46; box lightskyblue 54 12 88"
    " 46; box lightskyblue 12 54 46 88; box lightskyblue 54 54 88 88",
    "blinds": "box beige 6 3 94 14; box beige 10 20 90 30; box beige 10 36 90 46; box beige 10 52"
    " 90 62; box beige 10 68 90 78; rod gray 3 80 14 80 97",
    "curtains": "rod #5b3d1e 6 2 8 98 8; poly darkred 6 10 46 10 30 60 40 97 6 97; poly darkred"
    " 94 10 54 10 70 60 60 97 94 97",
    "showerdoor": "box #c9f0f7 14 2 86 98; box* #e9fbff 22 8 44 92; rod silver 6 76 40 76 62",
    "showerglass": "poly #a8dfea 4 10 96 2 96 98 4 90; rod* white 8 20 70 60 20; rod* white 8 40"
    " 78 80 30",
    "faucet": "rod silver 14 22 96 22 34 70 34 70 60; rod silver 12 8 14 40 14; curve deepskyblue"
    " 70 68 80 88 70 97 60 88",
    "stoveknob": "oval #2b2b2b 6 6 94 94; oval #666666 22 22 78 78; rod* red 9 50 50 50 16",
    "chair": "rod peru 8 22 4 22 97; rod peru 8 78 56 78 97; box peru 18 48 86 62; box burlywood"
    " 18 8 30 50",
    "footstool": "rod #5b3d1e 8 20 60 12 96; rod #5b3d1e 8 80 60 88 96; box mediumslateblue 6 34"
    " 94 64 14",
    "laundryhamperlid": "oval #c8ad7f 2 26 98 80; oval #a98c5a 14 34 86 66; rod #6b5430 7 38 48"
    " 62 48",
}
FLESH = {"apple": "#fff1c9", "bread": "#fbe3b0", "lettuce": "#e9f7b0", "tomato": "#ffb29e"}


def split_kind(kind: str) -> tuple[str, bool]:
    """(the kind as it is drawn, whether its name says that it is sliced)"""
    if kind not in ICONS and kind.removesuffix("sliced") in ICONS:
        return kind.removesuffix("sliced"), True
    return kind, False


@lru_cache(maxsize=1_024)
def icon(kind: str, flags: frozenset[str], size: int) -> Image.Image:
    """An object of `size` x `size` pixels on a transparent ground, with the marks of its state."""
    kind, sliced = split_kind(kind)
    flags = flags | {"sliced"} if sliced else flags
    whole = Image.new("RGBA", (size, size))
    inner = round(0.8 * size) if flags & {"hot", "cool", "clean", "on"} else size
    if "on" in flags:
        whole.alpha_composite(_mark("on", size))
    drawing = _sliced(kind, inner) if "sliced" in flags else plain_icon(kind, inner)
    whole.alpha_composite(drawing, ((size - inner) // 2, size - inner))
    for flag in ("hot", "cool", "clean"):
        if flag in flags:
            whole.alpha_composite(_mark(flag, size))
    return whole


@lru_cache(maxsize=512)
def plain_icon(kind: str, size: int) -> Image.Image:
    """An object without marks; one of an unknown kind is a parcel with its first letters."""
    pen = Pen(size, size, 4 if size < 48 else 3)
    if kind in ICONS:
        pen.put_all(ICONS[kind])
        return pen.result()
    hue = zlib.crc32(kind.encode()) % 360
    pen.put("box", f"hsl({hue},45%,62%)", 8, 14, 92, 94, 14)
    pen.write(50, 54, kind[:2], 48, "black")
    return pen.result()


def _sliced(kind: str, size: int) -> Image.Image:
    """The object in four slices, apart from each other, with pale cuts."""
    drawing, cut = Image.new("RGBA", (size, size)), ImageColor.getrgb(FLESH.get(kind, "#fff1c9"))
    gap = max(1, round(0.045 * size))
    width = (size - 3 * gap) / 4
    source = plain_icon(kind, round(4 * width))
    for i in range(4):
        left, right = round(i * width), round((i + 1) * width)
        part = source.crop((left, 0, right, source.height))
        if i:  # the cut's face, as high as the drawing is there
            face = Image.new("RGBA", (max(2, gap), source.height), cut)
            face.putalpha(part.getchannel("A").crop((0, 0, face.width, source.height)))
            part.alpha_composite(face)
        drawing.alpha_composite(part, (left + i * gap, (i % 2) * gap + gap))
    return drawing


@lru_cache(maxsize=256)
def _mark(flag: str, size: int) -> Image.Image:
    """What a state adds: red steam, a blue snowflake, sparkles, or light behind a lamp."""
    pen = Pen(size, size)
    if flag == "hot":
        for x in (24, 50, 76):
            pen.put("arc", "red", 4, x - 7, 1, x + 3, 13, 90, 300)
            pen.put("arc", "red", 4, x - 7, 13, x + 3, 25, -90, 110)
    elif flag == "cool":
        pen.put("oval", "#eaf6ff", 0, 2, 38, 40)
        for dx, dy in ((15, 0), (7.5, 13), (-7.5, 13)):
            pen.put("rod*", "#0a50e0", 5, 19 - dx, 21 - dy, 19 + dx, 21 + dy)
    elif flag == "clean":
        for x, y, r in ((80, 19, 19), (93, 52, 7), (9, 58, 9)):
            s = 0.24 * r
            star = (x, y - r, x + s, y - s, x + r, y, x + s, y + s)
            pen.put("poly", "#7dffe3", *star, x, y + r, x - s, y + s, x - r, y, x - s, y - s)
    else:
        for k in range(12):
            dx, dy = np.cos(k * np.pi / 6), np.sin(k * np.pi / 6)
            pen.put("rod*", "#ffb400", 6, 50 + 30 * dx, 50 + 30 * dy, 50 + 48 * dx, 50 + 48 * dy)
        pen.put("oval*", "#fff27a", 10, 10, 90, 90)
    return pen.result()


SKIN, SLEEVE = "#f0c39b", "#3c5a99"


@lru_cache(maxsize=64)
def hand(side: int) -> Image.Image:
    """An empty hand with its fingers spread."""
    pen = Pen(side, side)
    for x, y in ((24, 42), (38, 22), (52, 18), (66, 24)):
        pen.put("rod", SKIN, 11, 34 + (x - 24) * 0.7, 66, x, y)
    pen.put("rod", SKIN, 11, 62, 76, 84, 54)
    _palm(pen)
    return pen.result()


@lru_cache(maxsize=64)
def holding_hand(side: int) -> tuple[Image.Image, Image.Image]:
    """A hand that holds: (what is behind the object, the fingers in front of it)."""
    behind, before = Pen(side, side), Pen(side, side)
    _palm(behind)
    for i in range(4):
        before.put("rod", SKIN, 10, 27 + 2 * i, 66 + 8 * i, 52 + i, 66 + 8 * i)
    before.put("rod", SKIN, 11, 72, 82, 66, 62)
    return behind.result(), before.result()


def _palm(pen: Pen) -> None:
    """Sleeve and palm."""
    pen.put("box", SLEEVE, 32, 86, 72, 110)
    pen.put("curve", SKIN, 28, 62, 50, 54, 72, 62, 74, 82, 66, 94, 36, 94, 28, 84)
