"""Large values leave by a thread of their own, so that their device goes on computing while they are copied or sent.

One outbox a device; its thread exists once something large was sent. No more than `ROOM` are under way, since
each keeps its array alive; whoever has one more waits. What goes wrong is told to the step that sent it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

LARGE_BYTES = 2**20
"""From here on a copy takes longer than waking the thread."""

ROOM = 1


class Outbox:
    """Runs what is put to it, in order, on its own thread. `put` and `flush` from one thread; `close` from any."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Callable[[], None], Callable[[BaseException], None]]] = deque()
        """Those that are not done, the one that runs included."""
        self._thread: threading.Thread | None = None
        self._closed = False

    def put(self, send: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        """Have `send()` run, and `failed(error)` if it raises. Waits while `ROOM` are under way."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._waiting) < ROOM)
            if self._closed:
                return
            self._waiting.append((send, failed))
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"{self._name} send", daemon=True)
                self._thread.start()

    def flush(self) -> None:
        """Wait until all that was put has been done, or nothing more will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._waiting)

    def close(self) -> None:
        """End the thread after what it does now; drop what waits. Does not wait. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self, timeout_s: float) -> bool:
        """Wait until the thread is gone; False if it is still there."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or bool(self._waiting))
                if self._closed:
                    self._waiting.clear()
                    return
                send, failed = self._waiting[0]
            try:
                send()
            except BaseException as error:
                failed(error)
            del send, failed  # they hold arrays
            with self._changed:
                if self._waiting:
                    self._waiting.popleft()
                self._changed.notify_all()
