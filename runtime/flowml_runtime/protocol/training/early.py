"""Keeps the messages that reach a worker before their run has begun there."""

from __future__ import annotations

from flowml_runtime.protocol.errors import EarlyLimitError, ensure
from flowml_runtime.protocol.training.actions import Received

MAX_EARLY = 4096
"""The most messages that are kept for runs that have not begun here. Peers can be ahead by only a few steps."""

MAX_EARLY_BYTES = 2**30
"""The most bytes of arrays in those messages. The largest are contributions to the stores that live here."""


class EarlyMessages:
    """Messages for runs that have not begun here, in the order of arrival. Their number and bytes are bounded."""

    def __init__(self, me: str, driver: str) -> None:
        self._me = me
        self._driver = driver
        self._events: list[tuple[int, Received]] = []
        self._nbytes = 0

    def keep(self, number: int, event: Received) -> None:
        """Keep a message. Raises EarlyLimitError if there is no room, which ends the run. No message is dropped."""
        nbytes = self._nbytes + sum(spec.nbytes for spec in event.message.specs)
        if len(self._events) >= MAX_EARLY or nbytes > MAX_EARLY_BYTES:
            raise EarlyLimitError(
                f"{self._me} has been sent {len(self._events)} messages with {self._nbytes} bytes for a fit that has "
                f"not begun there, and {type(event.message).__name__} from {event.peer} is one too many (at most "
                f"{MAX_EARLY} messages and {MAX_EARLY_BYTES} bytes are kept); see whether {self._driver} or its "
                "connection is stuck, and start the fit again"
            )
        self._events.append((number, event))
        self._nbytes = nbytes

    def take_all(self) -> list[tuple[int, Received]]:
        events, self._events, self._nbytes = self._events, [], 0
        return events

    def validate(self, newest: int) -> None:
        ensure(len(self._events) <= MAX_EARLY, "more is kept for later runs than the limit")
        for _, event in self._events:
            ensure(event.message.run > newest, f"a message is kept for run {newest} or before")
