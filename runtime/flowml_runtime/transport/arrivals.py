"""Tracks which messages of a peer were processed, so that its loss is reported after its last message.

The messages that a dead process has sent remain in the kernel and in shared memory. They are still read, and then the
stream ends. But the end of the connection in the other direction, or the coordinator, may report the loss first.
"""

from __future__ import annotations

import threading
import time

from flowml_runtime.transport.endpoint import MAX_QUEUED_BYTES

DRAIN_S = 1.0
"""The longest time for which the report of a loss waits for messages that have arrived."""

QUIET_S = 0.1
"""A stream without a message for this long counts as read to its end."""


class Arrivals:
    """The state of a peer's incoming stream. Made on the thread that receives its messages."""

    __slots__ = ("_draining", "_ended", "_late_bytes", "_thread", "busy", "taken")

    def __init__(self) -> None:
        self.busy = False
        """True while a message is processed."""
        self.taken = 0
        """Number of messages processed so far."""
        self._thread = threading.current_thread()
        self._ended = threading.Event()
        self._draining = False
        self._late_bytes = 0

    def end(self) -> None:
        """The stream has ended: all its messages were processed."""
        self._ended.set()

    def begin_drain(self) -> None:
        """The peer is lost. Its earlier messages are processed until `drain` returns."""
        self._draining = True

    def admits(self, nbytes: int) -> bool:
        """Whether a message of a lost peer is processed: no more bytes than a sender may have in flight."""
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
        """Wait until the lost peer's messages are processed, and refuse later ones."""
        self.settle()
        self._draining = False
