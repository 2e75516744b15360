"""The leader's machine: it decides, clock by clock, whose work completes the clock.

One decision covers all clocked stores but those that replicas add up together, so that a work item is used or late as
a whole. It is taken on one worker, the home of the first such store, in the order of clocks:

* The decision at clock c is about the stores that are due at c. Where none is due there is no decision.
* A replica is complete at c when the homes of all those stores have told that they have every part of its
  contribution. An empty contribution counts: it says that there is nothing to wait for.
* The decision falls as soon as `need(c)` replicas are complete, and includes all that are complete then.
* A replica that is retired or lost is not waited for: the need is capped at the number of replicas that
  are complete or can still become so. What a lost replica had completed counts.
* An arrival for a clock that is decided is late and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowml_runtime.protocol.training.terms import Committed, ReplicaLost, Terms


@dataclass(frozen=True, slots=True)
class Arrived:
    """A home has every part of `replica`'s contribution to `store` at `clock`."""

    store: int
    replica: int
    clock: int


@dataclass(frozen=True, slots=True)
class ReplicaRetired:
    """`replica` has no more work, and all of its contributions were decided upon."""

    replica: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Tell every home and every worker of every replica. `replicas` ascend."""

    clock: int
    replicas: tuple[int, ...]

    @property
    def event(self) -> Committed:
        return Committed(self.clock, self.replicas)


Event = Arrived | ReplicaRetired | ReplicaLost


class Decision:
    """Decides the clocks of a run. Of use only where some store is decided upon."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._live = set(range(terms.replicas))
        self._arrived: dict[int, dict[int, set[int]]] = {}
        self._clock = -1
        self._open_next()

    @property
    def clock(self) -> int:
        """The clock that is decided next; `total_clocks` when all are."""
        return self._clock

    def step(self, event: Event) -> list[Commit]:
        match event:
            case Arrived(store, replica, clock):
                if clock >= self._clock:
                    self._arrived.setdefault(clock, {}).setdefault(replica, set()).add(store)
            case ReplicaRetired(replica) | ReplicaLost(replica):
                self._live.discard(replica)
        return self._decide()

    def _decide(self) -> list[Commit]:
        commits: list[Commit] = []
        while self._clock < self._terms.total_clocks:
            complete = self._complete()
            need = min(self._terms.need(self._clock), len(self._live | complete))
            if not complete or len(complete) < need:
                break
            commits.append(Commit(self._clock, tuple(sorted(complete))))
            self._open_next()
        return commits

    def _complete(self) -> set[int]:
        due = set(self._terms.due_stores(self._clock))
        return {r for r, stores in self._arrived.get(self._clock, {}).items() if stores >= due}

    def _open_next(self) -> None:
        self._clock += 1
        while self._clock < self._terms.total_clocks and not self._terms.need(self._clock):
            self._clock += 1
        for clock in [c for c in self._arrived if c < self._clock]:
            del self._arrived[clock]

    def validate(self) -> None:
        """Nothing decided is kept; only due stores of existing replicas arrive; what could be decided is."""
        assert all(self._clock <= c < self._terms.total_clocks for c in self._arrived)
        for clock, replicas in self._arrived.items():
            due = set(self._terms.due_stores(clock))
            assert due, f"something arrived at clock {clock}, where nothing is due"
            assert all(stores and stores <= due for stores in replicas.values())
            assert set(replicas) <= set(range(self._terms.replicas))
        if self._clock < self._terms.total_clocks:
            complete = self._complete()
            assert not complete or len(complete) < min(self._terms.need(self._clock), len(self._live | complete))
