"""Draws the figure of a claim or a benchmark as SVG: lines in one pair of axes, or rows of dots.

It needs no other program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 68, 150, 44, 48
LINE, CHARACTER, LABEL, APART = 15, 6.2, 36, 36
"""The height of a row of dots, about the width of a letter and of the label of a tick, and between columns of dots."""
KEY = 36
"""From the axes to the names of lines."""
COLOURS = ("#3978d8", "#dd7a2e", "#20967f", "#b5509a", "#7f8f1f", "#cf4759", "#6b62d6", "#7d6a57")
STYLE = """
.plot text{font-family:ui-sans-serif,system-ui,'Segoe UI','DejaVu Sans',Arial,sans-serif;font-size:11px;fill:#1c2733}
.plot .title{font-size:14px;font-weight:600}.plot .back{fill:#fff}.plot .rule{stroke:#d5dce5}
@media (prefers-color-scheme:dark){.plot text{fill:#e7ecf2}.plot .back{fill:#12161c}.plot .rule{stroke:#323c48}}
"""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A named line through points, or the points alone."""

    name: str
    points: Points
    dashed: bool = False


@dataclass(frozen=True)
class Plot:
    """Lines in one pair of axes. Points that are not finite, or not above 0 on a logarithmic axis, are left out."""

    title: str
    x: str
    y: str
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class _Axis:
    """Maps numbers to pixels. The range is that of the ticks."""

    ticks: tuple[float, ...]
    log: bool
    begin: float
    end: float

    def at(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        share = math.log(value / low) / math.log(high / low) if self.log else (value - low) / (high - low)
        return self.begin + share * (self.end - self.begin)


@dataclass(frozen=True)
class DotsRow:
    """A name, and the values of each column."""

    name: str
    values: tuple[Sequence[float], ...]


@dataclass(frozen=True)
class Dots:
    """Rows of dots in columns beside each other, each column with an axis of its own. A line marks the mean. A column
    without values in a row says `missing` there."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[DotsRow, ...]
    missing: str = "–"


def draw(figure: Plot | Dots) -> str:
    """The figure as an SVG document, on a background of its own, for light and dark pages."""
    return _dots(figure) if isinstance(figure, Dots) else _lines(figure)


def _document(title: str, height: float, parts: Sequence[str], width: float = WIDTH) -> str:
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="back" width="{width:g}" height="{height:g}" rx="8"/>',
        _text(LEFT, 24, title, "start", "title"),
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def _dots(figure: Dots) -> str:
    first = 16 + CHARACTER * max((len(row.name) for row in figure.rows), default=0)
    each = (WIDTH - 24 - first) / len(figure.columns)
    bottom = TOP + LINE * len(figure.rows)
    parts: list[str] = []
    for column, name in enumerate(figure.columns):
        begin, colour = first + column * each, COLOURS[column % len(COLOURS)]
        values = [value for row in figure.rows for value in row.values[column]]
        axis = _axis(values or [1.0], log=False, begin=begin + APART / 2, end=begin + each - APART / 2)
        for tick in axis.ticks[:: math.ceil(len(axis.ticks) * LABEL / each)]:
            parts += [
                f'<path class="rule" d="M{axis.at(tick):.1f},{TOP}V{bottom}"/>',
                _text(axis.at(tick), bottom + 16, f"{tick:g}", "middle"),
            ]
        parts.append(_text(begin + each / 2, bottom + 36, name, "middle"))
        parts += [
            _dots_row(row.values[column], axis, TOP + LINE * (number + 0.5), colour, figure.missing)
            for number, row in enumerate(figure.rows)
        ]
    names = (_text(first - 4, TOP + LINE * (i + 0.5) + 4, r.name, "end") for i, r in enumerate(figure.rows))
    return _document(figure.title, bottom + BOTTOM, [*parts, *names])


def _dots_row(values: Sequence[float], axis: _Axis, y: float, colour: str, missing: str) -> str:
    if not values:
        return _text((axis.begin + axis.end) / 2, y + 4, missing, "middle")
    mean = axis.at(sum(values) / len(values))
    dots = "".join(f'<circle cx="{axis.at(value):.1f}" cy="{y:g}" r="2.6"/>' for value in values)
    return f'<g fill="{colour}">{dots}<path d="M{mean:.1f},{y - 5:g}v10" stroke="{colour}" stroke-width="1.8"/></g>'


def _lines(plot: Plot) -> str:
    lines = [_finite(line, plot) for line in plot.lines]
    points = [point for line in lines for point in line.points]
    xs, ys = [x for x, _ in points] or [1.0], [y for _, y in points] or [1.0]
    across = _axis(xs, plot.log_x, LEFT, WIDTH - RIGHT)
    up = _axis(ys if plot.log_y else [0.0, *ys], plot.log_y, HEIGHT - BOTTOM, TOP)
    parts = [
        *(_tick_x(across, value) for value in across.ticks),
        *(_tick_y(up, value) for value in up.ticks),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, plot.x, "middle"),
        f'<g transform="rotate(-90 16 {HEIGHT / 2})">{_text(16, HEIGHT / 2, plot.y, "middle")}</g>',
        *_drawn(lines, across, up),
    ]
    names = CHARACTER * max((len(line.name) for line in lines), default=0)
    return _document(plot.title, HEIGHT, parts, max(WIDTH, math.ceil(WIDTH - RIGHT + KEY + names + 8)))


def _drawn(lines: Sequence[Line], across: _Axis, up: _Axis) -> list[str]:
    """The lines. One that a later line covers is wider, so that both are seen."""
    spots = [[(across.at(a), up.at(b)) for a, b in line.points] for line in lines]
    return [
        _line(line, index, spots[index], any(_covers(later, spots[index]) for later in spots[index + 1 :]))
        for index, line in enumerate(lines)
    ]


def _covers(later: Sequence[tuple[float, float]], spots: Sequence[tuple[float, float]]) -> bool:
    alike = len(later) == len(spots) > 0
    return alike and all(math.dist(a, b) < 2 for a, b in zip(later, spots, strict=True))


def _finite(line: Line, plot: Plot) -> Line:
    def shown(x: float, y: float) -> bool:
        fits = (x > 0 or not plot.log_x) and (y > 0 or not plot.log_y)
        return fits and math.isfinite(x) and math.isfinite(y)

    return Line(line.name, tuple(point for point in line.points if shown(*point)), line.dashed)


def _axis(values: Sequence[float], log: bool, begin: float, end: float) -> _Axis:
    low, high = min(values), max(values)
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        ticks = tuple(10.0**i for i in range(first, max(last, first + 1) + 1))
        return _Axis(ticks, log, begin, end)
    step = _step(high - low or abs(high) or 1.0)
    first, last = math.floor(low / step), math.ceil(high / step)
    return _Axis(tuple(step * i for i in range(first, max(last, first + 1) + 1)), log, begin, end)


def _step(extent: float) -> float:
    """A round distance between ticks, of which the extent has four to ten."""
    size = 10.0 ** math.floor(math.log10(extent))
    return next(size * part for part in (0.1, 0.2, 0.25, 0.5, 1.0) if extent <= 8 * size * part or part == 1.0)


def _line(line: Line, index: int, spots: Sequence[tuple[float, float]], covered: bool) -> str:
    colour, y = COLOURS[index % len(COLOURS)], TOP + 8 + 18 * index
    path = "L".join(f"{a:.1f},{b:.1f}" for a, b in spots)
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    radius, wide = (4.5, 5) if covered else (2.6, 1.8)
    marks = "" if line.dashed else "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{radius}"/>' for a, b in spots)
    drawn = f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{wide}"{dash}/>' if spots else ""
    left = WIDTH - RIGHT + KEY - 22
    key = f'<path d="M{left},{y - 4}h16" stroke="{colour}" stroke-width="2"{dash}/>'
    return f'<g fill="{colour}">{drawn}{marks}{key}</g>{_text(left + 22, y, line.name, "start")}'


def _tick_x(axis: _Axis, value: float) -> str:
    at = axis.at(value)
    rule = f'<path class="rule" d="M{at:.1f},{TOP}V{HEIGHT - BOTTOM}"/>'
    return rule + _text(at, HEIGHT - BOTTOM + 16, f"{value:g}", "middle")


def _tick_y(axis: _Axis, value: float) -> str:
    at = axis.at(value)
    rule = f'<path class="rule" d="M{LEFT},{at:.1f}H{WIDTH - RIGHT}"/>'
    return rule + _text(LEFT - 6, at + 4, f"{value:g}", "end")


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(text)}</text>'
