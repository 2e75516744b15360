"""Models the work of homes: how long it takes to add up the contributions of a clock and to apply the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowml.sim import checks


@dataclass(frozen=True)
class Homes:
    """An apply takes `apply_s`, plus the bytes of the contributions that it adds up at `bytes_per_s`.

    The applies of one worker follow one another, as on the device of a real one, and a version is published when its
    apply is done. Replicas that share memory update a layer themselves, one after the other, because each update holds
    the layer's lock for this time. By default they take no time.
    """

    apply_s: float = 0.0
    bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        object.__setattr__(self, "apply_s", checks.number("Homes", "apply_s", self.apply_s))
        object.__setattr__(self, "bytes_per_s", checks.rate("Homes", "bytes_per_s", self.bytes_per_s))

    def seconds(self, nbytes: float) -> float:
        return self.apply_s + nbytes / self.bytes_per_s


AT_ONCE = Homes()
"""Applies that take no time."""
