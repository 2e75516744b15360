"""Which worker runs which stages and holds which stores, and to whom it passes on what it gets.

All machines of a run compute the same answers from the plan, without messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from flowml.devices import worker_of
from flowml.plan import Part, StoreSpec, Training
from flowml.policy.filters import Seat, is_exchanged
from flowml_runtime.protocol.training.terms import Group


@dataclass(frozen=True)
class Places:
    """The workers of the stages and stores of a run.

    `stages[r][s]` runs stage s of replica r. `homes[i]` are the workers that hold store i; the value at the first is
    the result of the run. `readers[i][home]` are the workers to which `home` publishes store i.

    If the sites of store i decide for themselves, the workers of the leaders' first stages do that: `leads[i][worker]`
    are the numbers of the sites of one, and `passes_on[i][worker]` the workers to which it passes on what it gets.
    `partners[i][worker]` are the workers to whose homes one sends what its homes share in coupling i.
    """

    stages: tuple[tuple[str, ...], ...]
    homes: tuple[tuple[str, ...], ...]
    readers: tuple[Mapping[str, tuple[str, ...]], ...]
    leads: tuple[Mapping[str, tuple[int, ...]], ...] = ()
    passes_on: tuple[Mapping[str, tuple[str, ...]], ...] = ()
    partners: tuple[Mapping[str, tuple[str, ...]], ...] = ()
    lost: tuple[int, ...] = ()
    """The replicas that take no part. They have no stages."""

    @staticmethod
    def of(training: Training) -> Places:
        homes = tuple(_workers(s.copies) for s in training.stores)
        gone = {device for replica in training.lost for device in training.replicas[replica]}
        readers = tuple(
            {home: _workers(d for d in _told(s, home, training.replicas) if d not in gone) for home in homes[i]}
            for i, s in enumerate(training.stores)
        )
        stages = tuple(
            () if replica in training.lost else tuple(map(worker_of, devices))
            for replica, devices in enumerate(training.replicas)
        )
        leads = tuple(_leads(s, stages) for s in training.stores)
        passes_on = tuple(_passes_on(s, stages) for s in training.stores)
        partners = tuple(_partners([training.stores[i] for i in c.stores]) for c in training.couplings)
        return Places(stages, homes, readers, leads, passes_on, partners, training.lost)

    def without(self, replicas: Iterable[int]) -> Places:
        """The places after these replicas are lost, and the workers that had nothing but their stages."""
        lost = tuple(sorted({*self.lost, *replicas}))
        stages = tuple(() if replica in lost else workers for replica, workers in enumerate(self.stages))
        left = {worker for workers in stages for worker in workers}.union(*self.homes)
        readers = tuple({home: tuple(w for w in told if w in left) for home, told in of.items()} for of in self.readers)
        return replace(self, stages=stages, readers=readers, lost=lost)

    @property
    def first(self) -> int:
        """The first replica that takes part."""
        return next(replica for replica in range(len(self.stages)) if replica not in self.lost)

    def led_by(self, worker: str, store: int) -> tuple[int, ...]:
        """The numbers of the sites of a store for which this worker decides."""
        return self.leads[store].get(worker, ()) if self.leads else ()

    def others(self, worker: str, store: int) -> tuple[str, ...]:
        """The workers to which this one passes on what it gets of a store."""
        return self.passes_on[store].get(worker, ()) if self.passes_on else ()

    def relay(self, site: Sequence[int]) -> str:
        """The worker that gathers, decides and passes on for a site."""
        return self.stages[site[0]][0]

    def site_workers(self, site: Sequence[int]) -> tuple[str, ...]:
        """The workers that run the replicas of a site."""
        return tuple(dict.fromkeys(worker for replica in site for worker in self.stages[replica]))

    def told(self, store: int, home: str, replica: int | None = None) -> tuple[str, ...]:
        """The workers to which a home publishes a store: all its readers, or those of one replica."""
        readers = self.readers[store][home]
        return readers if replica is None else tuple(w for w in dict.fromkeys(self.stages[replica]) if w in readers)

    def told_commits(self, group: Group) -> tuple[str, ...]:
        """The workers that get the decisions of a group. Those of sites pass them on."""
        if not group.relayed:
            return self.workers
        homes = (worker for store in group.stores for worker in self.homes[store])
        return tuple(dict.fromkeys((*map(self.relay, group.sites), *homes)))

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


def _leads(store: StoreSpec, stages: Sequence[Sequence[str]]) -> dict[str, tuple[int, ...]]:
    """For the first worker of each leader, the numbers of its sites."""
    found: dict[str, list[int]] = {}
    for number, site in enumerate(store.sites if store.relayed else ()):
        found.setdefault(stages[site.replicas[0]][0], []).append(number)
    return {worker: tuple(numbers) for worker, numbers in found.items()}


def _passes_on(store: StoreSpec, stages: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """For the first worker of each leader, the other workers of its sites that read the store."""
    found: dict[str, dict[str, None]] = {}
    for site in store.sites if store.relayed and not store.sites_decide else ():
        relay = stages[site.replicas[0]][0]
        readers = (worker_of(r) for n in site.replicas for r in store.read_by(n, len(stages)))
        found.setdefault(relay, {}).update(dict.fromkeys(r for r in readers if r != relay))
    return {relay: tuple(readers) for relay, readers in found.items()}


def _partners(stores: Sequence[StoreSpec]) -> dict[str, tuple[str, ...]]:
    """For each worker with homes of these stores, all workers with homes of the same copies, itself included."""
    found: dict[str, dict[str, None]] = {}
    for copies in zip(*(store.copies for store in stores), strict=True):
        workers = _workers(copies)
        for worker in workers:
            found.setdefault(worker, {}).update(dict.fromkeys(workers))
    return {worker: tuple(others) for worker, others in found.items()}


def _told(store: StoreSpec, home: str, replicas: Sequence[Sequence[str]]) -> Iterable[str]:
    """The readers to which a home publishes. Where sites share one home, their leaders tell the others."""
    if store.relayed and not store.sites_decide:
        return (replicas[site.replicas[0]][0] for site in store.sites)
    if store.sites and not store.collective:
        return (reader for leader in store.leaders for reader in store.read_by(leader, len(replicas)))
    return store.read_from([copy for copy in store.copies if worker_of(copy) == home])


def _workers(devices: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(worker_of, devices)))


def seats(training: Training, store: StoreSpec, part: Part) -> dict[int, Seat]:
    """The slot of each replica that takes part, where they exchange what filters encode: as many for each worker, in
    the order of ranks. Empty without such an exchange."""
    if part.reduction is None or not is_exchanged(store.policy.summed_filters):
        return {}
    there: dict[str, list[int]] = {worker: [] for worker in part.reduction.workers}
    for replica in store.leaders or training.live:
        there[worker_of(training.replicas[replica][part.stage])].append(replica)
    most = max(map(len, there.values()))
    slots = most * len(there)
    return {r: Seat(rank * most + i, slots) for rank, mine in enumerate(there.values()) for i, r in enumerate(mine)}
