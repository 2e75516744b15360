"""Estimates what slow replicas cost where no home decides a clock, from what replicas report to the driver.

Among     replicas that add up gradients or average parameters among themselves, or wait by several rules: the fit is
          run again without what made them late (`paces`)
Bound     replicas that may not run further ahead of the slowest one than their staleness allows
Portions  replicas that take portions of a batch: what it takes longer than the good ones need for their shares
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flowml.policy import UNBOUNDED, Completion, Consensus, Deadline, Gossip, Quorum, can_read
from flowml.policy.apply import base_of
from flowml.policy.waits import MOST_LATE, Waits, punctual, shared
from flowml_runtime import wire
from flowml_runtime.driver.training.history import MAX_AHEAD
from flowml_runtime.driver.training.paces import Paces, Times
from flowml_runtime.driver.training.stragglers import SLOW
from flowml_runtime.protocol.training.clocks import Clocks
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import RETIRED, Terms

Rows = list[tuple[int, float, float]]
"""(replica, how far behind the middle replica, its share of the cost)."""


def modelled(terms: Terms) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The stores whose clocks `Among` models, and those of them for which it alone says what late replicas cost.

    Where one rule keeps all replicas in step, and a home decides by it, the arrivals there say the same, unless
    decisions overlap or a site arrives as one. But if the home itself stands still, all arrivals are late alike. Clocks
    that leave replicas out are modelled only beside other rules: each home sees what it waits for itself, and the fit
    waits for whatever takes longest.
    """
    decided = {store: group for group in terms.groups for store in group.stores}
    found: list[int] = []
    alone: list[int] = []
    for number, store in enumerate(terms.stores):
        among = (store.collective or isinstance(store.policy.remote, Gossip)) and not store.sites_decide
        if among or (number in decided and not decided[number].drops and not terms.speculation):
            found.append(number)
            if among or store.policy.every.delay or store.sites:
                alone.append(number)
    if mixed(terms):
        found = [s for s, store in enumerate(terms.stores) if _rule(terms, s, store) is not None]
        return tuple(found), tuple(alone)
    return (tuple(found) if alone or not terms.drops else ()), tuple(alone)


def mixed(terms: Terms) -> bool:
    """Whether layers of replicas that share clocks have several rules, or none and one, and `Among` models all.

    If each rule may leave replicas out, a decision of one is no later because of the others, so the arrivals do say
    what it waited for.
    """
    return _several(terms) and not any(
        store.sites_decide
        or isinstance(base_of(store.policy.apply), Consensus)
        or not all(map(_is_plain, (store.policy.quorum, store.policy.site_quorum)))
        for store in terms.stores
    )


def rough(terms: Terms) -> bool:
    """Whether layers have such rules that `Among` does not model together."""
    return _several(terms) and not mixed(terms)


def _several(terms: Terms) -> bool:
    if not terms.aligned or terms.speculation or terms.cut:
        return False
    rules = {_rule(terms, s, store) for s, store in enumerate(terms.stores)}
    dropping = {group.number for group in terms.groups if group.drops}
    return len(rules) > 1 and not rules <= {None, *dropping}


def _is_plain(quorum: Completion | None) -> bool:
    """Whether it waits for the first so many replicas, and then at most for some time."""
    if isinstance(quorum, Deadline):
        return not quorum.cuts
    return quorum is None or (isinstance(quorum, Quorum) and quorum.of == "replicas" and not quorum.ends_epoch)


def _rule(terms: Terms, number: int, store: StoreTerms) -> object:
    """What makes replicas wait for each other because of this store, as a value; None if nothing does."""
    policy, group = store.policy, terms.group_of.get(number)
    if isinstance(policy.remote, Gossip):
        return policy.remote, policy.every, policy.staleness
    if store.collective:
        return "sums", policy.every, policy.staleness, policy.local
    if group is not None:
        return group
    return None if store.shared or policy.staleness == UNBOUNDED else ("bound", policy.every, policy.staleness)


