"""Lets a worker compile on every core, although it computes on its own cores only.

XLA makes the threads that generate code when it compiles for the first time, one for each core that the compiling
thread may use, and they stay on these cores. The compiling thread is one that XLA made when it started, so it is pinned
as the process is. While a worker compiles for the first time, XLA's threads are therefore allowed on every core. Those
that compute stay where they are.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from flowml_runtime.environment.machine import cores

_THREADS = Path("/proc/self/task")
_COMPUTES = "tf_XLAEigen"
"""The name of the threads with which XLA computes."""


def threads() -> frozenset[int]:
    """The threads of this process."""
    return frozenset(int(entry.name) for entry in _THREADS.iterdir())


class Spread:
    """The cores of compilations. `started` are the threads that XLA made when it started."""

    def __init__(self, everywhere: tuple[int, ...] = (), started: Collection[int] = ()) -> None:
        self.cores = everywhere or cores()
        self._started = tuple(started)
        self._lock = threading.Lock()
        self._compiled = False

    def here(self) -> None:
        """Allow the calling thread on every core."""
        _move([0], self.cores)

    @contextmanager
    def first(self) -> Generator[None]:
        """Allow XLA to make its compiling threads on every core, until it has made them: it makes none where an
        executable comes from a cache, or the compilation fails."""
        with self._lock:
            if self._compiled or not self._started:
                yield
                return
            own, before = cores(), threads()
            moved = [thread for thread in self._started if _name(thread) != _COMPUTES]
            _move(moved, self.cores)
            try:
                yield
                self._compiled = any(_allowed(thread) == {*self.cores} for thread in threads() - before)
            finally:
                _move(moved, own)


def _move(moved: Collection[int], where: tuple[int, ...]) -> None:
    for thread in moved:
        with suppress(OSError):  # it has ended, or a core is not allowed any more
            os.sched_setaffinity(thread, where)


def _allowed(thread: int) -> set[int]:
    with suppress(OSError):
        return os.sched_getaffinity(thread)
    return set()


def _name(thread: int) -> str:
    with suppress(OSError):
        return (_THREADS / str(thread) / "comm").read_text().strip()
    return ""
