"""Measures how long a step computes, and slows its tasks down by the delays of `Trainer(delays=)`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from itertools import repeat

from flowml.instructions import Instruction, Run, until_last_message


class Pace:
    """The pace of the steps of one stage."""

    def __init__(self, delays: Sequence[float], instructions: Sequence[Instruction]) -> None:
        """`delays` are those of this worker in seconds, one a clock in turn."""
        self._delays = delays
        self._paced = sum(isinstance(i, Run) for i in until_last_message(instructions))
        """The number of tasks of a step that share its delay."""
        self._pauses: Iterator[float] = iter(())
        """Those of the tasks of this step that come next."""
        self._since = math.inf
        """When the first task of the step began; infinite before."""

    def begin(self, clock: int) -> None:
        self._since = math.inf
        if self._delays:
            self._pauses = repeat(self._delays[clock % len(self._delays)] / max(self._paced, 1), self._paced)

    def task(self) -> None:
        """A task is about to run."""
        if self._since == math.inf:
            self._since = time.perf_counter()
        if pause_s := next(self._pauses, 0.0):
            time.sleep(pause_s)

    def computed_s(self) -> float:
        """The time since the first task of the step began."""
        return time.perf_counter() - self._since
