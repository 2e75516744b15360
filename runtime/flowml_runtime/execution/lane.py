"""A thread that does what it is given, in order, so that the thread that orders it goes on.

A device has a lane for large values, which leave while it computes: `ROOM` are under way, since each keeps its array
alive, and the device waits to give it one more. The home of a store has a lane for applies, and a slow reader one for
what is published to it. They have room for everything, because the rules of training bound what they are given.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from flowml_runtime import service

LARGE_BYTES = 2**20
"""From here on a copy takes longer than waking the thread."""

ROOM = 1


class Lane:
    """Runs what is put to it, in order, on its own thread, which exists once something was put.

    `put` and `flush` wait only where there is a limit, and then from one thread; `close` from any.
    """

    def __init__(self, name: str, room: int | None = None) -> None:
        """`put` waits while `room` jobs are under way; never, if it is None."""
        self._name = name
        self._room = room
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Callable[[], None], Callable[[BaseException], None]]] = deque()
        """Those that are not done, the one that runs included."""
        self._thread: threading.Thread | None = None
        self._closed = False

    def put(self, job: Callable[[], None], failed: Callable[[BaseException], None]) -> bool:
        """Have `job()` run, and `failed(error)` if it raises. False once the lane is closed: neither will be called."""
        with self._changed:
            if self._room is not None:
                room = self._room
                # no deadline: each job has its own, and close() wakes
                self._changed.wait_for(lambda: self._closed or len(self._waiting) < room)
            if self._closed:
                return False
            self._waiting.append((job, failed))
            self._changed.notify_all()
            if self._thread is None:
                self._thread = service.start(self._name, self._run, lambda _: self.close())
        return True

    def flush(self) -> None:
        """Wait until all that was put has been done, or nothing more will be."""
        with self._changed:
            # no deadline: each job has its own, and close() wakes
            self._changed.wait_for(lambda: self._closed or not self._waiting)

    def close(self, *, drop: bool = True) -> None:
        """End the thread after what it does now; with `drop` false, after all that was put. Does not wait."""
        with self._changed:
            self._closed = True
            while drop and len(self._waiting) > 1:
                self._waiting.pop()
            self._changed.notify_all()

    def join(self, timeout_s: float) -> bool:
        """Wait until the thread is gone; False if it is still there."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                # no deadline: the thread sleeps until it has work or is closed
                self._changed.wait_for(lambda: self._closed or bool(self._waiting))
                if not self._waiting:
                    return
                job, failed = self._waiting[0]
            try:
                job()
            except BaseException as error:
                with service.going_on(f"{self._name}: what a job raised could not be reported"):
                    failed(error)
            del job, failed  # they hold arrays
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()
