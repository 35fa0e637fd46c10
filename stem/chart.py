"""Charts as pictures, drawn with Pillow: large letters for small previews, and colours that colour-blind people tell apart."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH, PLOT = 1000, 210  # of a chart, and height of a panel's plot, in pixels
MARGIN, LEFT, ABOVE, BELOW = 28, 132, 24, 92  # around all; before, above and under a plot, for numbers and labels
TITLE, TEXT = 34, 28  # sizes of letters
FINE = 2  # drawn so many times larger, then made smaller: smooth lines
PAPER, INK, PALE, GRID = "white", "#222222", "#666666", "#dddddd"
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
"""Source: the palette of Okabe and Ito, which people with any kind of colour vision tell apart."""


class Line(NamedTuple):
    """One curve."""

    name: str  # "" for none in the legend
    values: Tensor  # (n,); where they are not finite there is a gap
    colour: str
    dashed: bool = False


class Panel(NamedTuple):
    """A plot with a title."""

    title: str
    label: str  # of what runs to the right
    x: Tensor  # (n,) ascending
    lines: tuple[Line, ...] = ()
    bars: tuple[Tensor, Tensor] | None = None  # heights (n,), and colours (n, 3) in sRGB 0..1
    low: float | None = None  # of the numbers, where they are not to follow from the values
    high: float | None = None
    note: tuple[float, str] | None = None  # a mark at a place to the right, and what it says


def draw_chart(headline: Sequence[str], panels: Sequence[Panel]) -> Tensor:
    """An image (1, height, width, 3) in 0..1: lines of text, and panels under one another."""
    head = MARGIN + len(headline) * (TEXT + 12) + (18 if headline else 0)
    height = head + sum(_height(panel) for panel in panels) + MARGIN // 2
    picture = Image.new("RGB", (FINE * WIDTH, FINE * height), PAPER)
    pen = Pen(picture)
    for number, text in enumerate(headline):
        pen.text((MARGIN, MARGIN + number * (TEXT + 12)), text, size=TEXT)
    top = head
    for panel in panels:
        _draw_panel(pen, panel, top)
        top += _height(panel)
    small = picture.resize((WIDTH, height), Image.Resampling.LANCZOS)
    return torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).reshape(1, height, WIDTH, 3) / 255


def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own letters, the same everywhere."""
    return ImageFont.load_default(size)


