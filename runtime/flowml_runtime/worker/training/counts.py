"""Counts what a worker sends for each store in a run, for `wire.Traffic`. Both clocks count with it."""

from __future__ import annotations

Row = tuple[int, int, int, int, int, int]
"""The fields of an element of `wire.Traffic.stores`."""

Bytes = tuple[tuple[int, int], ...]
"""(store, bytes)."""

_COUNT, _BYTES, _WIRE, _PUBLISHED, _SHARED = range(5)

NO_BYTES: dict[int, int] = {}
"""Stands for all empty tables, of which a simulation has very many. It is never written."""


def _added(found: dict[int, int], store: int, nbytes: int) -> dict[int, int]:
    """The table with so many bytes more for a store."""
    if not found:
        return {store: nbytes}
    found[store] = found.get(store, 0) + nbytes
    return found


class Counts:
    """Not thread-safe."""

    def __init__(self, stores: int) -> None:
        self._rows = [[0, 0, 0, 0, 0] for _ in range(stores)]
        self._work: dict[int, list[float]] | None = None
        """Store -> the number of jobs of the homes here, and their seconds."""
        self._pushed = NO_BYTES
        """Store -> the bytes pushed since `take`."""
        self._crossed = NO_BYTES
        """Store -> the bytes of all kinds since `take` that crossed to another worker."""

    def push(self, store: int, part: int, nbytes: int, *, crosses: bool, told: bool = False) -> None:
        """Count a part of a contribution. `crosses` means that it is sent to another worker, `told` that the driver
        learns of its bytes in another way than by reports."""
        row = self._rows[store]
        row[_COUNT] += part == 0  # a contribution counts once, however many parts it has
        row[_BYTES] += nbytes
        if crosses:
            self._cross(store, _WIRE, nbytes)
        if not told:
            self._pushed = _added(self._pushed, store, nbytes)

    def take(self) -> tuple[Bytes, Bytes]:
        """(store, bytes of contributions), and (store, all bytes that crossed to another worker), since this was called
        last, for `wire.Report`."""
        pushed, crossed = tuple(self._pushed.items()), tuple(self._crossed.items())
        self._pushed = self._crossed = NO_BYTES
        return pushed, crossed

    def _cross(self, store: int, kind: int, nbytes: int) -> None:
        if nbytes:
            self._rows[store][kind] += nbytes
            self._crossed = _added(self._crossed, store, nbytes)

    def crossing(self, store: int, nbytes: int) -> None:
        """Count the bytes sent to other workers to add up a push, which is counted already."""
        self._cross(store, _WIRE, nbytes)

    def publish(self, store: int, nbytes: int) -> None:
        """Count a version that is sent to another worker."""
        self._cross(store, _PUBLISHED, nbytes)

    def share(self, store: int, nbytes: int) -> None:
        """Count what the home of a store sends to those of other stores that the optimizer couples to it."""
        self._cross(store, _SHARED, nbytes)

    def worked(self, store: int, seconds: float) -> float:
        """A home here has worked for a store, if it takes time in a simulation. Returns the seconds."""
        if seconds:
            self._work = {} if self._work is None else self._work
            row = self._work.setdefault(store, [0, 0.0])
            row[0] += 1
            row[1] += seconds
        return seconds

    def work(self) -> tuple[tuple[int, int, float], ...]:
        """The work of the homes here, for `wire.Traffic.homes`."""
        if self._work is None:
            return ()
        return tuple((store, int(jobs), seconds) for store, (jobs, seconds) in sorted(self._work.items()))

    def rows(self) -> tuple[Row, ...]:
        return tuple((i, row[0], row[1], row[2], row[3], row[4]) for i, row in enumerate(self._rows))
