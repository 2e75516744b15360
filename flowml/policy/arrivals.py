"""Defines what a way to complete a clock is: it looks at the arrivals of contributions, and says if they are enough.

These values travel in the plan. The leader's state machine counts arrivals in an `Arrivals`, and asks `decide` after
each one, and again at the time that the answer named. `decide` is a pure function, so it is tested alone.
To add a way to complete a clock, write a class that follows `Completion`, and register it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from flowml.policy.answers import Answer
from flowml.policy.kinds import Knob
from flowml.policy.late import Drop, Late

Of = Literal["replicas", "samples", "microbatches"]


@dataclass(slots=True)
class Arrivals:
    """The complete contributions to one clock of one group of layers, as counted so far."""

    members: int
    """The number of replicas."""
    full: float
    """The number of microbatch gradients in a contribution that lacks none."""
    rows: float
    """The number of examples in a microbatch."""
    began: float
    """When the clock before was decided, in seconds."""
    window_s: float | None = None
    """The window learnt from the `spread` of earlier clocks; None before the first one."""
    hopeful: int = 0
    """The number of replicas that are not complete but still can become so."""
    weight: int = 0
    """The number of microbatch gradients in the complete contributions."""
    times: dict[int, float] = field(default_factory=dict[int, float])
    """The time at which each complete replica arrived, in the order of arrival."""
    among: Sequence[int] | None = None
    """The numbers of the replicas, if they are not those below `members`."""

    @property
    def count(self) -> int:
        return len(self.times)

    def missing(self) -> str:
        """The first replicas that are not complete, as text."""
        among = range(self.members) if self.among is None else self.among
        absent = [str(r) for r in among if r not in self.times]
        return ", ".join([*absent[:8], *(["…"] if len(absent) > 8 else [])])

    def spread_s(self, count: int) -> float:
        """The time from the first arrival to the one that made `count` complete."""
        times = list(self.times.values())
        return times[count - 1] - times[0]


@dataclass(slots=True)
class Spread:
    """Learns how far apart the arrivals of a quorum usually are: their mean and four mean deviations.

    This is the estimate of TCP's retransmission timer (Jacobson, Congestion avoidance and control, 1988). Only the
    replicas of the quorum count, so that a straggler does not lengthen the wait for itself.
    """

    window_s: float | None = None
    _mean: float = 0.0
    _deviation: float = 0.0

    def add(self, spread_s: float) -> None:
        if self.window_s is None:
            self._mean, self._deviation = spread_s, spread_s / 2
        else:
            self._deviation += (abs(spread_s - self._mean) - self._deviation) / 4
            self._mean += (spread_s - self._mean) / 8
        self.window_s = self._mean + 4 * self._deviation


class Completion(Knob):
    """What completes a clock. A kind has at least `decide`."""

    __slots__ = ()

    of: Of = "replicas"
    """What is counted. `"microbatches"`, between which replicas may stop, is for `Quorum` and `Deadline` alone."""
    late: Late = Drop()
    """What happens to contributions that come after their clock is decided."""

    def decide(self, arrivals: Arrivals, now: float) -> Answer:
        """Whether the clock is complete with these arrivals at time `now`, in seconds: `Wait`, `Decide` or `Never`."""
        raise NotImplementedError

    def need(self, members: int) -> int:
        """How many of `members` are always waited for. The spread of their arrivals is what `Arrivals.window_s` is
        learnt from, and they share the work of a step that waits."""
        return members

    def never_drops(self, members: int) -> bool:
        """Whether none of `members` replicas can come too late."""
        return False

    @property
    def waits_for_all(self) -> bool:
        """Whether it needs every replica whatever their number, as the default does."""
        return False

    @property
    def by_replica(self) -> bool:
        """Whether it depends on what each replica has computed, so that a site cannot take part as one."""
        return False

    @property
    def cuts(self) -> bool:
        """Whether replicas stop between two microbatches and contribute what they have."""
        return False

    def goes_on(self) -> bool:
        """Whether a clock is complete with whichever replicas are there, once a time limit is over."""
        return False

    def describe(self) -> str:
        """A short text for tables: "quorum 0.75 drop", "coded 1 cyclic"."""
        return f"{self} {self.late.describe()}"
