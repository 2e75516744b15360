"""Runs the steps of replicas that keep in step among themselves again, with other durations.

Where replicas add up gradients or average parameters, no home decides a clock. A slow replica delays its neighbours,
and they delay theirs. So the times at which they report do not say what the slow one costs. The durations of their own
work do, which are those of their steps without the waits. A step ends when its own work has ended and the others are as
far as it waits for; then the next one begins. The model has no messages, because their times are alike in both runs.

    begun[r, c + 1] = max(begun[r, c] + own[r, c], what r waits for at the end of step c)

    sums over replicas      the own work of all, `staleness` clocks before
    sums within a site      the own work of its replicas
    averages of neighbours  the beginning of their steps, or the end with an outer optimizer
    mirrors                 the own work of all senders, `staleness` clocks before
    decisions, bounds       the own work of all senders, `staleness` clocks before; of a quorum, of the first so many

A replica that a decision leaves out may skip clocks. It then goes on where it stands.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flowml.policy import Deadline, Gossip, Outer, Spread
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Group, Terms

Times = NDArray[np.float64]
"""Seconds, with a row for each run of the model and a column for each replica."""


MOST_CLOCKS = 64
"""If replicas may skip one of so many clocks, they may skip clocks at all."""


class _Decision:
    """When a group decides a clock without waiting for all of its replicas, in each run."""

    def __init__(self, group: Group, runs: int) -> None:
        self._group = group
        self._sites = [_Decision(group.at_site(n), runs) for n in range(len(group.sites))] if group.relayed else []
        self._senders = np.array(group.senders)
        self._need = group.quorum.need(len(group.senders))
        self._spreads = [Spread() for _ in range(runs)]
        self._decided = np.zeros(runs)

    def step(self, ended: Times) -> NDArray[np.float64]:
        """The time of the decision in each run, if the own work of replicas ends at these times."""
        if self._sites:
            times = np.stack([site.step(ended) for site in self._sites], axis=1)
        else:
            times = ended[:, self._senders]
        times = np.sort(times, axis=1)
        found, quorum = times[:, self._need - 1], self._group.quorum
        if isinstance(quorum, Deadline):
            rows = zip(times, self._spreads, self._decided, strict=True)
            found = np.array([self._by_deadline(quorum, *row) for row in rows])
        self._decided = found
        return found

    def _by_deadline(self, quorum: Deadline, times: NDArray[np.float64], spread: Spread, began: float) -> float:
        reached = float(times[self._need - 1])
        own = reached - float(times[0])
        learnt = own if spread.window_s is None else spread.window_s
        if reached < math.inf:
            spread.add(own)
        grace = learnt if isinstance(quorum.grace, str) else quorum.grace
        until = max(min(reached + grace, began + quorum.limit_s), float(times[0]))
        return min(until, float(times[-1]))


@dataclass
class _Store:
    """What the replicas wait for because of one store."""

    terms: StoreTerms
    replicas: int
    last_clock: int
    _graph: tuple[int, NDArray[np.intp]] | None = None
    """The round of the last clock, and whom each sender waits for in it."""
    decision: _Decision | None = None
    """What says when a clock is over that may leave replicas out."""
    senders: NDArray[np.intp] = field(init=False)
    site: NDArray[np.intp] | None = field(init=False, default=None)
    """The position of each replica's site among the senders."""

    def __post_init__(self) -> None:
        self.senders = np.array(self.terms.senders(self.replicas))
        if self.terms.sites:
            self.site = np.zeros(self.replicas, np.intp)
            for number, members in enumerate(self.terms.sites):
                self.site[list(members)] = number

    @property
    def lag(self) -> int:
        """How many clocks ago others must have come as far as they are waited for."""
        policy = self.terms.policy
        return int(policy.staleness) + policy.every.delay

    def due(self, clock: int) -> bool:
        """Whether replicas wait for each other at the end of this step."""
        policy = self.terms.policy
        if isinstance(policy.remote, Gossip):
            return policy.remote.due(clock)
        return policy.every.due(clock - self.lag, self.last_clock)

    def inside(self, clock: int, ended: Times) -> Times:
        """The ends of the own work of this step, after the sums within sites."""
        if self.site is None or not (self.terms.policy.local or self.due(clock)):
            return ended
        return self._of_sites(ended, self.site)[:, self.site]

    def outside(self, clock: int, began: Sequence[Times], ended: Sequence[Times]) -> Times | float:
        """The time until which each replica waits for others; the last elements are those of this step."""
        if not self.due(clock) or len(ended) <= self.lag:
            return 0.0
        policy = self.terms.policy
        if self.decision is not None:
            return self.decision.step(ended[-1 - self.lag])[:, None]
        if not isinstance(policy.remote, Gossip) or policy.mirrored:
            return ended[-1 - self.lag].max(axis=1, keepdims=True)
        times = ended[-1] if isinstance(policy.apply, Outer) else began[-1]
        found = times[:, self.senders][:, self._neighbours(policy.remote, clock)].max(axis=2)
        return found if self.site is None else found[:, self.site]

    def _of_sites(self, times: Times, site: NDArray[np.intp]) -> Times:
        found = np.zeros((len(times), len(self.senders)))
        for row, given in zip(found, times, strict=True):
            np.maximum.at(row, site, given)
        return found

    def _neighbours(self, gossip: Gossip, clock: int) -> NDArray[np.intp]:
        """A row for each sender with those that it waits for, filled up with itself."""
        turn = clock // gossip.every
        if self._graph is None or self._graph[0] != turn:
            rows = [list(gossip.weights(i, len(self.senders), clock)) for i in range(len(self.senders))]
            width = max(map(len, rows))
            filled = np.array([row + [i] * (width - len(row)) for i, row in enumerate(rows)], np.intp)
            self._graph = turn, filled
        return self._graph[1]


