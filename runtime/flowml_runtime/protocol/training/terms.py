"""What the training machines need to know of a plan, and the events that more than one of them takes.

`Terms` is a small frozen view of `plan.Training`: which stores push at which clock, how many replicas a
clock's decision needs, and which stages send the parts of a contribution. `Places` says which worker does
what. Every machine of a run derives the same answers from them, so none has to be told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, cast

from flowml.devices import worker_of
from flowml.plan import Training
from flowml.policy import due

RETIRED = 2**53 - 1
"""The clock of a replica that is not waited for any more: the largest that the wire carries."""


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

    def lasting(self, total_clocks: int) -> Terms:
        """The same rules for a run of that many clocks."""
        return replace(self, total_clocks=total_clocks)

    @cached_property
    def aligned(self) -> bool:
        """Whether replicas share clocks, so that each runs the same ones. Else each runs as many as it can."""
        return any(s.clocked for s in self.stores)

    @cached_property
    def decides(self) -> bool:
        """Whether any clock has a decision."""
        return any(s.decided for s in self.stores)

    @cached_property
    def drops(self) -> bool:
        """Whether any decision may leave a live replica out."""
        return any(s.decided and s.need < self.replicas for s in self.stores)

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


@dataclass(frozen=True)
class Places:
    """Which worker does what in a run.

    `stages[r][s]` runs stage s of replica r. `homes[i]` are the workers that hold store i; the value at the first is
    the result of the run. `readers[i][home]` are the workers that hear of each version that `home` makes of store i.
    """

    stages: tuple[tuple[str, ...], ...]
    homes: tuple[tuple[str, ...], ...]
    readers: tuple[Mapping[str, tuple[str, ...]], ...]

    @staticmethod
    def of(training: Training) -> Places:
        homes = tuple(_workers(s.copies) for s in training.stores)
        readers = tuple(
            {home: _workers(s.read_from([c for c in s.copies if worker_of(c) == home])) for home in homes[i]}
            for i, s in enumerate(training.stores)
        )
        return Places(tuple(tuple(map(worker_of, devices)) for devices in training.replicas), homes, readers)

    @cached_property
    def workers(self) -> tuple[str, ...]:
        """All that take part."""
        stages = (worker for replica in self.stages for worker in replica)
        return tuple(dict.fromkeys((*stages, *(worker for homes in self.homes for worker in homes))))

    def stages_on(self, worker: str) -> tuple[tuple[int, int], ...]:
        """(replica, stage) of all that this worker runs."""
        return self._stages_on.get(worker, ())

    def stores_on(self, worker: str) -> tuple[int, ...]:
        """The stores that live on this worker."""
        return self._stores_on.get(worker, ())

    def replicas_on(self, worker: str) -> tuple[int, ...]:
        """The replicas that cannot go on without this worker."""
        return tuple(dict.fromkeys(replica for replica, _ in self.stages_on(worker)))

    @cached_property
    def _stages_on(self) -> dict[str, tuple[tuple[int, int], ...]]:
        found: dict[str, list[tuple[int, int]]] = {}
        for replica, workers in enumerate(self.stages):
            for stage, worker in enumerate(workers):
                found.setdefault(worker, []).append((replica, stage))
        return {worker: tuple(stages) for worker, stages in found.items()}

    @cached_property
    def _stores_on(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, list[int]] = {}
        for store, homes in enumerate(self.homes):
            for worker in homes:
                found.setdefault(worker, []).append(store)
        return {worker: tuple(stores) for worker, stores in found.items()}


def _workers(devices: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(worker_of, devices)))


@dataclass(frozen=True, slots=True)
class Committed:
    """The decision for `clock`: it is complete with the work of every replica but those in `excluded`."""

    clock: int
    excluded: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """A worker of `replica` died: nothing more comes from it that is worth waiting for."""

    replica: int
