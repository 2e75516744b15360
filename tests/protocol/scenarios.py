"""Scenarios: the real machines of a small run, driven by commands, and what they do in sentences.

A file has blocks: commands, a line `----`, and what they lead to, up to an empty line. Messages arrive at once and in
the order of sending, but for links that are held.

    run replicas=3 stages=1 clocks=2 items=6 stores=quorum(2;4),every(2)
                         begin a run, with all stores at the first stage of replica 0. quorum(2;4): two, each 4th clock.
                         fold(2): two, and late ones join a later clock. softsync(2): two at a time, without clocks
                         pull(1;2): gradients are sent at each step, and parameters taken at each 2nd, without clocks
                         save=K: with a snapshot every K clocks and at the end; save=0: only at the end
    finish R[.S]         the stage pushes what is due and leaves its step
    push R[.S], leave R[.S]   the same in two
    hold A B, free A B   keep what A sends to B until it is freed
    again A B            what A sent to B last comes once more
    reads R[.S] STORE    whether the stage, as it is, may read the store
    lose R               all are told that the replica is lost
    left_out R           the driver is told that its worker is lost, and that the fit may go on without it
    pause                the driver is to take a snapshot soon
    withdraw             it gives the snapshot up for now that a late replica holds up
    resume               begin the run anew, from its newest snapshot
    show KIND...         also tell of these actions and messages
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from flowml import policies
from flowml.policy import UNBOUNDED, Every, Policy, Quorum, check_composition
from flowml_runtime import wire
from flowml_runtime.protocol.training import actions, driver
from flowml_runtime.protocol.training.ledger import LedgerState, Work
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.replica import Replica
from flowml_runtime.protocol.training.snapshot import Rhythm, Save
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.story import wants
from flowml_runtime.protocol.training.terms import ReplicaLost, Terms
from flowml_runtime.protocol.training.worker import TrainingWorker

IDS: dict[str, Any] = {"plan_id": "plan", "run": 0}
RULES: dict[str, Callable[..., Policy]] = {
    "sync": policies.synchronous,
    "quorum": lambda n, k=1: policies.quorum(int(n), every=int(k)),
    "every": lambda k: policies.every(int(k)),
    "fold": lambda n, k=1: policies.quorum(int(n), late="fold", every=int(k)),
    "softsync": lambda n: Policy(staleness=UNBOUNDED, quorum=Quorum(int(n), late="fold")),
    "async": lambda *s: policies.asynchronous(*map(int, s)),
    "pull": lambda push, pull: policies.asynchronous(every=Every(int(push), int(pull))),
    "sum": policies.all_reduce,
}
TOLD = {
    "Start",
    "Abandon",
    "Count",
    "Apply",
    "Publish",
    "Return",
    "Fail",
    "Over",
    "Release",
    "Commit",
    "Settled",
    "Retired",
    "Paused",
    "Save",
}


def rule(text: str) -> Policy:
    name, _, rest = text.partition("(")
    return RULES[name](*filter(None, rest.rstrip(")").split(";")))


@dataclass
class _Running:
    start: actions.Start
    pushed: bool = False
    reads: dict[int, int] | None = None


class Scenario:
    """One run. `do` carries a command out and returns what was to be told of it."""

    def __init__(self) -> None:
        self._told = set(TOLD)
        self._lines: list[str] = []
        self.saved: tuple[wire.Stopped, LedgerState] | None = None
        self.waited = False
        """Whether contributions waited at a snapshot."""
        self.applied, self._saved_applied = Counter[int](), Counter[int]()
        """The contributions in the newest version of each store, and in that of the newest snapshot."""
        self._clear()

    def _clear(self) -> None:
        """Forget all messages and steps."""
        self._links: dict[tuple[str, str], deque[Any]] = defaultdict(deque)
        self._order: deque[tuple[str, str]] = deque()
        self.held: set[tuple[str, str]] = set()
        self._last: dict[tuple[str, str], Any] = {}
        self.running: dict[tuple[int, int], _Running] = {}
        self._gathered: dict[tuple[int, int, int], int] = defaultdict(int)
        self._sums: dict[tuple[int, int], int] = defaultdict(int)
        self._handles = itertools.count(1)

    def do(self, command: str) -> list[str]:
        name, *words = command.split()
        self._lines = []
        getattr(self, f"_{name}")(*words)
        self._deliver()
        return self._lines

    def validate(self) -> None:
        for machine in (self.driver, *self.workers.values()):
            machine.validate()

    # Commands.

    def _run(self, *settings: str) -> None:
        given = dict(s.split("=") for s in settings)
        replicas, stages, clocks = (int(given.get(k, 1)) for k in ("replicas", "stages", "clocks"))
        rules = [rule(r) for r in given.get("stores", "sync").split(",")]
        check_composition({str(i): p for i, p in enumerate(rules)}, replicas)
        names = tuple(tuple(f"{r}.{s}" if stages > 1 else str(r) for s in range(stages)) for r in range(replicas))
        stores, homes, readers = [], [], []
        for p in rules:
            at = tuple(range(stages))
            stores.append(StoreTerms(at, p, p.collective))
            homes.append(tuple(n[0] for n in names) if p.collective else names[0][:1])
            by_home = {h: names[int(h.split(".")[0])] if p.collective else sum(names, ()) for h in homes[-1]}
            readers.append(by_home)
        self.terms = Terms(replicas, stages, 1, tuple(stores), clocks)
        self.places = Places(names, tuple(homes), tuple(readers))
        self.work = Work(replicas, int(given.get("items", replicas * clocks)), 8, clocks, aligned=self.terms.aligned)
        self._rhythm = Rhythm(int(given["save"]), partial=True) if "save" in given else None
        self._begin()

    def _begin(self) -> None:
        stopped, ledger = self.saved or (None, None)
        self.applied = self._saved_applied.copy()
        ids: dict[str, Any] = {**IDS, "seed": 0, "shuffle": False, "examples": 1, "source": "shipped"}
        start = wire.StartTraining(**ids, total_clocks=self.terms.total_clocks, stopped=stopped)
        about = self.terms, self.work, self.places, self._rhythm, ledger
        self.driver = driver.TrainingDriver(start, *about, outlives=True)
        self.workers = {n: TrainingWorker(n, "driver", self.terms.lasting(0), self.places) for n in self.places.workers}
        self._tell("driver", driver.Begin())

    def _pause(self) -> None:
        self._tell("driver", driver.Pause())

    def _withdraw(self) -> None:
        self._tell("driver", driver.Withdraw())

    def _resume(self) -> None:
        self._clear()
        self._begin()

    def _finish(self, at: str) -> None:
        if not self.running[self._at(at)].pushed:
            self._push(at)
        self._leave(at)

    def _push(self, at: str) -> None:
        replica, stage = where = self._at(at)
        running = self.running[where]
        running.pushed = True
        start, name = running.start, self.places.stages[replica][stage]
        machine = self.workers[name].stage(where)
        assert isinstance(machine, Replica)
        for index, store in enumerate(self.terms.stores):
            self._gathered[replica, stage, index] += 1
            if not machine.pushes(index, start.clock):
                continue
            weight = self._gathered.pop((replica, stage, index))
            if store.collective:
                self._add_up(index, stage, start, weight)
                continue
            base = machine.version(index)
            sent = self.workers[name].contribution(start, index, stage, base_version=base, weight=weight)
            self._send(name, sent.to, sent.message, arrays=True)

    def _leave(self, at: str) -> None:
        replica, stage = where = self._at(at)
        start = self.running.pop(where).start
        name = self.places.stages[replica][stage]
        self._tell(name, actions.StepFinished(0, replica, stage, start.clock, start.cause))

    def _hold(self, source: str, to: str) -> None:
        self.held.add((source, to))

    def _free(self, source: str, to: str) -> None:
        self.held.discard((source, to))
        self._order.extendleft((source, to) for _ in self._links[source, to])

    def _again(self, source: str, to: str) -> None:
        message = self._last[source, to]
        self._tell(to, actions.Received(source, message, next(self._handles)))

    def _reads(self, at: str, store: str) -> None:
        where = self._at(at)
        clock = self.running[where].start.clock
        yes = self.workers[self.places.stages[where[0]][where[1]]].stage(where).may_read(int(store), clock)
        self._lines.append(
            f"stage {where[1]} of replica {where[0]} {'may' if yes else 'may not'} read at clock {clock}"
        )

    def _lose(self, replica: str) -> None:
        for name in ("driver", *self.workers):
            if name not in self.places.stages[int(replica)]:
                self._tell(name, ReplicaLost(int(replica)))

    def _left_out(self, replica: str) -> None:
        (worker,) = self.places.stages[int(replica)]
        self._tell("driver", driver.WorkerLost(worker, "it stopped", may_leave=True))

    def _show(self, *kinds: str) -> None:
        self._told.update(kinds)

    # What the machines want.

    def _at(self, text: str) -> tuple[int, int]:
        replica, _, stage = text.partition(".")
        return int(replica), int(stage or 0)

    def _add_up(self, store: int, stage: int, start: actions.Start, weight: int) -> None:
        self._sums[store, stage] += weight
        if self._sums[store, stage] < weight * self.terms.replicas:
            return
        ids: dict[str, Any] = {**IDS, "replica": 0, "incarnation": 0, "base_version": 0}
        ids |= {"store": store, "part": stage, "clock": start.clock, "weight": self._sums.pop((store, stage))}
        for home in self.places.homes[store]:
            self._send("sum", (home,), wire.Contribution(**ids), arrays=True)

    def _send(self, source: str, to: tuple[str, ...], message: Any, *, arrays: bool = False) -> None:
        for name in to:
            handle = next(self._handles) if arrays else None
            self._last[source, name] = message
            self._links[source, name].append(actions.Received(source, message, handle))
            self._order.append((source, name))

    def _deliver(self) -> None:
        while self._order:
            link = self._order.popleft()
            if link not in self.held and self._links[link]:
                self._tell(link[1], self._links[link].popleft())

    def _tell(self, name: str, event: Any) -> None:
        machine: Any = self.driver if name == "driver" else self.workers[name]
        for action in machine.step(event):
            kind = type(action.message if isinstance(action, actions.Send | actions.Leave) else action).__name__
            if kind in self._told:
                self._lines.append(f"{'the driver' if name == 'driver' else f'worker {name}'} {wants(action)}")
            self._act(name, action)

    def _act(self, name: str, action: Any) -> None:
        match action:
            case actions.Send(to, message) | actions.Leave(to, message):
                self._send(name, to, message)
            case driver.SendStore(store, to):
                version = self.saved[0].stores[store].version if self.saved else 0
                self._send(name, to, wire.StoreValue(**IDS, store=store, version=version), arrays=True)
            case actions.Start(_, replica, stage):
                self.running[replica, stage] = _Running(action)
            case actions.Abandon(replica, stage, clock):
                running = self.running.get((replica, stage))
                if running is not None and running.start.clock == clock:
                    running.pushed = True  # it pushes nothing more
            case actions.Publish(store, version, floor, value, to, cause):
                message = wire.Published(**IDS, cause=cause, store=store, version=version, floor=floor)
                self._send(name, to, message, arrays=value)
            case actions.Return(store, version, value):
                self._send(name, ("driver",), wire.StoreValue(**IDS, store=store, version=version), arrays=value)
            case actions.Export(stages, stores):
                waiting = tuple(part for part, _ in action.waiting)
                about: dict[str, Any] = {"stages": stages, "stores": stores, "sites": action.sites, "waiting": waiting}
                about["number"] = action.number
                self._send(name, ("driver",), wire.Exported(**IDS, **about, buffers=0))
            case driver.SendBuffers():
                assert self.saved is not None
                for part in self.saved[0].waiting:
                    message = wire.Contribution(**IDS, **msgspec.structs.asdict(part), incarnation=0)
                    self._send(name, self.places.homes[part.store][:1], message, arrays=not part.empty)
            case actions.Apply(store, _, contributions):
                self.applied[store] += len(contributions)
            case Save(stopped):
                self._saved_applied, self.waited = self.applied.copy(), self.waited or bool(stopped.waiting)
                self.saved = stopped, self.driver.ledger.kept(stopped.clocks)
            case driver.Over():
                self._tell("driver", driver.Stop())
            case _:
                pass
