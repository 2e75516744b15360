"""Keeps the order of calls whose effects are ordered: one begins when the one before it has ended, as under jit."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from flowml_runtime.execution.future import Future


class Turns:
    """The order of the calls of one session."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: Callable[[], Future[Any] | None] = lambda: None
        """The last call. A future that is not done is kept alive elsewhere, and one that is done is not kept here."""

    def take(self, start: Callable[[], Future[Any]]) -> Future[Any]:
        """Start a call after the last one, whatever became of it."""
        with self._lock:
            last = self._last()
            if last is not None:
                last.exception()  # no deadline: that of the call itself
            future = start()
            self._last = weakref.ref(future)
            return future
