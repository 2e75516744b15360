"""Waits until the workers of a cluster have started, or one of them has failed to; knows which are started again."""

from __future__ import annotations

import threading
import time

from flowml.errors import ClusterError
from flowml.render.units import listed
from flowml_runtime import wire


class Starting:
    """Who has joined, and whose process has ended."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._members: set[str] = set()
        self._exits: dict[str, str] = {}

    def on_members(self, members: tuple[wire.Member, ...]) -> None:
        """These are the members now."""
        with self._changed:
            self._members = {m.worker for m in members}
            self._changed.notify_all()

    def on_exit(self, worker: str, reason: str) -> None:
        """The process of a worker has ended."""
        with self._changed:
            self._exits[worker] = reason
            self._changed.notify_all()

    def wait_for(self, workers: tuple[str, ...], timeout_s: float, began_s: float) -> None:
        """Wait until all these workers have joined. Raises ClusterError if one ends first or does not join in time.

        The timeout is counted from `began_s`, a time of the monotonic clock.
        """
        deadline = began_s + timeout_s
        with self._changed:
            while missing := set(workers) - self._members:
                ended = [w for w in workers if w in self._exits]
                if ended:
                    raise ClusterError(f"{ended[0]} did not start: {self._exits[ended[0]]}", worker=ended[0])
                left = deadline - time.monotonic()
                if left <= 0:
                    late = listed(tuple(sorted(missing, key=workers.index)), 8)
                    raise ClusterError(f"{late} did not start within {timeout_s:g} s; allow more with start_timeout_s=")
                self._changed.wait(left)


class Restarts:
    """The lost workers that are being started again, so that none is started twice."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._before: dict[str, int] = {}
        """Worker -> its process before, or 0."""

    def begin(self, worker: str, pid: int) -> bool:
        """Whether to start a worker, whose process was `pid`: not if that has begun."""
        with self._lock:
            first = worker not in self._before
            self._before.setdefault(worker, pid)
            return first

    def on_exit(self, worker: str, pid: int) -> None:
        """A process of a worker has ended. If it is not the one before, the worker may be started once more."""
        if self._before.get(worker, pid) != pid:
            self.end(worker)

    def end(self, worker: str) -> None:
        """A worker has been started again, or could not be."""
        with self._lock:
            self._before.pop(worker, None)
