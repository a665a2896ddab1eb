"""What a terminal is shown of a game: its picture in half blocks, text as it comes, PNG files.

A character cell is about twice as high as it is wide. An upper half block in the colour of one
pixel, on a ground in the colour of the pixel below, makes two square pixels of it.

Left out: who plays (`turbo.play`); graphics protocols, which few terminals share.
"""

import time
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

HALF = "\u2580"
SPARE = 4  # rows of the screen that are left to the text


def draw_blocks(picture: np.ndarray, columns: int, rows: int) -> Text:
    """The picture [H, W, 3], as large as `columns` x `rows` cells hold, in half blocks."""
    height, width = picture.shape[:2]
    scale = min(columns / width, 2 * rows / height)
    size = max(1, round(width * scale)), 2 * max(1, round(height * scale / 2))
    pixels = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
    text = Text(no_wrap=True)
    for upper, lower in zip(pixels[0::2].tolist(), pixels[1::2].tolist(), strict=True):
        for (above, below), cells in groupby(zip(upper, lower, strict=True)):
            style = Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below))
            text.append(HALF * len(list(cells)), style)
        text.append("\n")
    text.right_crop()
    return text


def printable(text: str) -> str:
    """`text` without what a terminal would obey; a model or a game may have written it."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


class Screen:
    """Text, pictures and answers on a console; pictures as PNG files in a folder too."""

    def __init__(self, console: Console, folder: str = "", delay: float = 0.0):
        self.console, self.folder = console, Path(folder) if folder else None
        self.delay = delay if console.is_terminal else 0.0
        self.shows_pictures = console.is_terminal and console.color_system is not None
        self.pictures = 0
        self._shown: np.ndarray | None = None
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)

    def say(self, text: str = "", style: str = "", end: str = "\n") -> None:
        """Print text as it is: nothing in it is markup, and nothing is obeyed."""
        text = Text(printable(text), style)
        self.console.print(text, end=end, soft_wrap=True, highlight=False)

    def show(self, picture: np.ndarray) -> None:
        """Draw and save a picture, unless it is the one that was shown last."""
        if self._shown is not None and np.array_equal(picture, self._shown):
            return
        self._shown = np.array(picture)
        self.pictures += 1
        if self.shows_pictures:
            rows = max(8, self.console.height - SPARE)
            self.console.print(draw_blocks(picture, self.console.width, rows), soft_wrap=True)
        if self.folder:
            path = self.folder / f"{self.pictures:04d}.png"
            Image.fromarray(picture).save(path)
            self.say(f"picture: {path}", "dim")
        elif not self.shows_pictures and self.pictures == 1:
            self.say("(no colours here: --png DIR saves the pictures)", "dim")

    def stream(self, piece: str, style: str) -> None:
        """Print the next piece of a line, at the pace of a reader."""
        self.say(piece, style, end="")
        self.console.file.flush()
        if self.delay:
            time.sleep(self.delay)
