"""How far the messages of a peer have been taken in, so that its loss is reported after its last message.

A process that dies leaves what it has sent in the kernel and in shared memory. That is still read, and then the stream
ends by itself. But the end of the connection in the other direction, or the coordinator, may report the loss first.
"""

from __future__ import annotations

import threading
import time

from flowml_runtime.transport.endpoint import MAX_QUEUED_BYTES

DRAIN_S = 1.0
"""How long the loss of a peer is held back at most for what has arrived from it."""

QUIET_S = 0.1
"""A stream that brings nothing for this long has been read to its end."""


class Arrivals:
    """The incoming stream of a peer. Made on the thread that takes its messages in."""

    __slots__ = ("_draining", "_ended", "_late_bytes", "_thread", "busy", "taken")

    def __init__(self) -> None:
        self.busy = False
        """True while a message is taken in."""
        self.taken = 0
        """Messages taken in so far."""
        self._thread = threading.current_thread()
        self._ended = threading.Event()
        self._draining = False
        self._late_bytes = 0

    def end(self) -> None:
        """The stream has ended: all of its messages have been taken in."""
        self._ended.set()

    def begin_drain(self) -> None:
        """The peer is lost. What it has sent before is taken in until `drain` is over."""
        self._draining = True

    def admits(self, nbytes: int) -> bool:
        """Whether a message of a lost peer is taken in: no more than a sender may have in flight."""
        if not self._draining or self._late_bytes > MAX_QUEUED_BYTES:
            return False
        self._late_bytes += nbytes
        return True

    def settle(self) -> None:
        """Wait until the stream has ended or nothing arrives any more, for at most DRAIN_S."""
        deadline, seen = time.monotonic() + DRAIN_S, -1
        while self._thread is not threading.current_thread() and time.monotonic() < deadline:
            seen, before = self.taken, seen
            if (seen == before and not self.busy) or self._ended.wait(QUIET_S):
                return

    def drain(self) -> None:
        """Take in what the lost peer has sent, and nothing after that."""
        self.settle()
        self._draining = False
