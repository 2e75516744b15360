"""Defines what else may complete a clock, portions of batches and copies of them, and lists all that may."""

from __future__ import annotations

import math

import msgspec

from flowml.errors import PolicyError
from flowml.numbers import whole
from flowml.policy.answers import Answer, Decide, Wait
from flowml.policy.arrivals import Arrivals, Completion
from flowml.policy.kinds import register
from flowml.policy.late import number
from flowml.policy.quorum import Coded, Deadline, Quorum
from flowml.policy.wording import Value


@register
class Speculate(Completion, Value, frozen=True, tag=True):
    """The batch is cut into portions, an idle replica takes the next, and portions that take long are computed twice.

    The first result of a portion is applied, and a second one is refused. So each step applies the gradient of the
    whole batch, and no portion waits for one slow replica (Dean et al., Large Scale Distributed Deep Networks, NeurIPS
    2012, Sandblaster; Dean & Ghemawat, MapReduce, OSDI 2004, backup tasks).

    Args:
        portions: the number of portions of the batch for each replica. Fast replicas compute more, slow ones fewer.
        after: an idle replica waits so many times as long as its last portion took, before it takes a copy of a portion
            that another replica has begun.
        copies: the most copies of one portion; 0: none, so that portions are only shared out.

    Raises:
        PolicyError: for a value that is out of range.
    """

    portions: int = 4
    after: float = 1.0
    copies: int = 1

    def __post_init__(self) -> None:
        for name, least in (("portions", 1), ("copies", 0)):
            value = whole(getattr(self, name))
            if value is None or value < least:
                raise PolicyError(f"Speculate({name}={getattr(self, name)!r}): give a whole number of at least {least}")
            msgspec.structs.force_setattr(self, name, value)
        after = number(self.after, "Speculate(after={!r}): give a number of at least 0")
        if not 0 <= after < math.inf:
            raise PolicyError(f"Speculate(after={after}): it multiplies a time; give a number of at least 0")
        msgspec.structs.force_setattr(self, "after", float(after))

    @property
    def by_replica(self) -> bool:
        return True

    def never_drops(self, members: int) -> bool:
        return True

    def decide(self, arrivals: Arrivals, now: float) -> Answer:
        """Decide when each portion has arrived once."""
        return Decide() if arrivals.count == arrivals.members else Wait()

    def copies_at(self, idle_since: float, took_s: float) -> float:
        """When a replica takes a copy that has been idle since then, and whose last portion took so long."""
        return idle_since + self.after * took_s

    def describe(self) -> str:
        return f"speculate {self.portions}"

    def __str__(self) -> str:
        return f"Speculate({self.portions})"


COMPLETIONS = (Quorum, Deadline, Coded, Speculate)
"""Those of flowml, of which errors tell."""


def cutting(quorum: Completion | None) -> Quorum | Deadline | None:
    """The quorum, if it stops replicas between two microbatches."""
    return quorum if isinstance(quorum, Quorum | Deadline) and quorum.cuts else None
