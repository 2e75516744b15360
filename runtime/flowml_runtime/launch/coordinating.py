"""The coordinator of a launched cluster as a process of its own, which is started again when it has ended.

The launcher is a member of the cluster, as an observer: it sees who has joined, and tells the coordinator how the
processes that it started have ended. It finds the coordinator again as every member does.
"""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress

from msgspec import structs

from flowml.errors import ClusterError, FlowmlError
from flowml_runtime import wire
from flowml_runtime.environment.processes import machine
from flowml_runtime.launch.local import LocalWorkers
from flowml_runtime.membership.etcd import is_etcd
from flowml_runtime.membership.member import Membership, passing_name
from flowml_runtime.membership.process import CoordinatorConfig, tls_of
from flowml_runtime.protocol.membership import COORDINATOR
from flowml_runtime.transport.addresses import bind_towards, reserve
from flowml_runtime.transport.ending import Ending
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from flowml_runtime.transport.security import split_address

MOST_IN_VAIN = 5
"""A coordinator that has ended as often in a row without having listened is not started again."""

START_S = 60.0
"""How long the process that starts others may take to read the request."""


class CoordinatorProcess:
    """A coordinator process, and the launcher's membership in its cluster."""

    def __init__(
        self,
        processes: LocalWorkers,
        config: CoordinatorConfig,
        on_members: Callable[[tuple[wire.Member, ...]], None],
        on_losses: Callable[[Mapping[str, str]], None],
        on_failure: Callable[[str], None],
        on_restart: Callable[[str], None],
    ) -> None:
        """`start` starts it. `on_failure` is called once if it cannot go on, and `on_restart` with lost workers that
        are needed again."""
        self.address = ""
        self._processes = processes
        self._config = config
        self._on_members, self._on_losses = on_members, on_losses
        self._on_failure, self._on_restart = on_failure, on_restart
        self._in_vain = 0
        """How many of the newest processes have ended before they listened."""
        self._changed = threading.Condition()
        self._ended = ""
        self._ending: Ending | None = None
        self._place: socket.socket | None = None
        """Keeps the port while no coordinator listens: another process would get the requests to it otherwise."""
        self._membership: Membership | None = None
        self._endpoint: GrpcEndpoint | None = None
        self._untold: dict[str, tuple[int, wire.Exited]] = {}
        """Worker -> its incarnation and the report of its end, until the members show that the coordinator knows."""

    def start(self, reached_at: Callable[[str], str], deadline_s: float) -> None:
        """Start the process and join it. `reached_at` makes of the address that it listens at the one to join.

        Raises ClusterError if it ends, or does not listen in time. `deadline_s` is of the monotonic clock.
        """
        self._keep_port(self._config.bind)
        self._start(deadline_s)
        with self._changed:
            self._changed.wait_for(lambda: self.address or self._ended, max(0.0, deadline_s - time.monotonic()))
        if not self.address:
            raise ClusterError(f"the coordinator did not start: {self._ended or 'not in time'}")
        self.address = reached_at(self.address)
        config = self._config
        endpoint = self._endpoint = GrpcEndpoint(
            passing_name(),
            config.token,
            bind=bind_towards(self.address),
            tls=tls_of(config.tls),
            shared_memory=config.shared_memory,
            checksum=config.checksum,
        )
        membership = self._membership = Membership(
            endpoint,
            config.state if is_etcd(config.state) else self.address,
            lambda *_: None,
            lambda *_: None,
            on_members=self._on_view,
            on_end=self._on_failure,
            on_replace=lambda asked: self._on_restart(asked.worker),
            on_losses=self._on_losses,
        )
        membership.join(f"launcher-{uuid.uuid4().hex[:12]}", timeout_s=max(0.1, deadline_s - time.monotonic()))

    def on_listening(self, address: str) -> None:
        """The process can be joined."""
        with self._changed:
            self.address = self.address or address
            self._in_vain = -1
            self._changed.notify_all()

    def process_exited(self, worker: str, pid: int, reason: str) -> None:
        """The process of a worker has ended. A coordinator that ends before it has noted that tells its successor
        nothing, which would miss the worker only when it has been silent for long enough: that one is told too."""
        if self._membership is not None and machine():
            ended = wire.Exited(worker=worker, process=wire.Process(machine(), pid), reason=reason)
            lives = {m.worker: m.incarnation for m in self._membership.members}
            with self._changed:
                if worker in lives:
                    self._untold[worker] = lives[worker], ended
            self._report(ended)

    def _on_view(self, members: tuple[wire.Member, ...]) -> None:
        """These are the members now. Each coordinator tells them as this launcher joins it."""
        self._on_members(members)
        lives = {m.worker: m.incarnation for m in members}
        with self._changed:
            self._untold = {worker: its for worker, its in self._untold.items() if lives.get(worker) == its[0]}
            again = [ended for _, ended in self._untold.values()]
        for ended in again:
            self._report(ended)

    def _report(self, ended: wire.Exited) -> None:
        if self._endpoint is not None:
            with suppress(FlowmlError):  # the coordinator is away; `_on_view` tells its successor
                self._endpoint.send(COORDINATOR, ended)

    def has_ended(self, reason: str) -> None:
        """The process has ended: start another with the same state, at the same address."""
        with self._changed:
            self._ended = reason
            self._changed.notify_all()
        if self._membership is None:  # it never listened, so `start` fails
            return
        self._in_vain += 1
        if self._in_vain == MOST_IN_VAIN:
            self._on_failure(f"it could not be started again: {reason}")
            return
        try:
            self._keep_port(self.address)
            self._start(time.monotonic() + START_S)
        except (OSError, FlowmlError) as error:
            self._on_failure(f"it could not be started again: {error}")

    def end_with(self, ending: Ending | None) -> None:
        """For tests: the process that is started next ends at a point, and those after it do not."""
        self._ending = ending

    def close(self) -> None:
        """Leave the cluster. The process ends with those that were started with it."""
        if self._membership is not None:
            self._membership.leave("the launcher ends")
        if self._endpoint is not None:
            self._endpoint.close()
        if self._place is not None:
            self._place.close()

    def _keep_port(self, address: str) -> None:
        """Keep the port of an address, or any for port 0. One whose log is in etcd is found wherever it is."""
        port = split_address(address)[1]
        if is_etcd(self._config.state) or (self._place is not None and self._place.getsockname()[1] == port):
            return
        if self._place is not None:
            self._place.close()
        self._place = reserve(address)
        if self._place is not None:
            self._config = structs.replace(self._config, reserved=self._place.getsockname()[1])

    def _start(self, deadline_s: float) -> None:
        ending, self._ending = self._ending, None
        self._processes.start(structs.replace(self._config, ending=ending), deadline_s)
