"""Implements a peer's side of membership: it joins, sends heartbeats, and follows the coordinator's view.

Messages of the coordinator are handled here; all others are passed on. The endpoint joins under a temporary name, and
takes the name that the coordinator gives it before it connects to other peers.

If the connection to the coordinator ends, and the coordinator is one that comes back, the member asks it to join again
under the same name and incarnation until it answers. Meanwhile it has the members that it had, and their connections.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from msgspec import structs

import flowml
from flowml.errors import ClusterError, FlowmlError
from flowml_runtime import service, wire
from flowml_runtime.environment.processes import machine
from flowml_runtime.transport.endpoint import OnLost, OnMessage
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from flowml_runtime.transport.grpc_streams import TURNED_AWAY

COORDINATOR = "coordinator"

REPORT_S = 1.0
"""How long the joining thread waits for the reason of a failed connection, which another thread reports."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 1.0
"""Between two questions to a coordinator that is away. Each pause is twice as long as the one before."""

AGAIN_S = 0.25
"""How long to wait before joining again if the coordinator had too many connections."""


def passing_name() -> str:
    """A unique temporary name to join under."""
    return f"joining-{uuid.uuid4().hex[:12]}"


class Membership:
    """The membership of one endpoint. `on_members` is called at every change, and `on_end` if the coordinator is lost
    and does not come back in time."""

    def __init__(
        self,
        endpoint: GrpcEndpoint,
        coordinator: str,
        on_message: OnMessage,
        on_lost: OnLost,
        *,
        on_members: Callable[[tuple[wire.Member, ...]], None] = lambda _: None,
        on_end: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.members: tuple[wire.Member, ...] = ()
        self._endpoint = endpoint
        self._address = coordinator
        self._pass_message = on_message
        self._pass_lost = on_lost
        self._on_members = on_members
        self._on_end = on_end
        self._welcome: wire.Welcome | None = None
        self._refusal: str | None = None
        self._epoch = -1
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._away = ""
        """Why the connection to the coordinator ended; "" while there is one."""
        self._answered = False
        """Whether the coordinator has answered the newest request to join."""

    def join(
        self, name: str, devices: tuple[wire.DeviceInfo, ...] = (), *, python: bool = False, timeout_s: float = 30.0
    ) -> str:
        """Join as `name` ("": any free name) and return the name. Raises ClusterError with the reason for a failure."""
        endpoint = self._endpoint
        endpoint.start(self._on_message, self._on_lost)
        endpoint.know({COORDINATOR: self._address})
        join = wire.Join(
            worker=name,
            address=endpoint.address,
            incarnation=endpoint.incarnation,
            protocol=wire.PROTOCOL,
            version=flowml.__version__,
            devices=devices,
            python=python,
            process=wire.Process(machine(), os.getpid()) if machine() else None,
        )
        deadline = time.monotonic() + timeout_s
        self._ask(join, deadline)
        while (self._refusal or "").endswith(TURNED_AWAY) and time.monotonic() + AGAIN_S < deadline:
            self._over.wait(AGAIN_S)
            with self._changed:
                self._refusal = None
            endpoint.forget(COORDINATOR)
            endpoint.know({COORDINATOR: self._address})
            self._ask(join, deadline)
        if self._refusal is not None:
            raise ClusterError(f"the cluster at {self._address} cannot be joined: {self._refusal}")
        welcome = self._welcome
        if welcome is None:
            raise ClusterError(f"the cluster at {self._address} did not answer within {timeout_s:g} s; is it running?")
        again = structs.replace(join, worker=welcome.worker)
        service.start("flowml-heartbeat", lambda: self._beat(welcome, again), self._end)
        return welcome.worker

    def _ask(self, join: wire.Join, deadline: float) -> None:
        """Send the request, and wait for the answer or for the reason of a failure."""
        try:
            self._endpoint.send(COORDINATOR, join)
        except FlowmlError as error:
            with self._changed:  # the connection has ended, and its reason will be reported soon
                self._changed.wait_for(lambda: self._refusal is not None, REPORT_S)
            self._end(str(error))
        with self._changed:
            left = max(0.0, deadline - time.monotonic())
            self._changed.wait_for(lambda: self._refusal is not None or self._epoch >= 0, left)

    def leave(self, reason: str = "it left") -> None:
        """Tell the coordinator, and stop. Idempotent; the owner closes the endpoint."""
        if self._over.is_set():
            return
        self._stop()
        try:
            self._endpoint.send(COORDINATOR, wire.Leave(worker=self._endpoint.name, reason=reason))
        except FlowmlError:
            return  # the coordinator has ended already

    def _stop(self) -> None:
        with self._changed:
            self._over.set()
            self._changed.notify_all()

    def _beat(self, welcome: wire.Welcome, join: wire.Join) -> None:
        beat = wire.Heartbeat(worker=welcome.worker, incarnation=join.incarnation)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._away or self._over.is_set(), welcome.heartbeat_s)
            if self._over.is_set():
                return
            if self._away:
                self._come_back(welcome.away_s, join)
                continue
            try:
                self._endpoint.send(COORDINATOR, beat)
            except FlowmlError as error:
                self._lose_coordinator(str(error))

    def _come_back(self, away_s: float, join: wire.Join) -> None:
        """Ask a coordinator that is away to join again, until it answers. After `away_s` the membership ends."""
        deadline, pause = time.monotonic() + away_s, FIRST_PAUSE_S
        while not self._over.is_set():
            with self._changed:
                reason, self._away, self._answered = self._away, "", False
            self._endpoint.forget(COORDINATOR)
            self._endpoint.know({COORDINATOR: self._address})
            try:
                self._endpoint.send(COORDINATOR, join)
            except FlowmlError as error:
                self._lose_coordinator(str(error))
            with self._changed:
                left = max(0.0, deadline - time.monotonic())
                # One that is reached and slow is waited for. A connection that fails is always reported.
                self._changed.wait_for(lambda: self._answered or self._away or self._over.is_set(), left)
                if self._answered:
                    return
            if time.monotonic() + pause > deadline:
                self._end(f"{self._away or reason}; it did not come back within {away_s:g} s")
                return
            self._over.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _on_message(self, peer: str, message: wire.Wire, arrays: list[Any]) -> None:
        if peer != COORDINATOR:
            self._pass_message(peer, message, arrays)
        elif isinstance(message, wire.Members):
            self._take(message)
        elif isinstance(message, wire.Welcome):
            self._endpoint.name = message.worker
            self._welcome = message
            with self._changed:
                self._answered = True
                self._changed.notify_all()
        elif isinstance(message, wire.Refused):
            self._end(message.reason)

    def _on_lost(self, peer: str, reason: str) -> None:
        if peer == COORDINATOR:
            self._lose_coordinator(reason)
        else:
            self._pass_lost(peer, reason)

    def _lose_coordinator(self, reason: str) -> None:
        with self._changed:
            welcome = self._welcome
            if welcome is not None and welcome.away_s and self._epoch >= 0:
                self._away = self._away or reason
                self._changed.notify_all()
                return
        self._end(reason)

    def _take(self, view: wire.Members) -> None:
        """Follow the coordinator's view. Losses come first, because a lost name may be a member again in this view."""
        if view.epoch < self._epoch:
            self._end("it has forgotten this cluster: another log or another coordinator is at its address")
            return
        own = self._endpoint.name
        for worker, reason in self._losses(view).items():
            if worker != own:
                self._endpoint.lose(worker, reason)
        others = [m for m in view.members if m.worker != own]
        self._endpoint.know({m.worker: m.address for m in others}, {m.worker: m.incarnation for m in others})
        self.members = view.members
        self._on_members(view.members)
        with self._changed:
            self._epoch = view.epoch
            self._changed.notify_all()

    def _losses(self, view: wire.Members) -> dict[str, str]:
        """Worker -> why it is lost. A view says so once, and this peer may have missed it without a coordinator."""
        now = {(m.worker, m.incarnation) for m in view.members}
        missed = [m.worker for m in self.members if (m.worker, m.incarnation) not in now]
        return dict.fromkeys(missed, "it was lost while the coordinator was away") | dict(view.lost)

    def _end(self, reason: str) -> None:
        with self._changed:
            joined, self._refusal = self._epoch >= 0, self._refusal or reason
            self._changed.notify_all()
        if joined and not self._over.is_set():
            self._stop()
            self._on_end(reason)
