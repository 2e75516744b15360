"""The virtual clock of a simulation: events in the order of their times, and of their scheduling where times are equal.

An event is a function call. Its *label* is a number that says what happens where. The trace hash covers the time and
the label of every event, so two runs with one hash did the same things at the same times.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Callable
from typing import Any

Act = Callable[..., None]
_Group = list[tuple[int, Act, tuple[Any, ...]]]
"""Events of one time, in order: (label, function, arguments). A broadcast is one entry of the heap."""

_FLUSH = 8192
"""Numbers that are gathered before they are hashed."""


class Clock:
    """Virtual time. Not thread-safe."""

    def __init__(self) -> None:
        self.now = 0.0
        """The time of the event that happens now, in seconds."""
        self.events = 0
        """The number of events so far."""
        self._heap: list[tuple[float, int, _Group]] = []
        self._scheduled = 0
        self._last = -1.0
        self._open: _Group = []
        """The group that was scheduled last, for the time `_last`. A next event of that time joins it."""
        self._group: _Group = []
        """The group that happens now, and the next of it."""
        self._next = 0
        self._trace = array("d")
        self._hash = hashlib.blake2b(digest_size=16)

    def at(self, when: float, label: int, act: Act, *args: Any) -> None:
        """Call `act(*args)` at the time `when`, which is not before now."""
        if not when >= self.now:
            raise ValueError(f"an event at {when} s is scheduled at {self.now} s; a delay is at least 0 and no NaN")
        if when == self._last:
            self._open.append((label, act, args))
            return
        self._last, self._open = when, [(label, act, args)]
        self._scheduled += 1
        heapq.heappush(self._heap, (when, self._scheduled, self._open))

    def after(self, delay: float, label: int, act: Act, *args: Any) -> None:
        """Call `act(*args)` in `delay` seconds."""
        self.at(self.now + delay, label, act, *args)

    def step(self) -> bool:
        """Let the next event happen. False if there is none."""
        if self._next == len(self._group):
            if not self._heap:
                return False
            self.now, _, self._group = heapq.heappop(self._heap)
            self._next = 0
        label, act, args = self._group[self._next]
        self._next += 1
        self.events += 1
        trace = self._trace
        trace.append(self.now)
        trace.append(label)
        if len(trace) >= _FLUSH:
            self._flush()
        act(*args)
        return True

    def run(self, limit: int) -> None:
        """Let all events happen. Raises RuntimeError if they do not end after `limit` events."""
        for _ in range(limit):
            if not self.step():
                return
        raise RuntimeError(f"the simulation does not end: {limit} events have happened by {self.now} s")

    @property
    def trace_hash(self) -> str:
        """A hash of the time and label of every event so far."""
        self._flush()
        return self._hash.hexdigest()

    def _flush(self) -> None:
        self._hash.update(self._trace.tobytes())
        del self._trace[:]
