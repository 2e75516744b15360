"""A fake world for the training machines: workers that walk a small pipeline program over a fake link.

Gradients are integers in base 16: the gradient of work item q is 16**q, so each digit of a sum says how often
that item is in it. Links keep the order between two workers and nothing else; contributions may come twice.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowml.policy import Policy, check_composition
from flowml_runtime.protocol.rendezvous import Rendezvous
from flowml_runtime.protocol.training import decision, ledger, replica
from flowml_runtime.protocol.training import home as store
from flowml_runtime.protocol.training.accumulator import Accumulator
from flowml_runtime.protocol.training.terms import ReplicaLost, StoreTerms, Terms

MICROBATCHES = 2
Address = tuple[int, int]  # (replica, stage); the driver is (-1, 0)
DRIVER: Address = (-1, 0)


class Link:
    """Virtual time, and messages that keep their order between two ends only."""

    def __init__(self, rng: random.Random) -> None:
        self.now = 0.0
        self._rng = rng
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._last: dict[tuple[Address, Address], float] = defaultdict(float)

    def after(self, delay: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + delay, next(self._count), act))

    def send(self, source: Address, destination: Address, act: Callable[[], None]) -> None:
        delay = 0.0 if source == destination else self._rng.choice([0.01, 0.1, 1.0, 5.0]) * self._rng.random()
        when = max(self._last[source, destination], self.now + delay)
        self._last[source, destination] = when
        heapq.heappush(self._heap, (when, next(self._count), act))

    def run(self, limit: int = 300_000) -> None:
        for _ in range(limit):
            if not self._heap:
                return
            self.now, _, act = heapq.heappop(self._heap)
            act()
        raise AssertionError("the run does not end")


@dataclass
class Run:
    """A run's machines by where they are, and what was seen of it."""

    terms: Terms
    work: ledger.Work
    speeds: Sequence[float]
    seed: int
    homes: Sequence[Address]
    twice: float = 0.0
    applied: dict[int, list[list[tuple[int, int, int, float]]]] = field(default_factory=dict[int, Any])
    pushed: dict[int, set[tuple[int, int]]] = field(default_factory=lambda: defaultdict(set))
    reads: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    fates: dict[int, tuple[int, int, str]] = field(default_factory=dict[int, tuple[int, int, str]])
    commits: list[decision.Commit] = field(default_factory=list[decision.Commit])
    dead: set[int] = field(default_factory=set[int])
    sums: dict[tuple[int, int, int], dict[int, int]] = field(default_factory=dict[Any, Any])
    copies: dict[int, set[tuple[Any, ...]]] = field(default_factory=lambda: defaultdict(set))

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.link = Link(self.rng)
        grid = [(r, s) for r in range(self.terms.replicas) for s in range(self.terms.stages)]
        self.stages = {a: Stage(self, *a) for a in grid}
        places = [self._places(i) for i in range(len(self.homes))]
        self.hosts = {
            a: HomeHost(self, a, [i for i, found in enumerate(places) if a in found]) for a in set().union(*places)
        }
        self.ledger = ledger.Ledger(self.work)
        self.decision = decision.Decision(self.terms)
        decided = [i for i, s in enumerate(self.terms.stores) if s.decided]
        self.leader = self.homes[decided[0]] if decided else DRIVER
        self.applied = {i: [] for i in range(len(self.homes))}

    def _places(self, index: int) -> set[Address]:
        """Where a store is at home: a collective one with every replica."""
        home = self.homes[index]
        return {(r, home[1]) for r in range(self.terms.replicas)} if self.terms.stores[index].collective else {home}

    def add_up(self, who: int, value: int, **ids: Any) -> None:
        """An all-reduce: when the last replica has brought its part, every home gets the sum, sooner or later."""
        key = (ids["store"], ids["part"], ids["clock"])
        given = self.sums.setdefault(key, {})
        assert who not in given, "a replica takes part twice"
        given[who] = value
        if len(given) == self.terms.replicas:
            del self.sums[key]
            whole = {**ids, "replica": 0, "weight": ids["weight"] * self.terms.replicas}
            for at in self._places(ids["store"]):
                self.link.send((at[0], -1), at, lambda at=at: self.hosts[at].receive(sum(given.values()), **whole))

    def go(self) -> None:
        for stage in self.stages.values():
            self.link.after(0, lambda stage=stage: stage.tell(replica.Started()))
        for host in self.hosts.values():
            host.load()
        self.link.run()

    def lose(self, victim: int, when: float) -> None:
        """All workers of a replica fall silent; the others are told one after the other."""

        def die() -> None:
            self.dead.add(victim)
            event = ReplicaLost(victim)
            self.link.after(self.rng.random() * 3, lambda: self.tell_ledger(event))
            self.link.after(self.rng.random() * 3, lambda: self.tell_decision(event))
            for host in self.hosts.values():
                self.link.after(self.rng.random() * 3, lambda host=host: host.tell(event))

        self.link.after(when, die)

    def tell_ledger(self, event: ledger.Event) -> None:
        if isinstance(event, ledger.Settled):
            for item, fate in event.fates:
                assert item.sequence not in self.fates, "an item was settled twice"
                self.fates[item.sequence] = (event.replica, item.epoch, fate)
        grants = self.ledger.step(event)
        self.ledger.validate()
        for grant in grants:
            stage = self.stages[grant.replica, 0]
            granted = replica.Granted(grant.items, grant.exhausted)
            self.link.send(DRIVER, stage.at, lambda stage=stage, granted=granted: stage.tell(granted))

    def tell_decision(self, event: decision.Event) -> None:
        commits = self.decision.step(event)
        self.decision.validate()
        self.commits += commits
        for commit in commits:
            for node in [*self.hosts.values(), *self.stages.values()]:
                self.link.send(self.leader, node.at, lambda node=node, commit=commit: node.tell(commit.event))


