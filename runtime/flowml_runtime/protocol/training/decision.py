"""The leader's state machine decides for each clock which replicas' work completes the clock.

One decision covers all clocked stores except those whose gradients replicas add up together, so that a work item is
used or late as a whole. One worker, the home of the first such store, makes the decisions, in the order of clocks:

* The decision at clock c is about the stores that are due at c. If none is due, there is no decision.
* A replica is complete at c when the homes of all those stores have reported that they have every part of its
  contribution. An empty contribution counts, because it says that there is nothing to wait for.
* The decision is made as soon as `need(c)` replicas are complete, and includes all replicas that are complete then.
* A retired or lost replica is not waited for: the need is capped at the number of replicas that are complete or can
  still become complete. Contributions that a lost replica has completed count.
* An arrival for a decided clock is late and changes nothing.

Arrivals are counted, so that the cost of one does not depend on the number of replicas. A commit names the replicas
that it excludes, which are few or none.

What the caller must do:

1. Report each arrival, in any order. Repetitions are harmless.
2. Send every Commit to all workers, in the order of the list.
3. Report that a replica has retired only after the decision about its last arrival.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flowml_runtime.protocol.errors import ProtocolError, ensure
from flowml_runtime.protocol.training.terms import Committed, ReplicaLost, Terms


@dataclass(frozen=True, slots=True)
class Arrived:
    """A home has every part of `replica`'s contribution to `store` at `clock`."""

    store: int
    replica: int
    clock: int


@dataclass(frozen=True, slots=True)
class ReplicaRetired:
    """`replica` has no more work, and all of its contributions have been decided."""

    replica: int


Event = Arrived | ReplicaRetired | ReplicaLost


@dataclass(slots=True)
class _Tally:
    """The arrivals for one clock: the stores of each replica, and the replicas that are complete."""

    due: frozenset[int]
    stores: dict[int, set[int]] = field(default_factory=dict[int, set[int]])
    complete: set[int] = field(default_factory=set[int])


class Decision:
    """Decides the clocks of a run. Used only if some store needs decisions."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._gone: set[int] = set()
        self._tallies: dict[int, _Tally] = {}
        self._clock = -1
        self._need = 0
        self._hopeless = 0
        """The number of replicas that are lost or retired, and not complete at the next clock to decide."""
        self._open_next()

    @property
    def clock(self) -> int:
        """The next clock to decide; `total_clocks` when all are decided."""
        return self._clock

    def step(self, event: Event) -> list[Committed]:
        """Process one event. Returns the resulting commits, each of which must be sent to all workers."""
        if isinstance(event, Arrived):
            if event.clock < self._clock or not self._arrive(event):
                return []
        elif event.replica not in self._gone:
            self._gone.add(event.replica)
            self._hopeless += event.replica not in self._complete()
        return self._decide()

    def _arrive(self, event: Arrived) -> bool:
        """Whether the replica has become complete at the next clock to decide."""
        tally = self._tallies.get(event.clock)
        if tally is None:
            tally = self._tallies[event.clock] = _Tally(frozenset(self._terms.due_stores(event.clock)))
        if event.store not in tally.due or not 0 <= event.replica < self._terms.replicas:
            raise ProtocolError(
                f"replica {event.replica} arrived at store {event.store} at clock {event.clock}, where it is not due"
            )
        stores = tally.stores.setdefault(event.replica, set())
        stores.add(event.store)
        if len(stores) < len(tally.due) or event.replica in tally.complete:
            return False
        tally.complete.add(event.replica)
        if event.clock > self._clock:
            return False
        self._hopeless -= event.replica in self._gone
        return True

    def _decide(self) -> list[Committed]:
        commits: list[Committed] = []
        while self._is_decided():
            commits.append(Committed(self._clock, self._excluded()))
            self._open_next()
        return commits

    def _is_decided(self) -> bool:
        complete = len(self._complete())
        return complete > 0 and complete >= min(self._need, self._terms.replicas - self._hopeless)

    def _complete(self) -> set[int]:
        tally = self._tallies.get(self._clock)
        return tally.complete if tally else set()

    def _excluded(self) -> tuple[int, ...]:
        complete, replicas = self._complete(), self._terms.replicas
        return () if len(complete) == replicas else tuple(r for r in range(replicas) if r not in complete)

    def _open_next(self) -> None:
        self._tallies.pop(self._clock, None)
        self._clock += 1
        while self._clock < self._terms.total_clocks and not self._terms.need(self._clock):
            self._clock += 1
        self._need = self._terms.need(self._clock)
        self._hopeless = len(self._gone - self._complete()) if self._gone else 0

    def validate(self) -> None:
        """Check that no decided clock is kept, that counts are right, and that every possible decision is made."""
        for clock, tally in self._tallies.items():
            ensure(self._clock <= clock < self._terms.total_clocks, f"clock {clock} is kept, which is over")
            complete = {r for r, stores in tally.stores.items() if len(stores) == len(tally.due)}
            ensure(complete == tally.complete, f"replicas {complete ^ tally.complete} are counted wrongly")
        ensure(self._hopeless == len(self._gone - self._complete()), "replicas that are gone are counted wrongly")
        ensure(self._clock >= self._terms.total_clocks or not self._is_decided(), f"clock {self._clock} is not decided")
