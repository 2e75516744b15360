"""A `LaunchedCluster` is a coordinator and workers on this machine that have no driver yet: drivers connect to it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from msgspec import structs

from flowml.arguments import choice, flag, flag_or_none, seconds, text
from flowml.errors import ClusterError
from flowml.numbers import MOST, whole_number
from flowml_runtime import service, wire
from flowml_runtime.environment.forks import check_owner, check_startable, is_foreign, this_process
from flowml_runtime.environment.machine import cores, memory_bytes, share_cores
from flowml_runtime.execution.future import wait_heeding_signals
from flowml_runtime.launch.capacity import check_room, room
from flowml_runtime.launch.coordinating import CoordinatorProcess
from flowml_runtime.launch.local import LocalWorkers
from flowml_runtime.launch.news import News
from flowml_runtime.launch.options import counts, refusing
from flowml_runtime.launch.spares import Spares
from flowml_runtime.launch.starting import Restarts, Starting
from flowml_runtime.membership.coordinator import CoordinatorHost
from flowml_runtime.membership.etcd import is_etcd
from flowml_runtime.membership.process import CoordinatorConfig, coordinator_of
from flowml_runtime.protocol.membership import COORDINATOR, LEAST_LOST_AFTER_S, SPARE, TIMEOUT_S, TOO_SOON
from flowml_runtime.transport.addresses import advertised_host
from flowml_runtime.transport.ending import Ending
from flowml_runtime.transport.security import TLS, check_exposure, new_token, split_address
from flowml_runtime.worker.compile_cache import settings_here
from flowml_runtime.worker.config import ORPHAN_S, WorkerConfig
from flowml_runtime.worker.leaving import NOTICE_S

TLSFiles = TLS | Mapping[str, str | os.PathLike[str]] | None
"""Paths of PEM files under "cert", "key" and "ca"."""


class LaunchedCluster:
    """A coordinator and workers on this machine. Others connect to it with its `address` and `token`."""

    def __init__(
        self,
        bind: str = "127.0.0.1:0",
        workers: int = 2,
        tls: TLSFiles = None,
        token: str | None = None,
        *,
        spares: int = 0,
        devices_per_worker: int = 1,
        allow_python: bool = False,
        platform: str = "cpu",
        start_timeout_s: float = 120.0,
        transport: str = "auto",
        checksum: bool | None = None,
        lost_after_s: float = TIMEOUT_S,
        orphan_s: float = ORPHAN_S,
        notice_s: float = NOTICE_S,
        state: str | os.PathLike[str] | None = None,
    ) -> None:
        """Returns when all workers have joined. If one does not, ends everything it started and raises ClusterError.

        `spares` more workers wait to take the place of a lost one, and others are started when they have. Without a
        spare, a lost worker is started again when a driver asks for it. A worker that is silent for `lost_after_s` is
        lost. Workers keep the newest snapshot of a fit whose driver is lost for `orphan_s`, and have `notice_s` to hand
        over before they leave. With `state` the coordinator is a process of its own, which is started again if it ends.
        The folder `state` keeps its log, also for a later cluster; with "" it is in a temporary folder, which is
        removed at the end. It may also be a place in etcd, "etcd://host:port/prefix", which is then the address of the
        cluster. Without `state` the coordinator is in this process.
        """
        check_startable()
        with refusing():
            workers, devices_per_worker = counts(workers, devices_per_worker)
            spares = whole_number("spares", spares, least=0, most=MOST)
            start_timeout_s = seconds("start_timeout_s", start_timeout_s)
            lost_after_s = _lost_after(lost_after_s)
            orphan_s, notice_s = seconds("orphan_s", orphan_s, zero=True), seconds("notice_s", notice_s)
            allow_python, checksum = flag("allow_python", allow_python), flag_or_none("checksum", checksum)
            files, shared, platform = TLS.of(tls), shares_memory(transport), text("platform", platform)
            self.token = new_token() if token is None else text("token", token)
        check_exposure(bind, files, self.token, "listen on")
        reached_at = advertised_host(bind)
        self._start_timeout_s = start_timeout_s
        self._owner = this_process()
        self._over, self._failure = threading.Event(), ""
        self._coordinator: CoordinatorHost | CoordinatorProcess | None = None
        self._starting = Starting()
        self._spares: Spares | None = None
        self._restarts, self.news = Restarts(), News()
        began = time.monotonic()
        check_room(workers + spares, start_timeout_s, room())
        with ExitStack() as stack:
            processes = self.processes = LocalWorkers(self._on_exit, self._on_listening)  # first: it takes the longest
            stack.callback(processes.close)
            config = CoordinatorConfig(
                bind=bind,
                token=self.token,
                state=_state_of(state) or processes.state_folder,
                tls=files and (str(files.cert), str(files.key), str(files.ca)),
                shared_memory=shared,
                checksum=checksum,
                lost_after_s=lost_after_s,
            )
            start = self._start_coordinator_here if state is None else self._start_coordinator
            port = split_address(start(config, reached_at, began, stack))[1]
            self.address = config.state if is_etcd(config.state) else f"{reached_at}:{port}"
            self.pids: Mapping[str, int] = processes.pids
            own = {"devices": devices_per_worker, "python": allow_python, "platform": platform}
            own |= {"orphan_s": orphan_s, "notice_s": notice_s}
            self._configs = self._workers(workers, config, own)
            self._start_all(began, spares)
            self._stack = stack.pop_all()

    def _workers(self, workers: int, like: CoordinatorConfig, options: Mapping[str, Any]) -> dict[str, WorkerConfig]:
        """The configuration of each worker, with its share of the machine. It connects as its coordinator does."""
        common = WorkerConfig(
            coordinator=self.address,
            token=like.token,
            core_share=len(cores()) / workers,
            memory_bytes=memory_bytes() // workers,
            tls=like.tls,
            shared_memory=like.shared_memory,
            checksum=like.checksum,
            compiled=self.processes.shared_folder,
            compile_cache=settings_here(),
            **options,
        )
        pairs = zip(worker_names(workers), share_cores(cores(), workers), strict=True)
        return {name: structs.replace(common, name=name, cores=own) for name, own in pairs}

    def _start_coordinator_here(
        self, config: CoordinatorConfig, reached_at: str, began: float, stack: ExitStack
    ) -> str:
        """Start a coordinator in this process. Returns its address."""
        host = self._coordinator = coordinator_of(
            config, on_members=self._on_members, on_failure=self._on_failure, on_restart=self._on_restart
        )
        stack.callback(host.close)
        return host.address

    def _start_coordinator(self, config: CoordinatorConfig, reached_at: str, began: float, stack: ExitStack) -> str:
        """Start a coordinator process. Returns its address."""
        deadline_s = began + self._start_timeout_s
        self.processes.wait_ready(deadline_s)
        process = CoordinatorProcess(
            self.processes, config, self._on_members, self.news.on_losses, self._on_failure, self._on_restart
        )
        self._coordinator = process
        stack.callback(process.close)
        process.start(lambda address: f"{reached_at}:{split_address(address)[1]}", deadline_s)
        return process.address

    def _start_all(self, began: float, spares: int) -> None:
        """Start the workers and spares, and return when all have joined."""
        deadline_s = began + self._start_timeout_s
        self.processes.wait_ready(deadline_s)
        for config in self._configs.values():
            self.processes.start(config, deadline_s)
        some = next(iter(self._configs.values()))
        places = tuple((name, config.cores) for name, config in self._configs.items())
        spare = structs.replace(some, spare=True, places=places)
        self._spares = Spares(spares, self.processes, spare, lambda: time.monotonic() + self._start_timeout_s)
        self._starting.wait_for((*self._configs, *self._spares.fill()), self._start_timeout_s, began)

    def wait(self) -> None:
        """Return when the cluster is closed. Raises ClusterError if its coordinator has failed."""
        check_owner(self._owner)
        wait_heeding_signals(self._over)
        if self._failure:
            raise ClusterError(f"the coordinator has ended: {self._failure}; start the cluster again")

    def end_worker(self, worker: str) -> bool:
        """Kill the process of a worker, if it still runs. All members lose it. Returns whether there was one."""
        return self.processes.kill(worker)

    def start_worker(self, worker: str, ending: Ending | None = None) -> None:
        """Start a process under the name of a worker that is lost. Tests say at what point it is to end.

        Raises ClusterError if it cannot be started in time.
        """
        config = structs.replace(self._configs[worker], ending=ending)
        self.processes.start(config, time.monotonic() + self._start_timeout_s)

    def _on_restart(self, worker: str) -> None:
        """A driver needs a lost worker, and there is no spare: start it again, unless that has begun."""
        before = self.pids.get(worker, 0)
        if worker in self._configs and self._restarts.begin(worker, before):

            def restart() -> None:
                # It may be suspended, or out of reach; or a spare that has just joined has its place by now.
                if self.processes.kill(worker, before) or worker not in self.pids:
                    self.start_worker(worker)

            service.start("flowml-restart", restart, lambda _: self._restarts.end(worker))

    def _on_members(self, members: tuple[wire.Member, ...]) -> None:
        self._starting.on_members(members)
        self.news.on_members(members)
        for member in members:
            self._restarts.end(member.worker)
        if self._spares is not None:
            self._spares.on_members(members)

    def end_coordinator(self, ending: Ending | None = None) -> None:
        """Kill the coordinator process, which is started again. Tests say at what point that one is to end."""
        if not isinstance(self._coordinator, CoordinatorProcess):
            raise ClusterError("the coordinator is in this process; give state=, and it is in one of its own")
        self._coordinator.end_with(ending)
        self.processes.kill(COORDINATOR)

    def close(self) -> None:
        """End the workers and the coordinator. Idempotent. Does nothing in a fork of the process that started them."""
        if not is_foreign(self._owner):
            self._over.set()
            self._stack.close()

    def _on_failure(self, reason: str) -> None:
        self._failure = reason
        self._over.set()

    def _on_exit(self, name: str, pid: int, reason: str) -> None:
        coordinator = self._coordinator
        if name == COORDINATOR and isinstance(coordinator, CoordinatorProcess):
            self.news.coordinator_ended(reason)
            coordinator.has_ended(reason)
            return
        self._starting.on_exit(name, reason)
        self._restarts.on_exit(name, pid)
        if self._spares is not None and name.startswith(SPARE):
            self._spares.on_exit(name, reason)
        if coordinator is not None:
            coordinator.process_exited(name, pid, reason)

    def _on_listening(self, address: str) -> None:
        if isinstance(self._coordinator, CoordinatorProcess):
            self._coordinator.on_listening(address)


def _state_of(state: str | os.PathLike[str] | None) -> str:
    """Where the coordinator keeps its log; "" if that is not given."""
    if not state:
        return ""
    return state if isinstance(state, str) and is_etcd(state) else os.path.abspath(state)


def worker_names(workers: int) -> tuple[str, ...]:
    """The names of the workers of a cluster."""
    return tuple(f"worker:{i}" for i in range(workers))


def shares_memory(transport: str) -> bool:
    """Whether processes of one machine may pass arrays in shared memory. Raises for an unknown transport."""
    return choice("transport", transport, ("auto", "grpc")) == "auto"


def _lost_after(given: float) -> float:
    """How long a member may be silent. Raises ValueError if no heartbeat comes in that time."""
    lost_after_s = seconds("lost_after_s", given)
    if lost_after_s < LEAST_LOST_AFTER_S:
        raise ValueError(f"lost_after_s={lost_after_s:g}: {TOO_SOON}")
    return lost_after_s
