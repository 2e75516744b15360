"""Lays out a plan without replicas: one lane for each device, with time downwards.

A box is below everything that it waits for, and no two boxes of a lane share a row. Every arrow therefore points
down, the gaps between rows hold only arrows, and the gutters between lanes are free for arrows that pass several rows.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from flowml.render.drawing import (
    TINTS,
    Drawing,
    Path,
    PlacedBox,
    PlacedCard,
    Rect,
    Words,
    elbow,
    text_width,
    weight,
)
from flowml.render.scene import FEED, FETCH, LOCAL, Arrow, Box, Scene

MARGIN = 28.0
_TOP = 92.0
_BOX_WIDTH = 204.0
_PAD = 24.0
_LANE = _BOX_WIDTH + 2 * _PAD
_GUTTER = 44.0
_HEADER = 52.0
_ROW_GAP = 52.0


def box_height(box: Box) -> float:
    """The height of a feed or fetch, or of a title and one line for each fact."""
    return 42.0 if box.kind in (FEED, FETCH) else 34.0 + 16.0 * len(box.facts)


def draw_lanes(scene: Scene) -> Drawing:
    """Place every box of `scene`, and route its arrows."""
    rows = _rows(scene)
    depth = max(rows.values(), default=-1) + 1
    heights = [0.0] * depth
    for box in scene.boxes:
        heights[rows[box.id]] = max(heights[rows[box.id]], box_height(box))
    above = accumulate(heights, initial=0.0)
    tops = [_TOP + _HEADER + 10 + y + _ROW_GAP * r for r, y in zip(range(depth), above, strict=False)]
    bottom = (tops[-1] + heights[-1] if depth else _TOP + _HEADER) + 20
    placed: dict[str, PlacedBox] = {}
    cards: list[PlacedCard] = []
    for lane, card in enumerate(scene.cards):
        x = MARGIN + lane * (_LANE + _GUTTER)
        cards.append(PlacedCard(card, Rect(x, _TOP, _LANE, bottom - _TOP)))
        for box in card.boxes:
            at = Rect(x + _PAD, tops[rows[box.id]], _BOX_WIDTH, box_height(box))
            placed[box.id] = PlacedBox(box, at, lane % TINTS)
    router = _Router(placed, rows, [(top - _ROW_GAP, top) for top in tops] + [(bottom, bottom)])
    for arrow in _outer_first(scene.arrows, rows):
        router.add(arrow)
    right = max((c.at.right for c in cards), default=MARGIN + _LANE)
    words = (Words(MARGIN, 40, scene.name, "title"), Words(MARGIN, 62, scene.headline, "headline"))
    return Drawing(
        width=max(right, MARGIN + text_width(scene.headline, 13)) + MARGIN,
        height=bottom + MARGIN,
        cards=tuple(cards),
        boxes=tuple(placed.values()),
        paths=tuple(router.paths),
        words=(*words, *router.words),
    )


def _rows(scene: Scene) -> dict[str, int]:
    """A row for each box: below all that it waits for, and alone in its lane. A feed is just above its first user."""
    sources: dict[str, list[str]] = {b.id: [] for b in scene.boxes}
    users: dict[str, list[str]] = {b.id: [] for b in scene.boxes}
    for arrow in scene.arrows:
        sources[arrow.target].append(arrow.source)
        users[arrow.source].append(arrow.target)
    level = {b.id: b.level for b in scene.boxes}
    for box in scene.boxes:
        if box.kind == FEED and users[box.id]:
            level[box.id] = min(level[u] for u in users[box.id]) - 1
    rows: dict[str, int] = {}
    free: dict[tuple[str, int], int] = {}  # a row that is taken -> one below it that may be free
    for box in sorted(scene.boxes, key=lambda b: (level[b.id], b.order)):
        row = max([level[box.id], *(rows[s] + 1 for s in sources[box.id] if s in rows)])
        passed: list[int] = []
        while (box.device, row) in free:
            passed.append(row)
            row = free[box.device, row]
        free.update({(box.device, r): row + 1 for r in (*passed, row)})
        rows[box.id] = row
    return rows


def _outer_first(arrows: Sequence[Arrow], rows: Mapping[str, int]) -> list[Arrow]:
    """Arrows from long to short, so that short ones are drawn above long ones."""
    return sorted(arrows, key=lambda a: -abs(rows[a.target] - rows[a.source]))


_CELL_WIDTH, _CELL_HEIGHT = 128, 32
"""Labels are no larger than a cell, so a label can overlap only labels of adjacent cells."""


class Taken:
    """The parts of a line that are taken: disjoint intervals, in order."""

    def __init__(self) -> None:
        self._ends: list[float] = []
        """The start of the first interval, its end, the start of the second, and so on."""

    def take(self, left: float, right: float) -> bool:
        """Take an interval if all of it is free."""
        at = bisect_left(self._ends, left)
        if at % 2 or bisect_right(self._ends, right) != at:
            return False
        self._ends[at:at] = [left, right]
        return True


@dataclass
class _Router:
    """Draws arrows one after the other and remembers which ports, tracks and heights are in use."""

    placed: Mapping[str, PlacedBox]
    rows: Mapping[str, int]
    gaps: Sequence[tuple[float, float]]
    paths: list[Path] = field(default_factory=list[Path])
    words: list[Words] = field(default_factory=list[Words])
    tracks: dict[float, int] = field(default_factory=dict[float, int])
    ports: dict[str, int] = field(default_factory=dict[str, int])
    runs: dict[tuple[int, int], Taken] = field(default_factory=dict[tuple[int, int], Taken])
    """Taken intervals by (gap, height in the gap)."""
    labels: dict[tuple[int, int], list[Words]] = field(default_factory=dict[tuple[int, int], list[Words]])
    """Labels by their cell."""

    def add(self, arrow: Arrow) -> None:
        source, target = self.placed[arrow.source].at, self.placed[arrow.target].at
        span = self.rows[arrow.target] - self.rows[arrow.source]
        if source.x == target.x and span != 1:
            data, label = self._around(source, target)
        elif span == 1:
            data, label = self._across_gap(arrow, source, target)
        else:
            data, label = self._through_gutter(arrow, source, target)
        line = 1.2 if arrow.kind == LOCAL else weight(arrow.nbytes)
        self.paths.append(Path(data, arrow.kind, line, arrow.detail, arrow.source, arrow.target))
        if arrow.label:
            self._label(arrow.label, *label)

    def _across_gap(self, arrow: Arrow, source: Rect, target: Rect) -> tuple[str, tuple[float, float]]:
        """A path to the next row: down, across in the gap, down."""
        x1, x2 = self._port(arrow.source, "out", source, target), self._port(arrow.target, "in", target, source)
        middle = self._height(self.rows[arrow.target], x1, x2)
        points = [(x1, source.bottom), (x1, middle), (x2, middle), (x2, target.y)]
        return elbow(points), ((x1 + x2) / 2, middle)

    def _height(self, gap: int, x1: float, x2: float) -> float:
        """A height in the gap above row `gap` that is free between `x1` and `x2`."""
        left, right = min(x1, x2), max(x1, x2)
        middle = sum(self.gaps[gap]) / 2
        if left == right:
            return middle
        for offset in (0, 8, -8, 16, -16):
            if self.runs.setdefault((gap, offset), Taken()).take(left, right):
                return middle + offset
        return middle

    def _port(self, box: str, side: str, at: Rect, other: Rect) -> float:
        """The position where an arrow meets a box: the middle within a lane, else the side of the other end."""
        if at.x == other.x:
            return at.cx
        key = f"{side} {box} {other.x > at.x}"
        used = self.ports[key] = self.ports.get(key, 0) + 1
        shift = min(26.0 + 18.0 * used, at.w / 2 - 12)
        return at.cx + (shift if other.x > at.x else -shift)

    def _around(self, source: Rect, target: Rect) -> tuple[str, tuple[float, float]]:
        """A path around the boxes in between, in the margin of the lane."""
        track = self.tracks[source.x] = self.tracks.get(source.x, -1) + 1
        x = source.x - 8 - 4 * (track % 4)
        y1, y2 = source.cy + 5 * (track % 3), target.cy - 5 * (track % 3)
        return elbow([(source.x, y1), (x, y1), (x, y2), (target.x, y2)], 7), (x, (y1 + y2) / 2)

    def _through_gutter(self, arrow: Arrow, source: Rect, target: Rect) -> tuple[str, tuple[float, float]]:
        """A path down to the gap below the source, along the gutter beside the target, and in above the target."""
        gutter = target.x - _PAD - _GUTTER if target.x > source.x else target.right + _PAD
        track = self.tracks[gutter] = self.tracks.get(gutter, -1) + 1
        x = gutter + 8 + (track * 9) % (_GUTTER - 12)
        x1, x2 = self._port(arrow.source, "out", source, target), self._port(arrow.target, "in", target, source)
        above = self._height(self.rows[arrow.source] + 1, x1, x)
        below = self._height(self.rows[arrow.target], x, x2)
        points = [(x1, source.bottom), (x1, above), (x, above), (x, below), (x2, below), (x2, target.y)]
        return elbow(points, 8), ((x1 + x) / 2, above)

    def _label(self, text: str, x: float, y: float) -> None:
        """Put a label at a position, or slightly below or above it if another label is there."""
        width = text_width(text, 11)
        column = int(x // _CELL_WIDTH)
        for shift in (0, 14, -14, 28, -28, 42):
            row = int((y + shift) // _CELL_HEIGHT)
            near = (w for i in (-1, 0, 1) for j in (-1, 0, 1) for w in self.labels.get((column + i, row + j), ()))
            if all(abs(w.x - x) > (width + text_width(w.text, 11)) / 2 or abs(w.y - 4 - y - shift) > 13 for w in near):
                y += shift
                break
        label = Words(x, y + 4, text, "label", "middle")
        self.labels.setdefault((column, int(y // _CELL_HEIGHT)), []).append(label)
        self.words.append(label)
