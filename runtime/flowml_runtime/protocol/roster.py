"""What a coordinator must not forget when its process ends: who is a member, and which incarnations were used.

A roster changes by records only, and the records of a log give the same roster again. So a coordinator that is started
again with the log of its predecessor has the same members, refuses the same incarnations, and goes on counting changes.
When a member was heard last is not in it: a new coordinator gives each member a whole timeout to come back.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from flowml_runtime import wire

LOST = "it was lost"
"""The reason that a record without one stands for."""


class Joined(msgspec.Struct, frozen=True, tag=True):
    """A peer became a member, or one has given notice. It takes the place of a member of its name."""

    member: wire.Member
    process: wire.Process | None = None


class Left(msgspec.Struct, frozen=True, tag=True):
    """Members were lost, or left, at the same time, and why."""

    names: tuple[wire.Name, ...]
    reasons: dict[wire.Name, wire.Text] = {}


class Whole(msgspec.Struct, frozen=True, tag=True):
    """A whole roster. It stands for all records before it."""

    epoch: wire.Count
    members: tuple[wire.Member, ...]
    lives: dict[wire.Name, wire.Count]
    processes: dict[wire.Name, wire.Process | None]
    gone: dict[wire.Name, wire.Text] = {}


Record = Joined | Left | Whole


class Roster:
    """The members of a cluster, by name and in the order in which they joined."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.epoch = 0
        """The number of changes."""
        self.members: dict[str, wire.Member] = {}
        self.lives: dict[str, int] = {}
        """Worker -> its latest incarnation, kept after its loss. Observers never return under the same name."""
        self.processes: dict[str, wire.Process | None] = {}
        """The process of each member, if it said which."""
        self.gone: dict[str, str] = {}
        """Worker -> why it was lost, or left, until another has its name."""
        for record in records:
            self.apply(record)

    def apply(self, record: Record) -> None:
        match record:
            case Joined(member, process):
                self.epoch += 1
                self.processes[member.worker] = process
                self.members[member.worker] = member
                if member.devices:
                    self.lives[member.worker] = member.incarnation
                self.gone.pop(member.worker, None)
            case Left(names, reasons):
                self.epoch += 1
                for name in names:
                    if self.members[name].devices:
                        self.gone[name] = reasons.get(name, LOST)
                    del self.members[name], self.processes[name]
            case Whole(epoch, members, lives, processes, gone):
                self.epoch, self.lives, self.processes = epoch, dict(lives), dict(processes)
                self.gone = dict(gone)
                self.members = {m.worker: m for m in members}

    def whole(self) -> Whole:
        """The one record that gives this roster."""
        members, lives, processes = tuple(self.members.values()), dict(self.lives), dict(self.processes)
        return Whole(self.epoch, members, lives, processes, dict(self.gone))
