"""Keeps the membership of a cluster: it admits peers, monitors them, and tells all members of changes.

Two kinds of peer join: workers, which offer devices, and observers (drivers and launchers), which offer none. Both
are in `Members`, so that every member has the address of every other. A name with an incarnation is one life of a
peer. A peer that joins again must have a later incarnation, so that messages of an earlier life are never taken for
those of its successor. A peer is lost when the first of these happens: its process ends, its connection breaks, it
leaves, or it is silent for `timeout_s`. If the host can see that a silent peer's process is at work, and only lacks a
core because the machine is busy, the peer may be silent for `patience_s`.

A coordinator may be durable: its host logs a `Record` of each change before anyone is told of it. If its process ends,
another with the same log goes on. Meanwhile members work, and ask to join again until they are answered or `away_s`
have passed. Nobody is lost because the coordinator was away: a member of the log is lost when it has been silent for
`timeout_s` of the new coordinator's time. It is sent nothing before it has asked to join again: it makes its connection
anew with each question, and a message on the one before would break it. One that was lost before is refused as ever,
because its incarnation is in the log. One that has ended meanwhile may have left its address to a newcomer: it is lost
when that one joins.

A *spare* is an observer that may become a worker. When a driver asks for another in the place of a lost worker, the
coordinator asks the first spare that is free, and that one joins under the worker's name in a later incarnation. It
gives up its name as a spare with that. If there is none, the launchers are asked to start a process. A driver asks
again until the worker is there, and then the same spare is asked again.

A worker may give notice before it leaves, or an observer for it. Then it is a member like any other, and marked for all
to see, so that drivers can have others go on with its work. It leaves when it has nothing to do any more.

Any message may be lost. Each request is sent again until its effect is seen. A heartbeat says which view a member has,
and a member whose view is an old one is sent the newest.

Duties of the host:

1. Pass on every Join, Heartbeat, Notice and Leave as `Received` from its sender, and do the actions in order.
2. Tick several times per heartbeat. Time advances only with ticks.
3. Report the end of a peer's connection once, and before any message from a later life of that peer.
4. Tick before any other event.
5. Have each `Append` on disk before the actions after it are done. If that fails, end.
6. A peer joins under a unique temporary name, and then uses the name that `Welcome` gives it.
7. Answer `Look` with `Working` if the process is at work. Do not answer otherwise, or if it is on another machine.
8. Do `Restart` if this process has started the worker: start another in its place, unless one is starting.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from msgspec import structs

from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.roster import Joined, Left, Record, Roster

HEARTBEAT_S = 0.5
TIMEOUT_S = 5.0
PATIENCE_S = 30.0
LEAST_LOST_AFTER_S = 0.1
TOO_SOON = (
    f"every worker would be lost before its next heartbeat has come; give at least {LEAST_LOST_AFTER_S:g} seconds"
)
"""What is wrong with a shorter time of silence than that."""
MAX_MEMBERS = 1024
AWAY_S = 60.0
"""How long members wait for a durable coordinator that has ended."""

_WORKER = re.compile(r"worker:(0|[1-9]\d{0,8})")
_OBSERVER = re.compile(r"(driver|launcher|spare)(-[0-9a-zA-Z]{1,64})?")
COORDINATOR = "coordinator"
"""The name of every coordinator."""
WORKER, LAUNCHER, SPARE = "worker", "launcher", "spare"
"""What the names of workers and of these observers begin with."""


MembershipMessage = wire.Join | wire.Heartbeat | wire.Notice | wire.Leave | wire.Replace


@dataclass(frozen=True)
class Received:
    """A membership message from `peer`, which is the current name of its connection."""

    peer: str
    message: MembershipMessage


@dataclass(frozen=True)
class ConnectionLost:
    peer: str
    reason: str


@dataclass(frozen=True)
class ProcessExited:
    """The process of `worker` has ended. Its parent reports this. With `process` only that one is meant, and not one
    that has the worker's name by now."""

    worker: str
    reason: str
    process: wire.Process | None = None


@dataclass(frozen=True)
class Working:
    """The process of `worker` is at work. This is the answer to `Look`, if true."""

    worker: str


@dataclass(frozen=True)
class Tick:
    now_s: float


@dataclass(frozen=True)
class Close:
    """The cluster ends, and its members are told."""

    reason: str


Event = Received | ConnectionLost | ProcessExited | Working | Tick | Close


@dataclass(frozen=True)
class Know:
    """Use `address` for `peer` from now on."""

    peer: str
    address: str


@dataclass(frozen=True)
class Rename:
    """Rename `peer` and its connections to `name`."""

    peer: str
    name: str


@dataclass(frozen=True)
class Send:
    peer: str
    message: wire.Wire


