"""The virtual clock of a simulation: events in the order of their times, and of their scheduling where times are equal.

An event is a function call. Its *label* is a number that says what happens where. The trace hash covers the time and
the label of every event, so two runs with one hash did the same things at the same times.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from heapq import heappop, heappush
from operator import length_hint
from typing import Any

import numpy as np

Act = Callable[..., None]
_Event = tuple[int, Act, tuple[Any, ...]]
"""The label, the function and its arguments."""
_Group = list[_Event]
"""Events of one time, in order. A broadcast is one entry of the heap."""

_FLUSH = 8192
"""Events that are gathered before they are hashed."""


class Clock:
    """Virtual time. Not thread-safe."""

    def __init__(self) -> None:
        self.now = 0.0
        """The time of the event that happens now, in seconds."""
        self._heap: list[tuple[float, int, _Group]] = []
        self._scheduled = 0
        self._last = -1.0
        self._open: _Group = []
        """The group that was scheduled last, for the time `_last`. A next event of that time joins it."""
        self._group: _Group = []
        """The group that happens now."""
        self._rest = iter(self._group)
        """The events of it that have not happened. A group may grow meanwhile, and they with it."""
        self._labels: list[int] = []
        """The labels of the events that are not hashed yet."""
        self._times: list[float] = []
        """The times of these events, each once for all events of its group."""
        self._firsts: list[int] = []
        """The place in `_labels` of the first event of each of these times."""
        self._hashed = 0
        self._hash = hashlib.blake2b(digest_size=16)

    @property
    def events(self) -> int:
        """The number of events so far."""
        return self._hashed + len(self._labels)

    def at(self, when: float, label: int, act: Act, *args: Any) -> None:
        """Call `act(*args)` at the time `when`, which is not before now."""
        self.put(when, label, act, args)

    def put(self, when: float, label: int, act: Act, args: tuple[Any, ...]) -> None:
        """As `at`, with the arguments in a tuple."""
        if when == self._last:
            self._open.append((label, act, args))
            return
        if not when >= self.now:
            raise ValueError(f"an event at {when} s is scheduled at {self.now} s; a delay is at least 0 and no NaN")
        self._last = when
        self._open = group = [(label, act, args)]
        self._scheduled = number = self._scheduled + 1
        heappush(self._heap, (when, number, group))

    def after(self, delay: float, label: int, act: Act, *args: Any) -> None:
        """Call `act(*args)` in `delay` seconds."""
        self.put(self.now + delay, label, act, args)

    def go_on(self, idle: Callable[[], bool]) -> bool:
        """Let events happen as long as `idle` returns True. Returns False if there are no more events before."""
        if not idle():
            return True
        labels, heap = self._labels, self._heap
        while True:
            for label, act, args in self._rest:
                labels.append(label)
                act(*args)
                if not idle():
                    return True
            if self._open is self._group:
                self._last = -1.0  # none joins a group whose end has come
            if not heap:
                return False
            if len(labels) >= _FLUSH:
                self._flush()
            self.now, _, self._group = heappop(heap)
            self._rest = iter(self._group)
            self._times.append(self.now)
            self._firsts.append(len(labels))

    def run(self, limit: int) -> None:
        """Let all events happen. Raises RuntimeError if they do not end after `limit` events."""
        most = self.events + limit
        if self.go_on(lambda: self.events < most) and (self._heap or length_hint(self._rest)):
            raise RuntimeError(f"the simulation does not end: {limit} events have happened by {self.now} s")

    @property
    def trace_hash(self) -> str:
        """A hash of the time and label of every event so far."""
        self._flush()
        return self._hash.hexdigest()

    def _flush(self) -> None:
        count = len(self._labels)
        trace = np.empty((count, 2))
        trace[:, 0] = np.repeat(self._times, np.diff([*self._firsts, count]))
        trace[:, 1] = self._labels
        self._hash.update(trace.tobytes())
        self._hashed += count
        self._labels.clear()
        self._times, self._firsts = self._times[-1:], [0] * bool(self._times)
