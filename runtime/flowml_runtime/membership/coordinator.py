"""Hosts the coordinator machine: its endpoint, its clock, and one thread that processes all events in order."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import flowml
from flowml.errors import ClusterError, WorkerLostError
from flowml.render.units import listed
from flowml_runtime import service, wire
from flowml_runtime.membership.member import COORDINATOR
from flowml_runtime.protocol.membership import (
    HEARTBEAT_S,
    PATIENCE_S,
    TIMEOUT_S,
    Action,
    ConnectionLost,
    Coordinator,
    Event,
    Forget,
    Know,
    Look,
    ProcessExited,
    Received,
    Rename,
    Send,
    Tick,
    Working,
)
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from flowml_runtime.transport.security import TLS

MAX_WAITING_EVENTS = 65536
BEATS_IN_TIME = 4


class CoordinatorHost:
    """A coordinator that peers join at `address`."""

    def __init__(
        self,
        bind: str,
        token: str,
        tls: TLS | None = None,
        *,
        works: Callable[[str], bool] = lambda _: False,
        shared_memory: bool = True,
        checksum: bool | None = None,
        heartbeat_s: float | None = None,
        timeout_s: float = TIMEOUT_S,
        on_failure: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Raises ClusterError if the address cannot be bound, or not safely.

        A member that is silent for `timeout_s` is lost. Members send heartbeats every `heartbeat_s`, by default at
        least `BEATS_IN_TIME` times within that time. `works` says whether the process of a silent worker runs, as far
        as this process can see. Without `shared_memory`, peers of this machine are reached by gRPC too. `on_failure` is
        called once if the coordinator fails before `close`; its members lose it at the same time.
        """
        self._works = works
        heartbeat_s = min(HEARTBEAT_S, timeout_s / BEATS_IN_TIME) if heartbeat_s is None else heartbeat_s
        self._machine = Coordinator(
            flowml.__version__,
            wire.PROTOCOL,
            heartbeat_s=heartbeat_s,
            timeout_s=timeout_s,
            patience_s=max(PATIENCE_S, timeout_s),
        )
        self._tick_s = heartbeat_s / 2
        self._events: queue.Queue[Event | None] = queue.Queue(MAX_WAITING_EVENTS)
        self._changed = threading.Condition()
        self._members: tuple[wire.Member, ...] = ()
        self._exits: dict[str, str] = {}
        self._endpoint = GrpcEndpoint(
            COORDINATOR, token, bind=bind, tls=tls, shared_memory=shared_memory, checksum=checksum
        )
        self.address = self._endpoint.address
        self._on_failure = on_failure
        self._endpoint.start(self._on_message, lambda peer, reason: self._events.put(ConnectionLost(peer, reason)))
        self._thread = service.start("flowml-coordinator", self._run, self._fail)

    def process_exited(self, worker: str, reason: str) -> None:
        """Called by the process that started a worker when the worker's process has ended."""
        with self._changed:
            self._exits[worker] = reason
            self._changed.notify_all()
        self._events.put(ProcessExited(worker, reason))

    def wait_for(self, workers: tuple[str, ...], timeout_s: float, began_s: float) -> None:
        """Wait until all these workers have joined. Raises ClusterError if one ends first or does not join in time.

        The timeout is counted from `began_s`, a time of the monotonic clock.
        """
        deadline = began_s + timeout_s
        with self._changed:
            while missing := set(workers) - {m.worker for m in self._members}:
                ended = [w for w in workers if w in self._exits]
                if ended:
                    raise ClusterError(f"{ended[0]} did not start: {self._exits[ended[0]]}", worker=ended[0])
                left = deadline - time.monotonic()
                if left <= 0:
                    late = listed(tuple(sorted(missing, key=workers.index)), 8)
                    raise ClusterError(f"{late} did not start within {timeout_s:g} s; allow more with start_timeout_s=")
                self._changed.wait(left)

    def close(self) -> None:
        self._events.put(None)
        self._thread.join(5.0)
        self._endpoint.close()

    def _on_message(self, peer: str, message: wire.Wire, arrays: list[Any]) -> None:
        if isinstance(message, wire.Join | wire.Heartbeat | wire.Leave):
            self._events.put(Received(peer, message))

    def _run(self) -> None:
        next_tick = 0.0
        while True:
            event: Event | None = None
            with suppress(queue.Empty):
                event = self._events.get(timeout=max(0.0, next_tick - time.monotonic()))
                if event is None:
                    return
            with service.going_on("a membership event could not be processed"):
                if event is not None:
                    self._do(self._machine.step(event))
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + self._tick_s
                    self._do(self._machine.step(Tick(time.monotonic())))
                self._note()

    def _fail(self, reason: str) -> None:
        """The thread has failed: close the endpoint, so that the members lose the coordinator."""
        self._endpoint.close()
        self._on_failure(reason)

    def _note(self) -> None:
        members = self._machine.members
        if members != self._members:
            with self._changed:
                self._members = members
                self._changed.notify_all()

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            with service.going_on(f"{action} could not be done"), suppress(WorkerLostError):
                self._act(action)  # the loss of a peer is a separate event

    def _act(self, action: Action) -> None:
        match action:
            case Know(peer, address):
                self._endpoint.know({peer: address})
            case Rename(peer, name):
                self._endpoint.rename(peer, name)
            case Send(peer, message):
                self._endpoint.send(peer, message)
            case Forget(peer):
                self._endpoint.forget(peer)
            case Look(worker):
                if self._works(worker):
                    self._do(self._machine.step(Working(worker)))
