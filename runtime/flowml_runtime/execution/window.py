"""How far the producer of an edge may be ahead of its consumer: credits, where values are large.

A Send never waits for its Recv, so that edges cost one hop; what bounds the memory of those ahead is the number of
steps in flight. For large values that is too much, and their edges have a window: at most so many steps' values that
the consumer has not taken. It returns a credit for each that it takes.

    producer: enter(edge, step) once there is room; sends      consumer: takes, answers Taken -> leave(edge, step)

Whoever finds no room gets a claim to it, as for a value that has not come, and asks again when that is done.

Nothing can deadlock over it. Devices run steps in order, so whoever waits to send in step s has finished all earlier
ones; what it waits for is that its consumer takes something of an earlier step, which needs only steps before s.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from flowml.plan import Message
from flowml_runtime.execution.mailbox import Cancelled, Claim
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
        self._lock = threading.Lock()
        self._waiting: tuple[int, int, Claim] | None = None
        """(edge, step, claim to room): a device runs one step of a plan at a time."""

    @property
    def waiting(self) -> bool:
        """Whether a step waits for room."""
        return self._waiting is not None

    def enter(self, edge: int, step: int) -> Claim | None:
        """Take room, or get the claim to wait for before asking again. Raises Cancelled if the step is given up."""
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
        """The consumer has taken the value of `step`. Edges and steps that nobody knows are ignored."""
        with self._lock:
            self._untaken.get(edge, set[int]()).discard(step)
            claim = self._settled()
        _wake(claim)

    def cancel(self, step: int) -> None:
        """Nobody takes the values of this step any more."""
        with self._lock:
            for untaken in self._untaken.values():
                untaken.discard(step)
            self._cancelled.add(step)
            claim = self._settled()
        _wake(claim)

    def finish(self, step: int) -> None:
        """The device is past this step."""
        if self._cancelled:
            with self._lock:
                self._cancelled = {s for s in self._cancelled if s > step}

    def close(self) -> None:
        """Wake whoever waits, with Cancelled."""
        with self._lock:
            self._closed = True
            claim = self._settled()
        _wake(claim)

    def _settled(self) -> Claim | None:
        """The claim that is done now, to be woken without the lock, which is held here."""
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
