"""Keeps spare workers ready: processes that have started, joined and wait to take the place of a lost worker.

The coordinator chooses which spare takes which place. Here one only sees in the members that it has: an own spare is
gone, and a worker has its address. Its process is then that of the worker, and another spare is started.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from msgspec import structs

from flowml.errors import ClusterError
from flowml_runtime import wire
from flowml_runtime.launch.local import LocalWorkers
from flowml_runtime.membership.member import spare_name
from flowml_runtime.worker.config import WorkerConfig

MOST_IN_VAIN = 5
"""After as many spares in a row that end before they have joined, no more are started."""

_log = logging.getLogger("flowml")


class Spares:
    """The spare workers of a launcher. `number` are kept ready."""

    def __init__(self, number: int, processes: LocalWorkers, config: WorkerConfig, deadline_s: Callable[[], float]):
        """`config` is that of each, without a name. `deadline_s`: until when one that is started now may take."""
        self._number = number
        self._processes = processes
        self._config = config
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._started: dict[str, str] = {}
        """Spare -> its address, or "" until it has joined."""
        self._in_vain = 0
        """How many of the newest have ended before they had joined."""

    def fill(self) -> tuple[str, ...]:
        """Start as many as are missing. Returns the names of all. Raises ClusterError if one cannot be started."""
        with self._lock:
            while len(self._started) < self._number and self._in_vain < MOST_IN_VAIN:
                name = spare_name()
                self._started[name] = ""
                self._processes.start(structs.replace(self._config, name=name), self._deadline_s())
            return tuple(self._started)

    def on_members(self, members: tuple[wire.Member, ...]) -> None:
        """These are the members now."""
        here = {m.worker: m.address for m in members}
        with self._lock:
            gone = {spare: at for spare, at in self._started.items() if at and spare not in here}
            for spare in self._started.keys() & here.keys():
                self._started[spare], self._in_vain = here[spare], 0
            for spare, address in gone.items():
                place = next((name for name, at in here.items() if at == address), "")
                if place:
                    self._processes.rename(spare, place)
                    del self._started[spare]  # the end of any other is reported by its process
        self._refill()

    def on_exit(self, spare: str, reason: str) -> None:
        """The process of a spare has ended."""
        with self._lock:
            if not self._started.pop(spare, ""):
                self._in_vain += 1
            if self._in_vain == MOST_IN_VAIN:
                _log.warning("no more spare workers are started: %s", reason)
        self._refill()

    def _refill(self) -> None:
        try:
            self.fill()
        except ClusterError as error:
            _log.warning("a spare worker could not be started: %s", error)
