"""Says who belongs to a simulated cluster at each time of a fit: the coordinator's machine, under the virtual clock.

Workers join, give notice, leave and are lost as `fm.sim.Churn` and `fm.sim.Crash` say. The coordinator
(`protocol.membership`) is that of real clusters, and tells one observer, the driver of the fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import flowml
from flowml.devices import Device
from flowml.sim import Churn, Crash, Fault
from flowml_runtime import wire
from flowml_runtime.protocol.membership import (
    ConnectionLost,
    Coordinator,
    MembershipMessage,
    Received,
    Send,
    Tick,
)
from flowml_runtime.protocol.roster import Joined, Roster
from flowml_runtime.sim.network import DRIVER

FIRST_LIFE = 1
NOTICED_S = 1.0
"""After how long the others know that a worker has stopped."""


@dataclass(frozen=True, order=True)
class Absence:
    """A worker is away for a part of a fit. Times are in seconds from its beginning."""

    down_s: float
    worker: int
    notice_s: float = math.inf
    """When it gives notice, if it does before it goes."""
    noticed_s: float = 0.0
    """When the others know that it is away."""
    up_s: float = math.inf
    """When it takes part again."""

    @property
    def name(self) -> str:
        return f"worker:{self.worker}"

    @property
    def reason(self) -> str:
        return f"it {'stopped' if self.notice_s == math.inf else 'left'} at {self.down_s:g} s"


def absences(faults: Iterable[Fault | Churn], workers: int) -> tuple[Absence, ...]:
    """When which of so many workers are away, in order."""
    found: list[Absence] = []
    for fault in faults:
        if isinstance(fault, Crash):
            found.append(Absence(fault.at_s, fault.worker, noticed_s=fault.at_s + fault.noticed_s))
        elif isinstance(fault, Churn):
            found += _absences(fault, workers)
    return tuple(sorted(found))


def _absences(churn: Churn, workers: int) -> Iterator[Absence]:
    """The absences in a churn. A worker that goes again before it takes part was away all the time. One that is there
    again before others notice that it was away is noticed then: it is another life."""
    times: dict[int, list[float]] = {}
    for time_s, worker, _ in churn.changes:
        if worker < workers:
            times.setdefault(worker, []).append(time_s)
    for worker, own in times.items():
        spans: list[tuple[float, float]] = []
        for down_s, back_s in zip_longest(own[::2], own[1::2], fillvalue=math.inf):
            if spans and spans[-1][1] >= down_s:
                down_s = spans.pop()[0]
            spans.append((down_s, back_s + churn.start_s))
        here = 0.0
        for down_s, up_s in spans:
            if churn.notice_s:
                yield Absence(down_s, worker, max(here, down_s - churn.notice_s), down_s, up_s)
            else:
                yield Absence(down_s, worker, math.inf, min(down_s + NOTICED_S, up_s) if down_s else 0.0, up_s)
            here = up_s


class SimulatedMembers:
    """The members of a cluster during one fit."""

    def __init__(self, devices: Sequence[Device], away: Sequence[Absence]) -> None:
        """`devices` are those of all workers, `away` says which of these are away when."""
        self._away = away
        self._all = tuple(devices)
        self._infos: dict[str, tuple[wire.DeviceInfo, ...]] = {}
        for device in devices:
            info = wire.DeviceInfo(name=device.name, platform="cpu", memory_bytes=0, cores=1.0)
            self._infos[device.worker] = (*self._infos.get(device.worker, ()), info)
        first = Roster(Joined(self._member(worker, FIRST_LIFE)) for worker in self._infos)
        self._machine = Coordinator(flowml.__version__, wire.PROTOCOL, max_members=len(self._infos) + 1, roster=first)
        self._lives = dict.fromkeys(self._infos, FIRST_LIFE)
        self._events = sorted(self._changes(), key=lambda change: change[0])
        self._next = 0
        self.devices: tuple[Device, ...] = self._all
        """Those of the workers that are there. Another tuple after each change."""
        self.leaving: frozenset[str] = frozenset()
        """The workers that have given notice."""
        self._step(Tick(0.0))
        self._receive(DRIVER, _join(DRIVER, DRIVER, FIRST_LIFE, ()))
        self.go_on(0.0)

    @property
    def next_s(self) -> float:
        """When the members change next."""
        return self._events[self._next][0] if self._next < len(self._events) else math.inf

    def go_on(self, now_s: float) -> None:
        """It is now so many seconds after the beginning of the fit."""
        while self.next_s <= now_s:
            _, kind, worker = self._events[self._next]
            self._next += 1
            self._change(kind, worker)

    def absence(self, worker: str, now_s: float) -> Absence | None:
        """The absence of a worker at this time, or else its next one."""
        return next((a for a in self._away if a.name == worker and a.up_s > now_s), None)

    def was_there(self, worker: str, since_s: float, now_s: float) -> bool:
        """Whether a worker has not been away since a time."""
        return not any(a.name == worker and a.down_s <= now_s and a.up_s > since_s for a in self._away)

    def _changes(self) -> Iterator[tuple[float, str, str]]:
        """What happens, by its time: a worker gives notice, leaves, is lost, or joins again."""
        for away in self._away:
            if away.notice_s < away.down_s:
                yield away.notice_s, "notice", away.name
            yield away.noticed_s, "leave" if away.notice_s < math.inf else "lose", away.name
            if away.up_s < math.inf:
                yield away.up_s, "join", away.name

    def _change(self, kind: str, worker: str) -> None:
        match kind:
            case "notice":
                self._receive(worker, wire.Notice(worker=worker))
            case "leave":
                self._receive(worker, wire.Leave(worker=worker))
            case "lose":
                self._step(ConnectionLost(worker, "it stopped"))
            case _:
                self._lives[worker] += 1
                life = self._lives[worker]
                address = self._member(worker, life).address
                self._receive(address, _join(worker, address, life, self._infos[worker]))

    def _receive(self, peer: str, message: MembershipMessage) -> None:
        self._step(Received(peer, message))

    def _step(self, event: Tick | Received | ConnectionLost) -> None:
        for action in self._machine.step(event):
            if isinstance(action, Send) and action.peer == DRIVER and isinstance(action.message, wire.Members):
                there = {member.worker for member in action.message.members}
                self.devices = tuple(device for device in self._all if device.worker in there)
                self.leaving = frozenset(member.worker for member in action.message.members if member.leaving)

    def _member(self, worker: str, life: int) -> wire.Member:
        return wire.Member(
            worker=worker, address=f"{worker}/{life}", incarnation=life, devices=self._infos[worker], python=True
        )


def _join(name: str, address: str, life: int, devices: tuple[wire.DeviceInfo, ...]) -> wire.Join:
    version = flowml.__version__
    return wire.Join(
        worker=name, address=address, incarnation=life, protocol=wire.PROTOCOL, version=version, devices=devices
    )
