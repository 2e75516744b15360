"""How a worker leaves a running cluster: it gives notice, hands over what it does, and goes.

    SIGTERM, `flowml worker --leave` -> notice: all members see it -> drivers let others go on with its part of a fit,
    its last calls end -> it has nothing to do any more, or its time is over -> it leaves, and its process ends

A machine that is taken away, such as a spot machine, usually has half a minute after SIGTERM.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from flowml_runtime import service
from flowml_runtime.interrupts import Terminated

NOTICE_S = 25.0
"""How long a worker that has given notice may take to hand over."""
LOOK_S = 0.05
"""How often it looks whether it has nothing to do any more."""
HANDED_OVER = "it left after it had given notice"
"""The reason that others are told if it could hand over."""
QUIET_S = 1.0
"""For how long it must have had nothing to do, because messages may be under way."""


class GiveNotice(Terminated):
    """The signal to leave has come. Where no worker runs yet, the process ends with it, and well."""

    def __init__(self) -> None:
        super().__init__(signal.SIGTERM)
        self.code = 0


def heed_notice() -> None:
    """Have SIGTERM raise `GiveNotice`. Called on the main thread."""
    signal.signal(signal.SIGTERM, _raise)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    raise GiveNotice


class Departure:
    """Waits until a worker that has given notice may go, and calls `go` with the reason for those that miss it."""

    def __init__(self, idle: Callable[[], bool], go: Callable[[str], None], notice_s: float = NOTICE_S) -> None:
        self._idle = idle
        self._go = go
        self._notice_s = notice_s
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self.begun = False

    def begin(self) -> bool:
        """The worker has given notice. False if it had before."""
        with self._lock:
            if self.begun:
                return False
            self.begun = True
        service.start("flowml-leaving", self._wait, self._go)
        return True

    def cancel(self) -> None:
        """The worker has ended otherwise."""
        self._cancelled.set()

    def _wait(self) -> None:
        quiet_since = time.monotonic()
        until = quiet_since + self._notice_s
        while not self._cancelled.wait(LOOK_S):
            now = time.monotonic()
            if not self._idle():
                quiet_since = now
            if now - quiet_since >= QUIET_S:
                self._go(HANDED_OVER)
                return
            if now >= until:
                self._go(f"it left before others had taken over, {self._notice_s:g} s after it had given notice")
                return
