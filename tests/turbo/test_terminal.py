"""turbo/terminal.py: every pixel in its place and colour, nothing that a terminal would obey."""

import io
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from turbo.terminal import HALF, Screen, draw_blocks, printable


def cells(text):
    """[(character, colour above, colour below)] of each line."""
    lines, row, styles = [], [], sorted(text.spans, key=lambda span: span.start)
    for i, character in enumerate(text.plain):
        if character == "\n":
            lines.append(row)
            row = []
            continue
        style = next(span.style for span in styles if span.start <= i < span.end)
        row.append((character, tuple(style.color.triplet), tuple(style.bgcolor.triplet)))
    return [*lines, row]


def test_a_cell_holds_two_pixels():
    picture = np.arange(4 * 3 * 3, dtype=np.uint8).reshape(4, 3, 3)
    lines = cells(draw_blocks(picture, columns=3, rows=2))
    assert len(lines) == 2 and all(len(line) == 3 for line in lines)
    for y, line in enumerate(lines):
        for x, (character, above, below) in enumerate(line):
            assert character == HALF
            assert above == tuple(picture[2 * y, x]) and below == tuple(picture[2 * y + 1, x])


@pytest.mark.parametrize(
    ("size", "room", "cells_wide", "cells_high"),
    [
        ((112, 56), (80, 100), 80, 20),  # as wide as the terminal
        ((112, 56), (200, 20), 80, 20),  # as high as it
        ((56, 56), (80, 20), 40, 20),
        ((1000, 1), (10, 10), 10, 1),
    ],
)
def test_the_picture_keeps_its_proportions(size, room, cells_wide, cells_high):
    picture = np.full((size[1], size[0], 3), 7, dtype=np.uint8)
    lines = cells(draw_blocks(picture, *room))
    assert [len(line) for line in lines] == [cells_wide] * cells_high


def test_nothing_is_obeyed():
    assert printable("a\x1b[2Jb\rc\x07\x9bd") == "a\ufffd[2Jb\ufffdc\ufffd\ufffdd"
    assert printable("ä → 7♠\n\u4e2d") == "ä → 7♠\n\u4e2d"


def new_screen(folder="", **options):
    out = io.StringIO()
    return Screen(Console(file=out, width=60, height=30, **options), folder), out


def test_a_picture_is_drawn_once_while_it_stays(tmp_path):
    screen, out = new_screen(
        str(tmp_path / "made"), force_terminal=True, color_system="truecolor", legacy_windows=False
    )
    rng = np.random.default_rng(0)
    one, two = rng.integers(0, 256, (2, 20, 40, 3), dtype=np.uint8)
    for picture in (one, one.copy(), two, one):
        screen.show(picture)
    files = sorted((tmp_path / "made").iterdir())
    assert [file.name for file in files] == ["0001.png", "0002.png", "0003.png"]
    for file, picture in zip(files, (one, two, one), strict=True):
        assert (np.asarray(Image.open(file)) == picture).all()
    assert out.getvalue().count("\x1b[38;2;") > 3 * 40
    drawn = [line for line in strip(out.getvalue()).splitlines() if HALF in line]
    assert {len(line) for line in drawn} == {60} and len(drawn) == 3 * 15


def strip(text):
    """`text` without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_without_colours_the_picture_is_left_to_files():
    screen, out = new_screen()
    screen.show(np.zeros((4, 4, 3), np.uint8))
    screen.show(np.ones((4, 4, 3), np.uint8))
    assert HALF not in out.getvalue() and out.getvalue().count("--png DIR") == 1
    screen.say("[bold]as it is[/bold] \x1b[31m")
    assert "[bold]as it is[/bold] \ufffd[31m" in out.getvalue()
