"""Says in one line each what happens to the workers of a launched cluster: who has joined, is lost, leaves or is
replaced.

It sees what the launcher sees as a member: the members at each change, and why one of them was lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from flowml_runtime import wire
from flowml_runtime.protocol.membership import SPARE
from flowml_runtime.worker.leaving import HANDED_OVER


class News:
    """What has changed since the members that were seen before."""

    def __init__(self) -> None:
        self._tell: Callable[[str], None] | None = None
        self._lock = threading.Lock()
        self._members: dict[str, wire.Member] = {}
        """Workers and spares: the newest of each name, also after its loss."""
        self._lost: set[str] = set()
        self._free: set[str] = set()
        """Those of them that have left as they should. Another that takes the name replaces nobody."""
        self._spares: dict[str, str] = {}
        """The address of each spare that has joined -> its name."""

    def tell(self, tell: Callable[[str], None]) -> None:
        """Call `tell` with a line for everything that happens from now on."""
        with self._lock:
            self._tell = tell

    def on_members(self, members: tuple[wire.Member, ...]) -> None:
        """These are the members now."""
        with self._lock:
            for member in members:
                if member.devices or member.worker.startswith(SPARE):
                    self._take(member)

    def on_losses(self, losses: Mapping[str, str]) -> None:
        """These members are lost, or have left."""
        with self._lock:
            for name, reason in losses.items():
                member = self._members.get(name)
                if member is not None and name not in self._lost:
                    self._lost.add(name)
                    self._tell_of_loss(member, reason)

    def coordinator_ended(self, reason: str) -> None:
        """The process of the coordinator has ended, and another one is started."""
        with self._lock:
            self._say(f"the coordinator is lost, and another is started: {reason}")

    def _take(self, member: wire.Member) -> None:
        name, before = member.worker, self._members.get(member.worker)
        self._members[name] = member
        if before is not None and before.incarnation == member.incarnation:
            if member.leaving and not before.leaving:
                self._say(f"{name} has been given notice: it hands over, and leaves")
            return
        self._lost.discard(name)
        replaced = before is not None and name not in self._free
        self._free.discard(name)
        if not member.devices:
            self._spares[member.address] = name
            self._say(f"{_called(member)} has joined and waits")
        elif member.address in self._spares:
            self._say(f"{name} is replaced by {self._spares.pop(member.address)}")
        else:
            self._say(f"{name} is replaced: another has joined under its name" if replaced else f"{name} has joined")

    def _tell_of_loss(self, member: wire.Member, reason: str) -> None:
        if reason == HANDED_OVER:
            self._free.add(member.worker)
            self._say(f"{member.worker} has left")
        elif member.devices or not reason.startswith("it took the place of"):  # of which `_take` tells
            self._say(f"{_called(member)} is lost: {reason}")

    def _say(self, line: str) -> None:
        if self._tell is not None:
            self._tell(line)


def _called(member: wire.Member) -> str:
    return member.worker if member.devices else f"spare worker {member.worker}"
