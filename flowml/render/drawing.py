"""Defines drawings, which layouts make and painters paint: rectangles, paths and words at positions, in pixels.

A drawing has no colours and no escaped text. A painter turns `kind` and `tint` into a style.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from flowml.render.scene import Box, Card, Cylinder

TINTS = 8
"""The number of accent colours for devices, or for the tasks of a stage; the ninth uses the first colour again."""


@dataclass(frozen=True)
class Rect:
    """Position of the top left corner, width and height."""

    x: float
    y: float
    w: float
    h: float

    @property
    def right(self) -> float:
        return self.x + self.w

    @property
    def bottom(self) -> float:
        return self.y + self.h

    @property
    def cx(self) -> float:
        return self.x + self.w / 2

    @property
    def cy(self) -> float:
        return self.y + self.h / 2


@dataclass(frozen=True)
class PlacedCard:
    card: Card
    at: Rect


@dataclass(frozen=True)
class PlacedBox:
    """`compact` boxes show only their title."""

    box: Box
    at: Rect
    tint: int
    compact: bool = False


@dataclass(frozen=True)
class PlacedStore:
    store: Cylinder
    at: Rect


@dataclass(frozen=True)
class Path:
    """An arrow or line through `data`, in SVG path syntax. `weight` is its width."""

    data: str
    kind: str  # "message" | "local" | "bus" | "stub"
    weight: float = 1.4
    detail: str = ""
    source: str = ""
    target: str = ""


@dataclass(frozen=True)
class Words:
    """One line of text. `anchor` ("start", "middle" or "end") is the part of it at `x`; `y` is the base line."""

    x: float
    y: float
    text: str
    kind: str  # "title" | "headline" | "heading" | "muted" | "label" | "bar"
    anchor: str = "start"


@dataclass(frozen=True)
class Bar:
    """One run in the timeline."""

    at: Rect
    tint: int
    text: str
    detail: str


@dataclass(frozen=True)
class Drawing:
    """A finished layout."""

    width: float
    height: float
    cards: tuple[PlacedCard, ...] = ()
    boxes: tuple[PlacedBox, ...] = ()
    stores: tuple[PlacedStore, ...] = ()
    paths: tuple[Path, ...] = ()
    words: tuple[Words, ...] = ()
    bars: tuple[Bar, ...] = ()
    rules: tuple[tuple[float, float, float, float], ...] = ()


_NARROW = frozenset("iljtfrI.,:;|!'`()[]{}/\\ ")
_WIDE = frozenset("mwMW@%&…→←×")


def text_width(text: str, size: float) -> float:
    """The approximate width of `text` in a sans-serif font of `size` pixels; rather too large than too small."""
    return size * sum(map(_width, text))


def _width(c: str) -> float:
    return 0.36 if c in _NARROW else 0.92 if c in _WIDE or ord(c) > 0x2E80 else 0.62


def fit(text: str, width: float, size: float) -> str:
    """`text` on one line, cut with an ellipsis if it is wider than `width` pixels."""
    line = " ".join(text.split())
    ends = list(accumulate(map(_width, line)))
    if not ends or size * ends[-1] <= width:
        return line
    return f"{line[: bisect_right(ends, width / size - _width('…'))]}…"


def weight(nbytes: int) -> float:
    """The width of an arrow, which grows with the order of magnitude of its bytes."""
    return min(1.4 + 0.45 * max(math.log10(nbytes / 1024), 0.0) if nbytes else 1.4, 4.0)


def elbow(points: list[tuple[float, float]], radius: float = 10) -> str:
    """A path of horizontal and vertical pieces with rounded corners."""
    data = [f"M{_n(points[0][0])},{_n(points[0][1])}"]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        r = min(radius, _length(before, corner) / 2, _length(corner, after) / 2)
        (x1, y1), (x2, y2) = _towards(corner, before, r), _towards(corner, after, r)
        data.append(f"L{_n(x1)},{_n(y1)}Q{_n(corner[0])},{_n(corner[1])} {_n(x2)},{_n(y2)}")
    data.append(f"L{_n(points[-1][0])},{_n(points[-1][1])}")
    return "".join(data)


def bracket(x1: float, y1: float, x2: float, y2: float, bulge: float) -> str:
    """A curve that leaves and returns on the left, around the shapes in between."""
    left = min(x1, x2) - bulge
    return f"M{_n(x1)},{_n(y1)}C{_n(left)},{_n(y1)} {_n(left)},{_n(y2)} {_n(x2)},{_n(y2)}"


def _length(a: tuple[float, float], b: tuple[float, float]) -> float:
    return math.hypot(a[0] - b[0], a[1] - b[1])


def _towards(start: tuple[float, float], end: tuple[float, float], distance: float) -> tuple[float, float]:
    length = _length(start, end) or 1.0
    return (start[0] + (end[0] - start[0]) * distance / length, start[1] + (end[1] - start[1]) * distance / length)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
