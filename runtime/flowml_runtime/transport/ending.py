"""For tests of losses: ends or suspends a worker's process at a named point of a run, as kill -9 or SIGSTOP does.

A point is the moment before or after the n-th message of a type is sent or taken. Everything that processes
do for each other in a run is a message, so these points cover a run. A worker without an `Ending` runs none of this.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from flowml_runtime import service, wire
from flowml_runtime.transport.endpoint import OnMessage
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint


class Ending(msgspec.Struct, frozen=True):
    """Where a process ends. `soon`: some time in the millisecond after, while the message is being processed.
    `suspended`: it stops there, and may be woken."""

    when: Literal["before", "after", "soon"]
    verb: Literal["send", "take"]
    message: str
    """The name of a class in `wire`."""
    number: int = 1
    suspended: bool = False

    def __str__(self) -> str:
        times = "" if self.number == 1 else f" {self.number}"
        return f"{self.when} {self.verb} {self.message}{times}{', suspended' * self.suspended}"


class Ends:
    """Counts messages, and ends the process at its point."""

    def __init__(self, at: Ending) -> None:
        self._at = at
        self._left = at.number
        self._lock = threading.Lock()

    def watch_sent(self, endpoint: GrpcEndpoint) -> None:
        """Watch what an endpoint sends from now on."""
        if self._at.verb != "send":
            return
        send = endpoint.send

        def watched(peer: str, message: wire.Wire, arrays: Sequence[Any] = (), timeout_s: float | None = None) -> None:
            here = self._is_here(message)
            send(peer, message, arrays, timeout_s)
            self._end(here)

        endpoint.send = watched

    def watch_taken(self, on_message: OnMessage) -> OnMessage:
        """The same function for messages that arrive, watched."""
        if self._at.verb != "take":
            return on_message

        def watched(peer: str, message: wire.Wire, arrays: list[Any]) -> None:
            here = self._is_here(message)
            on_message(peer, message, arrays)
            self._end(here)

        return watched

    def _is_here(self, message: wire.Wire) -> bool:
        if type(message).__name__ != self._at.message:
            return False
        with self._lock:
            self._left -= 1
            here = self._left == 0
        if here and self._at.when == "before":
            self._stop()
        return here

    def _end(self, here: bool) -> None:
        if here and self._at.when == "after":
            self._stop()
        elif here:
            service.start("flowml-ending", lambda: (threading.Event().wait(1e-3), self._stop()), lambda _: self._stop())

    def _stop(self) -> None:
        if self._at.suspended:
            os.kill(os.getpid(), signal.SIGSTOP)
            return
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()  # the signal may reach the process in another thread
