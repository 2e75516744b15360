"""Passes what a driver hears of its cluster to those whom it concerns: the cluster, its session, and its links."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from flowml.devices import Device
from flowml_runtime import wire
from flowml_runtime.links.prober import Prober
from flowml_runtime.links.table import LinkTable
from flowml_runtime.membership.advice import LAUNCH_AGAIN, back_with
from flowml_runtime.membership.member import Membership, devices_of
from flowml_runtime.protocol.membership import LAUNCHER, SPARE, WORKER
from flowml_runtime.transport.endpoint import Endpoint

if TYPE_CHECKING:
    from flowml_runtime.driver.session import Session


class Followed(Protocol):
    """A cluster that a driver has joined."""

    endpoint: Endpoint
    session: Session
    python: bool
    pids: Mapping[str, int]
    spares: int
    launchers: int
    told: dict[str, str]

    def have(self, devices: Sequence[Device], leaving: Collection[str] | None = None) -> None: ...


class DriverEvents:
    """Passes the events of a membership to its cluster, which exists only after the membership has joined."""

    def __init__(self, prober: Prober) -> None:
        self.prober = prober
        self.table: LinkTable | None = None
        self._cluster: Followed | None = None
        self._membership: Membership | None = None
        self._lock = threading.Lock()

    def adopt(self, cluster: Followed, membership: Membership) -> None:
        with self._lock:
            self._cluster, self._membership = cluster, membership
            self._show(membership.members)

    def on_members(self, members: tuple[wire.Member, ...]) -> None:
        with self._lock:
            self._show(members)

    def on_losses(self, losses: Mapping[str, str]) -> None:
        """Called before the members that are left are shown."""
        if self._cluster is not None:
            self._cluster.told.update((w, why) for w, why in losses.items() if w.startswith(WORKER))

    def _show(self, members: tuple[wire.Member, ...]) -> None:
        if self._cluster is not None:
            self._cluster.spares = sum(m.worker.startswith(SPARE) for m in members)
            self._cluster.launchers = sum(m.worker.startswith(LAUNCHER) for m in members)
            leaving = [m.worker for m in members if m.leaving]
            session, gone = self._cluster.session, {} if self._membership is None else self._membership.gone
            session.lost_elsewhere(gone)  # before others hear that the devices are gone
            self._cluster.have(devices_of(members, python=self._cluster.python), leaving)
            session.back = back_with(self._cluster.spares, session.remedy)

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
                self._cluster.session.remedy = LAUNCH_AGAIN
            self.on_members(())
            for member in members:
                self._cluster.endpoint.lose(member.worker, f"the coordinator was lost: {reason}")
