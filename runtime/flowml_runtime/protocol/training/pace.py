"""Counts the microbatches that all replicas have computed at a clock, and says when the others stop.

With `Quorum(k, of="microbatches")` a clock has enough once k of the microbatches of all its replicas are computed. A
replica that still computes then stops before its next microbatch. The worker of the first home counts for all layers,
because a replica leaves out whole microbatches. Nothing waits for the count: a replica that hears too late computes
more, and what it has computed counts.

* A replica tells how many microbatches of a clock it has computed (`cut`). Only the newest number of each counts, so
  messages may be repeated, and one may stand for several.
* When the sum is reached, `Halt` goes to the replicas that have not computed all, once for each clock.
* A share is one of the microbatches that the replicas which are left can compute, and of those that lost ones have
  computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flowml.policy import Quorum
from flowml_runtime.protocol.errors import ProtocolError, ensure
from flowml_runtime.protocol.training.terms import ReplicaLost, Terms


@dataclass(frozen=True, slots=True)
class Computed:
    """`replica` has computed so many microbatches at `clock`."""

    replica: int
    clock: int
    microbatches: int


@dataclass(frozen=True, slots=True)
class Halt:
    """These replicas begin no more microbatches of `clock`."""

    clock: int
    replicas: tuple[int, ...]


@dataclass(slots=True)
class _Clock:
    """The microbatches computed by each replica at one clock, and their sum."""

    computed: dict[int, int] = field(default_factory=dict[int, int])
    total: int = 0


class Pace:
    """The count of one run."""

    def __init__(self, terms: Terms, quorum: Quorum) -> None:
        self._replicas, self._each = terms.replicas, terms.microbatches
        self._quorum = quorum
        self._enough = quorum.need(terms.replicas * terms.microbatches)
        self._clocks: dict[int, _Clock] = {}
        self._halted = -1
        """The newest clock that has enough. Replicas run clocks in order, so all earlier ones have enough too."""
        self._lost: set[int] = set()

    def step(self, event: Computed | ReplicaLost) -> list[Halt]:
        match event:
            case ReplicaLost(replica):
                self._lost.add(replica)
                return [h for clock in sorted(self._clocks) for h in self._decide(clock)]
            case Computed():
                return self._count(event)

    def _count(self, told: Computed) -> list[Halt]:
        if told.replica >= self._replicas or not 0 < told.microbatches <= self._each:
            raise ProtocolError(
                f"replica {told.replica} has computed {told.microbatches} microbatches at clock {told.clock}, of which "
                f"{self._replicas} replicas have {self._each} each"
            )
        if told.clock <= self._halted:
            return []
        clock = self._clocks.setdefault(told.clock, _Clock())
        more = told.microbatches - clock.computed.get(told.replica, 0)
        if more <= 0:
            return []
        clock.computed[told.replica] = told.microbatches
        clock.total += more
        return self._decide(told.clock)

    def _decide(self, number: int) -> list[Halt]:
        found = self._clocks.get(number)
        if found is None or found.total < self._need(found):
            return []
        for clock in [c for c in self._clocks if c <= number]:
            del self._clocks[clock]
        self._halted = number
        late = (r for r in range(self._replicas) if r not in self._lost)
        whose = tuple(r for r in late if found.computed.get(r, 0) < self._each)
        return [Halt(number, whose)] if whose else []

    def _need(self, clock: _Clock) -> int:
        """How many microbatches are enough at a clock."""
        if not self._lost:
            return self._enough
        gone = sum(self._each - clock.computed.get(r, 0) for r in self._lost)
        return self._quorum.need(self._replicas * self._each - gone)

    def validate(self) -> None:
        """Check that sums are right, and that each clock that has enough is over."""
        for number, clock in self._clocks.items():
            ensure(number > self._halted, f"clock {number} is counted, which has enough")
            ensure(
                clock.total == sum(clock.computed.values()), f"the microbatches of clock {number} are counted wrongly"
            )
            ensure(clock.total < self._need(clock), f"clock {number} has enough, and no replica was told to stop")
