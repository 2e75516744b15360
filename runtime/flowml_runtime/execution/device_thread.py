"""Runs the shared threads of a worker: one computing thread for each device, and one for deadlines.

Their number does not depend on the number of plans. `DeviceThread` runs the work of all plans of its device in order.
`Deadlines` ends overdue waits that block no thread, and which therefore no thread would end.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from flowml.ir._jax import explicit_transfers
from flowml_runtime import service


def moves_arrays() -> None:
    """Say that what this thread moves from now on is moved on purpose, whatever `jax.transfer_guard` says."""
    explicit_transfers().__enter__()


service.in_each_thread(moves_arrays)


class DeviceThread:
    """Computes for all plans of one device. Safe to use from any thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: queue.SimpleQueue[tuple[object, Callable[[], None]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._running: object = None
        """The owner of the work that runs now."""
        self._threads: list[threading.Thread] = []
        """The last one serves. Earlier ones end after their current work, if that ever ends."""
        self._serve()

    def put(self, owner: object, work: Callable[[], None]) -> None:
        """Run `work` after all work that was put before."""
        self._work.put((owner, work))

    def leave(self, owner: object) -> None:
        """`owner` is stopped. If its work runs now, another thread takes over, because that work may never end."""
        with self._lock:
            if self._running is owner and self._threads[-1] is not threading.current_thread():
                self._running = None
                self._serve()

    def close(self) -> None:
        """End after all work that was put. Does not wait."""
        self._work.put(None)

    def join(self, timeout_s: float) -> bool:
        """Wait until the threads end. False if one is still alive, e.g. inside a callback that never returns."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout_s)
        return not any(t.is_alive() for t in self._threads)

    def _serve(self) -> None:
        self._threads = [t for t in self._threads if t.is_alive()]
        self._threads.append(service.start(self._name, self._run, self._serve_on))

    def _serve_on(self, reason: str) -> None:
        """Start another thread in place of the serving one, which has failed."""
        with self._lock:
            if self._threads[-1] is threading.current_thread():
                self._running = None
                self._serve()

    def _run(self) -> None:
        while (item := self._work.get()) is not None:  # no deadline: the thread sleeps until it has work or is closed
            owner, work = item
            with self._lock:
                self._running = owner
            with service.going_on(f"{self._name} could not continue a step"):
                work()  # the work of one plan must not end the thread of all
            del item, owner, work  # else they keep arrays alive until the next work comes
            with self._lock:
                if self._threads[-1] is not threading.current_thread():
                    return
                self._running = None


class Deadlines:
    """Calls functions periodically that end overdue waits. Its thread lives while any function is watched."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._looks: dict[object, tuple[Callable[[], None], float]] = {}
        self._thread: threading.Thread | None = None

    def watch(self, owner: object, look: Callable[[], None], every_s: float) -> None:
        """Call `look()` every `every_s` seconds or more often, until `forget(owner)`. It must not wait."""
        with self._changed:
            self._looks[owner] = look, every_s
            if self._thread is None:
                self._thread = service.start(self._name, self._run, self._look_on)
            self._changed.notify_all()

    def forget(self, owner: object) -> None:
        with self._changed:
            self._looks.pop(owner, None)
            self._changed.notify_all()

    def close(self, timeout_s: float) -> None:
        with self._changed:
            self._looks.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def _look_on(self, reason: str) -> None:
        with self._changed:
            self._thread = service.start(self._name, self._run, self._look_on)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait(min((every_s for _, every_s in self._looks.values()), default=0.0))
                if not self._looks:
                    self._thread = None
                    return
                looks = [look for look, _ in self._looks.values()]
            for look in looks:
                with service.going_on(f"{self._name} could not end a wait"):
                    look()
