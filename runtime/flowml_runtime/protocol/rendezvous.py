"""The table where a Recv meets the value that was pushed to it. A sender never waits for a receiver to ask.

A key is a tuple (stream, step, …). A stream is whatever takes its steps in order, such as one device of one
plan; the rest of the key tells the values of a step apart. Under a key the table holds a value or the one
who waits for it, and whoever comes second takes the other away:

* `put` returns the waiter it has met, or None and the value stays. The same key twice is an error.
* `claim` returns the value it has met, or None and the waiter stays. Two waiters for a key are an error.
* `cancel_step` gives a step up: it returns those who wait in it, and what comes for it later is dropped.
* `advance` says that a stream takes no more from steps before the given one; the same holds for those.
* `close` ends everything: it returns all who wait, and what comes later is dropped.

The number of values that wait is bounded; one more is an error, because a sender that far ahead has not
been held back where it should have been.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Generic, TypeVar

from flowml_runtime.protocol.errors import ProtocolError, ensure

V = TypeVar("V")
W = TypeVar("W")

Key = tuple[Any, ...]
"""(stream, step, …): the stream hashable, the step an int."""


class Cancelled(Exception):
    """The step that was asked for has been given up, or is over."""


class Rendezvous(Generic[V, W]):
    """Values of type V, waiters of type W. Not safe for threads; the host guards it."""

    def __init__(self, capacity: int = 65536) -> None:
        self._capacity = capacity
        self._values: dict[Key, V] = {}
        self._waiters: dict[Key, W] = {}
        self._floor: dict[Hashable, int] = {}
        self._cancelled: dict[Hashable, set[int]] = {}
        self._closed = False
        self.dropped = 0
        """Values that came for a step that was given up or over."""

    def __len__(self) -> int:
        """Values that wait to be taken."""
        return len(self._values)

    def put(self, key: Key, value: V) -> W | None:
        if self.is_over(key[0], key[1]):
            self.dropped += 1
            return None
        if key in self._waiters:
            return self._waiters.pop(key)
        if key in self._values:
            raise ProtocolError(f"a value for {key} came twice")
        if len(self._values) >= self._capacity:
            raise ProtocolError(f"{len(self._values)} values wait to be taken, so {key} has no room")
        self._values[key] = value
        return None

    def claim(self, key: Key, waiter: W) -> V | None:
        """Raises Cancelled if no value will ever come."""
        if self.is_over(key[0], key[1]):
            raise Cancelled(key)
        if key in self._values:
            return self._values.pop(key)
        if key in self._waiters:
            raise ProtocolError(f"two wait for {key}")
        self._waiters[key] = waiter
        return None

    def is_over(self, stream: Hashable, step: int) -> bool:
        """Whether values of this step are dropped."""
        return self._closed or step < self._floor.get(stream, 0) or step in self._cancelled.get(stream, ())

    def cancel_step(self, stream: Hashable, step: int) -> tuple[W, ...]:
        if self.is_over(stream, step):
            return ()
        self._cancelled.setdefault(stream, set()).add(step)
        return self._drop(stream)

    def advance(self, stream: Hashable, step: int) -> tuple[W, ...]:
        if step <= self._floor.get(stream, 0):
            return ()
        self._floor[stream] = step
        cancelled = {s for s in self._cancelled.pop(stream, ()) if s >= step}
        if cancelled:
            self._cancelled[stream] = cancelled
        return self._drop(stream)

    def close(self) -> tuple[W, ...]:
        self._closed = True
        waiters = tuple(self._waiters.values())
        for table in (self._values, self._waiters, self._floor, self._cancelled):
            table.clear()
        return waiters

    def _drop(self, stream: Hashable) -> tuple[W, ...]:
        for key in [k for k in self._values if k[0] == stream and self.is_over(stream, k[1])]:
            del self._values[key]
            self.dropped += 1
        gone = [k for k in self._waiters if k[0] == stream and self.is_over(stream, k[1])]
        return tuple(self._waiters.pop(k) for k in gone)

    def validate(self) -> None:
        """A key holds a value or a waiter, never both; nothing of a step that is over is kept; counts are bounded."""
        ensure(not set(self._values) & set(self._waiters), "a value and a waiter have not met")
        over = any(self.is_over(k[0], k[1]) for k in [*self._values, *self._waiters])
        ensure(not over, "something is kept for a step that is over")
        ensure(len(self._values) <= self._capacity, "more values are kept than there is room for")
        kept = all(steps and min(steps) >= self._floor.get(s, 0) for s, steps in self._cancelled.items())
        ensure(kept, "a cancelled step is remembered that is over")
