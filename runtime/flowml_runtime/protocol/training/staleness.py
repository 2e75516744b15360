"""Counts how stale the contributions are that a home applies, for the history of a fit. Nothing depends on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from flowml.policy import Fold
from flowml.policy.apply import scales
from flowml_runtime.protocol.training.terms import StoreTerms, Terms

Rows = tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
"""(store, pairs of (staleness, number of contributions)), as in `wire.Staleness`."""


def may_be_stale(store: StoreTerms) -> bool:
    """Whether contributions to a store may be based on another version than the newest, or the policy asks for that.

    A sum over all replicas is never stale.
    """
    policy = store.policy
    return not store.collective and (
        policy.staleness > 0 or policy.every.delay > 0 or isinstance(policy.late, Fold) or scales(policy.apply)
    )


class Staleness:
    """The counts of one worker. `stores` are those whose contributions are counted."""

    def __init__(self, terms: Terms, stores: Iterable[int]) -> None:
        self.stores = tuple(s for s in stores if may_be_stale(terms.stores[s]))
        self._step = terms.replicas * len(self.stores)
        """The number of contributions of one step."""
        self._counted: dict[int, Counter[int]] = {}
        self._waiting = 0
        """The number of contributions that are counted and not yet taken."""
        self._unfinished = list(self.stores)

    def add(self, store: int, staleness: Iterable[int]) -> tuple[int, ...]:
        """The store applies contributions with this staleness: the versions since the one that they are based on.

        Returns it; nothing if it is not counted, and then does not compute it either.
        """
        if store not in self.stores:
            return ()
        found = tuple(staleness)
        self._counted.setdefault(store, Counter()).update(found)
        self._waiting += len(found)
        return found

    def finish(self, store: int) -> None:
        """The store applies nothing more."""
        self._unfinished = [s for s in self._unfinished if s != store]

    def take(self) -> Rows:
        """What was counted since the last time, once there are as many contributions as a step has, or at the end."""
        if not self._waiting or (self._waiting < self._step and self._unfinished):
            return ()
        counted, self._counted, self._waiting = self._counted, {}, 0
        return tuple((store, tuple(sorted(found.items()))) for store, found in sorted(counted.items()))
