"""Implements a peer's side of membership: it joins, sends heartbeats, and follows the coordinator's view.

Messages of the coordinator are handled here; all others are passed on. The endpoint joins under a temporary name, and
takes the name that the coordinator gives it before it connects to other peers.

If the connection to the coordinator ends, and the coordinator is one that comes back, the member asks it to join again
under the same name and incarnation until it answers. Meanwhile it has the members that it had, and their connections.

A member with which the connection broke is none for this peer from then on, also while the coordinator does not know or
is away: nothing can be sent to that incarnation any more. Its successor has a later one.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from msgspec import structs

import flowml
from flowml.devices import Device
from flowml.errors import ClusterError, FlowmlError
from flowml_runtime import service, wire
from flowml_runtime.environment.processes import machine
from flowml_runtime.membership.etcd import is_etcd
from flowml_runtime.membership.etcd_log import finder
from flowml_runtime.protocol.membership import COORDINATOR, SPARE
from flowml_runtime.transport.counted_out import NOT_HERE
from flowml_runtime.transport.endpoint import OnLost, OnMessage, new_incarnation
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from flowml_runtime.transport.grpc_streams import TURNED_AWAY
from flowml_runtime.transport.local_stream import BROKE, CLOSED

_CORE_FLOPS_PER_S = Device("").flops_per_s

REPORT_S = 1.0
"""How long the joining thread waits for the reason of a failed connection, which another thread reports."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 1.0
"""Between two questions to a coordinator that does not answer, or is away. Each pause is twice as long as the one
before."""

MOST_PAUSE_S = 60.0
"""As `LONGEST_PAUSE_S`, for another in the place of a lost worker: a process that cannot start is tried more seldom."""

AGAIN_S = 0.25
"""How long to wait before joining again if the coordinator had too many connections, or is away."""

RETURN_S = 10.0
"""How long to look for a coordinator that ended while it was asked: one with a log is there again by then."""

SUSPENDED_S, MISSED = 1.0, 2
"""A peer that has sent no heartbeat for so many seconds, or for the time of so many, may be lost itself."""

_ANY = 2**63
"""An incarnation that is newer than all."""

REFUSES = f"cannot be reached: {os.strerror(errno.ECONNREFUSED)}"
"""The reason if no process listens at an address."""


def passing_name() -> str:
    """A unique temporary name to join under."""
    return f"joining-{uuid.uuid4().hex[:12]}"


def spare_name() -> str:
    """A unique name of a spare."""
    return f"{SPARE}-{uuid.uuid4().hex[:8]}"


