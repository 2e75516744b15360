"""Counts how stale the contributions are that a home applies, for the history of a fit. Nothing depends on it.

A contribution belongs to a step of the fit: to the clock that is committed with it, or to its own clock in a store that
applies contributions as they arrive. If replicas share no clocks, a step is as many contributions as there are
replicas, in the order in which they are applied, as it is as many reports in the history.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from flowml.policy import Gossip
from flowml.policy.apply import scales
from flowml_runtime.protocol.training.store import Gathering, Store
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import RETIRED, Terms

Rows = tuple[tuple[int, int, tuple[tuple[int, int, int], ...]], ...]
"""(store, the first step of which it may tell more, rows of (step, staleness, number of contributions)), as in
`wire.Staleness`."""


def may_be_stale(store: StoreTerms) -> bool:
    """Whether contributions to a store may be based on another version than the newest, or the policy asks for that.

    A sum over all replicas is never stale.
    """
    policy = store.policy
    return not store.collective and (
        policy.staleness > 0 or policy.every.delay > 0 or policy.late.folds or scales(policy.apply)
    )


def counted(store: StoreTerms) -> bool:
    """Whether the home of a store counts how stale the contributions are."""
    return may_be_stale(store) and not store.shared and not isinstance(store.policy.remote, Gossip)


class Staleness:
    """The counts of one worker, for those of its `stores` that are counted."""

    @staticmethod
    def of(terms: Terms, stores: Mapping[int, Store]) -> Staleness:
        """The counts of the stores of a worker; most workers have none."""
        mine = {number: store for number, store in stores.items() if counted(store.terms)}
        return Staleness(aligned=terms.aligned, replicas=terms.replicas, stores=mine) if mine else _NOTHING

    def __init__(self, *, aligned: bool, replicas: int, stores: Mapping[int, Store]) -> None:
        self._aligned, self._replicas, self._stores = aligned, replicas, stores
        self._applied = {number: _before(store) for number, store in self._stores.items()}
        self._told = {number: self._reached(number) for number in self._stores}
        """By store, the first step of which it may tell more."""
        self._counts: dict[int, Counter[tuple[int, int]]] = {}
        """(step, staleness) -> number, of the stores that have something to tell."""

    def add(self, index: int, applied: Sequence[Gathering]) -> tuple[int, ...]:
        """The store applies these contributions to its version, and its floor is set.

        Returns their staleness: the versions since the one that each is based on. Returns nothing if it is not counted.
        """
        store = self._stores.get(index)
        if store is None:
            return ()
        counts = self._counts.setdefault(index, Counter())
        found = tuple(store.version - gathering.base_version for gathering in applied)
        for gathering, behind in zip(applied, found, strict=True):
            counts[self._step(index, store, gathering), behind] += 1
            self._applied[index] += 1
        return found

    def finish(self, index: int) -> None:
        """The store applies nothing more."""
        if index in self._stores:
            self._counts.setdefault(index, Counter())

    def take(self) -> Rows:
        """What was counted since the last time, of the stores that have applied all or as much as a step has."""
        if not self._counts:
            return ()
        ready = [index for index in sorted(self._counts) if self._is_ready(index)]
        rows: list[tuple[int, int, tuple[tuple[int, int, int], ...]]] = []
        for index in ready:
            self._told[index] = self._reached(index)
            counts = sorted(self._counts.pop(index).items())
            rows.append((index, self._told[index], tuple((step, behind, n) for (step, behind), n in counts)))
        return tuple(rows)

    def _is_ready(self, index: int) -> bool:
        return self._reached(index) > self._told[index] or self._counts[index].total() >= self._replicas

    def _step(self, index: int, store: Store, gathering: Gathering) -> int:
        if store.terms.clocked:
            return store.floor - 1
        if self._aligned:
            return gathering.clock
        return (self._applied[index] // self._replicas + 1) * store.terms.every - 1

    def _reached(self, index: int) -> int:
        store = self._stores[index]
        if store.finished:
            return RETIRED
        return store.floor if self._aligned else self._applied[index] // self._replicas * store.terms.every


_NOTHING = Staleness(aligned=True, replicas=1, stores={})
"""What all workers share that count nothing."""


def _before(store: Store) -> int:
    """How many contributions a store without common clocks has applied before a run that goes on."""
    clocks = () if store.clocks is None else store.clocks.all
    return sum(clock for clock in clocks if clock < RETIRED) // store.terms.every
