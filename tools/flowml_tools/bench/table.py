"""Formats rows as text: one table per benchmark, `median ± interquartile range`, and MISSED for a missed goal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flowml_tools.bench.rows import Goal, Row, Sample, Unit

HEADINGS = ("", "flowml", "peer", "", "ratio", "goal", "")
_SCALES: dict[Unit, tuple[tuple[float, str], ...]] = {
    "s": ((1e-6, "µs"), (1e-3, "ms"), (1.0, "s")),
    "bytes/s": ((1e6, "MB/s"), (1e9, "GB/s")),
    "1/s": ((1.0, "/s"), (1e3, "k/s")),
    "share": ((1e-2, "%"),),
    "bytes": ((2.0**10, "KiB"), (2.0**20, "MiB"), (2.0**30, "GiB")),
}
_SIGNS = {"at most": "≤", "at least": "≥"}


def render(benchmark: str, rows: Sequence[Row]) -> str:
    """The table of one benchmark, ending without a newline."""
    lines = [HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join([f"{benchmark} (median ± interquartile range)", *(f"  {line}".rstrip() for line in padded)])


def _cells(row: Row) -> tuple[str, ...]:
    peer = spread(row.peer.sample, row.unit) if row.peer.sample else "–"
    verdict = {True: "met", False: "MISSED", None: ""}[row.met]
    return row.name, spread(row.ours, row.unit), row.peer.name, peer, _relation(row), _goal(row), verdict


def spread(sample: Sample, unit: Unit) -> str:
    """`13.1 ± 0.6 µs`: both numbers in the scale that suits the median."""
    divisor, symbol = _scale(sample.median, unit)
    return f"{_number(sample.median / divisor)} ± {_number(sample.spread / divisor, 2)} {symbol}"


def _relation(row: Row) -> str:
    if row.ratio is None or row.difference is None:
        return "–"
    if row.goal and row.goal.of == "difference":
        return _signed(row.difference, row.unit)
    return f"{_number(row.ratio)}×"


def _goal(row: Row) -> str:
    goal: Goal | None = row.goal
    if goal is None:
        return "–"
    match goal.of:
        case "ratio":
            limit = f"{_number(goal.limit)}×"
        case "difference":
            limit = _signed(goal.limit, row.unit)
        case "value":
            divisor, symbol = _scale(goal.limit, row.unit)
            limit = f"{_number(goal.limit / divisor)} {symbol}"
    return f"{_SIGNS[goal.sense]} {limit}"


def _signed(value: float, unit: Unit) -> str:
    divisor, symbol = _scale(abs(value), unit)
    return f"{'-' if value < 0 else '+'}{_number(abs(value) / divisor)} {symbol}"


def _scale(value: float, unit: Unit) -> tuple[float, str]:
    """The largest scale in which the value is at least one, else the smallest."""
    scales = _SCALES[unit]
    return next((scale for scale in reversed(scales) if value >= scale[0]), scales[0])


def _number(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits if it has decimals, and never with an exponent."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(value)))
    return f"{value:.{decimals}f}"
