"""Hosts the coordinator machine: its endpoint, clock and log, and one thread that processes all events in order."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import flowml
from flowml.errors import ClusterError, WorkerLostError
from flowml_runtime import service, wire
from flowml_runtime.environment.processes import AtWork, machine
from flowml_runtime.membership.log import Log
from flowml_runtime.protocol.membership import (
    AWAY_S,
    COORDINATOR,
    HEARTBEAT_S,
    PATIENCE_S,
    TIMEOUT_S,
    Action,
    Append,
    Close,
    ConnectionLost,
    Coordinator,
    Event,
    Forget,
    Know,
    Look,
    MembershipMessage,
    ProcessExited,
    Received,
    Rename,
    Restart,
    Send,
    Tick,
    Working,
)
from flowml_runtime.transport.ending import Ending, Ends
from flowml_runtime.transport.endpoint import new_incarnation
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from flowml_runtime.transport.security import TLS

MAX_WAITING_EVENTS = 65536
BEATS_IN_TIME = 4
CLOSE_S = 5.0
"""How long `close` waits until the events before it have been processed."""


class CoordinatorHost:
    """A coordinator that peers join at `address`."""

    def __init__(
        self,
        bind: str,
        token: str,
        tls: TLS | None = None,
        *,
        works: Callable[[int], bool] | None = None,
        shared_memory: bool = True,
        checksum: bool | None = None,
        heartbeat_s: float | None = None,
        timeout_s: float = TIMEOUT_S,
        log: Log | None = None,
        ending: Ending | None = None,
        on_members: Callable[[tuple[wire.Member, ...]], None] = lambda _: None,
        on_failure: Callable[[str], None] = lambda _: None,
        on_restart: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Raises ClusterError if the address cannot be bound, or not safely.

        A member that is silent for `timeout_s` is lost. Members send heartbeats every `heartbeat_s`, by default at
        least `BEATS_IN_TIME` times within that time. `works` says whether a process of this machine is at work; by
        default it looks. With a `log` the members wait when this process ends, and the next one with this log and
        address goes on. The log belongs to this host, which closes it. Without `shared_memory`, peers of this machine
        are reached by gRPC too. `ending` is for tests. `on_members` is called when the members have changed,
        before they are told, `on_failure` once if the coordinator fails before `close`; without a log its members lose
        it at the same time, and `on_restart` with a lost worker whose place no spare can take.
        """
        self._works = works or AtWork()
        heartbeat_s = min(HEARTBEAT_S, timeout_s / BEATS_IN_TIME) if heartbeat_s is None else heartbeat_s
        self._machine = Coordinator(
            flowml.__version__,
            wire.PROTOCOL,
            heartbeat_s=heartbeat_s,
            timeout_s=timeout_s,
            patience_s=max(PATIENCE_S, timeout_s),
            away_s=AWAY_S if log is not None else 0.0,
            roster=None if log is None else log.roster,
        )
        self._log = log
        self._tick_s = heartbeat_s / 2
        self._events: queue.Queue[Event | None] = queue.Queue(MAX_WAITING_EVENTS)
        self._members: tuple[wire.Member, ...] = ()
        # Before it listens: what connects to an endpoint that is not started would wait for it in vain.
        incarnation = new_incarnation() if log is None else log.next_incarnation(new_incarnation())
        self._on_members = on_members
        self._endpoint = GrpcEndpoint(
            COORDINATOR, token, bind=bind, tls=tls, shared_memory=shared_memory, checksum=checksum
        )
        self.address = self._endpoint.address
        self._endpoint.incarnation = incarnation
        self._on_failure, self._on_restart = on_failure, on_restart
        on_message = self._on_message
        if ending is not None:
            ends = Ends(ending)
            ends.watch_sent(self._endpoint)
            on_message = ends.watch_taken(on_message)
        self._endpoint.start(on_message, lambda peer, reason: self._events.put(ConnectionLost(peer, reason)))
        self._thread = service.start("flowml-coordinator", self._run, self._fail)
        if log is not None:
            log.watch(self._fail)

    def process_exited(self, worker: str, pid: int, reason: str) -> None:
        """Called by the process that started a worker when the worker's process has ended."""
        self._events.put(ProcessExited(worker, reason, wire.Process(machine(), pid) if machine() else None))

    def close(self, reason: str = "") -> None:
        """End. With a reason the cluster ends too; else members of a coordinator with a log wait for its successor."""
        if reason:
            self._events.put(Close(reason))
        self._events.put(None)
        self._thread.join(CLOSE_S)
        self._endpoint.close()
        if self._log is not None:
            self._log.close()

    def _on_message(self, peer: str, message: wire.Wire, arrays: list[Any]) -> None:
        if isinstance(message, MembershipMessage):
            self._events.put(Received(peer, message))
        elif isinstance(message, wire.Exited):
            self._events.put(ProcessExited(message.worker, message.reason, message.process))

    def _run(self) -> None:
        try:
            self._take_all()
        except ClusterError as error:  # another coordinator has the log, or it cannot be written
            self._fail(service.text_of(error))

    def _take_all(self) -> None:
        self._take(Tick(time.monotonic()))
        next_tick = time.monotonic() + self._tick_s
        while True:
            event: Event | None = None
            with suppress(queue.Empty):
                event = self._events.get(timeout=max(0.0, next_tick - time.monotonic()))
                if event is None:
                    return
            if event is not None:
                self._take(event)
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + self._tick_s
                self._take(Tick(time.monotonic()))

    def _fail(self, reason: str) -> None:
        """The thread has failed, or the log is lost: close the endpoint, so that the members lose the coordinator."""
        self._endpoint.close()
        self._on_failure(reason)

    def _note(self) -> None:
        members = self._machine.members
        if members != self._members:
            self._members = members
            self._on_members(members)

    def _take(self, event: Event) -> None:
        """Raises ClusterError if the log cannot be written: then nobody is told, and the thread ends."""
        actions: list[Action] = []
        with service.going_on("a membership event could not be processed"):
            actions = self._machine.step(event)
        records = [action.record for action in actions if isinstance(action, Append)]
        if records and self._log is not None:
            self._log.append(records)
        self._note()
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
            case Look(worker, process):
                if process is not None and process.machine == machine() and self._works(process.pid):
                    self._take(Working(worker))
            case Restart(worker):
                self._on_restart(worker)
            case Append():
                pass  # done before the others
