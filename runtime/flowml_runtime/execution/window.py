"""How far the producer of an edge may be ahead of its consumer: credits, where values are large.

A Send never waits for its Recv, so that edges cost one hop; what bounds the memory of those ahead is the number of
steps in flight. For large values that is too much, and their edges have a window: at most so many steps' values that
the consumer has not taken. It returns a credit for each that it takes.

    producer: enter(edge, step) waits for room; sends          consumer: takes, answers Taken -> leave(edge, step)

Nothing can deadlock over it. Devices run steps in order, so whoever waits to send in step s has finished all earlier
ones; what it waits for is that its consumer takes something of an earlier step, which needs only steps before s.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from flowml.plan import Message
from flowml_runtime.protocol.rendezvous import Cancelled
from flowml_runtime.transport.endpoint import MAX_QUEUED_BYTES

WINDOW_BYTES = MAX_QUEUED_BYTES // 2
"""What may wait for the consumer of one edge, unless a single value is larger. Half of what a connection takes."""

IN_FLIGHT = 16
"""Calls of one plan that may be under way at once: an edge on which so many fit needs no window."""


def window(message: Message) -> int:
    """How many steps the producer may be ahead; 0 for an edge that needs no window."""
    steps = WINDOW_BYTES // max(message.nbytes, 1)
    return 0 if steps >= IN_FLIGHT else max(1, steps)


class Windows:
    """The windows of the edges that leave one device. `messages` are all of the plan. Safe to use from any thread."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self._room = [window(m) for m in messages]
        self._untaken: dict[int, set[int]] = {}
        """For each edge the steps whose values the consumer has not taken."""
        self._cancelled: set[int] = set()
        self._closed = False
        self._changed = threading.Condition()
        self.waiting = 0
        """Threads that wait for room."""

    def enter(self, edge: int, step: int, timeout_s: float) -> None:
        """Wait for room. Raises Cancelled if the step is given up meanwhile, TimeoutError if it takes too long."""
        if not self._room[edge]:
            return
        deadline = time.monotonic() + timeout_s
        with self._changed:
            untaken = self._untaken.setdefault(edge, set())
            while len(untaken) >= self._room[edge] and not self._is_over(step):
                self.waiting += 1
                in_time = self._changed.wait(deadline - time.monotonic())
                self.waiting -= 1
                if not in_time:
                    raise TimeoutError
            if self._is_over(step):
                raise Cancelled(step)
            untaken.add(step)

    def leave(self, edge: int, step: int) -> None:
        """The consumer has taken the value of `step`. Edges and steps that nobody knows are ignored."""
        with self._changed:
            self._untaken.get(edge, set[int]()).discard(step)
            self._changed.notify_all()

    def cancel(self, step: int) -> None:
        """Nobody takes the values of this step any more."""
        with self._changed:
            for untaken in self._untaken.values():
                untaken.discard(step)
            self._cancelled.add(step)
            self._changed.notify_all()

    def finish(self, step: int) -> None:
        """The device is past this step."""
        if self._cancelled:
            with self._changed:
                self._cancelled = {s for s in self._cancelled if s > step}

    def close(self) -> None:
        """Wake all who wait, with Cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _is_over(self, step: int) -> bool:
        return self._closed or step in self._cancelled
