"""Replays the recorded operations of a training job under a virtual clock, as they were or with some idealised.

An operation starts when the operations before it on its worker have ended. The members of a transfer (a send and its
receive, or the workers of a collective) move data together, from the start of the last until the end of the first: what
a member waited for the others is not part of the transfer, and arises anew in a replay. The gaps between operations, in
which a worker only launches the next one, are left out.

What-if analysis (Lin et al., Understanding stragglers in large model training using what-if analysis, 2025) gives a
chosen set of operations the duration of an unimpaired one: the mean of its kind for a computation, the median for a
transfer. The difference of the step times is what the operations cost by being uneven.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from os import PathLike
from statistics import fmean, median
from typing import Literal, TypeAlias

from flowml.arguments import MOST_S
from flowml.errors import SimulationError, TraceError, one_line
from flowml.sim import checks


@dataclass(frozen=True)
class Operation:
    """One operation of one worker in one step.

    Attributes:
        kind: such as `"forward-compute"`. Operations of a kind have one ideal duration.
        start_s, end_s: on the clock of its step.
        transfer: equal for the operations that move data together, within the step; None for a computation.
        line: where it is in its file, for errors.
    """

    step: int
    worker: int
    replica: int
    stage: int
    kind: str
    start_s: float
    end_s: float
    transfer: Hashable = None
    line: int = 0

    def __post_init__(self) -> None:
        for name in ("step", "worker", "replica", "stage"):
            checks.count("Operation", name, getattr(self, name))
        if not isinstance(self.kind, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SimulationError(f"Operation: kind={self.kind!r} is of type {type(self.kind).__name__}; give text")
        start_s = checks.number("Operation", "start_s", self.start_s, least=-MOST_S)
        checks.number("Operation", "end_s", self.end_s, least=start_s)


Chosen: TypeAlias = Callable[[Operation], bool]
By: TypeAlias = Literal["worker", "stage", "replica", "kind"]


@dataclass(frozen=True)
class _Unit:
    """Operations that go on together: one computation, or all members of a transfer. `after` are indices of units."""

    members: tuple[Operation, ...]
    after: tuple[int, ...]
    duration_s: float

    @property
    def kind(self) -> str:
        return self.members[0].kind


@dataclass(frozen=True)
class Recording:
    """A recorded training job.

    Raises:
        TraceError: if operations of a step wait for each other, so that they cannot have happened.
    """

    operations: Sequence[Operation]
    _steps: Mapping[int, Sequence[_Unit]] = field(init=False, repr=False, compare=False)
    """The units of each step in an order in which each comes after those that it waits for."""
    ideal_s: Mapping[str, float] = field(init=False, repr=False, compare=False)
    """The duration of an unimpaired operation of each kind."""

    def __post_init__(self) -> None:
        given = checks.sequence("Recording", "operations", self.operations, "fm.sim.Operation")
        wrong = [one for one in given if not isinstance(one, Operation)]
        if wrong:
            raise SimulationError(f"Recording: {one_line(repr(wrong[0]))} is not an fm.sim.Operation")
        object.__setattr__(self, "operations", tuple(given))
        if not self.operations:
            raise SimulationError("Recording: there are no operations; give at least one")
        steps: dict[int, list[Operation]] = defaultdict(list)
        for operation in self.operations:
            steps[operation.step].append(operation)
        object.__setattr__(self, "_steps", {step: _units(steps[step]) for step in sorted(steps)})
        object.__setattr__(self, "ideal_s", _ideals(u for units in self._steps.values() for u in units))

    def __repr__(self) -> str:
        workers = len({operation.worker for operation in self.operations})
        return f"<Recording of {len(self.operations):,} operations: {len(self._steps)} steps, {workers} workers>"

    @staticmethod
    def read(path: str | PathLike[str]) -> Recording:
        """Read a recorded job from a CSV or Parquet file; see `flowml.sim.traces` for its columns."""
        from flowml.sim.traces import read_operations  # which is built on this module

        return Recording(read_operations(path))

    def replay(self, ideal: Chosen | None = None) -> dict[int, float]:
        """The seconds of each step, with the operations for which `ideal` is true idealised.

        A transfer is as slow as its slowest member, so it is idealised if all members are.
        """
        return {step: self._seconds(units, ideal) for step, units in self._steps.items()}

    def _seconds(self, units: Sequence[_Unit], ideal: Chosen | None) -> float:
        ends: list[float] = []
        for unit in units:
            duration = unit.duration_s
            if ideal is not None:
                duration = max(self.ideal_s[unit.kind] if ideal(m) else unit.duration_s for m in unit.members)
            ends.append(max((ends[i] for i in unit.after), default=0.0) + duration)
        return max(ends)

    def slowdowns(self, by: By) -> dict[int | str, float]:
        """How many times as long a mean step takes if only the operations of one worker, stage, ... are not ideal."""
        found = dict.fromkeys(getattr(operation, by) for operation in self.operations)
        best = _mean(self.replay(lambda _: True))
        return {key: _mean(self.replay(lambda o, key=key: getattr(o, by) != key)) / best for key in sorted(found)}

    def recovered(self, ideal: Chosen) -> float:
        """The share of the slowdown of a mean step that goes away if only the chosen operations are idealised.

        0 means that they cost nothing. Above 1 the rest is faster than its ideal. NaN if the job has no slowdown.
        """
        as_it_was, best = _mean(self.replay()), _mean(self.replay(lambda _: True))
        lost = as_it_was - best
        return (as_it_was - _mean(self.replay(ideal))) / lost if lost > 0 else float("nan")

    def compute_times(self) -> tuple[tuple[float, ...], ...]:
        """The seconds that each replica computed in each step, over all its stages. For `Recorded`."""
        totals: dict[int, dict[int, float]] = {o.replica: dict.fromkeys(self._steps, 0.0) for o in self.operations}
        for operation in self.operations:
            if operation.transfer is None:
                totals[operation.replica][operation.step] += operation.end_s - operation.start_s
        return tuple(tuple(totals[replica].values()) for replica in sorted(totals))


def _mean(steps: Mapping[int, float]) -> float:
    return fmean(steps.values())


def _ideals(units: Iterable[_Unit]) -> dict[str, float]:
    computed: dict[str, list[float]] = defaultdict(list)
    moved: dict[str, list[float]] = defaultdict(list)
    for unit in units:
        (computed if unit.members[0].transfer is None else moved)[unit.kind].append(unit.duration_s)
    return {k: median(s) for k, s in moved.items()} | {k: fmean(s) for k, s in computed.items()}


def _units(operations: Sequence[Operation]) -> list[_Unit]:
    """The units of one step, each after those that it waits for."""
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, operation in enumerate(operations):
        members[("one", index) if operation.transfer is None else operation.transfer].append(index)
    groups = list(members.values())
    unit_of = {index: unit for unit, group in enumerate(groups) for index in group}
    before: list[set[int]] = [set() for _ in groups]
    for index, earlier in _before(operations).items():
        before[unit_of[index]].update(unit_of[i] for i in earlier)
    order = _topological(before, [operations[group[0]] for group in groups])
    place = {unit: position for position, unit in enumerate(order)}
    return [
        _Unit(
            tuple(operations[i] for i in groups[unit]),
            tuple(sorted(place[u] for u in before[unit])),
            _duration([operations[i] for i in groups[unit]]),
        )
        for unit in order
    ]


def _duration(members: Sequence[Operation]) -> float:
    return max(0.0, min(o.end_s for o in members) - max(o.start_s for o in members))


def _before(operations: Sequence[Operation]) -> dict[int, list[int]]:
    """The operations of the same worker for which each one waits, without those that these wait for."""
    lanes: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(operations)), key=lambda i: (operations[i].start_s, operations[i].end_s)):
        lanes[operations[index].worker].append(index)
    found: dict[int, list[int]] = {}
    for lane in lanes.values():
        own = [operations[i] for i in lane]
        latest_end = list(accumulate((o.end_s for o in own), max))
        for position, index in enumerate(lane):
            found[index] = [lane[p] for p in _waits_for(position, own, latest_end)]
    return found


def _waits_for(position: int, lane: Sequence[Operation], latest_end: Sequence[float]) -> list[int]:
    last = position - 1
    while last >= 0 and _together(lane[last], lane[position]):
        last -= 1
    if last < 0:
        return []
    found, at = [last], last - 1
    while at >= 0 and latest_end[at] > lane[last].start_s:
        if _together(lane[at], lane[last]) and not _together(lane[at], lane[position]):
            found.append(at)
        at -= 1
    return found


def _together(a: Operation, b: Operation) -> bool:
    """Whether two operations of a worker go on at once: they overlap by more than half of the shorter one.

    Recorded times have errors, so an operation may begin a little before the one that it waits for ends.
    """
    overlap = min(a.end_s, b.end_s) - max(a.start_s, b.start_s)
    return overlap > min(a.end_s - a.start_s, b.end_s - b.start_s) / 2


def _topological(before: Sequence[set[int]], first: Sequence[Operation]) -> list[int]:
    after: dict[int, list[int]] = defaultdict(list)
    for unit, sources in enumerate(before):
        for source in sources:
            after[source].append(unit)
    missing = [len(sources) for sources in before]
    order = [unit for unit, count in enumerate(missing) if count == 0]
    for unit in order:  # grows while it is read
        for then in after[unit]:
            missing[then] -= 1
            if missing[then] == 0:
                order.append(then)
    if len(order) < len(before):
        stuck = first[next(unit for unit, count in enumerate(missing) if count)]
        raise TraceError(
            f"step {stuck.step}, line {stuck.line}, column 'start_ts': {stuck.kind} of worker {stuck.worker} waits for "
            f"itself, through operations of its partners; its start or that of a partner is wrong, so correct it or "
            "leave this step out"
        )
    return order