class Among:
    """The clocks of stores that the replicas keep in step among themselves, or by several rules.

    A replica is late in a step if its own work takes clearly longer than that of the middle replica. Two models of the
    fit run side by side: one with the durations that were reported, and one in which late steps take as long as the
    middle replica's, and no replica skips a step. The cost of a clock is how much more the first one is behind after
    it. It is charged to the replicas that were late since the clock before, in proportion to what they were behind, or
    else to those before.
    """

    def __init__(self, terms: Terms, stores: Sequence[int], began: float, first: int = 0) -> None:
        """`first` is the first clock."""
        self._replicas = terms.replicas
        self._last = terms.last_clock
        self._began = began
        self._paces = Paces(terms, stores, runs=2)
        self._behind = 0.0
        """By how much the first model is behind the second. It may become less; then nothing is charged."""
        self._late: dict[int, tuple[float, float]] = {}
        """Replica -> (seconds behind, its share), since the clock before at which replicas waited."""
        self._charged: Rows = []
        """The replicas that were late last."""
        self._reports: dict[int, dict[int, tuple[float, float]]] = {}
        """Clock -> replica -> when it reported, and the duration of its own work."""
        self._clock = first
        self._reached = np.full(self._replicas, first - 1) if self._paces.skips else None
        """The newest clock that each replica has reported, if they may skip some."""
        self._started = math.inf
        """When the first step began."""
        self.left = 0.0
        """By how much the last replica is behind at the end, beyond what is charged."""

    @property
    def skips(self) -> bool:
        """Whether replicas may leave out clocks. Then what they do after the last one is not charged."""
        return self._reached is not None

    def reported(self, report: wire.Report, now: float) -> list[tuple[int, Waits]]:
        """What the clocks waited for that are over for all replicas. A report of a clock that went on without it comes
        too late to be charged."""
        if report.clock >= self._clock:
            self._reports.setdefault(report.clock, {})[report.replica] = now, report.seconds
        if self._reached is not None:
            self._reached[report.replica] = max(self._reached[report.replica], report.clock)
        found: list[tuple[int, Waits]] = []
        while self._is_over():
            found += self._next()
        return found

    def rest(self) -> list[tuple[int, Waits]]:
        """What the remaining clocks waited for, after the last report."""
        found: list[tuple[int, Waits]] = []
        while self._reached is not None and self._reports:
            found += self._next()
        return found

    def _is_over(self) -> bool:
        reports = self._reports.get(self._clock, ())
        if self._reached is None or len(reports) == self._replicas:
            return len(reports) == self._replicas
        if len(self._reports) > MAX_AHEAD:
            return True
        return bool(self._reports) and int(self._reached.min()) >= self._clock

    def _next(self) -> list[tuple[int, Waits]]:
        reports, clock = self._reports.pop(self._clock, {}), self._clock
        self._clock += 1
        waited = self._step(clock, reports) if reports else None
        return [] if waited is None else [(clock, waited)]

    def _step(self, clock: int, reports: dict[int, tuple[float, float]]) -> Waits | None:
        if self._started == math.inf:
            self._started = min(at - own for at, own in reports.values())
        rows, middle = _late({r: own for r, (_, own) in reports.items()})
        own = np.full((2, self._replicas), np.inf)
        own[:, list(reports)] = [seconds for _, seconds in reports.values()]
        own[1, [r for r in range(self._replicas) if r not in reports] + [r for r, _, _ in rows]] = middle
        until = self._paces.step(clock, own)
        for replica, behind, share in rows:
            known = self._late.get(replica, (0.0, 0.0))
            self._late[replica] = known[0] + behind, known[1] + share
        if not self._paces.due(clock) and clock != self._last:
            return None
        cost = max(self._lag(clock, until, reports) - self._behind, 0.0)
        self._behind += cost
        late, self._late = [(r, *seconds) for r, seconds in self._late.items()], {}
        self._charged = late or [(r, 0.0, share) for r, _, share in self._charged]
        total = sum(share for _, _, share in self._charged)
        charged = tuple((r, behind, cost * share / total) for r, behind, share in self._charged[-MOST_LATE:])
        times = [at for at, _ in reports.values()]
        began, self._began = self._began, max(*times, self._began)
        return Waits(self._began - began, max(times) - min(times), charged if late or cost else ())

    def _lag(self, clock: int, until: Times, reports: dict[int, tuple[float, float]]) -> float:
        """By how much the fit is behind the one without late replicas, after `clock`.

        If replicas may be left out, the middle one is the measure. What leaves early in a step, or is read late in it,
        lets others wait less than the model says, so the fit itself is a bound.
        """
        last = float(until[0].max() - until[1].max())
        if self._reached is None:
            return last
        times = np.array([at - self._started for at, _ in reports.values()])
        real = times.max() if clock == self._last else _middle(times)
        lag = float(min(_middle(until[0]), real) - _middle(until[1]))
        self.left = min(last, float(times.max() - until[1].max())) - max(lag, self._behind)
        return lag


def _middle(times: NDArray[np.float64]) -> np.float64:
    middle = (len(times) - 1) // 2
    return np.partition(times, middle)[middle]


