"""Runs jobs in order on a separate thread, so that the thread that submits them continues.

A device has a lane that sends large values while it computes. It holds at most `ROOM` jobs, because each keeps its
array alive, and the device waits before it submits another. The home of a store has a lane for applies, and a slow
reader one for values published to it. These have no limit, because the rules of training bound their jobs.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from flowml_runtime import service

LARGE_BYTES = 2**20
"""Copying an array of at least this size takes longer than waking the thread."""

ROOM = 1


class Lane:
    """Runs the jobs that are put to it in order on one thread, which starts with the first job.

    With a limit, `put` and `flush` may wait and must be called from one thread. `close` is safe from any thread.
    """

    def __init__(self, name: str, room: int | None = None) -> None:
        """`put` waits while `room` jobs are not done; None means no limit."""
        self._name = name
        self._room = room
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Callable[[], None], Callable[[BaseException], None]]] = deque()
        """Jobs that are not done, including the running one."""
        self._thread: threading.Thread | None = None
        self._closed = False

    def put(self, job: Callable[[], None], failed: Callable[[BaseException], None]) -> bool:
        """Run `job()`, and `failed(error)` if it raises. False once the lane is closed: neither is called then."""
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
        """Wait until all jobs are done or the lane is closed."""
        with self._changed:
            # no deadline: each job has its own, and close() wakes
            self._changed.wait_for(lambda: self._closed or not self._waiting)

    def close(self, *, drop: bool = True) -> None:
        """End the thread after the running job, or after all jobs if `drop` is false. Does not wait."""
        with self._changed:
            self._closed = True
            while drop and len(self._waiting) > 1:
                self._waiting.pop()
            self._changed.notify_all()

    def join(self, timeout_s: float) -> bool:
        """Wait until the thread ends. False if it is still alive."""
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
                with service.going_on(f"{self._name}: the error of a job could not be reported"):
                    failed(error)
            del job, failed  # they hold arrays
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()