class Pen:
    """Draws in pixels of the finished picture."""

    def __init__(self, picture: Image.Image):
        self.draw = ImageDraw.Draw(picture)

    def text(self, at: tuple[float, float], text: str, colour: str = INK, anchor: str = "la", size: int = TEXT) -> None:
        self.draw.text(_fine(at), text, colour, font(FINE * size), anchor)

    def line(self, *points: tuple[float, float], colour: str = INK, width: int = 1, dashed: bool = False) -> None:
        if not dashed:
            self.draw.line([_fine(point) for point in points], colour, FINE * width, "curve")
            return
        gone = 0.0
        for (x, y), (x_, y_) in pairwise(points):
            length = math.dist((x, y), (x_, y_))
            for piece in range(int(length // 2)):
                if (gone + 2 * piece) % 24 < 14:
                    ends = [(x + (x_ - x) * d / length, y + (y_ - y) * d / length) for d in (2 * piece, 2 * piece + 2)]
                    self.draw.line([_fine(end) for end in ends], colour, FINE * width)
            gone += length

    def box(self, left: float, top: float, right: float, bottom: float, colour: tuple[int, ...] | str) -> None:
        self.draw.rectangle([*_fine((left, top)), *_fine((right, bottom))], colour)

    def dot(self, x: float, y: float, colour: str, radius: int = 5) -> None:
        self.draw.ellipse([*_fine((x - radius, y - radius)), *_fine((x + radius, y + radius))], colour)


def ticks(low: float, high: float, most: int = 4, least: float = 0.0) -> list[float]:
    """Round numbers from low to high, at most so many and one more: multiples of 1, 2 or 5 times a power of ten.

    Args:
        low, high: Ends of the axis.
        most: How many steps there may be.
        least: Step that is the smallest.
    """
    raw = max((high - low) / most, least)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    return [step * i for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def value_range(panel: Panel) -> tuple[float, float]:
    """Of the numbers of a panel: those of its values with a little air, where it does not say its own."""
    values = torch.cat([line.values.double() for line in panel.lines] + ([panel.bars[0].double()] if panel.bars else []))
    values = values[values.isfinite()]
    least, most = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    air = 0.08 * (most - least) or 0.1 * abs(most) or 1.0
    return least - air if panel.low is None else panel.low, most + air if panel.high is None else panel.high


def _draw_panel(pen: Pen, panel: Panel, top: float) -> None:
    left, right = LEFT, WIDTH - MARGIN
    pen.text((MARGIN, top), panel.title, size=TITLE)
    top += TITLE + ABOVE
    named = [line for line in panel.lines if line.name]
    if named:
        _draw_legend(pen, named, top)
        top += TEXT + ABOVE
    bottom = top + PLOT
    low, high = value_range(panel)
    first, last = float(panel.x[0]), float(panel.x[-1])
    half = 0.5 if panel.bars is not None or first == last else 0.0  # bars are as wide as one
    first, last = first - half, last + half

    def at(x: float, y: float) -> tuple[float, float]:
        share = (min(max(y, low), high) - low) / (high - low)
        return left + (x - first) / (last - first) * (right - left), bottom - share * PLOT

    levels = ticks(low, high)
    for level in levels:
        y = at(first, level)[1]
        pen.line((left, y), (right, y), colour=GRID)
        pen.text((left - 14, y), _number(level, levels), PALE, "rm")
    for place in ticks(float(panel.x[0]), float(panel.x[-1]), 6, 1.0) if half == 0 or len(panel.x) > 1 else [float(panel.x[0])]:
        pen.text((at(place, low)[0], bottom + 10), f"{place:g}", PALE, "ma")
    if panel.bars is not None:
        for x, height, colour in zip(panel.x.tolist(), *(part.tolist() for part in panel.bars), strict=True):
            (x0, y), (x1, _) = at(x - 0.5, height), at(x + 0.5, height)
            if bottom - y > 0.5:
                pen.box(x0, y, max(x0, x1 - 1 / FINE), bottom, tuple(round(255 * c) for c in colour))
    if panel.note is not None:
        x = at(panel.note[0], low)[0]
        pen.line((x, top), (x, bottom), colour=PALE, width=2, dashed=True)
        leftwards = x > (left + right) / 2
        pen.text((x + (-12 if leftwards else 12), top + 6), panel.note[1], PALE, "ra" if leftwards else "la")
    pen.line((left, bottom), (right, bottom), colour=PALE, width=2)
    for line in panel.lines:
        _draw_line(pen, line, [at(*point) for point in zip(panel.x.tolist(), line.values.tolist(), strict=True)])
    pen.text(((left + right) / 2, bottom + 10 + TEXT + 8), panel.label, PALE, "ma")


def _draw_line(pen: Pen, line: Line, points: list[tuple[float, float]]) -> None:
    runs: list[list] = [[]]
    for point, value in zip(points, line.values.tolist(), strict=True):
        if math.isfinite(value):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    for run in filter(None, runs):
        if len(run) > 1:
            pen.line(*run, colour=line.colour, width=3, dashed=line.dashed)
        if len(run) == 1 or (len(points) <= 40 and not line.dashed):
            for x, y in run:
                pen.dot(x, y, line.colour)


def _draw_legend(pen: Pen, lines: Sequence[Line], top: float) -> None:
    x, y = float(LEFT), top + TEXT / 2
    for line in lines:
        pen.line((x, y), (x + 52, y), colour=line.colour, width=4, dashed=line.dashed)
        pen.text((x + 64, y), line.name, anchor="lm")
        x += 64 + font(TEXT).getlength(line.name) + 40


def _height(panel: Panel) -> int:
    return TITLE + ABOVE + (TEXT + ABOVE if any(line.name for line in panel.lines) else 0) + PLOT + BELOW + 20


def _number(value: float, among: Sequence[float]) -> str:
    """With as many decimals as tell the numbers of an axis apart."""
    step = abs(among[1] - among[0]) if len(among) > 1 else abs(value) or 1.0
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-6))}f}"


def _fine(point: tuple[float, float]) -> tuple[float, float]:
    return FINE * point[0], FINE * point[1]
