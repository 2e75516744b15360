"""Lets other replicas take part in a fit while it runs: those whose workers have joined or come back, without those
whose workers have given notice that they will leave.

    devices have changed -> the plan with the other replicas is loaded beside the run -> a snapshot is asked for
    -> it is taken -> the run ends there, and the next one goes on from it

The workers of the run go on while those that have joined compile. They stand still from the snapshot until the next run
begins, and do no step twice. The plan has a place for each replica from the beginning, and the executables are the same
for any number of them, so those that are there compile nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

from flowml.callers import warn
from flowml.devices import Device, worker_of
from flowml.errors import ClusterError, WorkerLostError
from flowml.placement import Pipeline, Placement
from flowml.placement.homes import homes_only
from flowml.placement.links import Links
from flowml.plan import Training
from flowml.training.spec import TrainingSpec
from flowml_runtime.driver.loaded_plan import LoadedPlan
from flowml_runtime.driver.training.program import Program
from flowml_runtime.driver.training.training_session import TrainingSession


class Regrouped(Exception):  # no error: a run ends with it
    """A snapshot is taken, from which the fit goes on with other replicas."""


class Regrouping:
    """The plan for the replicas whose workers are there, while a run of others goes on."""

    def __init__(
        self, cluster: Any, program: Program, may_be_gone: Callable[[Collection[str]], bool], *, joins: bool
    ) -> None:
        """`may_be_gone` says whether the fit can go on without these workers. Others take part only if `joins`."""
        self._may_be_gone = may_be_gone
        self._joins = joins
        self._cluster = cluster
        self._program = program
        self._gone: frozenset[str] = frozenset()
        """The workers without which the run goes on."""
        self._seen: tuple[Device, ...] = ()
        """The devices that were there when `ready` looked last."""
        self._wanted: frozenset[str] | None = None
        """The workers without which the next run is to be; None if the run goes on as it is."""
        self._lock = threading.Lock()
        self._turn = 0
        """The number of the newest plan that was wanted. Others that are loaded by now are forgotten."""
        self._loaded: LoadedPlan | None = None
        self._wrong = ""

    def begin(self, gone: Collection[str]) -> None:
        """A run begins without these workers. Forgets what was prepared for the one before."""
        self._gone, self._seen = frozenset(gone), ()
        self.forget()

    def forget(self) -> None:
        """Nothing else is wanted any more than the run that goes on."""
        with self._lock:
            loaded, self._loaded, self._wanted = self._loaded, None, None
            self._turn += 1
        if loaded is not None:
            self._program.session.release(loaded)

    def ready(self) -> bool:
        """Whether the plan with other replicas is loaded. Begins to load it if their workers are there. Called for
        each message of a fit."""
        if self._cluster.devices is not self._seen:
            self._look()
        if self._wrong:
            wrong, self._wrong = self._wrong, ""
            warn(wrong)
        loaded = self._loaded
        if loaded is not None and loaded.steps.stopped:  # a worker that had joined was lost again
            self.forget()
            return False
        return loaded is not None

    def joined(self, gone: Collection[str]) -> frozenset[str]:
        """Those of these workers that are there again, or at last, and may take part."""
        there = {device.worker for device in self._cluster.devices} - self._cluster.leaving
        return frozenset(there.intersection(gone)) if self._joins else frozenset()

    def leaving(self) -> tuple[int, ...]:
        """The replicas of the run that take no part in the one that is `ready`."""
        training, wanted = self._program.training, self._wanted or self._gone
        return tuple(sorted(lost_replicas(training, wanted) - lost_replicas(training, self._gone)))

    def take(self) -> tuple[LoadedPlan, frozenset[str]]:
        """The plan that is ready, and the workers without which it is."""
        with self._lock:
            loaded, wanted = self._loaded, self._wanted
            self._loaded = self._wanted = None
        assert loaded is not None and wanted is not None
        return loaded, wanted

    def _look(self) -> None:
        """See what is wanted now. A plan with a worker that has given notice meanwhile is not taken any more."""
        self._seen = self._cluster.devices
        leaving = frozenset(self._cluster.leaving.intersection(self._program.workers()))
        gone = (self._gone - self.joined(self._gone)) | leaving
        training = self._program.training
        changes = _lost(training, gone) != _lost(training, self._gone)
        wanted = gone if changes and self._may_be_gone(gone) else None  # else those that are to leave stay
        if wanted == self._wanted:
            return
        self.forget()
        if wanted is not None:
            self._wanted, turn = wanted, self._turn
            self._program.session.time.beside("regrouping", lambda: self._load(wanted, turn), self._failed)

    def _load(self, gone: frozenset[str], turn: int) -> None:
        try:
            handle = self._program.load_beside(gone)
        except WorkerLostError:
            with self._lock:  # it has left again, and `ready` looks again when the devices change
                self._wanted = None if turn == self._turn else self._wanted
            return
        except ClusterError:
            if turn == self._turn:
                raise
            return  # the cluster was closed after the end of the fit
        with self._lock:
            if turn == self._turn:
                self._loaded = handle
                return
        self._program.session.release(handle)

    def _failed(self, reason: str) -> None:
        self._wrong = f"workers that have joined cannot take part in the fit, which goes on without them: {reason}"


@dataclass(frozen=True)
class WithPlaces:
    """A cluster to compile for, whose devices stay the same during a fit. They may not be there yet, or not any more:
    what runs is on those that are."""

    cluster: Any
    devices: tuple[Device, ...]

    @staticmethod
    def of(cluster: Any, spec: TrainingSpec, *, elastic: bool) -> WithPlaces:
        """With the devices that are there. If the fit is `elastic`, with a place for each replica; raises ValueError
        then if no worker is there, or homes are not named."""
        if not elastic:
            return WithPlaces(cluster, cluster.devices)
        if not cluster.devices:
            raise ValueError(
                "replicas='elastic': no worker has joined, and a fit begins with at least one; start some with `flowml "
                "worker`"
            )
        if isinstance(spec.homes, int):
            raise ValueError(
                f"homes={spec.homes} counts workers, and those of an elastic fit change; name them, as in "
                "homes='worker:0'"
            )
        stages = spec.placement.stages if isinstance(spec.placement, Pipeline) else 1
        computing, homes = spec.divide(cluster.devices)
        named = _named_by(spec.placement, cluster.lost)
        return WithPlaces(cluster, places(computing, spec.replicas, stages, homes, spec.is_home, named))

    @property
    def session(self) -> TrainingSession:
        return self.cluster.session

    @property
    def lost(self) -> tuple[str, ...]:
        return self.cluster.lost

    def links_for(self, placement: Placement, devices: int | None = None) -> Links:
        return self.cluster.links_for(placement, devices)


def _named_by(placement: Placement, workers: Iterable[str]) -> tuple[str, ...]:
    """Those of these workers that a placement names."""
    names = (
        {str(name).partition("/")[0] for name in placement.values()} if isinstance(placement, Mapping) else set[str]()
    )
    return tuple(worker for worker in workers if worker in names)


def lost_replicas(training: Training, gone: Collection[str]) -> frozenset[int]:
    """The replicas with a stage on one of these workers."""
    replicas = enumerate(training.replicas)
    return frozenset(r for r, devices in replicas if not {*map(worker_of, devices)}.isdisjoint(gone))


def _lost(training: Training, gone: Collection[str]) -> tuple[frozenset[int], frozenset[str]]:
    """The replicas and the homes without which a run of these workers is."""
    homes = frozenset(worker_of(home) for home in homes_only(training))
    return lost_replicas(training, gone), homes.intersection(gone)


def places(
    devices: tuple[Device, ...],
    replicas: int,
    stages: int,
    homes: tuple[Device, ...] = (),
    is_home: Callable[[str], bool] = lambda worker: False,
    named: Sequence[str] = (),
) -> tuple[Device, ...]:
    """Devices for so many replicas of at least so many stages: those that are there, and places for workers that may
    join. These have the names that a coordinator gives, and are like the first. Those of `homes` are for no replica,
    and a worker that is to be one gets no place among them. Workers that are `named` have a place also if there are
    enough others."""
    there = {device.worker for device in (*devices, *homes)}
    first = [device for device in devices if device.worker == devices[0].worker]

    def free(worker: str) -> bool:
        return worker not in there and not is_home(worker)

    def of(worker: str) -> Iterator[Device]:
        yield from (replace(device, name=f"{worker}/{device.name.partition('/')[2]}") for device in first)

    def joining() -> Iterator[Device]:
        for worker in (name for number in count() if free(name := f"worker:{number}")):
            yield from of(worker)

    named = [*filter(free, named)]
    devices = (*devices, *(device for worker in named for device in of(worker)))
    there.update(named)
    wanted = replicas * max(stages, len(devices) // replicas)
    found = (*devices, *islice(joining(), max(0, wanted - len(devices))), *homes)
    return tuple(sorted(found, key=lambda device: int(device.worker.rpartition(":")[2])))