class Paces:
    """Runs of the model side by side, one for each row of `own`."""

    def __init__(self, terms: Terms, stores: Sequence[int], runs: int) -> None:
        decisions = {s: _Decision(g, runs) for g in terms.groups if g.drops for s in g.stores}
        self._terms = terms
        self._stores = [
            _Store(terms.stores[s], terms.replicas, terms.last_clock, decision=decisions.get(s)) for s in stores
        ]
        kept = 1 + max(store.lag for store in self._stores)
        self._began: deque[Times] = deque(maxlen=kept)
        self._ended: deque[Times] = deque(maxlen=kept)
        self._next = np.zeros((runs, terms.replicas))
        self._at_once = kept == 1
        """Whether what a step waits for is about that step."""
        self.skips = any(store.decision is not None for store in self._stores)
        self.skips &= any(terms.may_skip(clock) for clock in range(min(terms.total_clocks, MOST_CLOCKS)))
        """Whether replicas may leave out clocks."""

    def due(self, clock: int) -> bool:
        """Whether replicas wait for each other at the end of this step."""
        return any(store.due(clock) for store in self._stores)

    def step(self, clock: int, own: Times) -> Times:
        """The time at which each replica may begin the step after that of `clock`, for each run. Clocks come in order.

        Args:
            clock: the number of the step.
            own: the durations of own work, with a row for each run and a column for each replica; infinite for a
                replica that skips the step.
        """
        ended = self._next + own
        for store in self._stores:
            ended = np.maximum(ended, store.inside(clock, ended))
        self._began.append(self._next)
        self._ended.append(ended)
        waited = np.zeros_like(ended)
        for store in self._stores:
            waited = np.maximum(waited, store.outside(clock, self._began, self._ended))
        waited[np.isinf(waited)] = 0.0  # fewer are there than are needed
        until = np.maximum(ended, waited)
        if self.skips:
            skipped = np.isinf(ended)
            if self._at_once and self.due(clock) and self._terms.may_skip(clock):
                skipped |= self._next >= waited
            until = np.where(skipped, np.maximum(self._next, waited), until)
        self._next = until
        return until
