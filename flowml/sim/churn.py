"""Says when machines leave and return, for example because a cloud takes back machines that it had lent cheaply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from flowml.errors import SimulationError, TraceError
from flowml.sim import checks, tables
from flowml.sim.draws import uniform
from flowml.sim.faults import Crash

Counts: TypeAlias = Literal["available", "preempted"]
_PICKS = 0
"""The stream of draws that choose which machines leave or return."""


class Change(NamedTuple):
    """From `time_s` on, a worker is up or down."""

    time_s: float
    worker: int
    up: bool


@dataclass(frozen=True)
class Churn:
    """Workers that leave and return. At first all are up; a change at time 0 comes before anything else.

    Args:
        changes: in any order. They are sorted by time, then by worker.
        notice_s: how long before it goes a worker gives notice. With 0 it is lost, as at a crash.
        start_s: how long a worker that has come up takes until it can take part: its process starts, and compiles.
        pause_s: how long a fit stands still when its workers change, beside the messages of that.

    Raises:
        SimulationError: for a time or number that makes no sense, or a worker that leaves or returns twice.
    """

    changes: Sequence[Change | tuple[float, int, bool]]
    notice_s: float = 0.0
    start_s: float = 0.0
    pause_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("notice_s", "start_s", "pause_s"):
            object.__setattr__(self, name, checks.number("Churn", name, getattr(self, name)))
        given = checks.sequence("Churn", "changes", self.changes, "(time_s, worker, up)")
        changes = sorted(_change(i, change) for i, change in enumerate(given))
        down: set[int] = set()
        for time_s, worker, up in changes:
            if up == (worker not in down):
                state = "up" if up else "down"
                raise SimulationError(f"Churn: worker {worker} is {state} already when it goes {state} at {time_s:g} s")
            down ^= {worker}
        object.__setattr__(self, "changes", tuple(changes))

    def up(self, time_s: float, workers: int) -> tuple[int, ...]:
        """The workers, of so many, that are up at a time, after its changes."""
        down: set[int] = set()
        for at_s, worker, _ in self.changes:
            if at_s <= time_s:
                down ^= {worker}
        return tuple(w for w in range(workers) if w not in down)

    def crashes(self, workers: int) -> tuple[Crash, ...]:
        """The first departure of each worker, of so many: what happens to a fit that ends with the first one."""
        first: dict[int, float] = {}
        for time_s, worker, up in self.changes:
            if not up and worker < workers:
                first.setdefault(worker, time_s)
        return tuple(Crash(worker, time_s) for worker, time_s in first.items())

    def window(self, start_s: float, end_s: float) -> Churn:
        """The part from `start_s` up to `end_s`, whose times begin at 0. Who is down at its start is so from 0 on."""
        start_s = checks.number("Churn.window", "start_s", start_s)
        end_s = checks.number("Churn.window", "end_s", end_s, least=start_s)
        down: set[int] = set()
        for at_s, worker, _ in self.changes:
            if at_s <= start_s:
                down ^= {worker}
        later = [Change(c.time_s - start_s, c.worker, c.up) for c in map(Change._make, self.changes)]
        inside = [*(Change(0.0, w, False) for w in down), *(c for c in later if 0 < c.time_s < end_s - start_s)]
        return replace(self, changes=inside)

    @staticmethod
    def from_spot(
        source: str | PathLike[str] | Mapping[str, Any],
        *,
        counts: Counts = "available",
        workers: int | None = None,
        gap_s: float | None = None,
        seed: int = 0,
        notice_s: float = 0.0,
        start_s: float = 0.0,
        pause_s: float = 0.0,
    ) -> Churn:
        """The churn of recorded spot machines: `{"metadata": {"gap_seconds": 300}, "data": [4, 4, 3, ...]}`.

        `data` has the number of machines in each interval. A record does not say which machines they were: those that
        leave are drawn from all that are up, those that return from all that are down.

        Args:
            source: the path of a JSON file, or its parsed content.
            counts: whether `data` counts the `"available"` or the `"preempted"` machines.
            workers: how many there are in all; by default the largest number in `data`.
            gap_s: length of an interval, instead of the recorded one, to replay days in minutes.
            seed: seeds the draws.
            notice_s, start_s, pause_s: as those of `Churn`.

        Raises:
            TraceError: if the file is damaged or cut short, or a number in it makes no sense.
            SimulationError: for arguments that make no sense.
        """
        name, content = _content(source)
        data, gap = _series(content, name)
        if counts not in ("available", "preempted"):
            raise SimulationError(f"Churn.from_spot: counts={counts!r} is neither 'available' nor 'preempted'")
        if gap_s is not None:
            gap = checks.number("Churn.from_spot", "gap_s", gap_s, open_at_least=True)
        total = max(data) if workers is None else checks.count("Churn.from_spot", "workers", workers, least=1)
        if total < max(data):
            raise SimulationError(
                f"Churn.from_spot: workers={total} is less than the {max(data)} machines that {name} counts; leave it "
                f"out, or give at least as many"
            )
        up = data if counts == "available" else [total - n for n in data]
        return Churn(_changes(up, total, gap, seed), notice_s, start_s, pause_s)


def _changes(counts: Sequence[int], workers: int, gap_s: float, seed: int) -> list[Change]:
    found: list[Change] = []
    states = np.ones(workers, np.bool_)
    for interval, count in enumerate(counts):
        difference = count - int(states.sum())
        if difference:
            able = np.flatnonzero(states != (difference > 0))
            order = np.argsort(uniform(seed, able, interval, _PICKS))
            for worker in sorted(able[order[: abs(difference)]].tolist()):
                states[worker] = difference > 0
                found.append(Change(interval * gap_s, worker, difference > 0))
    return found


def recorded_counts(source: str | PathLike[str] | Mapping[str, Any]) -> Sequence[int]:
    """The number of machines in each interval of a record, as `Churn.from_spot` reads it. Raises TraceError."""
    name, content = _content(source)
    return _series(content, name)[0]


def _content(source: object) -> tuple[str, Any]:
    if isinstance(source, Mapping):
        return "the record", source
    if not isinstance(source, str | PathLike):
        raise SimulationError(f"Churn.from_spot: {type(source).__name__} is neither a path nor the content of a record")
    file = Path(source)
    return str(file), tables.json_of(file)


def _series(content: Any, name: str) -> tuple[list[int], float]:
    try:
        gap, data = content["metadata"]["gap_seconds"], content["data"]
    except (KeyError, TypeError):
        raise TraceError(
            f"{name} has no metadata.gap_seconds or no data, so it is no record of spot machines; give one such as "
            '{"metadata": {"gap_seconds": 300}, "data": [4, 4, 3]}'
        ) from None
    try:
        seconds = checks.number(name, "metadata.gap_seconds", gap, open_at_least=True)
        counts = [checks.count(name, f"data[{i}]", n) for i, n in enumerate(data if isinstance(data, list) else [])]
    except SimulationError as error:
        raise TraceError(str(error)) from None
    if not counts:
        raise TraceError(f"{name}: data has no number; give one for each interval")
    return counts, seconds


def _change(position: int, given: object) -> Change:
    name = f"changes[{position}]"
    fields = checks.sequence("Churn", name, given, "time_s, worker and up")
    if len(fields) != 3:
        raise SimulationError(f"Churn: {name} has {len(fields)} fields; give time_s, worker and up")
    time_s, worker, up = fields
    if not isinstance(up, bool | np.bool_):
        raise SimulationError(f"Churn: {name} up={up!r} makes no sense; give True or False")
    return Change(
        checks.number("Churn", f"{name} time_s", time_s), checks.count("Churn", f"{name} worker", worker), bool(up)
    )
