"""A second interpreter of the training machines: virtual time instead of threads, integers instead of arrays.

It carries out the actions of `TrainingWorker` and `TrainingDriver` over a link with delays, and executors walk a small
pipeline program. It decides nothing: who is told what is the machines'. Gradients are integers in base 16: the gradient
of work item q is 16**q, so each digit of a sum says how often that item is in it. Links keep the order between two
workers and nothing else; contributions may come twice.
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
from flowml_runtime import wire
from flowml_runtime.protocol.rendezvous import Rendezvous
from flowml_runtime.protocol.training import actions, driver, ledger
from flowml_runtime.protocol.training.accumulator import Accumulator
from flowml_runtime.protocol.training.terms import Places, ReplicaLost, StoreTerms, Terms
from flowml_runtime.protocol.training.worker import TrainingWorker

MICROBATCHES = 2
DRIVER = "driver"
PLAN = "plan"
RUN = 100
Parts = tuple[int, int, int]
"""(replica, clock, sum of gradients)"""


class Link:
    """Virtual time, and messages that keep their order between two ends only."""

    def __init__(self, rng: random.Random) -> None:
        self.now = 0.0
        self._rng = rng
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._last: dict[tuple[str, str], float] = defaultdict(float)

    def after(self, delay: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + delay, next(self._count), act))

    def send(self, source: str, destination: str, act: Callable[[], None]) -> None:
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
class World:
    """The driver, the workers by name, and what was seen of the run."""

    terms: Terms
    places: Places
    work: ledger.Work
    speeds: Sequence[float]
    seed: int
    twice: float = 0.0
    applied: dict[int, list[list[tuple[int, int, int, float]]]] = field(default_factory=dict[int, Any])
    pushed: dict[int, set[tuple[int, int]]] = field(default_factory=lambda: defaultdict(set))
    reads: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    fates: dict[int, tuple[str, int, str]] = field(default_factory=dict[int, tuple[str, int, str]])
    """By item: the worker that settled it, its epoch, its fate."""
    commits: list[wire.Commit] = field(default_factory=list[wire.Commit])
    dead: set[int] = field(default_factory=set[int])
    sums: dict[tuple[int, int, int], dict[int, int]] = field(default_factory=dict[Any, Any])
    copies: dict[int, set[tuple[Any, ...]]] = field(default_factory=lambda: defaultdict(set))

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.link = Link(self.rng)
        self.applied = {i: [] for i in range(len(self.terms.stores))}
        self.nodes = {name: Node(self, name) for name in self.places.workers}
        self.driver = Driver(self)

    def send(self, source: str, to: str, message: Any, value: Any = None) -> None:
        node = self.driver if to == DRIVER else self.nodes[to]
        self.link.send(source, to, lambda: node.receive(source, message, value))

    def add_up(self, start: actions.Start, store: int, part: int, weight: int, value: int) -> None:
        """An all-reduce: when the last replica has brought its part, every home gets the sum, sooner or later."""
        given = self.sums.setdefault((store, part, start.clock), {})
        assert start.replica not in given, "a replica takes part twice"
        given[start.replica] = value
        if len(given) == self.terms.replicas:
            del self.sums[store, part, start.clock]
            total = (0, start.clock, sum(given.values()))
            ids: dict[str, Any] = {"plan_id": PLAN, "run": RUN, "replica": 0, "incarnation": 0, "base_version": 0}
            ids |= {"store": store, "part": part, "clock": start.clock, "weight": weight * self.terms.replicas}
            for home in self.places.homes[store]:
                self.send(f"sum for {home}", home, wire.Contribution(**ids), total)

    def go(self) -> None:
        self.link.after(0, lambda: self.driver.tell(driver.Begin()))
        self.link.run()

    def lose(self, victim: int, when: float) -> None:
        """All workers of a replica fall silent; the others are told one after the other."""

        def die() -> None:
            self.dead.add(victim)
            event = ReplicaLost(victim)
            for each in (self.driver, *self.nodes.values()):
                self.link.after(self.rng.random() * 3, lambda each=each: each.tell(event))

        self.link.after(when, die)

    def is_dead(self, worker: str) -> bool:
        return any(replica in self.dead for replica, _ in self.places.stages_on(worker))


class Driver:
    """Carries out what the driver's machine says."""

    def __init__(self, world: World) -> None:
        self.world = world
        ids: dict[str, Any] = {"total_clocks": world.terms.total_clocks, "seed": 0, "shuffle": False, "examples": 1}
        start = wire.StartTraining(plan_id=PLAN, run=RUN, source="fed", **ids)
        self.machine = driver.TrainingDriver(start, world.terms, world.work, world.places)
        self.final: dict[int, Any] = {}
        self._peer = ""
        self._payloads: dict[int, Any] = {}
        self._handles = itertools.count(1)

    def receive(self, peer: str, message: Any, value: Any) -> None:
        handle = None
        if value is not None:
            handle = next(self._handles)
            self._payloads[handle] = value
        self._peer = peer
        self.tell(actions.Received(peer, message, handle))

    def tell(self, event: driver.Event) -> None:
        wanted = self.machine.step(event)
        self.machine.validate()
        for action in wanted:
            self._act(action)

    def _act(self, action: driver.Action) -> None:
        world = self.world
        match action:
            case actions.Send(to, message):
                for name in to:
                    world.send(DRIVER, name, message)
            case driver.SendStore(store, to):
                for name in to:
                    world.send(DRIVER, name, wire.StoreValue(plan_id=PLAN, run=RUN, store=store, version=0), "first")
            case driver.Feed(who, item):
                for name in dict.fromkeys(world.places.stages[who]):
                    batch = wire.Batch(plan_id=PLAN, run=RUN, device=name, sequence=item.sequence, slots=(0,))
                    world.send(DRIVER, name, batch, item.sequence)
            case driver.NoteFates(fates):
                for item, fate in fates:
                    assert item.sequence not in world.fates, "an item was settled twice"
                    world.fates[item.sequence] = (self._peer, item.epoch, fate)
            case driver.NoteCommit():
                pass
            case driver.Keep(store, handle):
                assert store not in self.final, "a final value came twice"
                self.final[store] = self._payloads.pop(handle or 0)
            case actions.Release(handle):
                del self._payloads[handle]
            case driver.Over():
                self.tell(driver.Stop())
            case _:
                raise AssertionError(action)