@dataclass(frozen=True)
class Forget:
    """Send nothing more to `peer` after the messages before this action."""

    peer: str


@dataclass(frozen=True)
class Look:
    """`worker` has been silent for a while: check whether its process is at work, if this machine can tell."""

    worker: str
    process: wire.Process | None = None


@dataclass(frozen=True)
class Append:
    """Write a record to the log, if there is one."""

    record: Record


@dataclass(frozen=True)
class Restart:
    """No spare and no launcher can take the place of `worker`: whoever runs the coordinator may have started it."""

    worker: str


Action = Know | Rename | Send | Forget | Look | Append | Restart


@dataclass
class _Heard:
    """The time of a member's last message, and the time when its process was last seen at work."""

    heard_s: float
    seen_s: float = 0.0
    back: bool = True
    """Whether it has joined this coordinator, and not only an earlier one with the same log."""
    came: str = ""
    """The name of its connection when it asked to join. What it asked meanwhile still comes under that name."""


class Coordinator:
    """The membership machine. Not thread-safe; the host guards it."""

    def __init__(
        self,
        version: str,
        protocol: int,
        *,
        heartbeat_s: float = HEARTBEAT_S,
        timeout_s: float = TIMEOUT_S,
        patience_s: float = PATIENCE_S,
        max_members: int = MAX_MEMBERS,
        away_s: float = 0.0,
        roster: Roster | None = None,
    ) -> None:
        """`roster` is what the log of an earlier coordinator gives. `away_s` is above 0 if there is a log."""
        self._version = version
        self._protocol = protocol
        self._heartbeat_s = heartbeat_s
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._max_members = max_members
        self._away_s = away_s
        self._now_s: float | None = None
        self._roster = roster or Roster()
        self._heard: dict[str, _Heard] = {}
        """The members, from the first tick on."""
        self._asked: dict[str, str] = {}
        """Spare -> the worker whose place it was asked to take."""

    @property
    def members(self) -> tuple[wire.Member, ...]:
        return tuple(self._roster.members.values())

    def step(self, event: Event) -> list[Action]:
        """Process one event. Returns the resulting actions, in order."""
        match event:
            case Tick(now_s):
                return self._tick(now_s)
            case ConnectionLost(peer, reason):
                return self._lose({peer: reason})
            case ProcessExited(worker, reason, process):
                another = process is not None and self._roster.processes.get(worker) != process
                return [] if another else self._lose({worker: reason})
            case Working(worker):
                if (heard := self._heard.get(worker)) is not None:
                    heard.seen_s = self._now()
                return []
            case Close(reason):
                return [Send(name, wire.Refused(reason=reason)) for name, heard in self._heard.items() if heard.back]
            case Received(peer, message):
                return self._receive(peer, message)

    def validate(self) -> None:
        """Raises ProtocolError if an invariant does not hold."""
        roster = self._roster
        addresses = [member.address for member in self.members]
        if len(set(addresses)) != len(addresses):
            raise ProtocolError(f"two members share an address: {sorted(addresses)}")
        if len(addresses) > self._max_members:
            raise ProtocolError(f"{len(addresses)} members, more than {self._max_members}")
        if self._now_s is not None and self._heard.keys() != roster.members.keys():
            raise ProtocolError(f"members {sorted(roster.members)}, and heard of are {sorted(self._heard)}")
        for name, member in roster.members.items():
            if member.worker != name or any(d.name.rpartition("/")[0] != name for d in member.devices):
                raise ProtocolError(f"{name} has the seat or devices of another: {member}")
            if bool(member.devices) != bool(_WORKER.fullmatch(name)):
                raise ProtocolError(f"{name} has {len(member.devices)} devices")
            if member.devices and roster.lives.get(name) != member.incarnation:
                raise ProtocolError(f"{name} lives in incarnation {member.incarnation}, not its latest")
        for name, heard in self._heard.items():
            if heard.heard_s > self._now():
                raise ProtocolError(f"{name} was heard of in the future")
        if not self._asked.keys() <= roster.members.keys() or len({*self._asked.values()}) != len(self._asked):
            raise ProtocolError(f"spares were asked for {self._asked}, and the members are {sorted(roster.members)}")

    def _receive(self, peer: str, message: MembershipMessage) -> list[Action]:
        match message:
            case wire.Join():
                return self._join(peer, message)
            case wire.Heartbeat(worker=worker):
                behind = self._hear(worker, message.incarnation) and message.epoch < self._roster.epoch
                return [Send(worker, self._view({}))] if behind and worker == peer else []
            case wire.Notice(worker=worker):
                return self._note(worker)
            case wire.Leave():
                return self._lose({peer: message.reason or "it left"})
            case wire.Replace(worker=worker):
                return self._replace(worker)

    def _replace(self, worker: str) -> list[Action]:
        """Have another in the place of a lost worker, unless it is there or a spare is on its way."""
        if worker in self._heard or worker not in self._roster.lives:
            return []
        for name, asked in self._asked.items():
            if asked == worker:  # it may not have heard the question
                return [Send(name, wire.Replace(worker=worker, after=self._latest_life(worker)))]
        if any(_is(name, SPARE) and not heard.back for name, heard in self._heard.items()):
            return []  # it may have been asked before this coordinator was started
        back = [name for name, heard in self._heard.items() if heard.back]
        message = wire.Replace(worker=worker, after=self._latest_life(worker))
        for name in back:
            if _is(name, SPARE) and name not in self._asked:
                self._asked[name] = worker
                return [Send(name, message)]
        return [Send(name, message) for name in back if _is(name, LAUNCHER)] or [Restart(worker)]

    def _now(self) -> float:
        return self._now_s or 0.0

    def _tick(self, now_s: float) -> list[Action]:
        if self._now_s is None:
            return self._begin(now_s)
        slept = max(0.0, now_s - self._now_s - self._heartbeat_s)
        self._now_s = max(now_s, self._now_s)
        if slept:
            # The coordinator itself was suspended, so the heartbeats of that time have not been read yet.
            for heard in self._heard.values():
                heard.heard_s = min(heard.heard_s + slept, self._now_s)
        overdue = {n: limit for n, h in self._heard.items() if (limit := self._overdue_s(h))}
        lost = self._lose({n: f"no heartbeat for {limit:g} s" for n, limit in overdue.items()})
        silent = [n for n, h in self._heard.items() if self._now() - h.heard_s > self._timeout_s / 2]
        return [*lost, *(Look(n, self._roster.processes[n]) for n in silent)]

    def _begin(self, now_s: float) -> list[Action]:
        self._now_s = now_s
        self._heard = {name: _Heard(now_s, back=False) for name in self._roster.members}
        return []

    def _overdue_s(self, heard: _Heard) -> float:
        """The limit of silence that a member has exceeded; 0 if none."""
        now = self._now()
        if now - heard.heard_s > self._patience_s:
            return self._patience_s
        return self._timeout_s if now - max(heard.heard_s, heard.seen_s) > self._timeout_s else 0.0

    def _hear(self, worker: str, incarnation: int) -> bool:
        """Whether that member is here."""
        heard = self._heard.get(worker)
        if heard is None or self._roster.members[worker].incarnation != incarnation:
            return False
        heard.heard_s = self._now()
        return heard.back

    def _join(self, peer: str, join: wire.Join) -> list[Action]:
        name = join.worker or self._name_of(join) or self._free_name(join.incarnation)
        if self._name_of(join) == name:  # it asks again: the answer was slow, or the coordinator was away
            self._hear(name, join.incarnation)
            same = peer == self._heard[name].came
            self._heard[name].came = peer
            return self._answer(name if same else peer, join, name)
        objection, spare = self._objection(name, join), self._spare_of(join)
        if spare and (objection is not None or name in self._heard):  # another came first, so it stays a spare
            self._asked.pop(spare, None)
            return self._answer(peer, join, spare)
        if objection is not None:
            # A peer that uses the name of a live member gets no answer, because the answer would go to that member.
            answer = Send(peer, wire.Refused(reason=objection))
            return [] if peer in self._heard else [Know(peer, join.address), answer, Forget(peer)]
        lost = {name: f"a new {name} took its place"} if name in self._heard else {}
        gone = {spare: f"it took the place of {name}"} if spare else {}
        if not spare and (holder := self._holder(join)) not in ("", name):
            gone[holder] = "another process listens at its address"
        for left in gone:
            del self._heard[left]
            self._asked.pop(left, None)
        lost |= gone
        devices = tuple(_named(d, name) for d in join.devices)
        member = wire.Member(
            worker=name, address=join.address, incarnation=join.incarnation, devices=devices, python=join.python
        )
        self._heard[name] = _Heard(self._now(), came=peer)
        return [
            *([self._change(_left(gone))] if gone else []),
            self._change(Joined(member, join.process)),
            *(Forget(left) for left in gone if left != peer),
            Know(peer, join.address),
            *([Rename(peer, name)] if peer != name else []),
            Send(name, self._welcome(name, join.incarnation)),
            *self._announce(lost),
        ]

    def _answer(self, peer: str, join: wire.Join, name: str) -> list[Action]:
        """Tell a member, whose connection is `peer`, its name and the view."""
        self._heard[name].back = True
        again = [] if peer == name else [Rename(peer, name)]
        welcome = self._welcome(name, join.incarnation)
        return [Know(peer, join.address), *again, Send(name, welcome), Send(name, self._view({}))]

    def _spare_of(self, join: wire.Join) -> str:
        """The name of the spare that asks to be a worker, or "" if it was none."""
        if not join.devices:
            return ""
        return next((m.worker for m in self.members if m.address == join.address and _is(m.worker, SPARE)), "")

    def _holder(self, join: wire.Join) -> str:
        """The member that has the address of the peer that asks, or ""."""
        return next((m.worker for m in self.members if m.address == join.address), "")

    def _note(self, worker: str) -> list[Action]:
        """A worker will leave soon. Nobody else can do that, and once is enough."""
        member = self._roster.members.get(worker)
        if member is None or not member.devices or member.leaving:
            return []
        leaving = structs.replace(member, leaving=True)
        return [self._change(Joined(leaving, self._roster.processes[worker])), *self._announce({})]

    def _name_of(self, join: wire.Join) -> str:
        """The name of the member that asks, or "" if it is none."""
        own = join.address, join.incarnation
        return next((m.worker for m in self.members if (m.address, m.incarnation) == own), "")

    def _objection(self, name: str, join: wire.Join) -> str | None:
        """Why this peer is not admitted and how to fix that, or None."""
        if (join.version, join.protocol) != (self._version, self._protocol):
            return (
                f"it runs flowml {join.version} (protocol {join.protocol}) and this cluster "
                f"flowml {self._version} (protocol {self._protocol}); install flowml {self._version} there"
            )
        kind = _WORKER if join.devices else _OBSERVER
        if not kind.fullmatch(name):
            role = "worker" if join.devices else "driver"
            return f"{name!r} is not a valid name for a {role}; give no name, and the cluster chooses one"
        if len({d.name.rpartition("/")[2] for d in join.devices}) != len(join.devices):
            return f"two of its devices have the same name: {', '.join(d.name for d in join.devices)}; name each once"
        holder = self._holder(join)
        if holder not in ("", name, self._spare_of(join)) and self._heard[holder].back:
            return f"its address {join.address} is that of {holder}; each peer needs a different address"
        latest = self._latest_life(name)
        if join.incarnation <= latest:
            return (
                f"its incarnation {join.incarnation} of {name} is not later than {latest}, seen before: "
                "it was counted as lost, or its clock is wrong; start it again, and if that does not help set its clock"
            )
        if name not in self._heard and not self._spare_of(join) and len(self._heard) >= self._max_members:
            return f"the cluster is full with {self._max_members} members"
        return None

    def _latest_life(self, name: str) -> int:
        member = self._roster.members.get(name)
        return member.incarnation if member is not None else self._roster.lives.get(name, -1)

    def _free_name(self, incarnation: int) -> str:
        """The first worker name that no member has, and that no peer has had with a later incarnation."""
        numbers = range(len(self._heard) + len(self._roster.lives) + 1)
        names = (f"worker:{i}" for i in numbers)
        return next(n for n in names if n not in self._heard and self._latest_life(n) < incarnation)

    def _lose(self, reasons: dict[str, str]) -> list[Action]:
        lost = {name: reason for name, reason in reasons.items() if self._heard.pop(name, None) is not None}
        self._asked = {spare: worker for spare, worker in self._asked.items() if spare not in lost}
        return [self._change(_left(lost)), *map(Forget, lost), *self._announce(lost)] if lost else []

    def _change(self, record: Record) -> Append:
        self._roster.apply(record)
        return Append(record)

    def _announce(self, lost: dict[str, str]) -> list[Action]:
        view = self._view(lost)
        return [Send(name, view) for name, heard in self._heard.items() if heard.back]

    def _view(self, lost: dict[str, str]) -> wire.Members:
        roster = self._roster
        gone = tuple(roster.gone.items())
        return wire.Members(epoch=roster.epoch, members=self.members, lost=tuple(lost.items()), gone=gone)

    def _welcome(self, name: str, incarnation: int) -> wire.Welcome:
        beat, away = self._heartbeat_s, self._away_s
        return wire.Welcome(worker=name, heartbeat_s=beat, away_s=away, incarnation=incarnation)


def _is(name: str, kind: str) -> bool:
    """Whether a member is of a kind."""
    return name == kind or name.startswith((f"{kind}-", f"{kind}:"))


def _left(lost: dict[str, str]) -> Left:
    """The record of members that are lost. Why is of interest as long as a name is free, and that of a worker is used
    again."""
    return Left(tuple(lost), {name: reason for name, reason in lost.items() if _is(name, WORKER)})


def _named(device: wire.DeviceInfo, worker: str) -> wire.DeviceInfo:
    """The device with its full name. A worker without a name offers only "cpu:0"."""
    return wire.DeviceInfo(
        name=f"{worker}/{device.name.rpartition('/')[2]}",
        platform=device.platform,
        memory_bytes=device.memory_bytes,
        cores=device.cores,
    )
