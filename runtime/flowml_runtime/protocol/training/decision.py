"""A leader's state machine decides, for one group of stores, which replicas' work completes each clock.

The stores of a group share a quorum, a late rule and a rhythm, and one decision covers them all. The home of the
group's first store makes the decisions, in the order of clocks. The policy says when: `quorum.decide` is asked
after each arrival, and at the time that it named. This machine counts:

* The decision at clock c is about the stores of the group. If they are not due at c, there is no decision.
* A replica is complete at c when the homes of all these stores have reported that they have every part of its
  contribution. An empty contribution counts, because it says that there is nothing to wait for.
* If batches are cut into portions, the members of a clock are its portions instead of the replicas. A portion is
  complete with the first contribution of any replica that computes it, and a commit names the copies that were first.
* The decision includes all replicas that are complete when it is made.
* A retired or lost replica is not waited for. Contributions that a lost replica has completed count.
* An arrival for a decided clock is late. If the group folds late contributions, the next decision includes it,
  unless it was included already. Otherwise it changes nothing.

In a tree whose parents add up what their children send (`branch`), a replica stands for those below it. A commit still
names each replica that was late, and has the coefficient of each that counts.

Arrivals are counted, so that the cost of one does not depend on the number of replicas. A commit names the replicas
that it excludes, which are few or none. It also says what the clock waited for (`flowml.policy.waits`), for the
history of the fit; nothing depends on that.

What the caller must do:

1. Report each arrival, in any order. Repetitions are harmless.
2. Send every Commit to all workers, in the order of the list.
3. Give a Tick at the time of each Wake or later. Times never go back.
4. Report that a replica has retired only after the decision about its last arrival.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

import msgspec

from flowml.errors import PolicyError
from flowml.policy import Arrivals, Coded, Decide, Never, Spread, Wait, window
from flowml.policy.waits import waits
from flowml_runtime.protocol.errors import ProtocolError, QuorumError, ensure
from flowml_runtime.protocol.training.terms import Committed, Group, ReplicaLost, Terms, Tick


class Arrived(msgspec.Struct, frozen=True):
    """A home has every part of `replica`'s contribution to `store` at `clock`, of `weight` microbatch gradients."""

    store: int
    replica: int
    clock: int
    weight: int = 1
    copy: int = 0
    terms: tuple[tuple[int, float], ...] = ()
    """If the contribution is a sum: the replicas in it that were in time, and their coefficients."""


class ReplicaRetired(msgspec.Struct, frozen=True):
    """`replica` has no more work, and all of its contributions have been decided."""

    replica: int


class Wake(msgspec.Struct, frozen=True):
    """Give a Tick at this time, in seconds."""

    at: float


MOST_STALE = 64
"""Of a larger staleness, no more clocks are considered when a commit says what its clock waited for."""

Event = Arrived | ReplicaRetired | ReplicaLost | Tick
Action = Committed | Wake


class _Clock(msgspec.Struct):
    """The arrivals for one clock: the stores of each replica that is not complete yet, and the complete ones."""

    arrivals: Arrivals
    stores: dict[int, set[int]] = {}
    copies: dict[int, int] = {}
    """Portion -> the copy of it that is complete, if that is not the first grant."""
    terms: dict[int, tuple[tuple[int, float], ...]] = {}
    """Replica -> what its contribution is the sum of, if it is one."""


