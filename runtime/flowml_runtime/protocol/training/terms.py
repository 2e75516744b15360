"""The parts of a plan that the training machines use, and the events that several machines share.

`Terms` is a small frozen view of `plan.Training`: which stores push at which clock, how many replicas a
clock's decision needs, and which stages send the parts of a contribution. `Places` says which worker runs
which stages and holds which stores. All machines of a run compute the same answers from them, without messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from flowml.devices import worker_of
from flowml.plan import Training
from flowml.policy import Every, Policy
from flowml.policy.filters import feeds_back

RETIRED = 2**53 - 1
"""The clock of a replica that is no longer waited for: the largest that a message can carry."""


@dataclass(frozen=True, slots=True)
class StoreTerms:
    """One store: its synchronization policy, and for each part of a contribution the stage that sends it.

    `collective`: the store has several homes, and each contribution is the sum over all replicas.
    """

    stages: tuple[int, ...]
    policy: Policy
    collective: bool = False

    @property
    def clocked(self) -> bool:
        return self.policy.clocked

    @property
    def every(self) -> int:
        return self.policy.every.push

    @property
    def keeps(self) -> bool:
        """Whether gradients of one step may wait for the push of a later one."""
        return self.every > 1 or feeds_back(self.policy.filters)

    @property
    def decided(self) -> bool:
        """Whether a decision determines for each clock what is applied. A sum over all replicas needs none."""
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
        stores = tuple(StoreTerms(tuple(p.stage for p in s.parts), s.policy, s.collective) for s in training.stores)
        stages = len(training.replicas[0])
        return Terms(len(training.replicas), stages, training.microbatches, stores, total_clocks)

    def lasting(self, total_clocks: int) -> Terms:
        """The same terms for a run of `total_clocks`."""
        return replace(self, total_clocks=total_clocks)

    @cached_property
    def aligned(self) -> bool:
        """Whether all replicas run the same clocks. Otherwise each runs as many as it can."""
        return any(s.clocked for s in self.stores)

    @cached_property
    def decides(self) -> bool:
        """Whether any clock has a decision."""
        return any(s.decided for s in self.stores)

    @cached_property
    def drops(self) -> bool:
        """Whether any decision may leave a live replica out."""
        return any(s.decided and not s.policy.quorum.never_drops(self.replicas) for s in self.stores)

    @cached_property
    def accumulates(self) -> bool:
        """Whether any store keeps gradients of one step for the push of a later one."""
        return any(s.keeps for s in self.stores)

    @cached_property
    def _needs(self) -> dict[Every, int]:
        """For each rhythm of the stores with decisions, the largest number of replicas that such a store needs."""
        needs: dict[Every, int] = {}
        for store in self.stores:
            if store.decided:
                rhythm = store.policy.every
                needs[rhythm] = max(needs.get(rhythm, 1), store.policy.quorum.need(self.replicas))
        return needs

    @property
    def most_clocks(self) -> int:
        """The most clocks that one replica can run. If replicas share no clocks, one may do all the work."""
        return self.total_clocks if self.aligned else self.total_clocks * self.replicas

    @property
    def last_clock(self) -> int:
        """The last clock of an aligned run; -1 if each replica has its own."""
        return self.total_clocks - 1 if self.aligned else -1

    def need(self, clock: int) -> int:
        """The number of replicas that the decision at `clock` needs; 0 if there is no decision."""
        return max((n for every, n in self._needs.items() if every.due(clock, self.last_clock)), default=0)

    def droppable(self, clock: int) -> bool:
        """Whether the decision at `clock` may leave a live replica out."""
        return 0 < self.need(clock) < self.replicas

    def due_stores(self, clock: int) -> tuple[int, ...]:
        """The stores that the decision at `clock` covers."""
        found = enumerate(self.stores)
        return tuple(i for i, s in found if s.decided and s.policy.every.due(clock, self.last_clock))

    def flushes(self, clock: int, last: bool) -> bool:
        """Whether a store pushes at `clock` what it may have kept of earlier steps."""
        return any(last or every.due(clock, self.last_clock) for every in self._kept_rhythms)

    @cached_property
    def _kept_rhythms(self) -> frozenset[Every]:
        return frozenset(s.policy.every for s in self.stores if s.keeps)


@dataclass(frozen=True)
class Places:
    """The workers of the stages and stores of a run.

    `stages[r][s]` runs stage s of replica r. `homes[i]` are the workers that hold store i; the value at the first is
    the result of the run. `readers[i][home]` are the workers to which `home` publishes store i.
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
        """All workers that take part."""
        stages = (worker for replica in self.stages for worker in replica)
        return tuple(dict.fromkeys((*stages, *(worker for homes in self.homes for worker in homes))))

    def stages_on(self, worker: str) -> tuple[tuple[int, int], ...]:
        """(replica, stage) of each stage that this worker runs."""
        return self._stages_on.get(worker, ())

    def stores_on(self, worker: str) -> tuple[int, ...]:
        """The stores that live on this worker."""
        return self._stores_on.get(worker, ())

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
    """The decision for `clock`: it includes the work of every replica except those in `excluded`."""

    clock: int
    excluded: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """A worker of `replica` is lost, so nothing more from this replica is waited for."""

    replica: int
