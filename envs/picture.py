"""Cards as a person knows them: rank, suit and colour on green felt, drawn with Pillow alone.

Small cards (for the tiny model: 26 x 42 pixels) show a bold rank above one suit, large ones also
have corners. Everything is drawn at three times the size and scaled down. Left out: image files,
card games' rules, any randomness (the caller passes the jitter).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FELT = (30, 110, 60)
WHITE = (255, 255, 255)
EDGE = (60, 60, 60)
INK = {
    "heart": (205, 20, 30),
    "diamond": (205, 20, 30),
    "spade": (15, 15, 15),
    "club": (15, 15, 15),
}
SCALE = 3
SMALL_WIDTH = 40  # narrower cards are drawn in the small style


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font built into Pillow, `size` pixels high."""
    return ImageFont.load_default(size=size)


def bold_text(draw: ImageDraw.ImageDraw, at: tuple, text: str, size: int, ink: tuple) -> None:
    """Text centred on `at`; the built-in font has no bold, so it is stroked."""
    stroke = max(1, size // 20)
    draw.text(
        at, text, font=font(size), fill=ink, anchor="mm", stroke_width=stroke, stroke_fill=ink
    )


def draw_suit(draw: ImageDraw.ImageDraw, suit: str, x: float, y: float, r: float) -> None:
    """One suit of half height r, centred on (x, y)."""
    ink = INK[suit]

    def disc(cx: float, cy: float, radius: float) -> None:
        draw.ellipse([cx - radius, cy - radius, cx + radius, cy + radius], fill=ink)

    def shape(*points: tuple) -> None:
        draw.polygon([(x + r * dx, y + r * dy) for dx, dy in points], fill=ink)

    if suit == "diamond":
        shape((0, -1), (0.72, 0), (0, 1), (-0.72, 0))
    elif suit == "heart":
        for side in (-1, 1):
            disc(x + side * 0.44 * r, y - 0.4 * r, 0.48 * r)
        shape((-0.85, -0.13), (0, -0.5), (0.85, -0.13), (0, 0.98))
    elif suit == "spade":
        for side in (-1, 1):
            disc(x + side * 0.42 * r, y + 0.22 * r, 0.44 * r)
        shape((0, -1), (0.82, 0.06), (0, 0.4), (-0.82, 0.06))
        shape((0, 0.1), (0.36, 0.98), (-0.36, 0.98))
    else:
        for dx, dy in ((0, -0.52), (-0.5, 0.2), (0.5, 0.2)):
            disc(x + dx * r, y + dy * r, 0.44 * r)
        disc(x, y, 0.25 * r)
        shape((0, 0), (0.36, 0.98), (-0.36, 0.98))


@lru_cache(maxsize=1_024)
def card_face(rank: str, suit: str, width: int, height: int) -> Image.Image:
    """One card with its felt corners, width x height pixels."""
    w, h = width * SCALE, height * SCALE
    image = Image.new("RGB", (w, h), FELT)
    draw = ImageDraw.Draw(image)
    radius = max(w // 9, 6)
    draw.rounded_rectangle([0, 0, w - 1, h - 1], radius=radius, fill=WHITE, outline=EDGE, width=2)
    if width < SMALL_WIDTH:
        _small_face(draw, rank, suit, w, h)
    else:
        _large_face(image, draw, rank, suit, w, h)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _small_face(draw: ImageDraw.ImageDraw, rank: str, suit: str, w: int, h: int) -> None:
    """A rank as large as fits above one suit: it must survive 14-pixel patches."""
    size = min(w * (15 if rank == "10" else 18) // 26, h * 20 // 42)
    bold_text(draw, (w / 2, 0.28 * h), rank, size, INK[suit])
    draw_suit(draw, suit, w / 2, 0.73 * h, min(0.29 * w, 0.19 * h))


def _large_face(
    image: Image.Image, draw: ImageDraw.ImageDraw, rank: str, suit: str, w: int, h: int
) -> None:
    """Rank and suit in both corners, upside down below, and one suit in the middle."""
    size = int((0.21 if rank == "10" else 0.25) * w)
    bold_text(draw, (0.17 * w, 0.13 * h), rank, size, INK[suit])
    draw_suit(draw, suit, 0.17 * w, 0.285 * h, 0.09 * w)
    corner = image.crop((4, 4, int(0.33 * w), int(0.36 * h))).rotate(180)
    image.paste(corner, (w - 4 - corner.width, h - 4 - corner.height))
    draw_suit(draw, suit, 0.5 * w, 0.5 * h, 0.27 * w)


def draw_row(
    ranks: Sequence[str],
    suits: Sequence[str],
    jitter: np.ndarray,  # [cards, 2] in -1..1: how far each card is off the middle of its cell
    canvas: tuple[int, int],
    strip: int = 0,  # pixels kept free below
) -> Image.Image:
    """The cards side by side, each in its own cell."""
    width, height = canvas
    free = height - strip
    cell = width / len(ranks)
    card_h = int(min((0.86 if strip else 0.75) * free, cell * 42 / 28))
    card_w = int(card_h * 26 / 42)
    image = Image.new("RGB", canvas, FELT)
    room_x, room_y = (cell - card_w) / 2, min((free - card_h) / 2, 0.1 * free)
    for i, (rank, suit) in enumerate(zip(ranks, suits, strict=True)):
        x = round(i * cell + room_x * (1 + min(1.0, 4 / room_x) * jitter[i, 0]))
        y = round((free - card_h) / 2 + min(room_y, 5) * jitter[i, 1])
        image.paste(card_face(rank, suit, card_w, card_h), (x, y))
    return image


def draw_line(image: Image.Image, text: str, strip: int) -> Image.Image:
    """A copy of the picture with `text` in the strip at its foot, as large as fits."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    width, height = image.size
    draw.rectangle([0, height - strip, width, height], fill=WHITE)
    size = int(0.62 * strip)
    while size > 6 and draw.textlength(text, font=font(size)) > 0.94 * width:
        size -= 1
    draw.text(
        (0.03 * width, height - strip / 2), text, font=font(size), fill=(10, 10, 10), anchor="lm"
    )
    return image


def as_array(image: Image.Image) -> np.ndarray:
    """A picture as the environments return it, [H, W, 3] uint8."""
    return np.array(image, dtype=np.uint8)