class Node:
    """One worker: carries out what its machine says."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.machine = TrainingWorker(name, DRIVER, world.terms.lasting(0), world.places)
        self.executors: dict[tuple[int, int], Executor] = {}
        self.payloads: dict[int, Any] = {}
        self.shown: dict[int, int] = {}
        self.batches: set[int] = set()
        self.mailboxes: dict[tuple[int, int], Rendezvous[bool, bool]] = defaultdict(Rendezvous)
        self._versions: dict[int, int] = {}
        self._handles = itertools.count(1)

    def receive(self, peer: str, message: Any, value: Any) -> None:
        handle = None
        if value is not None:
            handle = next(self._handles)
            self.payloads[handle] = value
        self.tell(actions.Received(peer, message, handle))

    def tell(self, event: actions.Event) -> None:
        if self.world.is_dead(self.name):
            return
        wanted = self.machine.step(event)
        self.machine.validate()
        for action in wanted:
            self._act(action)
        for executor in list(self.executors.values()):
            executor.walk()

    def _act(self, action: actions.Action) -> None:
        match action:
            case actions.Open():
                self.executors = {at: Executor(self, at) for at in self.world.places.stages_on(self.name)}
            case actions.Close():
                self.executors = {}
            case actions.Start(who, stage):
                self.executors[who, stage].start(action)
            case actions.Abandon(who, stage, clock):
                self.executors[who, stage].abandon(clock)
            case actions.Count(who, stage, clock, counts):
                self.executors[who, stage].settle(clock, counts)
            case actions.Send(to, message):
                if isinstance(message, wire.Commit):
                    self.world.commits.append(message)
                for name in to:
                    self.world.send(self.name, name, message)
            case actions.Hand(_, wire.Batch() as batch, handle):
                self.batches.add(batch.sequence)
                del self.payloads[handle or 0]
            case actions.TellTraffic():
                ids: dict[str, Any] = {"plan_id": PLAN, "run": RUN, "worker": self.name}
                self.world.send(self.name, DRIVER, wire.Traffic(**ids, stores=()))
            case _:
                self._act_on_store(action)

    def _act_on_store(self, action: actions.Action) -> None:
        world, ids = self.world, {"plan_id": PLAN, "run": RUN}
        match action:
            case actions.Load(store, handle):
                assert self.payloads.pop(handle) == "first"
                self._versions[store] = 0
            case actions.Show(store, version, handle):
                assert self.payloads.pop(handle) == version
                self.shown[store] = version
            case actions.Apply(store, version, contributions):
                made = [(*self._take(handles), factor) for handles, factor in contributions]
                assert version == self._versions[store] + 1
                self._versions[store] = version
                world.copies[store].add((version, *made))
                if self.name == world.places.homes[store][0]:
                    world.applied[store].append(made)
            case actions.Publish(store, version, floor, value, to):
                assert version == self._versions[store]
                for name in to:
                    message = wire.Published(**ids, store=store, version=version, floor=floor)  # pyright: ignore
                    world.send(self.name, name, message, version if value else None)
            case actions.Return(store, version, value):
                message = wire.StoreValue(**ids, store=store, version=version)  # pyright: ignore
                world.send(self.name, DRIVER, message, "last" if value else None)
            case actions.Release(handle):
                del self.payloads[handle]
            case _:
                raise AssertionError(action)

    def _take(self, handles: tuple[int, ...]) -> Parts:
        parts = {self.payloads.pop(h) for h in handles}
        assert len(parts) == 1, f"the stages of one contribution do not agree on its steps: {parts}"
        return parts.pop()


class Executor:
    """Walks a small pipeline program of one stage, one instruction after the other."""

    def __init__(self, node: Node, at: tuple[int, int]) -> None:
        self.node, self.world, self.at = node, node.world, at
        self.machine = node.machine.stage(at)
        self.rendezvous = node.mailboxes[at]
        self._sums: dict[tuple[int, int], Accumulator[int]] = {}
        self._step: actions.Start | None = None
        self._left: list[tuple[Any, ...]] = []
        self._busy = False
        self._base: dict[int, int] = {}
        self._awaited: tuple[Any, ...] | None = None  # the key of a claim; () when its value has come

    def start(self, step: actions.Start) -> None:
        self.rendezvous.advance(self.at, step.clock)
        self._step, self._left, self._base, self._awaited = step, self._program(), {}, None

    def abandon(self, clock: int) -> None:
        self.rendezvous.cancel_step(self.at, clock)

    def settle(self, clock: int, counts: bool) -> None:
        for each in self._sums.values():
            (each.adopt if counts else each.discard)(clock)

    def _program(self) -> list[tuple[Any, ...]]:
        """forward, backward, and pushes after the gradient has gone upstream, so that stages drift apart."""
        stage, last = self.at[1], self.world.terms.stages - 1
        stores = enumerate(self.world.terms.stores)
        mine = [(i, p) for i, s in stores for p, at in enumerate(s.stages) if at == stage]
        return [
            ("batch",),
            *([("recv", "forward")] if stage else []),
            *[("read", i) for i in dict.fromkeys(i for i, _ in mine)],
            ("task",),
            *([("send", stage + 1, "forward"), ("recv", "backward")] if stage < last else []),
            ("task",),
            *([("send", stage - 1, "backward")] if stage else []),
            ("task",),
            *[("push", i, p) for i, p in mine],
        ]

    def walk(self) -> None:
        """Go on until something has to be waited for. Every instruction is a task boundary."""
        while self._step is not None and not self._busy:
            step = self._step
            if not self._left or self.machine.should_abandon(step.clock):
                self._step = None
                self.node.tell(actions.StepFinished(RUN, *self.at, step.clock, step.cause))
                return
            if not self._execute(step, *self._left[0]):
                return
            self._left.pop(0)
            self._awaited = None

    def _execute(self, step: actions.Start, kind: str, *args: Any) -> bool:
        """Whether the instruction is done; False: try again when something has happened."""
        who = self.at[0]
        match kind:
            case "batch":
                return step.item.sequence in self.node.batches
            case "read":
                if not self.machine.may_read(args[0], step.clock):
                    return False
                self._base[args[0]] = self.node.shown[args[0]]
                self.world.reads.append((args[0], step.clock, self._base[args[0]]))
            case "task":
                self._busy = True
                self.world.link.after(self.world.rng.random() * self.world.speeds[who], self._task_done)
            case "send":
                peer = self.world.places.stages[who][args[0]]
                key = ((who, args[0]), step.clock, args[1])
                self.world.link.send(self.node.name, peer, lambda: self._put(peer, key))
            case "recv":
                if self._awaited is None:
                    self._awaited = (self.at, step.clock, args[0])
                    return self.rendezvous.claim(self._awaited, True) is not None
                return self._awaited == ()
            case _:
                self._push(step, *args)
        return True

    def _put(self, worker: str, key: tuple[Any, ...]) -> None:
        node = self.world.nodes[worker]
        if self.world.is_dead(worker):
            return
        waiter = node.mailboxes[key[0]].put(key, True)
        node.mailboxes[key[0]].validate()
        if waiter:
            node.executors[key[0]].take(key)

    def take(self, key: tuple[Any, ...]) -> None:
        assert key == self._awaited
        self._awaited = ()
        self.walk()

    def _task_done(self) -> None:
        self._busy = False
        if not self.world.is_dead(self.node.name):
            self.walk()

    def _push(self, step: actions.Start, store: int, part: int) -> None:
        world, value, steps = self.world, 16**step.item.sequence, 1
        pushes = self.machine.pushes(store, step.clock)
        if world.terms.stores[store].every > 1:
            gathered = self._sums.setdefault((store, part), Accumulator(lambda a, b: a + b))
            if not pushes:
                gathered.gather(step.clock, value)
                return
            total = gathered.push(step.clock, value)
            value, steps = total.value, total.steps
        weight = steps * MICROBATCHES
        if world.terms.stores[store].collective:
            world.pushed[store].add((0, step.clock))
            world.add_up(step, store, part, weight, value)
            return
        world.pushed[store].add((step.replica, step.clock))
        base = self._base[store]
        contribution = self.node.machine.contribution(step, store, part, base_version=base, weight=weight)
        for _ in range(1 + (world.rng.random() < world.twice)):
            for home in contribution.to:
                world.send(self.node.name, home, contribution.message, (step.replica, step.clock, value))


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
    workers: int | None = None,
) -> World:
    """A run with one store a policy; every third store is shared by the first and last stage, as tied weights are.

    Each stage of each replica has a worker of its own, unless `workers` says how many there are to share.
    """
    check_composition({str(i): p for i, p in enumerate(rules)}, replicas)
    grid = [(r, s) for r in range(replicas) for s in range(stages)]
    names = {at: f"worker:{n if workers is None else n % workers}" for n, at in enumerate(grid)}
    stores: list[StoreTerms] = []
    homes: list[tuple[str, ...]] = []
    readers: list[dict[str, tuple[str, ...]]] = []
    for i, p in enumerate(rules):
        home = i % stages
        shared = (0, stages - 1) if i % 3 == 2 and stages > 1 else (home,)
        need, every = p.quorum.need(replicas), p.every.push
        stores.append(StoreTerms(shared, p.clocked, need, every, p.staleness, p.apply, p.collective))
        owners = range(replicas) if p.collective else [i % replicas if homes_on is None else homes_on]
        homes.append(tuple(dict.fromkeys(names[r, home] for r in owners)))
        readers.append({})
        for name in homes[-1]:
            served = [r for r in range(replicas) if not p.collective or names[r, home] == name]
            readers[-1][name] = tuple(dict.fromkeys(names[r, s] for r in served for s in shared))
    items = items or replicas * 4
    terms = Terms(replicas, stages, MICROBATCHES, tuple(stores), clocks)
    by_stage = tuple(tuple(names[r, s] for s in range(stages)) for r in range(replicas))
    work = ledger.Work(replicas, items, item_size=8, total_clocks=clocks, aligned=terms.aligned)
    return World(terms, Places(by_stage, tuple(homes), tuple(readers)), work, speeds, seed, twice)
