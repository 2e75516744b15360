"""`SimulatedCluster` stands in for a `Cluster` in training: the same code under a virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from flowml.arguments import flag
from flowml.devices import Device
from flowml.errors import SimulationError
from flowml.numbers import whole_number
from flowml.placement import Placement
from flowml.placement.links import GRPC, Link, Links
from flowml.signatures import worded
from flowml.sim import AT_ONCE, Churn, ComputeModel, Crash, Fault, Homes, NetworkModel, Partition
from flowml_runtime.current import blocks

if TYPE_CHECKING:
    from flowml_runtime.sim.session import Models, SimulatedSession


class SimulatedCluster:
    """Workers that exist only in a simulation, for `fm.Trainer`. A `with` block makes it the current cluster.

    The workers' and the driver's state machines are those of real clusters. Only the time that things take is that of
    models, so that a fit on thousands of machines runs on one. With the same arguments and seed a fit repeats exactly.

    Args:
        workers: the number of workers.
        compute: how long one step of a replica computes, such as `fm.sim.LogNormal(mean_s=0.1, sigma=0.3)`. A pipeline
            divides it among its stages in proportion to the plan's estimates.
        network: the links, such as `fm.sim.Network(latency_s=1e-4, bytes_per_s=60e6)`.
        homes: how long an apply takes, such as `fm.sim.Homes(apply_s=1e-3)`. By default it takes no time.
        devices_per_worker: the devices of each worker, which share its memory and its links. Device d of worker w has
            the compute times of machine w · devices_per_worker + d.
        seed: seeds the models.
        arithmetic: False keeps clocks and bytes only: losses are NaN and parameters stay as they were.
        faults: `fm.sim.Crash`, `fm.sim.Partition` and `fm.sim.Disorder`. Their times count from the start of each fit.
            A crash ends a fit like the loss of a real worker does, and so does a worker that leaves in an
            `fm.sim.Churn`, unless `on_loss=` or `replicas="elastic"` says that the fit goes on. In such a fit workers
            also come back.
        jobs: how many processes of this machine simulate, each some of the workers. By default one, or one for each
            core for thousands of workers without arithmetic. What cannot be divided runs in one process, with a
            warning if more were asked for.
        compiled: True runs the simulator as machine code, with the same events. The first time compiles it, which takes
            minutes, mypy (`pip install 'flowml[compiled]'`) and a C compiler. Without them it runs as Python, with a
            warning.

    Raises:
        SimulationError: if the models make no sense, or do not fit the number of workers.
    """

    def __init__(
        self,
        workers: int,
        compute: ComputeModel,
        network: NetworkModel,
        *,
        homes: Homes = AT_ONCE,
        devices_per_worker: int = 1,
        seed: int = 0,
        arithmetic: bool = True,
        faults: Sequence[Fault | Churn] = (),
        jobs: int | None = None,
        compiled: bool = False,
    ) -> None:
        from flowml_runtime.sim.session import (
            Models,
            SimulatedSession,
        )  # a `Trainer` on real workers imports this module

        workers = whole_number("workers", workers, least=1)
        kinds = ("compute", compute, ComputeModel), ("network", network, NetworkModel), ("homes", homes, Homes)
        for name, value, kind in kinds:
            if not isinstance(value, kind):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise SimulationError(
                    f"SimulatedCluster({name}={value!r}) is of type {type(value).__name__}; give a model of fm.sim"
                )
        network.check(workers)
        compute.check(workers)
        homes.check(workers)
        found = _faults(faults, workers)
        self._network = network
        self._workers = workers
        each = whole_number("devices_per_worker", devices_per_worker, least=1)
        self._arithmetic = flag("arithmetic", arithmetic)
        count = None if jobs is None else whole_number("jobs", jobs, least=1)
        models = Models(
            workers,
            compute,
            network,
            whole_number("seed", seed),
            found,
            homes,
            each,
            count,
            flag("compiled", compiled),
            tuple(faults),
        )
        self._session = SimulatedSession(models, arithmetic=self._arithmetic)
        self.on_result: Callable[[Any], None] = lambda result: None
        """Called with the result of each fit."""
        self.on_fit: Callable[[Any, Any, Any, Any], None] | None = None
        """Called after that with the trainer, its first parameters, the shapes of a batch, and the model's state."""

    @property
    def session(self) -> SimulatedSession:
        return self._session

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices of the workers that are there, in the order of workers: in a fit that goes on after a loss not
        always all."""
        return self._session.devices

    @property
    def leaving(self) -> frozenset[str]:
        """The workers that have given notice."""
        return self._session.leaving

    @property
    def lost(self) -> tuple[str, ...]:
        """The workers that are not there."""
        there = {device.worker for device in self.devices}
        return tuple(dict.fromkeys(d.worker for d in self.models.all_devices if d.worker not in there))

    def bring_back(self, workers: Sequence[str]) -> None:
        """Let virtual time pass until these workers are there. Raises WorkerLostError if one does not return."""
        self._session.pass_until_there(workers)

    def why_refused(self, worker: str, ask: bool = False) -> str:
        """ "": a simulated driver is never lost."""
        return ""

    def notice(self, worker: str, timeout_s: float = 0.0) -> None:
        """A worker that has given notice does nothing any more, and goes as the models say."""

    @property
    def links(self) -> Links:
        """The links between workers, which count as machines of their own."""
        return _ModelLinks(apart=True, network=self._network)

    def links_for(self, placement: Placement, devices: int | None = None) -> Links:
        """The links to compile with."""
        return self.links

    @property
    def models(self) -> Models:
        return self._session.models

    def without_arithmetic(self, faults: Sequence[Fault | Churn] | None = None) -> SimulatedCluster:
        """A cluster of the same models and seed that keeps clocks and bytes only, with other faults if given."""
        m = self.models
        return SimulatedCluster(
            m.workers,
            m.compute,
            m.network,
            homes=m.homes,
            devices_per_worker=m.devices,
            seed=m.seed,
            arithmetic=False,
            faults=m.given if faults is None else faults,
            jobs=m.jobs,
            compiled=m.compiled,
        )

    def close(self) -> None:
        """Nothing has to be closed."""

    def __enter__(self) -> Self:
        blocks.enter(self)
        return self

    def __exit__(self, *_: object) -> None:
        blocks.leave(self)

    def __repr__(self) -> str:
        off = "" if self._arithmetic else ", no arithmetic"
        return f"<SimulatedCluster of {self._workers} workers{off}>"


def kind_of(cluster: object) -> str:
    """What kind the workers of a cluster are, for a snapshot."""
    if not isinstance(cluster, SimulatedCluster):
        return "real"
    return "simulated" if cluster.session.arithmetic else "simulated without arithmetic"


def _faults(faults: Sequence[Fault | Churn], workers: int) -> tuple[Fault, ...]:
    """The faults, checked. Each departure in a Churn is a crash."""
    if not isinstance(faults, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SimulationError(f"faults={faults!r} is no list; give one of fm.sim.Crash, Partition, Disorder and Churn")
    found = [f for fault in faults for f in (fault.crashes(workers) if isinstance(fault, Churn) else (fault,))]
    for fault in found:
        if not isinstance(fault, Fault):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SimulationError(
                f"faults has {fault!r}, which is none; give fm.sim.Crash, Partition, Disorder or Churn"
            )
        named = (fault.worker,) if isinstance(fault, Crash) else fault.workers if isinstance(fault, Partition) else ()
        for worker in named:
            if worker >= workers:
                raise SimulationError(f"{fault} names worker {worker}, and the cluster has workers 0 to {workers - 1}")
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class _ModelLinks(Links):
    """The links of a network model."""

    network: NetworkModel

    def between(self, source: str, destination: str) -> Link:
        link = self.network.link(_number(source), _number(destination))
        return Link(link.latency_s, link.bytes_per_s, GRPC)


def _number(device: str) -> int:
    """The number of a device's worker in a network model."""
    worker = device.partition("/")[0]
    return int(worker.rpartition(":")[2]) if ":" in worker else -1


worded(globals(), ("SimulatedCluster",), SimulationError)
