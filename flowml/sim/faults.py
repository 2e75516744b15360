"""Faults of a simulated cluster: workers that stop, and networks that delay, lose, repeat and part messages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flowml.errors import SimulationError
from flowml.sim import checks


@dataclass(frozen=True)
class Crash:
    """Worker number `worker` stops at `at_s`, and the driver learns of it `noticed_s` later."""

    worker: int
    at_s: float
    noticed_s: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "worker", checks.count("Crash", "worker", self.worker))
        for name in ("at_s", "noticed_s"):
            object.__setattr__(self, name, checks.number("Crash", name, getattr(self, name)))


@dataclass(frozen=True)
class Partition:
    """From `start_s` to `end_s` no message crosses between `workers` and all others. It arrives afterwards."""

    workers: Sequence[int]
    start_s: float
    end_s: float

    def __post_init__(self) -> None:
        given = checks.sequence("Partition", "workers", self.workers, "numbers of workers")
        found = tuple(checks.count("Partition", f"workers[{i}]", w) for i, w in enumerate(given))
        if not found:
            raise SimulationError("Partition: workers is empty, so nothing is parted; give the workers of one side")
        object.__setattr__(self, "workers", found)
        for name in ("start_s", "end_s"):
            object.__setattr__(self, name, checks.number("Partition", name, getattr(self, name)))
        if self.end_s <= self.start_s:
            raise SimulationError(
                f"Partition: end_s={self.end_s} is not after start_s={self.start_s}; give a later end_s, or an earlier "
                "start_s"
            )


@dataclass(frozen=True)
class Disorder:
    """A bad network between all workers, from `start_s` to `end_s`.

    Args:
        delay_s: the mean of an exponential delay of each message, so that messages of different senders change order.
        lost: the share of messages that are lost, and sent again after `resend_s`, perhaps repeatedly.
        repeated: the share of contributions that arrive twice.
    """

    delay_s: float = 0.0
    lost: float = 0.0
    resend_s: float = 0.2
    repeated: float = 0.0
    start_s: float = 0.0
    end_s: float = math.inf

    def __post_init__(self) -> None:
        for name in ("delay_s", "resend_s", "start_s"):
            object.__setattr__(self, name, checks.number("Disorder", name, getattr(self, name)))
        for name in ("lost", "repeated"):
            value = checks.number("Disorder", name, getattr(self, name))
            if value >= 1:
                raise SimulationError(f"Disorder: {name}={value} is a share of the messages; give a number in [0, 1)")
            object.__setattr__(self, name, value)
        if self.end_s != math.inf:
            object.__setattr__(self, "end_s", checks.number("Disorder", "end_s", self.end_s))
        if self.end_s <= self.start_s:
            raise SimulationError(
                f"Disorder: end_s={self.end_s} is not after start_s={self.start_s}; give a later end_s, or an earlier "
                "start_s"
            )


Fault = Crash | Partition | Disorder