class HomeHost:
    """A home machine and the payloads it names."""

    def __init__(self, run: Run, at: Address, stores: Sequence[int]) -> None:
        self.run, self.at, self.stores = run, at, stores
        self.machine = store.Home(run.terms, stores)
        self._payloads: dict[int, tuple[int, int, int]] = {}
        self._handles = itertools.count()

    def load(self) -> None:
        for index in self.stores:
            event = store.StoreLoaded(index)
            self.run.link.send(DRIVER, self.at, lambda event=event: self.tell(event))

    def receive(self, value: int, **ids: Any) -> None:
        handle = next(self._handles)
        self._payloads[handle] = (ids["replica"], ids["clock"], value)
        self.tell(store.ContributionReceived(handle=handle, incarnation=1, **ids))

    def tell(self, event: store.Event) -> None:
        actions = self.machine.step(event)
        self.machine.validate()
        for action in actions:
            self._act(action)

    def _act(self, action: store.Action) -> None:
        run = self.run
        match action:
            case store.Apply(index, version, contributions):
                made = [(*self._take(handles), factor) for handles, factor in contributions]
                run.copies[index].add((version, *made))
                if self.at == run.homes[index]:
                    run.applied[index].append(made)
                    assert version == len(run.applied[index])
            case store.Publish(index, version, clocks):
                event = replica.StorePublished(index, version, clocks)
                for stage in run.stages.values():
                    own = stage.at[0] == self.at[0] or not run.terms.stores[index].collective
                    if own and stage.at[1] in run.terms.stores[index].stages:
                        run.link.send(self.at, stage.at, lambda stage=stage: stage.tell(event))
            case store.SendArrived(index, who, clock):
                arrived = decision.Arrived(index, who, clock)
                run.link.send(self.at, run.leader, lambda: run.tell_decision(arrived))
            case store.Release(handle):
                del self._payloads[handle]
            case store.Finished():
                pass

    def _take(self, handles: tuple[int, ...]) -> tuple[int, int, int]:
        parts = {self._payloads.pop(h) for h in handles}
        assert len(parts) == 1, f"the stages of one contribution do not agree on its steps: {parts}"
        return parts.pop()

    def idle(self) -> bool:
        return not self._payloads and all(self.machine.finished(i) for i in self.stores)


