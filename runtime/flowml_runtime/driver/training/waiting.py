"""Estimates what slow replicas cost where no home decides a clock, from what replicas report to the driver.

Among     replicas that add up gradients or average parameters among themselves: the fit is run again without what
          made them late (`paces`)
Bound     replicas that may not run further ahead of the slowest one than their staleness allows
Portions  replicas that take portions of a batch: what it takes longer than the good ones need for their shares
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from flowml.policy import Gossip, can_read
from flowml.policy.waits import MOST_LATE, Waits, punctual, shared
from flowml_runtime import wire
from flowml_runtime.driver.training.paces import Paces
from flowml_runtime.driver.training.stragglers import SLOW
from flowml_runtime.protocol.training.clocks import Clocks
from flowml_runtime.protocol.training.terms import RETIRED, Terms

Rows = list[tuple[int, float, float]]
"""(replica, how far behind the middle replica, its share of the cost)."""


def modelled(terms: Terms) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The stores whose clocks `Among` models, and those of them for which it alone says what late replicas cost.

    It cannot model clocks that leave replicas out. Where a home decides, the arrivals there say the same, unless
    decisions overlap or a site arrives as one. But if the home itself stands still, all arrivals are late alike.
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
    return (tuple(found) if alone or not terms.drops else ()), tuple(alone)


class Among:
    """The clocks of stores that the replicas keep in step among themselves.

    A replica is late in a step if its own work takes clearly longer than that of the middle replica. Two models of the
    fit run side by side: one with the durations that were reported, and one in which late steps take as long as the
    middle replica's. The cost of a clock is how much more the first one is behind after it. It is charged to the
    replicas that were late since the clock before, in proportion to what they were behind, or else to those before.
    """

    def __init__(self, terms: Terms, stores: Sequence[int], began: float, first: int = 0) -> None:
        """`first` is the first clock."""
        self._replicas = terms.replicas
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

    def reported(self, report: wire.Report, now: float) -> list[tuple[int, Waits]]:
        """What the clocks waited for, if this was the last report that was missing."""
        self._reports.setdefault(report.clock, {})[report.replica] = now, report.seconds
        found: list[tuple[int, Waits]] = []
        while len(self._reports.get(self._clock, ())) == self._replicas:
            waited = self._step(self._reports.pop(self._clock))
            found += [] if waited is None else [(self._clock, waited)]
            self._clock += 1
        return found

    def _step(self, reports: dict[int, tuple[float, float]]) -> Waits | None:
        rows, middle = _late({r: own for r, (_, own) in reports.items()})
        own = np.array([[reports[r][1] for r in range(self._replicas)]] * 2)
        own[1, [r for r, _, _ in rows]] = middle
        ends = self._paces.step(self._clock, own)
        for replica, behind, share in rows:
            known = self._late.get(replica, (0.0, 0.0))
            self._late[replica] = known[0] + behind, known[1] + share
        if not self._paces.due(self._clock):
            return None
        cost = max(float(ends[0] - ends[1]) - self._behind, 0.0)
        self._behind += cost
        late, self._late = [(r, *seconds) for r, seconds in self._late.items()], {}
        self._charged = late or [(r, 0.0, share) for r, _, share in self._charged]
        total = sum(share for _, _, share in self._charged)
        charged = tuple((r, behind, cost * share / total) for r, behind, share in self._charged[-MOST_LATE:])
        times = [at for at, _ in reports.values()]
        began, self._began = self._began, max(*times, self._began)
        return Waits(self._began - began, max(times) - min(times), charged if late or cost else ())


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
        self._others = max(terms.replicas - 1, 1)
        self._waiting: dict[int, tuple[int, float]] = {}
        """Replica that waits -> the clock that it cannot begin, and since when."""
        self.waited: Counter[int] = Counter()
        """By replica, the seconds that it has waited."""

    def reported(self, replica: int, clock: int, now: float) -> Waits | None:
        """What others have waited for this replica, which now is at `clock`; `RETIRED` if it has no more work."""
        if clock <= self._clocks[replica]:
            return None
        self._clocks.raise_to(clock, replica)
        freed = [(r, since) for r, (at, since) in self._waiting.items() if self._may_begin(at)]
        for waiting, since in freed:
            del self._waiting[waiting]
            self.waited[waiting] += now - since  # pyright: ignore[reportArgumentType]
        self._waiting.pop(replica, None)
        if clock < RETIRED and not self._may_begin(clock):
            self._waiting[replica] = (clock, now)
        waited = [now - since for r, since in freed if r != replica]
        if not waited:
            return None
        cost = sum(waited) / self._others
        return Waits(cost, 0.0, ((replica, max(waited), cost),))

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

    def __init__(self, terms: Terms, portions: int, began: float) -> None:
        self._replicas, self._members, self._share = terms.replicas, terms.members, portions
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
        results = {r: len(batch.times.get(r, ())) + batch.copies[r] for r in range(self._replicas)}
        few = {r for r, number in results.items() if number < SLOW * self._share}
        ends = sorted((times[min(self._share, len(times)) - 1], r) for r, times in batch.times.items() if r not in few)
        if len(ends) < (self._replicas + 1) // 2:
            return Waits(now - began)  # there is no middle one to compare with
        middle = ends[(self._replicas - 1) // 2][0]
        on_time = punctual([end for end, _ in ends], middle, max(middle - began, 0.0))
        usual = ends[on_time - 1][0]
        pace = max(usual - began, 1e-9) / self._share
        lacks = {r: (end - usual) / pace for end, r in ends[on_time:]} | {r: self._share - results[r] for r in few}
        behind, total = max(now - usual, 0.0), sum(lacks.values())
        rows = tuple((r, behind, behind * lack / total) for r, lack in sorted(lacks.items()))
        return Waits(now - began, now - ends[0][0], rows[-MOST_LATE:])
