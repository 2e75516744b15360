"""Counts what a worker sends for each store in a run, for `wire.Traffic`. Both clocks count with it."""

from __future__ import annotations

Row = tuple[int, int, int, int, int, int]
"""The fields of an element of `wire.Traffic.stores`."""

Bytes = tuple[tuple[int, int], ...]
"""(store, bytes)."""

_COUNT, _BYTES, _WIRE, _PUBLISHED, _SHARED = range(5)


class Counts:
    """Not thread-safe."""

    def __init__(self, stores: int) -> None:
        self._rows = [[0, 0, 0, 0, 0] for _ in range(stores)]
        self._work: dict[int, list[float]] = {}
        self._pushed: dict[int, int] = {}
        """Store -> the bytes pushed since `take`."""
        self._crossed: dict[int, int] = {}
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
            self._pushed[store] = self._pushed.get(store, 0) + nbytes

    def take(self) -> tuple[Bytes, Bytes]:
        """(store, bytes of contributions), and (store, all bytes that crossed to another worker), since this was called
        last, for `wire.Report`."""
        pushed, crossed = tuple(self._pushed.items()), tuple(self._crossed.items())
        self._pushed, self._crossed = {}, {}
        return pushed, crossed

    def _cross(self, store: int, kind: int, nbytes: int) -> None:
        if nbytes:
            self._rows[store][kind] += nbytes
            self._crossed[store] = self._crossed.get(store, 0) + nbytes

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
            row = self._work.setdefault(store, [0, 0.0])
            row[0] += 1
            row[1] += seconds
        return seconds

    def work(self) -> tuple[tuple[int, int, float], ...]:
        """The work of the homes here, for `wire.Traffic.homes`."""
        return tuple((store, int(jobs), seconds) for store, (jobs, seconds) in sorted(self._work.items()))

    def rows(self) -> tuple[Row, ...]:
        return tuple((i, *row) for i, row in enumerate(self._rows))  # pyright: ignore[reportReturnType]