class Stage:
    """A replica machine and an executor that walks a small pipeline program, one instruction after the other."""

    def __init__(self, run: Run, who: int, stage: int) -> None:
        self.run, self.at = run, (who, stage)
        self.machine = replica.Replica(run.terms, who, stage)
        self.rendezvous: Rendezvous[bool, bool] = Rendezvous()
        self._versions: dict[int, int] = {}
        self._sums: dict[tuple[int, int], Accumulator[int]] = {}
        self._step: replica.Start | None = None
        self._left: list[tuple[Any, ...]] = []
        self._busy = False
        self._base: dict[int, int] = {}
        self._awaited: tuple[Any, ...] | None = None  # the key of a claim; () when its value has come

    def tell(self, event: replica.Event) -> None:
        if self.at[0] in self.run.dead:
            return
        if isinstance(event, replica.StorePublished):
            self._versions[event.store] = event.version
        actions = self.machine.step(event)
        self.machine.validate()
        for action in actions:
            self._act(action)
        self._walk()

    def _send(self, destination: Address, act: Callable[[], None]) -> None:
        self.run.link.send(self.at, destination, act)

    def _act(self, action: replica.Action) -> None:
        who = self.at[0]
        match action:
            case replica.Ask(clocks, returned):
                self._send(DRIVER, lambda: self.run.tell_ledger(ledger.Asked(who, clocks, returned)))
            case replica.Begin(clock, item, last):
                for other in self._others():
                    event = replica.BeginReceived(clock, item, last)
                    self._send(other.at, lambda other=other, event=event: other.tell(event))
            case replica.Start(clock):
                self.rendezvous.advance(self.at, clock)
                self._step, self._left, self._base, self._awaited = action, self._program(), {}, None
            case replica.Abandon(clock):
                self.rendezvous.cancel_step(self.at, clock)
            case replica.AdoptAccumulator(clock):
                for each in self._sums.values():
                    each.adopt(clock)
            case replica.DiscardAccumulator(clock):
                for each in self._sums.values():
                    each.discard(clock)
            case replica.Settle(item, fate):
                self._send(DRIVER, lambda: self.run.tell_ledger(ledger.Settled(who, ((item, fate),))))
            case replica.Retire():
                self._retire()

    def _others(self) -> list[Stage]:
        return [self.run.stages[self.at[0], s] for s in range(1, self.run.terms.stages)]

    def _retire(self) -> None:
        for host in self.run.hosts.values():
            self._send(host.at, lambda host=host: host.tell(store.StageRetired(*self.at)))
        if self.at[1] == 0:
            for other in self._others():
                self._send(other.at, lambda other=other: other.tell(replica.LeaderRetired()))
            self._send(self.run.leader, lambda: self.run.tell_decision(decision.ReplicaRetired(self.at[0])))

    def _program(self) -> list[tuple[Any, ...]]:
        """forward, backward, and pushes after the gradient has gone upstream, so that stages drift apart."""
        stage, last = self.at[1], self.run.terms.stages - 1
        mine = [(i, p) for i, s in enumerate(self.run.terms.stores) for p, at in enumerate(s.stages) if at == stage]
        return [
            *([("recv", "forward")] if stage else []),
            *[("read", i) for i in dict.fromkeys(i for i, _ in mine)],
            ("task",),
            *([("send", stage + 1, "forward"), ("recv", "backward")] if stage < last else []),
            ("task",),
            *([("send", stage - 1, "backward")] if stage else []),
            ("task",),
            *[("push", i, p) for i, p in mine],
        ]

    def _walk(self) -> None:
        """Go on until something has to be waited for. Every instruction is a task boundary."""
        while self._step is not None and not self._busy:
            clock = self._step.clock
            if not self._left or self.machine.should_abandon(clock):
                self._step = None
                self.tell(replica.StepFinished(clock))
                return
            if not self._execute(self._step, *self._left[0]):
                return
            self._left.pop(0)
            self._awaited = None

    def _execute(self, step: replica.Start, kind: str, *args: Any) -> bool:
        """Whether the instruction is done; False: try again when something has happened."""
        who = self.at[0]
        match kind:
            case "read":
                if not self.machine.can_read(args[0], step.clock):
                    return False
                self._base[args[0]] = self._versions[args[0]]
                self.run.reads.append((args[0], step.clock, self._versions[args[0]]))
            case "task":
                self._busy = True
                self.run.link.after(self.run.rng.random() * self.run.speeds[who], self._task_done)
            case "send":
                peer = self.run.stages[who, args[0]]
                self._send(peer.at, lambda: peer.put((peer.at, step.clock, args[1])))
            case "recv":
                if self._awaited is None:
                    self._awaited = (self.at, step.clock, args[0])
                    return self.rendezvous.claim(self._awaited, True) is not None
                return self._awaited == ()
            case _:
                self._push(step, *args)
        return True

    def put(self, key: tuple[Any, ...]) -> None:
        if self.at[0] in self.run.dead:
            return
        waiter = self.rendezvous.put(key, True)
        self.rendezvous.validate()
        if waiter:
            assert key == self._awaited
            self._awaited = ()
        self._walk()

    def _task_done(self) -> None:
        self._busy = False
        if self.at[0] not in self.run.dead:
            self._walk()

    def _push(self, step: replica.Start, index: int, part: int) -> None:
        value, steps = 16**step.item.sequence, 1
        pushes = self.machine.pushes(index, step.clock)
        if self.run.terms.stores[index].every > 1:
            gathered = self._sums.setdefault((index, part), Accumulator(lambda a, b: a + b))
            if not pushes:
                gathered.gather(step.clock, value)
                return
            total = gathered.push(step.clock, value)
            value, steps = total.value, total.steps
        collective = self.run.terms.stores[index].collective
        self.run.pushed[index].add((0 if collective else self.at[0], step.clock))
        ids: dict[str, Any] = {"store": index, "part": part, "replica": self.at[0], "clock": step.clock}
        ids |= {"base_version": self._base[index], "weight": steps * MICROBATCHES}
        if collective:
            self.run.add_up(self.at[0], value, **ids)
            return
        host = self.run.hosts[self.run.homes[index]]
        self._send(host.at, lambda: host.receive(value, **ids))
        if self.run.rng.random() < self.run.twice:
            self._send(host.at, lambda: host.receive(value, **ids))


def make(
    rules: Sequence[Policy],
    *,
    replicas: int,
    stages: int = 2,
    clocks: int = 12,
    items: int | None = None,
    speeds: Sequence[float] = (1, 1, 1, 1),
    seed: int = 0,
    twice: float = 0.0,
    homes_on: int | None = None,
) -> Run:
    """A run with one store a policy; every third store is shared by the first and last stage, as tied weights are."""
    check_composition({str(i): p for i, p in enumerate(rules)}, replicas)
    stores: list[StoreTerms] = []
    homes: list[Address] = []
    for i, p in enumerate(rules):
        home = i % stages
        shared = (0, stages - 1) if i % 3 == 2 and stages > 1 else (home,)
        need, every = p.quorum.need(replicas), p.every.push
        stores.append(StoreTerms(shared, p.clocked, need, every, p.staleness, p.apply, p.collective))
        homes.append((i % replicas if homes_on is None else homes_on, home))
    items = items or replicas * 4
    terms = Terms(replicas, stages, MICROBATCHES, tuple(stores), clocks)
    work = ledger.Work(replicas, items, item_size=8, total_clocks=clocks, aligned=terms.aligned)
    return Run(terms, work, speeds, seed, homes, twice)
