"""The results of a benchmark: rows that compare our sample with a peer's, and the arithmetic of ratios and goals.

Times are in seconds, rates in bytes/s, memory in bytes; a row states its unit. A goal bounds either the ratio of the
medians or their difference. A row whose peer could not be measured has no ratio, and its goal is neither met nor
missed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from flowml.errors import FlowmlError

Unit = Literal["s", "bytes/s", "bytes", "1/s", "share"]


class BenchError(FlowmlError):
    """A measurement failed. The message says why."""


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one thing, in the order they were made."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("a sample has at least one value")

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third, by linear interpolation."""
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        first, _, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return first, third

    @property
    def spread(self) -> float:
        """The interquartile range."""
        first, third = self.quartiles
        return third - first

    def json(self) -> dict[str, object]:
        return {"median": self.median, "quartiles": list(self.quartiles), "samples": list(self.values)}


@dataclass(frozen=True)
class Peer:
    """The other side of a comparison. Without a sample it was not measured, and `name` says why."""

    name: str
    sample: Sample | None = None


@dataclass(frozen=True)
class Goal:
    """A bound on ours / peer, on ours - peer, or on ours alone. The last two are in the unit of the row."""

    sense: Literal["at most", "at least"]
    limit: float
    of: Literal["ratio", "difference", "value"] = "ratio"

    def met(self, value: float) -> bool:
        return value <= self.limit if self.sense == "at most" else value >= self.limit

    def json(self) -> dict[str, object]:
        return {"of": self.of, "sense": self.sense, "limit": self.limit}


@dataclass(frozen=True)
class Row:
    """One line of a benchmark's table."""

    name: str
    unit: Unit
    ours: Sample
    peer: Peer
    goal: Goal | None = None
    group: tuple[str, ...] = ()
    """What the row is about, for a benchmark that arranges its rows in a table of its own."""

    @property
    def ratio(self) -> float | None:
        """Our median divided by the peer's. None if that was not measured, or is 0."""
        return self.ours.median / self.peer.sample.median if self.peer.sample and self.peer.sample.median else None

    @property
    def difference(self) -> float | None:
        """Our median minus the peer's, in the unit of the row."""
        return self.ours.median - self.peer.sample.median if self.peer.sample else None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met. None if there is no goal, or if it needs a peer that was not measured."""
        if self.goal is None:
            return None
        found = {"ratio": self.ratio, "difference": self.difference, "value": self.ours.median}
        value = found[self.goal.of]
        return None if value is None else self.goal.met(value)

    def json(self) -> dict[str, object]:
        peer: Mapping[str, object] = self.peer.sample.json() if self.peer.sample else {}
        return {
            "name": self.name,
            "group": list(self.group),
            "unit": self.unit,
            "ours": self.ours.json(),
            "peer": {"name": self.peer.name, "measured": self.peer.sample is not None, **peer},
            "ratio": self.ratio,
            "difference": self.difference,
            "goal": self.goal and self.goal.json(),
            "met": self.met,
        }


@dataclass(frozen=True)
class Part:
    """What a benchmark has found so far: text to print, the rows that it is about, and why there are no rows of what
    was left out."""

    text: str
    rows: tuple[Row, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict[str, str])
