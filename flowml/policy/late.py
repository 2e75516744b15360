"""Defines what happens to contributions that come after their clock is decided."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from flowml.errors import PolicyError
from flowml.numbers import MOST, real, whole
from flowml.policy.wording import Value


class Drop(Value, frozen=True, tag=True):
    """Late contributions are discarded."""


class Fold(Value, frozen=True, tag=True):
    """Late contributions join a later clock, multiplied by `decay` for each clock between.

    `decay` 1 compensates fully for the loss of late gradients (Xu et al., Live Gradient Compensation, 2020).
    """

    decay: float = 1.0

    def __post_init__(self) -> None:
        value = number(self.decay, "Fold(decay={!r}): give a number in (0, 1]")
        if not 0 < value <= 1:
            raise PolicyError(f"Fold(decay={value}): a late contribution is multiplied by a number in (0, 1]")


class Requeue(Value, frozen=True, tag=True):
    """The work items of late contributions return to the queue, and other replicas do them in a later clock."""


Late = Drop | Fold | Requeue

LateName = Literal["drop", "fold", "requeue"]

_LATE: dict[str, Callable[[], Late]] = {"drop": Drop, "fold": Fold, "requeue": Requeue}


def late_of(late: object, where: str) -> Late:
    """The late rule that a user has given as a value or by name."""
    if isinstance(late, Drop | Fold | Requeue):
        return late
    if isinstance(late, str) and late in _LATE:
        return _LATE[late]()
    raise PolicyError(
        f"{where}(late={late!r}) is not known; give 'drop', 'fold' or 'requeue', or Drop(), Fold(decay) or Requeue()"
    )


def late_name(late: Late) -> str:
    """A short text for tables: "drop", "fold", "fold 0.5", "requeue"."""
    if isinstance(late, Fold) and late.decay != 1:
        return f"fold {late.decay}"
    return type(late).__name__.lower()


def number(value: object, otherwise: str) -> int | float:
    """A Python or NumPy number as an int or a float. Raises PolicyError for NaN, a bool or anything else."""
    count = whole(value)
    if count is not None and abs(count) <= MOST:
        return count
    found = real(value)
    if found is None or math.isnan(found):
        raise PolicyError(otherwise.format(value))
    return found
