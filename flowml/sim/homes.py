"""Models the work of homes: how long it takes to add up the contributions of a clock and to apply the optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from flowml.errors import SimulationError
from flowml.sim import checks


@dataclass(frozen=True)
class Homes:
    """An apply takes `apply_s`, plus the bytes of the contributions that it adds up at `bytes_per_s`.

    The applies of one worker follow one another, as on the device of a real one, and a version is published when its
    apply is done. Replicas that share memory update a layer themselves, one after the other, because each update holds
    the layer's lock for this time. By default they take no time.

    Args:
        apply_s: seconds of each apply.
        bytes_per_s: at which contributions are added up.
        slow: by the number of a worker, how many times as long its applies take.

    Raises:
        SimulationError: for a number that makes no sense.
    """

    apply_s: float = 0.0
    bytes_per_s: float = math.inf
    slow: Mapping[int, float] = field(default_factory=dict[int, float])

    def __post_init__(self) -> None:
        object.__setattr__(self, "apply_s", checks.number("Homes", "apply_s", self.apply_s))
        object.__setattr__(self, "bytes_per_s", checks.rate("Homes", "bytes_per_s", self.bytes_per_s))
        if not isinstance(self.slow, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SimulationError(
                f"Homes: slow={self.slow!r} is no mapping; give one like {{3: 5.0}}, worker to factor"
            )
        found = {
            checks.count("Homes", "a worker of slow", w): checks.number("Homes", f"slow[{w!r}]", f, least=1)
            for w, f in self.slow.items()
        }
        object.__setattr__(self, "slow", found)

    def check(self, workers: int) -> None:
        """Raise SimulationError if a cluster of so many workers does not have those that are slow."""
        beyond = [worker for worker in self.slow if worker >= workers]
        if beyond:
            raise SimulationError(
                f"Homes: slow names worker {beyond[0]}, and the cluster has workers 0 to {workers - 1}"
            )

    def seconds(self, nbytes: float, worker: int = -1) -> float:
        """How long a worker takes for an apply of so many bytes."""
        seconds = self.apply_s + nbytes / self.bytes_per_s
        return seconds * self.slow.get(worker, 1.0) if self.slow else seconds


AT_ONCE = Homes()
"""Applies that take no time."""
