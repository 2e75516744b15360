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
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from flowml.arguments import flag, flag_or_none, seconds
from flowml.devices import Device
from flowml.errors import ClusterError, WorkerLostError
from flowml.numbers import whole_number
from flowml.placement import AutoPlacement, Pipeline, Placement
from flowml.placement.links import ASSUMED, SAME_PROCESS, Links
from flowml_runtime import wire
from flowml_runtime.current import blocks
from flowml_runtime.environment.forks import check_owner, check_startable, is_foreign, this_process
from flowml_runtime.environment.machine import cores, memory_bytes
from flowml_runtime.launch.launched import LaunchedCluster, TLSFiles, shares_memory, worker_names
from flowml_runtime.launch.options import MAX_THREAD_WORKERS, counts, refusing
from flowml_runtime.links.prober import Prober
from flowml_runtime.links.table import LinkTable, links_mode
from flowml_runtime.membership.member import Membership, passing_name
from flowml_runtime.protocol.membership import TIMEOUT_S
from flowml_runtime.transport.endpoint import Endpoint, ThreadHub
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint, bind_towards
from flowml_runtime.transport.security import TLS, check_exposure, find_token
from flowml_runtime.worker.compile_cache import CacheFolder

_START_ANOTHER = "close this cluster and start another"
"""What to do about a lost worker if the cluster started its workers itself: it cannot start one more."""

_LAUNCH_AGAIN = "start the cluster again with `flowml launch`, and connect to it"
"""What to do about a lost coordinator."""

NOTICE_S = 10.0
"""The longest time after which a lost worker is known to be lost."""
BACK_S = 60.0
"""How long a worker that takes the place of a lost one may take to join."""

