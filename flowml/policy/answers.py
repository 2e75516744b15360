"""What a completion rule answers when it is asked whether a clock is complete."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wait:
    """Do not decide yet. Ask again at `until` seconds, if that is later than now, or at the next arrival."""

    until: float = math.inf


@dataclass(frozen=True, slots=True)
class Decide:
    """The clock is complete with the arrivals so far.

    `coefficients` maps replicas to coefficients, and takes precedence over the weights of `Policy.apply`; empty: none.
    """

    coefficients: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Never:
    """The clock cannot be completed, or has waited too long, which ends the run. `why` is the end of a sentence."""

    why: str


WAIT = Wait()

Answer = Wait | Decide | Never
