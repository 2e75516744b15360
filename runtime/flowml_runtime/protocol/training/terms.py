"""What the training machines need to know of a plan, and the events that more than one of them takes.

`Terms` is a small frozen view of `plan.Training`: which stores push at which clock, how many replicas a
clock's decision needs, and which stages send the parts of a contribution. Every machine of a run derives
the same answers from it, so none has to be told.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

from flowml.plan import Training
from flowml.policy import due

RETIRED = 2**53 - 1
"""The clock of a replica that nobody needs to wait for any more: the largest that the wire carries."""


@dataclass(frozen=True, slots=True)
class StoreTerms:
    """One store: how it is kept in step, and for each part of a contribution the stage that sends it.

    `collective`: what comes to a home stands for all replicas, and there are several homes.
    """

    stages: tuple[int, ...]
    clocked: bool = True
    need: int = 1
    every: int = 1
    staleness: float = 0
    apply: Literal["mean", "sum"] = "mean"
    collective: bool = False

    @property
    def decided(self) -> bool:
        """Whether a decision says, clock by clock, what is applied. A sum over all replicas needs none."""
        return self.clocked and not self.collective


@dataclass(frozen=True)
class Terms:
    """A training run in numbers. `total_clocks` counts the clocks of each replica, if any store is clocked."""

    replicas: int
    stages: int
    microbatches: int
    stores: tuple[StoreTerms, ...]
    total_clocks: int

    @staticmethod
    def of(training: Training, total_clocks: int) -> Terms:
        stores = tuple(
            StoreTerms(
                stages=tuple(p.stage for p in s.parts),
                clocked=s.clocked,
                need=s.need,
                every=s.every,
                staleness=s.staleness,
                apply=cast("Literal['mean', 'sum']", s.apply_mode),
                collective=s.collective,
            )
            for s in training.stores
        )
        stages = len(training.replicas[0])
        return Terms(len(training.replicas), stages, training.microbatches, stores, total_clocks)

    @cached_property
    def aligned(self) -> bool:
        """Whether replicas share clocks, so that each runs the same ones. Else each runs as many as it can."""
        return any(s.clocked for s in self.stores)

    @cached_property
    def decides(self) -> bool:
        """Whether any clock has a decision."""
        return any(s.decided for s in self.stores)

    @cached_property
    def accumulates(self) -> bool:
        """Whether any store gathers the gradients of several steps."""
        return any(s.every > 1 for s in self.stores)

    @cached_property
    def _needs(self) -> dict[int, int]:
        """For each rhythm of the stores that are decided upon the most that one of them needs."""
        needs: dict[int, int] = {}
        for store in self.stores:
            if store.decided:
                needs[store.every] = max(needs.get(store.every, 1), store.need)
        return needs

    @property
    def most_clocks(self) -> int:
        """How many clocks one replica can come to run: all the work there is, where replicas share no clocks."""
        return self.total_clocks if self.aligned else self.total_clocks * self.replicas

    @property
    def last_clock(self) -> int:
        """The last clock of an aligned run; -1 where each replica finds out for itself."""
        return self.total_clocks - 1 if self.aligned else -1

    def need(self, clock: int) -> int:
        """How many replicas the decision at `clock` needs; 0 if nothing that is due needs one."""
        return max((n for every, n in self._needs.items() if due(clock, every, self.last_clock)), default=0)

    def droppable(self, clock: int) -> bool:
        """Whether the decision at `clock` may leave a live replica out."""
        return 0 < self.need(clock) < self.replicas

    def due_stores(self, clock: int) -> tuple[int, ...]:
        """The stores that the decision at `clock` is about."""
        found = enumerate(self.stores)
        return tuple(i for i, s in found if s.decided and due(clock, s.every, self.last_clock))

    def flushes(self, clock: int, last: bool) -> bool:
        """Whether a store that gathers several steps pushes at `clock`."""
        return any(every > 1 and (last or due(clock, every, self.last_clock)) for every in self._rhythms)

    @cached_property
    def _rhythms(self) -> frozenset[int]:
        return frozenset(s.every for s in self.stores)


@dataclass(frozen=True, slots=True)
class Committed:
    """The decision for `clock`: it is complete with the work of `replicas`, and only these."""

    clock: int
    replicas: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """A worker of `replica` died: nothing more comes from it that anybody should wait for."""

    replica: int