_BY_REFERENCE = Links(ASSUMED[SAME_PROCESS])
_CORE_FLOPS_PER_S = Device("").flops_per_s


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
        self._end_worker: Callable[[str], None] | None = None
        self._start_worker: Callable[[str], None] | None = None
        """End a worker, and start one under its name. None if others started the workers."""
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
        """The workers that were lost, are not back, and that this cluster can start again."""
        return () if self._start_worker is None else self.session.lost

    def have(self, devices: Sequence[Device]) -> None:
        """These are the devices now."""
        with self._changed:
            self.session.devices = devices
            self._changed.notify_all()

    def end_worker(self, worker: str) -> None:
        """End a worker at once, as kill -9 does, to see what a program does then. Raises ClusterError if this cluster
        did not start it."""
        check_owner(self._owner)
        if self._end_worker is None:
            raise ClusterError(f"{worker} was not started by this cluster; end it where it was started")
        self._end_worker(worker)

    def bring_back(self, workers: Sequence[str], timeout_s: float = BACK_S) -> None:
        """Have workers again that were lost: start new ones under their names, or wait until others have done that.

        Raises WorkerLostError if one is not there in time.
        """
        check_owner(self._owner)
        if self._end_worker is not None and self._start_worker is not None:
            for worker in workers:
                self._end_worker(worker)  # it may be suspended, or out of reach
            self._wait_for_devices(lambda there: there.isdisjoint(workers), workers, "known to be lost", timeout_s)
            for worker in workers:
                self._start_worker(worker)
        self._wait_for_devices(lambda there: there.issuperset(workers), workers, "there again", timeout_s)

    def notice(self, worker: str | None) -> None:
        """For the runtime: wait until a worker with which the connection broke is known to be lost, if it is."""
        with self._changed:
            self._changed.wait_for(lambda: worker not in {d.worker for d in self.devices}, NOTICE_S)

    def _wait_for_devices(
        self, holds: Callable[[set[str]], bool], workers: Sequence[str], what: str, timeout_s: float
    ) -> None:
        with self._changed:
            if self._changed.wait_for(lambda: holds({d.worker for d in self.devices}), timeout_s):
                return
        names, remedy = ", ".join(workers), self.session.remedy
        raise WorkerLostError(f"not within {timeout_s:g} s: {names} {what}; {remedy}", worker=workers[0])

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
    def local(
        cls,
        workers: int = 2,
        devices_per_worker: int = 1,
        *,
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
                allow_python=allow_python,
                platform=platform,
                start_timeout_s=start_timeout_s,
                transport=transport,
                checksum=checksum,
                lost_after_s=lost_after_s,
                orphan_s=0.0,
            )
            stack.callback(launched.close)
            options = _Options(allow_python, deadline_s, _START_ANOTHER, mode, shares_memory(transport), checksum)
            cluster = cls._join(launched.address, launched.token, None, "driver", options, stack)
            cluster.launched, cluster.pids = launched, launched.pids
            cluster.session.before_loading = folder.warn
            cluster._end_worker, cluster._start_worker = launched.end_worker, launched.start_worker
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
        devices = {w: [_device(n, "cpu", memory, share) for n in own] for w, own in names.items()}
        hub = ThreadHub()
        with ExitStack() as stack:
            endpoint = hub.endpoint("driver")
            stack.callback(endpoint.close)
            cluster = cls(endpoint, True, deadline_s, _START_ANOTHER)
            started = ThreadWorkers(hub, devices)
            stack.callback(started.close)

            def on_lost(peer: str, reason: str) -> None:
                cluster.have([d for d in cluster.devices if d.worker != peer])
                cluster.session.on_lost(peer, reason)

            def start(name: str) -> None:
                cluster.session.attach(started.start(name))
                there = {d.worker for d in cluster.devices} | {name}
                cluster.have([d for worker, own in devices.items() if worker in there for d in own])

            endpoint.start(cluster.session.on_message, on_lost)
            for name in devices:
                start(name)
            cluster._end_worker, cluster._start_worker = started.end, start
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
        """Join the cluster whose coordinator listens at `address` ("host:port").

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
            remedy = f"start it again with `flowml worker {address}`"
            options = _Options(allow_python, deadline_s, remedy, mode, shared, checksum)
            cluster = cls._join(address, find_token(token), TLS.of(tls), name, options, stack, timeout_s)
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
        check_exposure(address, tls, token, "connect to")
        shared = options.shared_memory
        endpoint = GrpcEndpoint(
            passing_name(),
            token,
            bind=bind_towards(address),
            tls=tls,
            shared_memory=shared,
            checksum=options.checksum,
        )
        stack.callback(endpoint.close)
        driver = _Driver(Prober(endpoint))
        stack.callback(driver.prober.close)
        membership = Membership(
            endpoint,
            address,
            driver.on_message,
            driver.on_lost,
            on_members=driver.on_members,
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
        return f"<Cluster of {', '.join(d.name for d in self.devices) or 'no workers'}>"


class _Driver:
    """Passes the events of a membership to its cluster, which exists only after the membership has joined."""

    def __init__(self, prober: Prober) -> None:
        self.prober = prober
        self.table: LinkTable | None = None
        self._cluster: Cluster | None = None
        self._lock = threading.Lock()

    def adopt(self, cluster: Cluster, membership: Membership) -> None:
        with self._lock:
            self._cluster = cluster
            cluster.have(_devices(membership.members, cluster.python))

    def on_members(self, members: tuple[wire.Member, ...]) -> None:
        with self._lock:
            if self._cluster is not None:
                self._cluster.have(_devices(members, self._cluster.python))

    def on_message(self, peer: str, message: wire.Wire, arrays: list[Any]) -> None:
        if isinstance(message, wire.Probe | wire.Probed):
            self.prober.on_message(peer, message)
        elif isinstance(message, wire.Contradicted):
            if self.table is not None:
                self.table.contradicted(peer, message.peer)
        elif self._cluster is not None:
            self._cluster.session.on_message(peer, message, arrays)

    def on_lost(self, peer: str, reason: str) -> None:
        self.prober.on_lost(peer, reason)
        if self._cluster is not None:
            self._cluster.session.on_lost(peer, reason)

    def on_end(self, reason: str, members: tuple[wire.Member, ...]) -> None:
        """The coordinator is lost, so the cluster and its workers end."""
        if self._cluster is not None:
            if not self._cluster.pids:
                self._cluster.session.remedy = _LAUNCH_AGAIN
            self.on_members(())
            for member in members:
                self._cluster.endpoint.lose(member.worker, f"the coordinator was lost: {reason}")


def current_cluster() -> Cluster:
    """The cluster of the innermost `with` block of this thread or task, else that of the process; see `current`.

    Raises ClusterError if there is none, or if it is simulated.
    """
    found = blocks.current()
    if not isinstance(found, Cluster):
        raise ClusterError(f"{found!r} runs fm.Trainer only; use `with fm.Cluster.threads():`, or give cluster=")
    return found


def _devices(members: tuple[wire.Member, ...], python: bool) -> tuple[Device, ...]:
    """The devices of all workers, in the order of their numbers. `python` says whether the driver allows Python."""
    workers = sorted((m for m in members if m.devices), key=lambda m: int(m.worker.rpartition(":")[2]))
    return tuple(
        _device(d.name, d.platform, d.memory_bytes, d.cores, python and m.python) for m in workers for d in m.devices
    )


def _device(name: str, platform: str, memory: int, share: float, python: bool = True) -> Device:
    speed = {"flops_per_s": _CORE_FLOPS_PER_S * share} if platform == "cpu" else {}
    return Device(name, platform=platform, memory_bytes=memory, python=python, **speed)