def _late(own: dict[int, float]) -> tuple[Rows, float]:
    """The replicas whose own work takes clearly longer than that of the middle one, and how long that takes."""
    order = sorted(own.items(), key=lambda pair: pair[1])
    times = [seconds for _, seconds in order]
    middle = times[(len(times) - 1) // 2]
    on_time = punctual(times, middle, middle)
    rows = shared(order[on_time:], times[on_time - 1])
    return [(r, seconds - middle, share) for r, seconds, share in rows], middle


class Bound:
    """The waits of replicas that may not run further ahead of the slowest one than `store` allows."""

    def __init__(self, terms: Terms, store: int) -> None:
        self._policy = terms.stores[store].policy
        self._clocks = Clocks(terms.replicas, terms.stores[store].senders(terms.members))
        self._replicas, self._others = terms.replicas, max(terms.replicas - 1, 1)
        self._waiting: dict[int, tuple[float, int]] = {}
        """Replica that waits -> since when, and which replica was the slowest then."""
        self._slowest = 0
        self.waited: Counter[int] = Counter()
        """By replica, the seconds that it has waited."""

    def reported(self, replica: int, clock: int, now: float, own: float = 0.0) -> Waits | None:
        """What this replica, which now is at `clock` after a step of so many seconds of its `own`, has waited for.

        `clock` is `RETIRED` if it has no more work. It has waited until its step began: a slower one may have sent long
        before it reported what the replica waited for.
        """
        if clock <= self._clocks[replica]:
            return None
        since, slowest = self._waiting.pop(replica, (math.inf, 0))
        waited = now - own - since
        self._clocks.raise_to(clock, replica)
        if clock < RETIRED and not self._may_begin(clock):
            self._waiting[replica] = now, self._find_slowest()
        if waited <= 0:
            return None
        self.waited[replica] += waited  # pyright: ignore[reportArgumentType]
        cost = waited / self._others
        return Waits(cost, 0.0, ((slowest, waited, cost),))

    def _find_slowest(self) -> int:
        """A replica that all wait for. It changes with the floor, so few waits need a search."""
        if self._clocks[self._slowest] > self._clocks.floor:
            self._slowest = min(range(self._replicas), key=self._clocks.__getitem__)
        return self._slowest

    def _may_begin(self, clock: int) -> bool:
        every, floor = self._policy.every, self._clocks.floor
        return can_read(clock, (floor,), self._policy.staleness, every.push, every.offset, every.delay)


@dataclass(slots=True)
class _Batch:
    """The first results of the portions of a batch: which there are, and when each replica's own ones came."""

    portions: set[int] = field(default_factory=set[int])
    times: dict[int, list[float]] = field(default_factory=dict[int, list[float]])
    """Without those of copies, before which a replica has waited."""
    copies: Counter[int] = field(default_factory=Counter[int])
    """By replica, the results of copies."""


class Portions:
    """The batches of a fit whose replicas take portions, and copies of late ones.

    If all replicas were good, each would compute its share of `portions`, one after the other. What a batch takes
    longer than the good ones took for their shares is charged to the late ones, in proportion to what they lack.
    """

    def __init__(self, terms: Terms, portions: int, began: float, lost: Collection[int] = ()) -> None:
        """Nothing waits for the `lost` replicas, whose portions others compute."""
        self._live = [r for r in range(terms.replicas) if r not in lost]
        self._members, self._share = terms.members, portions
        self._began = began
        self._batches: dict[int, _Batch] = {}

    def reported(self, report: wire.Report, now: float) -> Waits | None:
        """What the batch waited for, if this was its last portion."""
        clock, portion = divmod(report.item.sequence, self._members)
        batch = self._batches.setdefault(clock, _Batch())
        if portion in batch.portions:
            return None
        batch.portions.add(portion)
        if report.item.copy:
            batch.copies[report.replica] += 1
        else:
            batch.times.setdefault(report.replica, []).append(now)
        return self._waits(self._batches.pop(clock), now) if len(batch.portions) == self._members else None

    def _waits(self, batch: _Batch, now: float) -> Waits:
        began, self._began = self._began, now
        results = {r: len(batch.times.get(r, ())) + batch.copies[r] for r in self._live}
        few = {r for r, number in results.items() if number < SLOW * self._share}
        ends = sorted((times[min(self._share, len(times)) - 1], r) for r, times in batch.times.items() if r not in few)
        if len(ends) < (len(self._live) + 1) // 2:
            return Waits(now - began)  # there is no middle one to compare with
        middle = ends[(len(self._live) - 1) // 2][0]
        on_time = punctual([end for end, _ in ends], middle, max(middle - began, 0.0))
        usual = ends[on_time - 1][0]
        pace = max(usual - began, 1e-9) / self._share
        lacks = {r: (end - usual) / pace for end, r in ends[on_time:]} | {r: self._share - results[r] for r in few}
        behind, total = max(now - usual, 0.0), sum(lacks.values())
        rows = tuple((r, behind, behind * lack / total) for r, lack in sorted(lacks.items()))
        return Waits(now - began, now - ends[0][0], rows[-MOST_LATE:])
