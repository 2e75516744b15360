"""Matches each pushed value with the Recv that waits for it, in a table. A sender never waits for a receiver.

A key is a tuple (stream, step, …). A stream takes its steps in order, such as one device of one plan; the rest of the
key distinguishes the values of a step. Under a key the table holds either a value or a waiter. The second one to arrive
removes the first:

* `put` returns the waiter if there is one; otherwise it returns None and keeps the value. A repeated key is an error.
* `claim` returns the value if there is one; otherwise it returns None and keeps the waiter. Two waiters for a key are
  an error.
* `cancel_step` gives a step up: it returns the step's waiters, and later values for the step are dropped.
* `advance` says that a stream takes no more values of steps before the given one, and treats them like `cancel_step`.
* `close` ends everything: it returns all waiters, and later values are dropped.

The number of stored values is bounded. One more is an error, because flow control should have stopped a sender that is
so far ahead.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Generic, TypeVar

from flowml_runtime.protocol.errors import ProtocolError, ensure

V = TypeVar("V")
W = TypeVar("W")

Key = tuple[Any, ...]
"""(stream, step, …). The stream is hashable, the step an int."""


class Cancelled(Exception):
    """The requested step has been given up, or is over."""


class Rendezvous(Generic[V, W]):
    """The table, for values of type V and waiters of type W. Not thread-safe; the host guards it."""

    def __init__(self, capacity: int = 65536) -> None:
        self._capacity = capacity
        self._values: dict[Key, V] = {}
        self._waiters: dict[Key, W] = {}
        self._floor: dict[Hashable, int] = {}
        self._cancelled: dict[Hashable, set[int]] = {}
        self._closed = False

    def __len__(self) -> int:
        """The number of values that wait to be taken."""
        return len(self._values)

    def put(self, key: Key, value: V) -> W | None:
        if self.is_over(key[0], key[1]):
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
        """Take a value, or register a waiter. Raises Cancelled if the value can never arrive."""
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
        gone = [k for k in self._waiters if k[0] == stream and self.is_over(stream, k[1])]
        return tuple(self._waiters.pop(k) for k in gone)

    def validate(self) -> None:
        """Check that a key has a value or a waiter but not both, that ended steps keep nothing, and all bounds."""
        if self._values or self._waiters:
            ensure(not self._values.keys() & self._waiters.keys(), "a value and a waiter have not met")
            over = any(self.is_over(k[0], k[1]) for k in (*self._values, *self._waiters))
            ensure(not over, "something is kept for a step that is over")
        ensure(len(self._values) <= self._capacity, "more values are kept than there is room for")
        kept = all(steps and min(steps) >= self._floor.get(s, 0) for s, steps in self._cancelled.items())
        ensure(kept, "a cancelled step is remembered that is over")
