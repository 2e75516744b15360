"""Limits how far the producer of an edge may be ahead of its consumer, by credits for large values.

A Send never waits for its Recv, so an edge costs one hop. The number of steps in flight bounds the memory of small
values. An edge of large values also has a window: the largest number of steps whose values the consumer has not taken.
The consumer returns a credit for each value that it takes.

    producer: enter(edge, step) once there is room; sends      consumer: takes, answers Taken -> leave(edge, step)

A producer without room gets a claim, as for a missing value, and calls `enter` again when the claim is done.

The windows cannot deadlock. Devices run steps in order, so a producer that waits to send in step s has finished all
earlier steps. It waits until its consumer takes a value of an earlier step, which depends only on steps before s.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from flowml.plan import Message
from flowml_runtime.execution.mailbox import Cancelled, Claim
from flowml_runtime.transport.endpoint import MAX_QUEUED_BYTES

WINDOW_BYTES = MAX_QUEUED_BYTES // 2
"""The most bytes that wait for the consumer of one edge, unless one value is larger. Half of a connection's limit."""

IN_FLIGHT = 16
"""The most calls of one plan in flight. An edge whose window would hold this many needs no window."""


def window(message: Message) -> int:
    """How many steps the producer may be ahead; 0 for an edge that needs no window."""
    steps = WINDOW_BYTES // max(message.nbytes, 1)
    return 0 if steps >= IN_FLIGHT else max(1, steps)


class Windows:
    """The windows of one device's outgoing edges. `messages` are all of the plan. Safe to use from any thread."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self._room = [window(m) for m in messages]
        self._untaken: dict[int, set[int]] = {}
        """For each edge, the steps whose values the consumer has not taken."""
        self._cancelled: set[int] = set()
        self._closed = False
        self._lock = threading.Lock()
        self._waiting: tuple[int, int, Claim] | None = None
        """(edge, step, claim to room): a device runs one step of a plan at a time."""

    @property
    def waiting(self) -> bool:
        """Whether a step waits for room."""
        return self._waiting is not None

    def enter(self, edge: int, step: int) -> Claim | None:
        """Take room, or return the claim to wait for before the next try. Raises Cancelled if the step is cancelled."""
        if not self._room[edge]:
            return None
        with self._lock:
            if self._is_over(step):
                raise Cancelled(step)
            untaken = self._untaken.setdefault(edge, set())
            if len(untaken) < self._room[edge]:
                untaken.add(step)
                return None
            claim = Claim(self._lock)
            self._waiting = edge, step, claim
            return claim

    def leave(self, edge: int, step: int) -> None:
        """The consumer has taken the value of `step`. Unknown edges and steps are ignored."""
        with self._lock:
            self._untaken.get(edge, set[int]()).discard(step)
            claim = self._settled()
        _wake(claim)

    def cancel(self, step: int) -> None:
        """The step is cancelled: its values are not taken."""
        with self._lock:
            for untaken in self._untaken.values():
                untaken.discard(step)
            self._cancelled.add(step)
            claim = self._settled()
        _wake(claim)

    def finish(self, step: int) -> None:
        """The device has ended this step."""
        if self._cancelled:
            with self._lock:
                self._cancelled = {s for s in self._cancelled if s > step}

    def close(self) -> None:
        """Wake the waiting step with Cancelled."""
        with self._lock:
            self._closed = True
            claim = self._settled()
        _wake(claim)

    def _settled(self) -> Claim | None:
        """The claim that is done now, if any. The lock is held; the caller wakes the claim after releasing it."""
        if self._waiting is None:
            return None
        edge, step, claim = self._waiting
        if not self._is_over(step) and len(self._untaken[edge]) >= self._room[edge]:
            return None
        self._waiting = None
        claim.settle(None)
        return claim

    def _is_over(self, step: int) -> bool:
        return self._closed or step in self._cancelled


def _wake(claim: Claim | None) -> None:
    if claim is not None:
        claim.wake()
