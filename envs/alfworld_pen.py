"""A pen for ALFWorld's drawings: shapes in hundredths of a picture, and names with a light rim.

A drawing is a list of shapes on a square of 100 x 100 units, written as `shape colour numbers`:

    oval c x0 y0 x1 y1      box c x0 y0 x1 y1 [corner]     poly c x y x y ...
    curve c x y x y ...     rod c width x y x y ...        arc c width x0 y0 x1 y1 from to
    chord, pie c x0 y0 x1 y1 from to                       `*` after the shape: without an edge

It is drawn several times larger and scaled down. Left out: what is drawn.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from turbo.envs.picture import font

EDGE = "#262626"
INK, PAPER = "#15171a", "#ffffff"
SCALE = 4  # drawings are this many times larger, then scaled down


class Pen:
    """Draws on a transparent picture in units of a hundredth of its width and height."""

    def __init__(self, width: int, height: int, scale: int = SCALE):
        self.size = (width, height)
        self.image = Image.new("RGBA", (width * scale, height * scale))
        self.draw = ImageDraw.Draw(self.image)
        self.x, self.y = width * scale / 100, height * scale / 100
        self.unit = min(self.x, self.y)  # of thickness
        self.thin = max(scale, round(1.3 * self.unit))

    def at(self, points) -> list[tuple[float, float]]:
        """Units, as x y x y ..., to pixels."""
        return [(self.x * a, self.y * b) for a, b in zip(points[::2], points[1::2], strict=True)]

    def put(self, shape: str, colour: str, *numbers: float) -> None:
        """One shape, named and measured as this file's head says."""
        edge = None if shape.endswith("*") else EDGE
        shape, draw = shape.removesuffix("*"), self.draw
        style = {"fill": colour, "outline": edge, "width": self.thin if edge else 0}
        if shape in ("rod", "arc"):
            for ink, more in ((edge, 2 * self.thin), (colour, 0)):
                if ink:
                    thick = round(numbers[0] * self.unit) + more
                    self._stroke(shape, ink, thick, numbers[1:])
        elif shape == "oval":
            draw.ellipse(self.at(numbers), **style)
        elif shape == "box":
            corner = numbers[4] * self.unit if len(numbers) > 4 else 0
            draw.rounded_rectangle(self.at(numbers[:4]), corner, **style)
        elif shape == "chord":
            draw.chord(self.at(numbers[:4]), *numbers[4:], **style)
        elif shape == "pie":
            draw.pieslice(self.at(numbers[:4]), *numbers[4:], **style)
        else:
            points = self.at(numbers)
            points = _smooth(points) if shape == "curve" else points
            draw.polygon(points, fill=colour)
            if edge:
                draw.line([*points, *points[:2]], fill=edge, width=self.thin, joint="curve")

    def _stroke(self, shape: str, ink: str, thick: int, numbers: tuple) -> None:
        """A thick line with round ends, or a thick arc."""
        if shape == "arc":
            (x0, y0), (x1, y1) = self.at(numbers[:4])
            more = thick / 2  # Pillow draws an arc's thickness inwards
            frame = [x0 - more, y0 - more, x1 + more, y1 + more]
            self.draw.arc(frame, *numbers[4:], fill=ink, width=thick)
            return
        points = self.at(numbers)
        self.draw.line(points, fill=ink, width=thick, joint="curve")
        for x, y in points:
            self.draw.ellipse(
                [x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2], fill=ink
            )

    def write(self, x: float, y: float, text: str, high: float, ink: str) -> None:
        """Text in the middle of (x, y), `high` units high."""
        place, size = (self.x * x, self.y * y), max(1, round(high * self.unit))
        self.draw.text(place, text, font=font(size), fill=ink, anchor="mm", stroke_width=size // 16)

    def put_all(self, drawing: str) -> None:
        """Every shape of a drawing in the language of this file's head."""
        for shape, colour, numbers in _parse(drawing):
            self.put(shape, colour, *numbers)

    def result(self) -> Image.Image:
        """The picture, scaled down."""
        return self.image.resize(self.size, Image.Resampling.BOX)


@lru_cache(maxsize=512)
def _parse(drawing: str) -> list[tuple[str, str, list[float]]]:
    """(shape, colour, numbers) of every shape."""
    parts = [part.split() for part in drawing.split(";")]
    return [(shape, colour, [float(n) for n in numbers]) for shape, colour, *numbers in parts]


def _smooth(points: list[tuple[float, float]], steps: int = 8) -> list[tuple[float, float]]:
    """A closed Catmull-Rom curve through the points."""
    p = np.array(points)
    before, after, last = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    a, b, c, d = before[:, None], p[:, None], after[:, None], last[:, None]
    curve = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return [tuple(point) for point in curve.reshape(-1, 2)]


@lru_cache(maxsize=2_048)
def label(text: str, size: int, ink: str = INK, rim: str = PAPER) -> Image.Image:
    """A line of text, with a rim to be read on any ground; labels of one size have one height."""
    thick = max(1, round(size / 7)) if rim else 0
    above, below = font(size).getmetrics()
    width = int(font(size).getlength(text)) + 1 + 2 * thick
    image = Image.new("RGBA", (width, above + below + 2 * thick))
    style = {"font": font(size), "fill": ink, "stroke_width": thick, "stroke_fill": rim or ink}
    ImageDraw.Draw(image).text((thick, thick + above), text, anchor="ls", **style)
    return image