class Decision:
    """Decides the clocks of one group. `began` is the time in seconds at which the run begins."""

    def __init__(
        self, terms: Terms, group: Group, began: float = 0.0, first: int = 0, late: Iterable[tuple[int, int]] = ()
    ) -> None:
        """`first` is the first clock that may need a decision. `late` are contributions to earlier clocks, (replica,
        clock), that will arrive before any other: they wait since a snapshot."""
        self._terms = terms
        self._group = group
        self._senders = frozenset(group.senders)
        self._adds_up = isinstance(group.quorum, Coded) and group.quorum.tree is not None
        """Whether a contribution may be the sum of several replicas, of each of which the commit tells."""
        self._always = group.every.push == 1
        """Whether there is a decision at each clock."""
        self._replicas_each = terms.replicas / len(group.sites) if group.sites else 1
        """The replicas that one sender stands for, as the mean."""
        self._gone: set[int] = set()
        self._clocks: dict[int, _Clock] = {}
        self._clock = first - 1
        self._began = began
        staleness = min(terms.stores[store].policy.staleness for store in group.stores)
        self._decided = deque([began], maxlen=1 + int(min(staleness, MOST_STALE) // group.every.push))
        """The times of the latest decisions. A replica could read for the next clock after the first of them."""
        self._spread = Spread()
        self._hopeless = 0
        """The number of replicas that are lost or retired, and not complete at the next clock to decide."""
        self._wake = -math.inf
        """The time of the last Wake."""
        self._owed: dict[int, dict[int, set[int]]] = {}
        """If late contributions are folded in: replica -> excluded clock -> the stores that have it."""
        self._late: list[tuple[int, int]] = []
        """Late contributions that are complete, as (replica, clock)."""
        self._restoring = set(late)
        """Those of a snapshot that have still to arrive. Nothing is decided without them."""
        for replica, clock in self._restoring:
            self._owed.setdefault(replica, {})[clock] = set()
        self._open_next(began)

    @property
    def clock(self) -> int:
        """The next clock to decide; `total_clocks` when all are decided."""
        return self._clock

    def step(self, event: Event, now: float = 0.0) -> list[Action]:
        """Process one event at time `now`, in seconds."""
        match event:
            case Arrived():
                if event.store not in self._group.stores or event.replica not in self._senders:
                    raise ProtocolError(
                        f"replica {event.replica} arrived at store {event.store} at clock {event.clock}, where it is "
                        "not due"
                    )
                if event.clock < self._clock:
                    if not self._arrive_late(event):
                        return []
                elif not self._arrive(event, now):
                    return []
            case Tick() if now < self._wake:
                return []  # another machine here has asked for this time
            case Tick():
                self._wake = -math.inf
            case _ if self._terms.speculation:
                return []  # others compute the portions of a replica that is gone
            case _:
                if event.replica in self._senders and event.replica not in self._gone:
                    self._gone.add(event.replica)
                    self._hopeless += event.replica not in self._complete()
        return self._decide(now)

    def pass_over(self, clock: int, now: float) -> list[Action]:
        """Go on after `clock`, which is over for all here, and decide later clocks that are complete.

        If late contributions are folded in, those that are complete count as late ones from now on.
        """
        while self._clock <= min(clock, self._terms.total_clocks - 1):
            for replica in self._group.senders if self._group.folds else ():
                self._owed.setdefault(replica, {})[self._clock] = self._now.stores.get(replica, set())
                if replica in self._complete():
                    self._count_late(replica, self._clock)
            self._open_next(now)
            self._decided.append(now)
        return self._decide(now)

    @property
    def _now(self) -> _Clock:
        return self._at(self._clock)

    def _at(self, clock: int) -> _Clock:
        found = self._clocks.get(clock)
        if found is None:
            steps = clock - window(clock, self._group.every.push, self._group.every.offset) + 1
            full = steps * self._terms.microbatches * self._replicas_each
            among = self._group.senders
            arrivals = Arrivals(len(among), full, self._terms.rows, self._began, among=among)
            found = self._clocks[clock] = _Clock(arrivals)
        return found

    def _complete(self) -> dict[int, float]:
        """The replicas that are complete at the next clock to decide."""
        found = self._clocks.get(self._clock)
        return found.arrivals.times if found else {}

    def _arrive(self, event: Arrived, now: float) -> bool:
        """Whether the replica has become complete at the next clock to decide."""
        if not (self._always or self._group.every.due(event.clock, self._terms.last_clock)):
            raise ProtocolError(f"replica {event.replica} arrived at clock {event.clock}, at which nothing is due")
        clock = self._at(event.clock)
        if event.replica in clock.arrivals.times:
            return False
        if len(self._group.stores) > 1:
            stores = clock.stores.setdefault(event.replica, set())
            stores.add(event.store)
            if len(stores) < len(self._group.stores):
                return False
            del clock.stores[event.replica]
        clock.arrivals.times[event.replica] = now
        if event.copy:
            clock.copies[event.replica] = event.copy
        if event.terms:
            clock.terms[event.replica] = event.terms
        clock.arrivals.weight += event.weight
        if event.clock > self._clock:
            return False
        self._hopeless -= event.replica in self._gone
        return True

    def _arrive_late(self, event: Arrived) -> bool:
        """Whether it is the last one of a snapshot, so that decisions begin."""
        stores = self._owed.get(event.replica, {}).get(event.clock)
        if stores is None:
            return False
        stores.add(event.store)
        if len(stores) < len(self._group.stores):
            return False
        self._count_late(event.replica, event.clock)
        if not self._restoring:
            return False
        self._restoring.discard((event.replica, event.clock))
        return not self._restoring

    def _count_late(self, replica: int, clock: int) -> None:
        self._late.append((replica, clock))
        owed = self._owed[replica]
        for earlier in [c for c in owed if c <= clock]:  # a replica finishes its clocks in order
            del owed[earlier]

    def _decide(self, now: float) -> list[Action]:
        found: list[Action] = []
        if self._restoring:
            return found
        while self._clock < self._terms.total_clocks:
            arrivals = self._now.arrivals
            arrivals.began, arrivals.window_s = self._began, self._spread.window_s
            arrivals.hopeful = len(self._senders) - arrivals.count - self._hopeless
            answer: object = self._group.quorum.decide(arrivals, now)  # which may be of a class of the user
            match answer:
                case Wait(until):
                    if now < until < math.inf and until != self._wake:
                        self._wake = until
                        found.append(Wake(until))
                    return found
                case Never(why):
                    raise QuorumError(
                        f"clock {self._clock}{self._group.what} cannot be completed: {self._group.quorum} {why}; see "
                        "why these replicas are late or lost, give a quorum that fewer can meet, or Deadline(share, "
                        "limit_s=), which goes on with what has arrived"
                    )
                case Decide(coefficients):
                    if not arrivals.count:
                        raise QuorumError(
                            f"clock {self._clock}{self._group.what} would be complete without any contribution; "
                            f"{self._group.quorum!r} has to wait for one at least"
                        )
                    if self._lacks_needed():
                        return found
                    found.append(self._commit(arrivals, coefficients, now))
                    self._open_next(now)
                    self._decided.append(now)
                case _:
                    raise PolicyError(
                        f"{self._group.quorum!r}.decide() answers {answer!r}; return Wait(), Wait(until), Decide() or "
                        "Never(why)"
                    )
        return found

    def _lacks_needed(self) -> bool:
        """Whether the replica without which there is no decision has still to come."""
        needs = self._group.needs
        return needs is not None and needs not in self._complete() and needs not in self._gone

    def _commit(self, arrivals: Arrivals, coefficients: tuple[tuple[int, float], ...], now: float) -> Committed:
        replicas, complete = len(self._senders), arrivals.times
        excluded = () if len(complete) == replicas else tuple(r for r in self._group.senders if r not in complete)
        if self._group.folds:
            for replica in excluded:
                stores = self._now.stores.get(replica, set())
                self._owed.setdefault(replica, {})[self._clock] = stores
        need = min(self._group.quorum.need(replicas), len(complete))
        self._spread.add(arrivals.spread_s(need))
        folded, self._late = tuple(sorted(self._late)), []
        missing = [r for r in excluded if r not in self._gone]
        if self._adds_up:
            coefficients, excluded = self._below(complete, dict(coefficients))
        copies = tuple(sorted(self._now.copies.items()))
        waited = waits(
            complete,
            replicas - len(self._gone),
            began=self._began,
            start=self._decided[0],
            decided=now,
            missing=missing,
        )
        return Committed(self._clock, excluded, self._group.number, coefficients, folded, copies, waited)

    def _below(
        self, complete: Iterable[int], given: dict[int, float]
    ) -> tuple[tuple[tuple[int, float], ...], tuple[int, ...]]:
        """The coefficients of all replicas below those that are complete, and the replicas that were late. What was in
        time and is not needed has no coefficient."""
        found: dict[int, float] = {}
        for replica in complete:
            factor = given.get(replica, 0.0)
            for below, coefficient in self._now.terms.get(replica, ((replica, 1.0),)):
                found[below] = factor * coefficient
        used = tuple((replica, a) for replica, a in sorted(found.items()) if a)
        return used, tuple(r for r in range(self._terms.replicas) if r not in found)

    def _open_next(self, now: float) -> None:
        self._clocks.pop(self._clock, None)
        self._clock += 1
        last = self._terms.last_clock
        while self._clock < self._terms.total_clocks and not self._group.every.due(self._clock, last):
            self._clock += 1
        self._began, self._wake = now, -math.inf
        self._hopeless = len(self._gone - self._complete().keys()) if self._gone else 0

    def validate(self) -> None:
        """Check that no decided clock is kept, that counts are right, and that every possible decision is made."""
        for clock, kept in self._clocks.items():
            ensure(self._clock <= clock, f"clock {clock} is kept, which is over")
            missing = [s for s in kept.stores.values() if len(s) == len(self._group.stores)]
            ensure(not missing, f"a complete replica is not counted at clock {clock}")
            ensure(not kept.stores.keys() & kept.arrivals.times.keys(), f"a replica is counted twice at clock {clock}")
        if self._clock >= self._terms.total_clocks or self._restoring:
            return
        complete = self._complete()
        ensure(self._hopeless == len(self._gone - complete.keys()), "replicas that are gone are counted wrongly")
        if len(complete) == len(self._senders) - self._hopeless and complete:
            raise ProtocolError(f"clock {self._clock} is not decided, although all have arrived that can")
