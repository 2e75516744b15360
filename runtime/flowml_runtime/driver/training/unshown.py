"""Holds back the checkpoints of a fit until callbacks have had the records of the steps before them.

A record waits for what is decided about its clock, and the snapshot after it does not. If a later fit went on from such
a checkpoint, nobody would ever get the records in between, so it is written after them. Two are held at most: the
oldest, because in a fit whose records are always late a newer one would be so too, and the newest. So there are fewer
checkpoints, and none waits for longer than MOST_S.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from flowml_runtime.driver.training.parts import Parts
from flowml_runtime.driver.training.snapshots import Snapshot
from flowml_runtime.driver.training.writing import Writer

MOST_S = 60.0
"""How long a checkpoint waits for records. A policy may decide only at the end of the fit."""
MOST = 2


@dataclass(frozen=True)
class _Waiting:
    snapshot: Snapshot
    parts: Parts | None
    since: float

    @property
    def step(self) -> int:
        return self.snapshot.content.steps


class Unshown:
    """The checkpoints of one run that wait for records. `write` is called with each that does not wait any more."""

    def __init__(self, writer: Writer, write: Callable[[Snapshot, Parts | None], None], first: int) -> None:
        """`first` is the step of the first record of the run."""
        self._writer = writer
        self._write = write
        self._shown = first
        """The number of steps whose records callbacks have had."""
        self._waiting: deque[_Waiting] = deque()

    def put(self, snapshot: Snapshot, parts: Parts | None, now: float) -> None:
        """Write a snapshot as soon as the records before it were shown. Workers write `parts` of it."""
        if len(self._waiting) == MOST:
            self._drop(self._waiting.pop())
        self._waiting.append(_Waiting(snapshot, parts, now))
        self._release(now)

    def shown(self, steps: int) -> None:
        """Callbacks have had the records of so many steps."""
        self._shown = steps
        if self._waiting:
            self._release(-MOST_S)

    def wait(self, now: float) -> None:
        """Write those that have waited for long enough."""
        if self._waiting:
            self._release(now)

    def drop(self) -> bool:
        """The run has ended, and shows no more records. Returns whether a checkpoint has waited for some."""
        waited = bool(self._waiting)
        while self._waiting:
            self._drop(self._waiting.popleft())
        self._writer.more = False
        return waited

    def _release(self, now: float) -> None:
        while self._waiting and (self._waiting[0].step <= self._shown or now - self._waiting[0].since >= MOST_S):
            found = self._waiting.popleft()
            self._write(found.snapshot, found.parts)
        self._writer.more = bool(self._waiting)

    def _drop(self, waiting: _Waiting) -> None:
        if waiting.parts is not None:
            self._writer.discard(waiting.parts)
