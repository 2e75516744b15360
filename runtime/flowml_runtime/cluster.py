"""A `Cluster` holds the workers that run plans, and the session through which this process uses them.

There are three ways to make one. They differ only in who starts the workers:

    Cluster.threads   starts workers in this process; they pass arrays by reference
    Cluster.local     starts a coordinator and worker processes on this machine, and joins them like `connect`
    Cluster.connect   joins a running coordinator: that of a `LaunchedCluster`, which `flowml launch` holds

Workers and coordinators that a process starts end with it. They end on `close`, at the end of the `with` block, at the
end of the program, and when the program is killed with kill -9.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import uuid
from collections.abc import Callable, Collection, Container, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Self

from flowml.arguments import flag, flag_or_none, seconds
from flowml.callers import warn
from flowml.devices import Device
from flowml.errors import ClusterError, WorkerLostError, named
from flowml.numbers import whole_number
from flowml.placement import AutoPlacement, Pipeline, Placement
from flowml.placement.links import ASSUMED, SAME_PROCESS, Links
from flowml_runtime import wire
from flowml_runtime.current import blocks
from flowml_runtime.driver.member import DriverEvents
from flowml_runtime.environment.forks import check_owner, check_startable, is_foreign, this_process
from flowml_runtime.environment.machine import cores, memory_bytes
from flowml_runtime.interrupts import heeding_interrupts
from flowml_runtime.launch.launched import LaunchedCluster, TLSFiles, shares_memory, worker_names
from flowml_runtime.launch.options import MAX_THREAD_WORKERS, counts, refusing
from flowml_runtime.links.prober import Prober
from flowml_runtime.links.table import LinkTable, links_mode
from flowml_runtime.membership import advice
from flowml_runtime.membership.etcd_log import address_of
from flowml_runtime.membership.member import Membership, device, passing_name
from flowml_runtime.protocol.membership import TIMEOUT_S
from flowml_runtime.transport.addresses import bind_towards
from flowml_runtime.transport.endpoint import Endpoint, ThreadHub
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from flowml_runtime.transport.security import TLS, check_exposure, find_token
from flowml_runtime.worker.compile_cache import CacheFolder

NOTICE_S = 10.0
"""The longest time after which a lost worker is known to be lost."""
AGAIN_S = 1.0
"""After how long another is asked for again in the place of a lost worker."""
SOON_S = 0.02
"""The same for the process of a worker that its launcher does not know yet."""
BACK_S = 60.0
"""How long a worker that takes the place of a lost one may take to join."""

_BY_REFERENCE = Links(ASSUMED[SAME_PROCESS])


@dataclass(frozen=True)
class _Options:
    """The options of a driver that joins a cluster."""

    allow_python: bool
    deadline_s: float
    remedy: str
    links: str
    shared_memory: bool
    checksum: bool | None


class Cluster:
    """Workers and the session that uses them. `local`, `threads` and `connect` make one. Use it in a `with` block."""

    def __init__(self, endpoint: Endpoint, python: bool, deadline_s: float, remedy: str) -> None:
        """Called by `local`, `threads` and `connect`."""
        from flowml_runtime.driver.session import Session

        self.endpoint = endpoint
        self.session = Session(endpoint, (), deadline_s=deadline_s, remedy=remedy)
        self.python = python
        """Whether plans of this driver may bring Python to workers that allow it."""
        self.pids: Mapping[str, int] = {}
        """Worker -> process id, for workers that this cluster started."""
        self.outlives = False
        """Whether its workers outlive this process, and may keep fits for another driver."""
        self.launched: LaunchedCluster | None = None
        """For the runtime: the processes that this cluster started."""
        self._table: LinkTable | None = None
        """None if all workers are in this process."""
        self._end_worker: Callable[[str], bool] | None = None
        """End a worker; returns whether there was one. None if others started the workers."""
        self._replace: Callable[[str], None] = lambda _: None
        """Have another in the place of a lost worker, unless it is on its way."""
        self.spares = self.launchers = 0
        """How many spare workers wait to take the place of a lost one, and how many launchers may start one."""
        self._give_notice: Callable[[str], None]
        self.told: dict[str, str] = {}
        """Worker -> why it is gone, as the coordinator has told."""
        self.why_refused: Callable[..., str] = lambda worker, ask=False: ""
        """For the runtime: why a worker that is lost here counts this driver as lost, or "" if it does not."""
        self.leaving: frozenset[str] = frozenset()
        """The workers that have given notice: they leave as soon as others have taken over what they do."""
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        """Notified when the devices change."""
        self._owner = this_process()
        self._closed = False
        atexit.register(self.close)

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices of the current workers."""
        return self.session.devices

    @property
    def lost(self) -> tuple[str, ...]:
        """The workers that were lost, or have left, and are not back, also those that were before this process came."""
        return self.session.lost

    def have(self, devices: Sequence[Device], leaving: Collection[str] | None = None) -> None:
        """These are the devices now, and these workers have given notice, or those that had if it is None."""
        with self._changed:
            there = {device.worker for device in devices}
            self.leaving = frozenset(self.leaving if leaving is None else leaving) & there
            self.session.devices = devices
            self._changed.notify_all()

    def end_worker(self, worker: str, *, notice: bool = False) -> None:
        """End a worker at once, as kill -9 does. With `notice` it first hands over what it does. Does not wait for it.

        Raises ClusterError for a worker that is not there, or, without notice, that this cluster did not start.
        """
        check_owner(self._owner)
        if notice:
            if worker not in (there := {device.worker for device in self.devices}):
                raise ClusterError(f"{worker!r} is not in the cluster, whose workers are {named(sorted(there))}")
            self._give_notice(worker)
            return
        foreign = f"{worker} was not started by this cluster; end it where it was started"
        if self._end_worker is None:
            raise ClusterError(foreign)
        self._check(worker)
        deadline = time.monotonic() + NOTICE_S
        while not self._end_worker(worker):  # a spare's new name is known to its launcher a moment later
            if self._wait_for_devices(lambda there: worker not in there, SOON_S):
                return
            if time.monotonic() > deadline:
                raise ClusterError(foreign)

    def _check(self, worker: str) -> None:
        """Raise ClusterError for a worker that this cluster never had, if it has started them all."""
        known = {device.worker for device in self.devices} | {*self.session.lost}
        if self._end_worker is not None and worker not in known:
            raise ClusterError(f"{worker!r} is not in the cluster, whose workers are {named(sorted(known))}")

    def start_worker(self, worker: str) -> None:
        """Have a lost worker again: a spare takes its name, or its launcher starts another. Does not wait for it.

        Raises ClusterError for a worker that was never there.
        """
        check_owner(self._owner)
        self._check(worker)
        self._replace(worker)

    def bring_back(self, workers: str | Sequence[str], timeout_s: float = BACK_S) -> None:
        """Have workers again that were lost: start new ones under their names, or wait until others have done that.

        Raises ClusterError for a worker that was never there, WorkerLostError if one is not there in time.
        """
        check_owner(self._owner)
        workers = [workers] if isinstance(workers, str) else workers
        for worker in workers:
            self._check(worker)
        deadline = time.monotonic() + timeout_s
        if self._end_worker is not None:
            self._end_those_there(workers, timeout_s)
        told, asked = False, cycle(workers)
        while missing := set(workers) - {d.worker for d in self.devices}:
            left = deadline - time.monotonic()
            if left <= 0:
                raise WorkerLostError(advice.not_back(missing, timeout_s, self.session.remedy), worker=min(missing))
            if self._end_worker is None and not told and left < timeout_s - AGAIN_S:
                told, text = True, advice.waits(missing, timeout_s, self.session.remedy, launched=self.launchers > 0)
                warn(text)
            for worker in missing:
                self._replace(worker)
            if not self._wait_for_devices(lambda there: there.issuperset(workers), min(AGAIN_S, left)) and told:
                worker = next(asked)  # one at a time: an answer takes seconds if its machine is away
                if why := self.why_refused(worker, ask=True):  # this driver was cut off, and no longer is
                    raise WorkerLostError(advice.lost_itself(worker, why), worker=worker)

    def _end_those_there(self, workers: Sequence[str], timeout_s: float) -> None:
        """End the processes of those of the workers that are there: they may be suspended, or out of reach.

        A process that has just taken a lost one's place is ended when its launcher knows that it has the name.
        """
        assert self._end_worker is not None
        deadline = time.monotonic() + timeout_s
        while there := {device.worker for device in self.devices}.intersection(workers):
            if (left := deadline - time.monotonic()) <= 0:
                which = ", ".join(sorted(there))
                text = f"{which} did not end within {timeout_s:g} s; {self.session.remedy}"
                raise WorkerLostError(text, worker=min(there))
            for worker in there:
                self._end_worker(worker)
            self._wait_for_devices(lambda now: now.isdisjoint(workers), min(AGAIN_S, left))

    def notice(self, worker: str | None, timeout_s: float | None = NOTICE_S, gone: Container[str | None] = ()) -> None:
        """For the runtime: wait until a worker is lost, or has left. If it is `gone`, another may have its name."""
        with self._changed:
            self._changed.wait_for(lambda: worker in gone or worker not in {d.worker for d in self.devices}, timeout_s)

    def _wait_for_devices(self, holds: Callable[[set[str]], bool], timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: holds({d.worker for d in self.devices}), timeout_s)

    @property
    def max_programs(self) -> int:
        """How many compiled functions stay loaded on the workers. One more unloads the least recently used one.

        An unloaded function is loaded again when it is called again. Calls in flight may keep more functions loaded.
        This property can be set.
        """
        return self.session.max_programs

    @max_programs.setter
    def max_programs(self, most: int) -> None:
        self.session.max_programs = whole_number("max_programs", most, least=1)

    @property
    def links(self) -> Links:
        """The links between workers, and to this process ("driver"). Links without measurements have assumed values."""
        return _BY_REFERENCE if self._table is None else self._table.known()

    def measure_links(self) -> Links:
        """Measure every link now, and store the result for later programs. A pair of hosts takes well under a second.

        A link that cannot be measured keeps its old values, with a warning. A `threads` cluster has no links to
        measure. Raises WorkerLostError if all workers are lost.
        """
        check_owner(self._owner)
        self.session.check_workers("no link can be measured")
        return _BY_REFERENCE if self._table is None else self._table.measure()

    def links_for(self, placement: Placement, devices: int | None = None) -> Links:
        """The links to compile with. They are measured first if the placement depends on them.

        `devices` is the number of devices to choose from, by default all.
        """
        check_owner(self._owner)
        rules = isinstance(placement, AutoPlacement | Pipeline) or (isinstance(placement, str) and placement == "auto")
        count = len(self.devices) if devices is None else devices
        return self._table.settled() if self._table is not None and rules and count > 1 else self.links

    @contextmanager
    def trace(self, path: str | os.PathLike[str]) -> Generator[None]:
        """Record what every device does during the block, and write it to `path` for Perfetto or chrome://tracing.

        Each device has one track for its tasks, one for what it sends on a separate thread, and one for what arrives.
        Raises ClusterError if the workers do not answer, WorkerLostError if all are lost, OSError if the file cannot
        be written.
        """
        from flowml_runtime.driver.tracing import Tracing

        check_owner(self._owner)
        self.session.check_workers("no device can be traced")
        with Tracing(self.session, Path(path)):
            yield

    @classmethod
    @heeding_interrupts()
    def local(
        cls,
        workers: int = 2,
        devices_per_worker: int = 1,
        *,
        spares: int = 0,
        allow_python: bool = False,
        platform: str = "cpu",
        start_timeout_s: float = 120.0,
        deadline_s: float = wire.DEADLINE_S,
        lost_after_s: float = TIMEOUT_S,
        transport: str = "auto",
        links: str | None = None,
        checksum: bool | None = None,
    ) -> Cluster:
        """Start worker processes on this machine. Each worker gets an equal share of the cores and is pinned to it.

        `spares` more workers wait, and take the place of lost ones at once; others are started when they have.
        `allow_python` lets plans carry Python callbacks and data sources to the workers. `deadline_s` bounds each wait
        of one worker for another; a wait that takes longer raises DeadlineError. A worker that is silent for
        `lost_after_s`, such as a suspended one, is lost; one that is busy may be silent for half a minute. `transport`
        is "auto" (shared memory) or "grpc". `links` says where the cost model gets the links between workers: "measure"
        measures them once, before the first automatic placement, and stores the result; "remembered" uses stored
        results and measures only on request; "assume" uses assumed values. The default is the environment variable
        FLOWML_LINKS, else "measure". `checksum=True` adds a checksum to every message, and a message with a wrong one
        is refused; None adds it only between machines, False never. Raises ClusterError, with the end of its log, if a
        worker does not start.
        """
        with refusing():
            deadline_s = seconds("deadline_s", deadline_s)
            mode = links_mode(links)
        with ExitStack() as stack:
            folder = CacheFolder()
            launched = LaunchedCluster(
                workers=workers,
                devices_per_worker=devices_per_worker,
                spares=spares,
                allow_python=allow_python,
                platform=platform,
                start_timeout_s=start_timeout_s,
                transport=transport,
                checksum=checksum,
                lost_after_s=lost_after_s,
                orphan_s=0.0,
            )
            stack.callback(launched.close)
            options = _Options(allow_python, deadline_s, advice.START_ANOTHER, mode, shares_memory(transport), checksum)
            cluster = cls._join(launched.address, launched.token, None, "driver", options, stack)
            cluster.launched, cluster.pids = launched, launched.pids
            cluster.session.before_loading = folder.warn
            cluster._end_worker = launched.end_worker
            cluster._stack.callback(launched.processes.kill_stopped)  # runs first, so that nothing is sent to them
            return cluster

    @classmethod
    def threads(cls, workers: int = 2, devices_per_worker: int = 1, *, deadline_s: float = wire.DEADLINE_S) -> Cluster:
        """Start workers inside this process. They share its cores, its memory and its interpreter.

        `deadline_s` is as in `local`.
        """
        from flowml_runtime.launch.threads import ThreadWorkers

        check_startable()
        with refusing():
            deadline_s = seconds("deadline_s", deadline_s)
            workers, devices_per_worker = counts(workers, devices_per_worker, most=MAX_THREAD_WORKERS)
        share = len(cores()) / workers / devices_per_worker
        memory = memory_bytes() // (workers * devices_per_worker)
        names = {w: [f"{w}/cpu:{d}" for d in range(devices_per_worker)] for w in worker_names(workers)}
        devices = {w: [device(n, "cpu", memory, share) for n in own] for w, own in names.items()}
        hub = ThreadHub()
        with ExitStack() as stack:
            endpoint = hub.endpoint("driver")
            stack.callback(endpoint.close)
            cluster = cls(endpoint, True, deadline_s, advice.START_ANOTHER)
            started = ThreadWorkers(hub, devices)
            stack.callback(started.close)

            def on_lost(peer: str, reason: str) -> None:
                cluster.have([d for d in cluster.devices if d.worker != peer])
                cluster.session.on_lost(peer, reason)

            def start(name: str) -> None:
                cluster.session.attach(started.start(name))
                there = {d.worker for d in cluster.devices} | {name}
                cluster.have([d for worker, own in devices.items() if worker in there for d in own])

            def give_notice(name: str) -> None:
                cluster.have(list(cluster.devices), cluster.leaving | {name})
                started.leave(name)

            endpoint.start(cluster.session.on_message, on_lost)
            for name in devices:
                start(name)
            cluster._end_worker, cluster._replace, cluster._give_notice = started.end, start, give_notice
            cluster._stack = stack.pop_all()
        return cluster

    @classmethod
    def connect(
        cls,
        address: str,
        token: str | os.PathLike[str] | None = None,
        tls: TLSFiles = None,
        *,
        allow_python: bool = False,
        timeout_s: float = 30.0,
        deadline_s: float = wire.DEADLINE_S,
        transport: str = "auto",
        links: str | None = None,
        checksum: bool | None = None,
    ) -> Cluster:
        """Join the cluster whose coordinator listens at `address` ("host:port"), or is found at "etcd://host:port/prefix".

        `token` is the token or a file that holds it; the default is the file that FLOWML_TOKEN_FILE names. A
        coordinator on another machine requires `tls`. `deadline_s` and `links` are as in `local` and apply to the
        plans of this driver; `transport` and `checksum` are as in `local` and apply to its connections. Raises
        ClusterError if the cluster cannot be reached or refuses.
        """
        with refusing():
            deadline_s, timeout_s = seconds("deadline_s", deadline_s), seconds("timeout_s", timeout_s)
            mode, shared = links_mode(links), shares_memory(transport)
            allow_python, checksum = flag("allow_python", allow_python), flag_or_none("checksum", checksum)
        with ExitStack() as stack:
            name = f"driver-{uuid.uuid4().hex[:12]}"
            own, files = find_token(token), TLS.of(tls)
            options = _Options(
                allow_python, deadline_s, advice.start_worker(address, token, files), mode, shared, checksum
            )
            cluster = cls._join(address, own, files, name, options, stack, timeout_s)
            cluster.outlives = True
            return cluster

    @classmethod
    def _join(
        cls,
        address: str,
        token: str,
        tls: TLS | None,
        name: str,
        options: _Options,
        stack: ExitStack,
        timeout_s: float = 30.0,
    ) -> Cluster:
        """Join a coordinator as a driver. The cluster closes `stack` when it is closed, or now if the join fails."""
        check_startable()
        found, shared = address_of(address), options.shared_memory
        check_exposure(found, tls, token, "connect to")
        ways: dict[str, Any] = {"tls": tls, "shared_memory": shared, "checksum": options.checksum}
        endpoint = GrpcEndpoint(passing_name(), token, bind=bind_towards(found), apart_from=found, **ways)
        stack.callback(endpoint.close)
        driver = DriverEvents(Prober(endpoint))
        stack.callback(driver.prober.close)
        membership = Membership(
            endpoint,
            address,
            driver.on_message,
            driver.on_lost,
            on_members=driver.on_members,
            on_losses=driver.on_losses,
            on_end=lambda reason: driver.on_end(reason, membership.members),
        )
        stack.callback(membership.leave)
        membership.join(name, timeout_s=timeout_s)
        cluster = cls(endpoint, options.allow_python, options.deadline_s, options.remedy)
        cluster._table = driver.table = LinkTable(
            endpoint,
            driver.prober,
            lambda: membership.members,
            mode=options.links,
            shared_memory=shared and tls is None,
        )
        endpoint.on_sent = driver.table.traffic.sent
        cluster._replace, cluster._give_notice = membership.replace, membership.give_notice

        def why_refused(worker: str, ask: bool = False) -> str:
            # The question takes time if the worker is away, and few drivers are lost.
            return endpoint.why_refused(worker) if ask or membership.may_be_lost else ""

        cluster.why_refused = why_refused
        driver.adopt(cluster, membership)
        cluster._stack = stack.pop_all()
        return cluster

    def close(self) -> None:
        """End the session, and the workers if this cluster started them. Idempotent."""
        if is_foreign(self._owner):  # connections and workers belong to the parent; a fork may copy a held lock
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        with self._stack:
            self.session.close()

    def __enter__(self) -> Self:
        check_owner(self._owner)
        if self._closed:
            raise ClusterError("this cluster is closed; start another")
        blocks.enter(self)
        return self

    def __exit__(self, *_: object) -> None:
        blocks.leave(self)
        self.close()

    def __repr__(self) -> str:
        if self._closed:
            return "<Cluster, closed>"
        spares = f" and {self.spares} spare worker{'s' * (self.spares != 1)}" if self.spares else ""
        return f"<Cluster of {', '.join(d.name for d in self.devices) or 'no workers'}{spares}>"


def current_cluster() -> Cluster:
    """The cluster of the innermost `with` block of this thread or task, else that of the process; see `current`. Raises
    ClusterError if there is none, or if it is simulated."""
    found = blocks.current()
    if not isinstance(found, Cluster):
        raise ClusterError(f"{found!r} runs fm.Trainer only; use `with fm.Cluster.threads():`, or give cluster=")
    return found
