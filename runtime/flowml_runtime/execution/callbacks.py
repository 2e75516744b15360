"""Runs the users' done callbacks, so that they may wait.

A callback may make a call and wait for its result. On a thread that receives messages it would wait for ever, because
that thread would have to receive the result. Therefore all callbacks of a process run on one thread of their own, one
after another in the order in which they became due. The thread lives while any callback is due.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from flowml.errors import ClusterError
from flowml_runtime import service


class Callbacks:
    """Runs functions in order on one thread. Safe to use from any thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._due: deque[Callable[[], object]] = deque()
        self._running = False

    def put(self, call: Callable[[], object]) -> None:
        """Run `call()` after all that were put before. It must raise nothing. Does not wait."""
        with self._lock:
            self._due.append(call)
            if self._running:
                return
            self._running = True
        self._serve("")

    def _serve(self, reason: str) -> None:
        try:
            service.start(self._name, self._run, self._serve)
        except ClusterError:  # the system allows no more threads: a callback that waits here is better than a lost one
            self._run()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._due:
                    self._running = False
                    return
                call = self._due.popleft()
            call()
            del call


callbacks = Callbacks("flowml-callbacks")
"""The callbacks of this process."""
