"""Defines what happens to contributions that come after their clock is decided.

The machines ask a rule three things: whether late contributions join a later clock (`folds`), whether their work items
return to the queue (`requeues`), and by what a contribution that joins a later clock is multiplied (`factor`). To add a
rule, write a class that answers them, and register it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from flowml.errors import PolicyError
from flowml.numbers import MOST, real, whole
from flowml.policy.kinds import Knob, register
from flowml.policy.wording import Value


class Late(Knob):
    """What becomes of late contributions. As it is here, they are discarded."""

    __slots__ = ()

    @property
    def folds(self) -> bool:
        """Whether late contributions join a later clock."""
        return False

    @property
    def requeues(self) -> bool:
        """Whether the work items of contributions that join no clock return to the queue."""
        return False

    def factor(self, clocks: int) -> float:
        """By what a contribution is multiplied that joins a clock so many clocks after its own: a number above 0."""
        return 1.0

    def describe(self) -> str:
        """A short text for tables: "drop", "fold 0.5"."""
        return type(self).__name__.lower()


@register
class Drop(Late, Value, frozen=True, tag=True):
    """Late contributions are discarded."""


@register
class Fold(Late, Value, frozen=True, tag=True):
    """Late contributions join a later clock, multiplied by `decay` for each clock between.

    `decay` 1 compensates fully for the loss of late gradients (Xu et al., Live Gradient Compensation, 2020).
    """

    decay: float = 1.0

    def __post_init__(self) -> None:
        value = number(self.decay, "Fold(decay={!r}): give a number in (0, 1]")
        if not 0 < value <= 1:
            raise PolicyError(f"Fold(decay={value}): a late contribution is multiplied by a number in (0, 1]")

    @property
    def folds(self) -> bool:
        return True

    def factor(self, clocks: int) -> float:
        return self.decay**clocks

    def describe(self) -> str:
        return "fold" if self.decay == 1 else f"fold {self.decay}"


@register
class Requeue(Late, Value, frozen=True, tag=True):
    """The work items of late contributions return to the queue, and other replicas do them in a later clock."""

    @property
    def requeues(self) -> bool:
        return True


LateName = Literal["drop", "fold", "requeue"]

_LATE: dict[str, Callable[[], Late]] = {"drop": Drop, "fold": Fold, "requeue": Requeue}


def late_of(late: object, where: str) -> Late:
    """The late rule that a user has given as a value or by name."""
    if isinstance(late, Late):
        return late
    if isinstance(late, str) and late in _LATE:
        return _LATE[late]()
    raise PolicyError(
        f"{where}(late={late!r}) is not known; give 'drop', 'fold' or 'requeue', or Drop(), Fold(decay) or Requeue()"
    )


def factor(late: Late, clocks: int) -> float:
    """By what a contribution is multiplied that joins a clock so many clocks after its own. Raises PolicyError for a
    factor that is not a positive number: the contribution would be counted as folded, and have no effect."""
    found = late.factor(clocks)
    if not 0 < found < math.inf:
        raise PolicyError(f"{late!r} multiplies what is {clocks} clocks late by {found!r}; give a number above 0")
    return found


def number(value: object, otherwise: str) -> int | float:
    """A Python or NumPy number as an int or a float. Raises PolicyError for NaN, a bool or anything else."""
    count = whole(value)
    if count is not None and abs(count) <= MOST:
        return count
    found = real(value)
    if found is None or math.isnan(found):
        raise PolicyError(otherwise.format(value))
    return found
