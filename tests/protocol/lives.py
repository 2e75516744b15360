"""The lives of what the machines keep, as tables: (state, change) -> state. What a table lacks is refused.

A `Life` has the real machine take a change and says in which state the machine has what it keeps, so that
`test_tables` checks each table entry by entry; docs/protocol.md shows them as diagrams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from flowml.policy import Policy, Quorum
from flowml_runtime import wire
from flowml_runtime.protocol import membership
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.membership import Coordinator
from flowml_runtime.protocol.rendezvous import Rendezvous
from flowml_runtime.protocol.training import home, ledger
from flowml_runtime.protocol.training.actions import Fail, Received
from flowml_runtime.protocol.training.home import Home
from flowml_runtime.protocol.training.ledger import ITEMS, Asked, Ledger, Settled, Work
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Committed, ReplicaLost, Terms
from flowml_runtime.protocol.training.worker import TrainingWorker

Table = Mapping[tuple[str, str], str]


class Life(Protocol):
    """One thing that a fresh machine keeps."""

    def take(self, change: str) -> None:
        """Raises an error where the machine refuses the change."""
        ...

    def state(self) -> str: ...

    def validate(self) -> None: ...


# A key of a rendezvous.

KEYS: Table = {
    ("empty", "put"): "value",
    ("empty", "claim"): "waiter",
    ("empty", "end"): "over",
    ("value", "claim"): "empty",
    ("value", "end"): "over",
    ("waiter", "put"): "empty",
    ("waiter", "end"): "over",
    ("over", "put"): "over",
    ("over", "end"): "over",
}


class Key:
    def __init__(self, end: str) -> None:
        self.machine: Rendezvous[str, str] = Rendezvous()
        self._end = end

    def take(self, change: str) -> None:
        waits, table = self.state() == "waiter", self.machine
        if change == "put":
            assert table.put(("stream", 0, "key"), "value") == ("waiter" if waits else None)
        elif change == "claim":
            holds = self.state() == "value"
            assert table.claim(("stream", 0, "key"), "waiter") == ("value" if holds else None)
        else:
            ends = {"cancel": table.cancel_step, "advance": lambda s, n: table.advance(s, n + 1)}
            woken = table.close() if self._end == "close" else ends[self._end]("stream", 0)
            assert woken == (("waiter",) if waits else ())

    def state(self) -> str:
        if self.machine.is_over("stream", 0):
            return "over"
        if len(self.machine):
            return "value"
        return "waiter" if self.machine._waiters else "empty"  # pyright: ignore

    def validate(self) -> None:
        self.machine.validate()


# A worker's name in membership. "silent" is half the time-out without a word, "at work" the same where the process has
# been seen at work meanwhile. `silence` is more than half a time-out without a word, and `patience` all that is borne.

PEERS: Table = {
    ("unknown", "join"): "member",
    ("unknown", "join anew"): "member",
    ("member", "join"): "member",
    ("member", "join anew"): "member",
    ("member", "hear"): "member",
    ("member", "see work"): "member",
    ("member", "silence"): "silent",
    ("member", "patience"): "lost",
    ("member", "end"): "lost",
    ("silent", "join"): "member",
    ("silent", "join anew"): "member",
    ("silent", "hear"): "member",
    ("silent", "see work"): "at work",
    ("silent", "silence"): "lost",
    ("silent", "patience"): "lost",
    ("silent", "end"): "lost",
    ("at work", "join"): "member",
    ("at work", "join anew"): "member",
    ("at work", "hear"): "member",
    ("at work", "see work"): "at work",
    ("at work", "silence"): "silent",
    ("at work", "patience"): "lost",
    ("at work", "end"): "lost",
    ("lost", "join anew"): "member",
} | {(away, c): away for away in ("unknown", "lost") for c in ("hear", "see work", "silence", "patience", "end")}


class Peer:
    NAME = "worker:0"
    TIMEOUT_S, PATIENCE_S, BEAT_S = 4.0, 24.0, 0.5

    def __init__(self, end: str) -> None:
        times = {"heartbeat_s": self.BEAT_S, "timeout_s": self.TIMEOUT_S, "patience_s": self.PATIENCE_S}
        self.machine = Coordinator("1", 1, **times)
        self._end = end
        self._now_s = 0.0
        self._life = 1
        self.machine.step(membership.Tick(0.0))

    def take(self, change: str) -> None:
        step, name = self.machine.step, self.NAME
        if change in ("join", "join anew"):
            self._life += change == "join anew"
            self._join()
        elif change == "hear":
            step(membership.Received(name, wire.Heartbeat(worker=name, incarnation=self._life)))
        elif change == "see work":
            step(membership.Working(name))
        elif change == "silence":
            self._wait(self.TIMEOUT_S * 0.6, works=False)
        elif change == "patience":
            self._wait(self.PATIENCE_S + self.BEAT_S, works=True)
        elif self._end == "leave":
            step(membership.Received(name, wire.Leave(worker=name)))
        else:
            step((membership.ConnectionLost if self._end == "disconnect" else membership.ProcessExited)(name, "gone"))

    def _join(self) -> None:
        cpu = wire.DeviceInfo(name="cpu:0", platform="cpu", memory_bytes=10, cores=1.0)
        ids: dict[str, Any] = {"worker": self.NAME, "address": f"h:{self._life}", "incarnation": self._life}
        join = wire.Join(**ids, protocol=1, version="1", devices=(cpu,))
        answers = [a.message for a in self.machine.step(membership.Received("joining", join)) if hasattr(a, "message")]
        if any(isinstance(m, wire.Refused) for m in answers):
            raise ProtocolError("it is refused")

    def _wait(self, seconds: float, *, works: bool) -> None:
        until = self._now_s + seconds
        while self._now_s < until:
            self._now_s += self.BEAT_S / 2
            actions = self.machine.step(membership.Tick(self._now_s))
            if works and membership.Look(self.NAME) in actions:
                self.machine.step(membership.Working(self.NAME))

    def state(self) -> str:
        heard = self.machine._heard.get(self.NAME)  # pyright: ignore
        if heard is None:
            return "lost" if self.NAME in self.machine._roster.lives else "unknown"  # pyright: ignore
        if self._now_s - heard.heard_s <= self.TIMEOUT_S / 2:
            return "member"
        return "at work" if self._now_s - heard.seen_s <= self.TIMEOUT_S / 2 else "silent"

    def validate(self) -> None:
        self.machine.validate()


# A run on a worker.

RUNS: Table = {
    ("unknown", "message"): "early",
    ("unknown", "start"): "open",
    ("unknown", "stop"): "closed",
    ("unknown", "later run"): "closed",
    ("early", "message"): "early",
    ("early", "start"): "open",
    ("early", "stop"): "closed",
    ("early", "later run"): "closed",
    ("open", "message"): "open",
    ("open", "start"): "open",
    ("open", "stop"): "closed",
    ("open", "later run"): "closed",
    ("closed", "message"): "closed",
    ("closed", "start"): "closed",
    ("closed", "stop"): "closed",
    ("closed", "later run"): "closed",
}


class Run:
    RUN = 10

    def __init__(self) -> None:
        places = Places((("a",),), (("a",),), ({"a": ("a",)},))
        self.machine = TrainingWorker("a", "driver", Terms(1, 1, 1, (StoreTerms((0,), Policy()),), 0), places)
        self._later = self.RUN

    def take(self, change: str) -> None:
        message: wire.TrainingMessage
        if change == "message":
            message = wire.Source(plan_id="p", run=self.RUN, slots=(0,))
        elif change == "stop":
            message = wire.StopTraining(plan_id="p", run=self.RUN)
        else:
            self._later += change == "later run"
            run = self._later if change == "later run" else self.RUN
            ids: dict[str, Any] = {"seed": 0, "shuffle": False, "examples": 1, "source": "fed", "total_clocks": 4}
            message = wire.StartTraining(plan_id="p", run=run, **ids)
        actions = self.machine.step(Received("driver", message, 1 if change == "message" else None))
        assert not any(isinstance(a, Fail) for a in actions)

    def state(self) -> str:
        fit, early = self.machine._fit, self.machine._early._events  # pyright: ignore
        if fit is not None and fit.run == self.RUN:
            return "open"
        if any(event.message.run == self.RUN for _, event in early):
            return "early"
        return "closed" if self.machine.newest >= self.RUN else "unknown"

    def validate(self) -> None:
        self.machine.validate()


# A contribution of two parts at the home of a store that is decided upon.

DECIDED: Table = {
    ("absent", "part"): "partial",
    ("absent", "rest"): "partial",
    ("absent", "younger part"): "partial",
    ("absent", "exclude"): "dropped",
    ("partial", "part"): "partial",
    ("partial", "rest"): "complete",
    ("partial", "younger part"): "partial",
    ("partial", "exclude"): "dropped",
    ("complete", "part"): "complete",
    ("complete", "rest"): "complete",
    ("complete", "younger part"): "complete",
    ("complete", "include"): "applied",
    ("complete", "exclude"): "dropped",
} | {
    (over, change): over
    for over in ("applied", "dropped")
    for change in ("part", "rest", "younger part", "include", "exclude")
}

# The same where a contribution is applied when it arrives.

ARRIVING: Table = {
    ("absent", "part"): "partial",
    ("absent", "rest"): "partial",
    ("absent", "younger part"): "partial",
    ("absent", "lose"): "dropped",
    ("partial", "part"): "partial",
    ("partial", "rest"): "applied",
    ("partial", "younger part"): "partial",
    ("partial", "lose"): "dropped",
} | {(over, c): over for over in ("applied", "dropped") for c in ("part", "rest", "younger part", "lose")}


class Contribution:
    def __init__(self, *, decided: bool) -> None:
        store = StoreTerms((0, 1), Policy(quorum=Quorum(1))) if decided else StoreTerms((0, 1), Policy(staleness=3))
        self.machine = Home(Terms(2, 2, 1, (store,), 4), [0])
        self._handles = 0
        self._kept: set[int] = set()
        self._over = ""
        self._step(home.StoreLoaded(0))
        if decided:  # so that there is something to commit without replica 0
            for part in (0, 1):
                self._part(replica=1, part=part)

    def take(self, change: str) -> None:
        before = self._over
        if change in ("include", "exclude"):
            self._step(Committed(0, () if change == "include" else (0,)))
            self._over = before or {"include": "applied", "exclude": "dropped"}[change]
        elif change == "lose":
            self._step(ReplicaLost(0))
            self._over = before or "dropped"
        else:
            self._part(part=int(change == "rest"), life=2 if change == "younger part" else 1)

    def _part(self, *, part: int, replica: int = 0, life: int = 1) -> None:
        self._handles += 1
        self._kept.add(self._handles)
        self._step(home.ContributionReceived(0, part, replica, life, 0, 0, 1, self._handles))

    def _step(self, event: home.Event) -> None:
        for action in self.machine.step(event):
            if isinstance(action, home.Release):
                self._kept.remove(action.handle)
            if isinstance(action, home.Apply):
                self._kept -= {h for handles, _ in action.contributions for h in handles}
                self._over = self._over or "applied"

    def state(self) -> str:
        row = self.machine._stores[0].gathering.get(0, {})  # pyright: ignore
        if 0 in row:
            return "complete" if len(row[0].parts) == 2 else "partial"
        return self._over or "absent"

    def validate(self) -> None:
        self.machine.validate()
        assert self._kept == set(self.machine.handles()), "a payload was neither kept nor applied nor released"


# A work item: the ledger itself follows `ITEMS`.


class Item:
    def __init__(self) -> None:
        self.machine = Ledger(Work(1, 1, 8, 1, aligned=False))
        self._item = wire.Item(sequence=0, epoch=0, start=0, size=8)
        self._clock = 0

    def take(self, change: ledger.Change) -> None:
        if change == "granted":
            (grant,) = self.machine.step(Asked(0, (self._clock,)))
            self._clock += 1
            if not grant.items:
                raise ProtocolError("there is no item to grant")
        elif change == "returned":
            self.machine.step(Asked(0, (), (self._item,)))
        else:
            self.machine.step(Settled(0, ((self._item, change),)))

    def state(self) -> str:
        summary = self.machine.summary()
        counts = {"granted": summary.outstanding, **{n: getattr(summary, n) for n in ("used", "dropped", "folded")}}
        (state,) = [name for name, count in counts.items() if count] or ["waiting"]
        return state

    def validate(self) -> None:
        self.machine.validate()


@dataclass(frozen=True)
class Kept:
    """What machines keep: its table, the state that it begins with, and how to make one, for each kind of end."""

    table: Table
    first: str
    make: tuple[Callable[[], Life], ...]


KEPT = {
    "keys of a rendezvous": Kept(KEYS, "empty", tuple(partial(Key, end) for end in ("cancel", "advance", "close"))),
    "peers": Kept(PEERS, "unknown", tuple(partial(Peer, end) for end in ("leave", "disconnect", "exit"))),
    "runs": Kept(RUNS, "unknown", (Run,)),
    "contributions, decided": Kept(DECIDED, "absent", (partial(Contribution, decided=True),)),
    "contributions, on arrival": Kept(ARRIVING, "absent", (partial(Contribution, decided=False),)),
    "items": Kept(ITEMS, "waiting", (Item,)),
}