class Membership:
    """The membership of one endpoint. `on_members` is called at every change, and `on_losses` before that with the
    members that the coordinator has lost and the reasons. `on_end` is called if the coordinator is lost and does not
    come back in time. `coordinator` is its address, or the place in etcd that says where it is now."""

    def __init__(
        self,
        endpoint: GrpcEndpoint,
        coordinator: str,
        on_message: OnMessage,
        on_lost: OnLost,
        *,
        on_members: Callable[[tuple[wire.Member, ...]], None] = lambda _: None,
        on_end: Callable[[str], None] = lambda _: None,
        on_replace: Callable[[wire.Replace], None] = lambda _: None,
        on_losses: Callable[[Mapping[str, str]], None] = lambda _: None,
    ) -> None:
        self.members: tuple[wire.Member, ...] = ()
        """Those of the coordinator's newest view that this peer has not lost."""
        self.gone: Mapping[str, str] = {}
        """Worker -> why it was lost, or left, in that view. In its place is no other."""
        self._showing = threading.RLock()
        """Held while the members change and `on_members` is told, so that the newest ones are told last."""
        self._endpoint = endpoint
        self._find = finder(coordinator)
        self._may_move = is_etcd(coordinator)
        self._address = self._find()
        self._pass_message = on_message
        self._pass_lost = on_lost
        self._on_members = on_members
        self._on_end, self._on_replace, self._on_losses = on_end, on_replace, on_losses
        self._own: wire.Join | None = None
        """With what it joins again."""
        self._welcome: wire.Welcome | None = None
        self._refusal: str | None = None
        self._was_refused = False
        """Whether the coordinator itself has said so."""
        self._epoch = -1
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._away = ""
        """Why the connection to the coordinator ended; "" while there is one."""
        self._answered = False
        """Whether the coordinator has answered the newest request to join."""
        self._notices: dict[str, None] = {}
        """The workers for which this peer has given notice."""
        self._beaten_s, self._longest_s = time.monotonic(), 0.0
        """When this peer has sent the newest heartbeat, and the longest time between two of them."""
        self._wanted: dict[str, tuple[float, float]] = {}
        """Lost worker in whose place this peer wants another -> when to ask again, and the pause after that."""

    def join(
        self,
        name: str,
        devices: tuple[wire.DeviceInfo, ...] = (),
        *,
        python: bool = False,
        timeout_s: float = 30.0,
        patience_s: float = 0.0,
        on_wait: Callable[[str], None] = lambda _: None,
    ) -> str:
        """Join as `name` ("": any free name) and return the name. Raises ClusterError with the reason for a failure.

        A coordinator that refuses connections may be started again at the moment: it is tried for `patience_s`, and
        `on_wait` is called once with the reason. One that ends while it is asked may have noted this peer in its log.
        Its successor is asked, with the same incarnation, and answers as to a member that comes back.
        """
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
        patient, told = time.monotonic() + patience_s, False
        self._ask(join, deadline)
        while self._may_ask_again(patient) and time.monotonic() + AGAIN_S < deadline:
            if self._is_away and patience_s and not told:
                told, why = True, REFUSES if REFUSES in (self._refusal or "") else f"is not there: {self._refusal}"
                on_wait(f"the coordinator at {self._address} {why}; trying again for up to {patience_s:g} s")
            if self._has_ended:
                patient = max(patient, time.monotonic() + RETURN_S)
            self._over.wait(AGAIN_S)
            self._has_moved()
            with self._changed:
                self._begin_again()
                self._refusal = None
            self._ask(join, deadline)
        if self._refusal is not None:
            fix = "; see whether its address is right, and start it with `flowml launch`" if self._is_away else ""
            raise ClusterError(f"the cluster at {self._address} cannot be joined: {self._refusal}{fix}")
        welcome = self._welcome
        if welcome is None:
            raise ClusterError(f"the cluster at {self._address} did not answer within {timeout_s:g} s; is it running?")
        self._own = structs.replace(join, worker=welcome.worker)
        self._beaten_s = time.monotonic()
        service.start("flowml-heartbeat", lambda: self._beat(welcome), self._end)
        return welcome.worker

    def replace(self, worker: str) -> None:
        """Ask for another in the place of a worker that this peer knows to be lost. Ask again, ever more seldom, until
        it is there: the answer is that it joins.

        A coordinator that does not know of the loss yet does nothing, so this peer asks again when that tells of it.
        """
        self._wanted[worker] = time.monotonic() + LONGEST_PAUSE_S, 2 * LONGEST_PAUSE_S
        with suppress(FlowmlError):  # the coordinator is away
            self._endpoint.send(COORDINATOR, wire.Replace(worker=worker))

    def become(
        self, asked: wire.Replace, devices: tuple[wire.DeviceInfo, ...], *, python: bool, timeout_s: float = 30.0
    ) -> str:
        """Take the place of a lost worker, as a spare. Returns its name, or that of the spare if another came first.

        Raises ClusterError if the coordinator does not answer in time.
        """
        spare = self._own
        assert spare is not None
        self._endpoint.incarnation = max(new_incarnation(), asked.after + 1)
        worker = structs.replace(
            spare, worker=asked.worker, incarnation=self._endpoint.incarnation, devices=devices, python=python
        )
        with self._changed:
            self._own, self._answered = worker, False  # also for a coordinator that is away now
        deadline = time.monotonic() + timeout_s
        while not (self._answered or self._over.is_set()) and (left := deadline - time.monotonic()) > 0:
            with suppress(FlowmlError):
                self._endpoint.send(COORDINATOR, worker)
            with self._changed:
                self._changed.wait_for(lambda: self._answered or self._over.is_set(), min(left, LONGEST_PAUSE_S))
        with self._changed:
            if not self._answered:
                raise ClusterError(f"the coordinator did not answer that this is {asked.worker} now")
            if self._endpoint.name == spare.worker:
                self._own = spare
        return self._endpoint.name

    def _may_ask_again(self, patient: float) -> bool:
        """Whether the coordinator had too many connections, or has ended meanwhile, or another is about to take its
        place, or it may be there again until the time `patient`."""
        moves = self._may_move and self._refusal is not None and not self._was_refused
        comes = self._is_away and time.monotonic() + AGAIN_S < patient
        return moves or comes or self._has_ended or (self._refusal or "").endswith(TURNED_AWAY)

    @property
    def _has_ended(self) -> bool:
        """Whether the coordinator was there, and has ended before it answered."""
        return not self._was_refused and (self._refusal or "").endswith((BROKE, CLOSED))

    @property
    def _is_away(self) -> bool:
        """Whether no coordinator listened where it should be."""
        refusal = self._refusal or ""
        return not self._was_refused and (REFUSES in refusal or NOT_HERE in refusal)

    def _ask(self, join: wire.Join, deadline: float) -> None:
        """Send the request until the answer and the members are here, or the reason of a failure."""

        def settled() -> bool:
            return self._refusal is not None or (self._welcome is not None and self._epoch >= 0)

        while not settled() and (left := deadline - time.monotonic()) > 0:
            try:
                self._endpoint.send(COORDINATOR, join)
            except FlowmlError as error:
                with self._changed:  # the connection has ended, and its reason will be reported soon
                    self._changed.wait_for(lambda: self._refusal is not None, REPORT_S)
                self._end(str(error))
            with self._changed:
                self._changed.wait_for(settled, min(left, LONGEST_PAUSE_S))

    def leave(self, reason: str = "it left") -> None:
        """Tell the coordinator, and stop. Idempotent; the owner closes the endpoint."""
        if self._over.is_set():
            return
        self._stop()
        try:
            self._endpoint.send(COORDINATOR, wire.Leave(worker=self._endpoint.name, reason=reason))
        except FlowmlError:
            return  # the coordinator has ended already

    def give_notice(self, worker: str) -> None:
        """Tell the coordinator that a worker is to leave, with each heartbeat until the members show it."""
        self._notices[worker] = None
        with suppress(FlowmlError):
            self._endpoint.send(COORDINATOR, wire.Notice(worker=worker))

    def _stop(self) -> None:
        with self._changed:
            self._over.set()
            self._changed.notify_all()

    def _beat(self, welcome: wire.Welcome) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._away or self._over.is_set(), welcome.heartbeat_s)
            if self._over.is_set():
                return
            if self._away:
                self._come_back(welcome.away_s)
                continue
            if self._has_moved():
                self._lose_coordinator("another has taken its place")
                continue
            own = self._own
            assert own is not None
            self._note_silence()
            try:
                self._beat_once(own)
            except FlowmlError as error:
                self._lose_coordinator(str(error))

    def _note_silence(self) -> None:
        now = time.monotonic()
        self._longest_s, self._beaten_s = max(self._longest_s, now - self._beaten_s), now

    def _beat_once(self, own: wire.Join) -> None:
        """Send a heartbeat with the epoch of the view that is here, and what the coordinator has not done yet."""
        beat = wire.Heartbeat(worker=own.worker, incarnation=own.incarnation, epoch=max(0, self._epoch))
        self._endpoint.send(COORDINATOR, beat)
        for worker in list(self._notices):
            self._endpoint.send(COORDINATOR, wire.Notice(worker=worker))
        for worker, (at, pause_s) in list(self._wanted.items()):
            if self._beaten_s >= at:
                self._wanted[worker] = at + pause_s, min(2 * pause_s, MOST_PAUSE_S)
                self._endpoint.send(COORDINATOR, wire.Replace(worker=worker))

    @property
    def may_be_lost(self) -> bool:
        """Whether this peer has been silent for so long that others may count it as lost, as after a suspension. One
        that was suspended when a heartbeat was due has noted that and not sent it."""
        silent_s = max(self._longest_s, time.monotonic() - self._beaten_s)
        return self._welcome is not None and silent_s > min(SUSPENDED_S, MISSED * self._welcome.heartbeat_s)

    def _has_moved(self) -> bool:
        """Whether the coordinator is at another address by now. Notes it then."""
        before = self._address
        if not self._may_move:
            return False
        with suppress(ClusterError):  # etcd is away: the coordinator may be there
            self._address = self._find()
        return self._address != before

    def _come_back(self, away_s: float) -> None:
        """Ask a coordinator that is away to join again, until it answers. After `away_s` the membership ends."""
        self._note_silence()
        deadline, pause = time.monotonic() + away_s, FIRST_PAUSE_S
        while not self._over.is_set():
            self._has_moved()
            with self._changed:
                self._begin_again()
                reason, self._away, self._answered = self._away, "", False
                own = self._own
            assert own is not None
            try:
                self._endpoint.send(COORDINATOR, own)
            except FlowmlError as error:
                self._lose_coordinator(str(error))
            with self._changed:
                left = max(0.0, deadline - time.monotonic())
                # One that is reached and slow is waited for. A connection that fails is always reported.
                self._changed.wait_for(lambda: self._answered or self._away or self._over.is_set(), left)
                answered = self._answered
            if answered:
                self._beaten_s = time.monotonic()  # it was away, and does not count this peer as lost
                for worker in list(self._notices):
                    self.give_notice(worker)
                return
            if time.monotonic() + pause > deadline:
                self._end(f"{self._away or reason}; it did not come back within {away_s:g} s")
                return
            self._over.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _begin_again(self) -> None:
        """Give up the connection to the coordinator for another one. The lock is held: a report of the old one that
        comes later says nothing about the new one. To give that up too would be the end of this member for the
        coordinator, which loses one whose connection ends."""
        self._endpoint.forget(COORDINATOR)
        self._endpoint.know({COORDINATOR: self._address})

    def _on_message(self, peer: str, message: wire.Wire, arrays: list[Any]) -> None:
        if peer != COORDINATOR:
            self._pass_message(peer, message, arrays)
        elif isinstance(message, wire.Members):
            self._take(message)
        elif isinstance(message, wire.Welcome):
            self._endpoint.name = message.worker
            self._welcome = message
            with self._changed:
                # A spare that has asked to join twice may hear the second answer when it asks for a place.
                self._answered |= self._own is None or message.incarnation == self._own.incarnation
                self._changed.notify_all()
        elif isinstance(message, wire.Replace):
            self._on_replace(message)
        elif isinstance(message, wire.Refused):
            self._was_refused = True
            self._end(message.reason)

    def _on_lost(self, peer: str, reason: str) -> None:
        if peer == COORDINATOR:
            self._lose_coordinator(reason, reported=True)
            return
        with self._showing:
            self._notices.pop(peer, None)  # it is not for its successor
            self._show(self.members)
        self._pass_lost(peer, reason)

    def _show(self, members: tuple[wire.Member, ...]) -> None:
        own, lost = self._endpoint.name, self._endpoint.has_lost
        self.members = tuple(m for m in members if m.worker == own or not lost(m.worker, m.incarnation))
        self._on_members(self.members)

    def _lose_coordinator(self, reason: str, *, reported: bool = False) -> None:
        """The coordinator is away. `reported` by the endpoint, and perhaps late: see `_begin_again`."""
        with self._changed:
            if reported and not self._endpoint.has_lost(COORDINATOR, _ANY):
                return
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
        losses = self._losses(view)
        self._on_losses(losses)
        for worker, reason in losses.items():
            self._notices.pop(worker, None)
            if worker != own:
                self._endpoint.lose(worker, reason)
        others = [m for m in view.members if m.worker != own]
        self.gone = dict(view.gone)
        with self._showing:  # what is lost as soon as it is known is lost in this view
            self._endpoint.know({m.worker: m.address for m in others}, {m.worker: m.incarnation for m in others})
            self._show(view.members)
        for member in self.members:
            if member.leaving:
                self._notices.pop(member.worker, None)
        there = {m.worker for m in self.members}
        for worker in list(self._wanted):
            if worker in there:
                del self._wanted[worker]
            else:
                self.replace(worker)
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


def devices_of(members: Sequence[wire.Member], *, python: bool) -> tuple[Device, ...]:
    """The devices of all workers, in the order of their numbers. `python` says whether the driver allows Python."""
    workers = sorted((m for m in members if m.devices), key=lambda m: int(m.worker.rpartition(":")[2]))
    return tuple(
        device(d.name, d.platform, d.memory_bytes, d.cores, python=python and m.python)
        for m in workers
        for d in m.devices
    )


def device(name: str, platform: str, memory: int, share: float, *, python: bool = True) -> Device:
    """A device with a share of the cores of its machine."""
    speed = {"flops_per_s": _CORE_FLOPS_PER_S * share} if platform == "cpu" else {}
    return Device(name, platform=platform, memory_bytes=memory, python=python, **speed)
