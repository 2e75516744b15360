"""Whole training runs in the simulator, with integers instead of arrays, and random delays.

Gradients are integers in base 16: the gradient of work item q is 16**q, so each digit of a sum says how often that item
is in it. A value is (replica, clock, sum of gradients). Contributions may come twice.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from flowml.plan import ArraySpec, Feed, Instruction, Part, Push, Read, Recv, Reduction, Run, Send
from flowml.policy import Policy, check_composition
from flowml.sim import Network
from flowml_runtime import wire
from flowml_runtime.protocol.training import actions, driver, ledger
from flowml_runtime.protocol.training.terms import Places, StoreTerms, Terms
from flowml_runtime.sim.heap import Clock
from flowml_runtime.sim.node import Node
from flowml_runtime.sim.program import At, Edge, Sizes, StageProgram
from flowml_runtime.sim.world import Layout
from flowml_runtime.sim.world import World as Simulation

MICROBATCHES = 2
PLAN = "plan"
RUN = 100
Value = tuple[int, int, int]
"""(replica, clock, sum of gradients)"""
_FIRST: Value = (-1, -1, 0)


class Digits:
    """The arithmetic of these runs, which also notes what is read, pushed and applied."""

    computes = False

    def __init__(self, world: World) -> None:
        self._world = world
        self._versions: dict[tuple[str, int], int] = {}

    def begin(self, at: At, start: actions.Start) -> actions.Start:
        return start

    def perform(self, state: actions.Start, position: int, given: Any) -> Value | None:
        world = self._world
        match world.programs[state.replica, state.stage].instructions[position]:
            case Read(store):
                version, value = given
                assert value == (-1, version, 0)
                world.reads.append((store, state.clock, version))
            case Push():
                return *world.terms.place(state.replica, state.clock, state.item.sequence), 16**state.item.sequence
            case Send():
                return (state.replica, state.clock, 0)
            case Recv():
                assert given == (state.replica, state.clock, 0)
            case _:
                pass
        return None

    def report(self, state: actions.Start) -> None:
        return None

    def add(self, at: At, store: int, part: int, a: Value, b: Value) -> Value:
        assert a[0] == b[0] == at[0]
        return a[0], max(a[1], b[1]), a[2] + b[2]

    def is_finite(self, store: int, part: int, value: Value) -> bool:
        self._world.pushed[store].add(value[:2])
        return True

    def kept(self, at: At) -> dict[int, float]:
        return {}

    def flight(self, *_: Any) -> None:
        return None

    def total(self, values: Sequence[Value]) -> Value:
        assert len({clock for _, clock, _ in values}) == 1
        assert sorted(who for who, *_ in values) == list(range(self._world.terms.replicas)), "each takes part once"
        return 0, values[0][1], sum(value for *_, value in values)

    def load(self, worker: str, store: int, value: Value) -> None:
        assert value == _FIRST
        self._versions[worker, store] = 0

    def apply(
        self,
        worker: str,
        store: int,
        version: int,
        given: Sequence[tuple[Sequence[Value], float]],
        staleness: Sequence[int] = (),
    ) -> None:
        world = self._world
        assert version == self._versions[worker, store] + 1
        self._versions[worker, store] = version
        made: list[tuple[int, int, int, float]] = []
        for parts, factor in given:
            assert len(set(parts)) == 1, f"the stages of one contribution do not agree on its steps: {parts}"
            made.append((*parts[0], factor))
        world.copies[store].add((version, *made))
        if worker == world.places.homes[store][0]:
            world.applied[store].append(made)

    def current(self, worker: str, store: int) -> Value:
        return -1, self._versions[worker, store], 0

    def final(self, worker: str, store: int) -> Value:
        return self.current(worker, store)

    def hand(self, worker: str, message: wire.TrainingMessage, value: Any) -> None:
        assert isinstance(message, wire.Batch)


class Disturbed:
    """Random delays between any two, and contributions that come twice."""

    def __init__(self, rng: random.Random, twice: float) -> None:
        self._rng = rng
        self._twice = twice

    def delays(self, source: str, to: str, message: object) -> tuple[float, ...]:
        again = isinstance(message, wire.Contribution) and self._rng.random() < self._twice
        return tuple(self._rng.choice([0.01, 0.1, 1.0, 5.0]) * self._rng.random() for _ in range(1 + again))


class Speeds:
    """Random compute times. `speeds` are by replica, each of which has `stages` workers in a row."""

    def __init__(self, rng: random.Random, speeds: Sequence[float], stages: int) -> None:
        self._rng, self._speeds, self._stages = rng, speeds, stages

    def seconds(self, worker: int, step: int) -> float:
        return 3 * self._rng.random() * self._speeds[worker // self._stages % len(self._speeds)]


@dataclass
class World:
    """The driver, the simulated workers by name, and what was seen of the run."""

    layout: Layout
    work: ledger.Work
    speeds: Sequence[float]
    seed: int
    twice: float = 0.0
    applied: dict[int, list[list[tuple[int, int, int, float]]]] = field(default_factory=dict[int, Any])
    pushed: dict[int, set[tuple[int, int]]] = field(default_factory=lambda: defaultdict(set))
    reads: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    fates: dict[int, tuple[str, int, str]] = field(default_factory=dict[int, tuple[str, int, str]])
    """By item: the worker that settled it, its epoch, its fate."""
    missing: dict[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])
    """By item: the groups that do not use it, although others do."""
    duplicates: list[wire.Item] = field(default_factory=list[wire.Item])
    commits: list[wire.Commit] = field(default_factory=list[wire.Commit])
    dead: set[int] = field(default_factory=set[int])
    copies: dict[int, set[tuple[Any, ...]]] = field(default_factory=lambda: defaultdict(set))
    source: Literal["fed", "shipped"] = "fed"

    def __post_init__(self) -> None:
        layout, self.rng, self.clock = self.layout, random.Random(self.seed), Clock()
        self.terms, self.places, self.programs = layout.terms, layout.places, layout.programs
        self.applied = {i: [] for i in range(len(self.terms.stores))}
        self.driver = Driver(self)
        self.simulation = Simulation(
            clock=self.clock,
            layout=layout,
            values=Digits(self),
            times=Speeds(self.rng, self.speeds, self.terms.stages),
            network=Network(latency_s=0.0, bytes_per_s=1e30),
            to_driver=self.driver.receive,
            numbers={name: n for n, name in enumerate(self.places.workers)},
            tamper=Disturbed(self.rng, self.twice),
            stepped=self._check,
        )
        self.nodes = self.simulation.nodes

    def _check(self, node: Node) -> None:
        node.machine.validate()
        node.mailbox.validate()

    def go(self) -> None:
        self.clock.after(0, 0, self.driver.tell, driver.Begin())
        self.clock.run(300_000)

    def lose(self, victim: int, when: float) -> None:
        """All workers of a replica fall silent; the others are told one after the other."""
        self.clock.after(when, 0, self._die, victim)

    def _die(self, victim: int) -> None:
        self.dead.add(victim)
        self.clock.after(self.rng.random() * 3, 0, self.driver.tell, driver.ReplicaLost(victim))
        for name in self.nodes:
            if self.is_dead(name):
                self.simulation.silence(name)
            else:
                self.clock.after(self.rng.random() * 3, 0, self.simulation.tell_lost, name, victim)

    def is_dead(self, worker: str) -> bool:
        return any(replica in self.dead for replica, _ in self.places.stages_on(worker))


class Driver:
    """Carries out what the driver's machine says."""

    def __init__(self, world: World) -> None:
        self.world = world
        ids: dict[str, Any] = {"total_clocks": world.terms.total_clocks, "seed": 0, "shuffle": False, "examples": 1}
        start = wire.StartTraining(plan_id=PLAN, run=RUN, source=world.source, **ids)
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
                    world.simulation.deliver(name, message)  # pyright: ignore[reportArgumentType]
            case driver.SendStore(store, to):
                for name in to:
                    value = wire.StoreValue(plan_id=PLAN, run=RUN, store=store, version=0)
                    world.simulation.deliver(name, value, _FIRST)
            case driver.SendSource():
                pass  # the values of items need no data
            case driver.Feed(who, item):
                for name in dict.fromkeys(world.places.stages[who]):
                    batch = wire.Batch(plan_id=PLAN, run=RUN, device=name, sequence=item.sequence, slots=(0,))
                    world.simulation.deliver(name, batch, ())
            case driver.NoteFates(fates, missing):
                for item, fate in fates:
                    if fate == "duplicate":
                        world.duplicates.append(item)
                        continue
                    before = world.fates.get(item.sequence)
                    assert before is None or before[2] == "requeued", "an item was settled twice"
                    world.fates[item.sequence] = (self._peer, item.epoch, fate)
                    world.missing[item.sequence] = missing
            case driver.NoteCommit(clock, excluded):
                world.commits.append(wire.Commit(plan_id=PLAN, run=RUN, clock=clock, excluded=excluded))
            case driver.Keep(store, handle):
                assert store not in self.final, "a final value came twice"
                self.final[store] = self._payloads.pop(handle or 0)
            case actions.Release(handle):
                del self._payloads[handle]
            case driver.Over():
                self.tell(driver.Stop())
            case _:
                raise AssertionError(action)


def _program(name: str, at: At, terms: Terms) -> StageProgram:
    """forward, backward, and pushes after the gradient has gone upstream, so that stages drift apart."""
    (who, stage), last = at, terms.stages - 1
    mine = [(i, p) for i, s in enumerate(terms.stores) for p, owner in enumerate(s.stages) if owner == stage]
    up, down, first = 2 * stage - 1, 2 * stage + 1, 2 * stage  # messages: forward 0, 2, …; backward 1, 3, …
    run = Run(task=0, inputs=(), outputs=())
    instructions: list[Instruction] = [
        Feed(slots=(), buffers=()),
        *([Recv(message=first - 2, buffers=())] if stage else []),
        *[Read(store=i, leaves=(), buffers=()) for i in dict.fromkeys(i for i, _ in mine)],
        run,
        *([Send(message=first, buffers=()), Recv(message=down, buffers=())] if stage < last else []),
        run,
        *([Send(message=up, buffers=())] if stage else []),
        run,
        *[Push(store=i, part=p, buffers=()) for i, p in mine],
    ]
    edges = {first: Edge((who, stage + 1), 0), up: Edge((who, stage - 1), 0)}
    return StageProgram(name, tuple(instructions), tuple(isinstance(i, Run) / 3 for i in instructions), edges)


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
    source: Literal["fed", "shipped"] = "fed",
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
    parts: list[tuple[Part, ...]] = []
    for i, p in enumerate(rules):
        shared = (0, stages - 1) if i % 3 == 2 and stages > 1 else (i % stages,)
        home = shared[0]
        stores.append(StoreTerms(shared, p, p.collective))
        owners = range(replicas) if p.collective else [i % replicas if homes_on is None else homes_on]
        homes.append(tuple(dict.fromkeys(names[r, home] for r in owners)))
        readers.append({})
        for name in homes[-1]:
            served = [r for r in range(replicas) if not p.collective or names[r, home] == name]
            readers[-1][name] = tuple(dict.fromkeys(names[r, s] for r in served for s in shared))
        ranks = {s: tuple(dict.fromkeys(names[r, s] for r in range(replicas))) for s in shared}
        sums = {s: Reduction(("ring", "doubling", "tree")[i % 3], w, tuple(range(len(w))), 2) for s, w in ranks.items()}
        payload = (ArraySpec((8,), "float32"),)
        parts.append(tuple(Part(s, (), payload, reduction=sums[s] if p.collective else None) for s in shared))
    items = items or replicas * 4
    terms = Terms(replicas, stages, MICROBATCHES, tuple(stores), clocks)
    by_stage = tuple(tuple(names[r, s] for s in range(stages)) for r in range(replicas))
    places = Places(by_stage, tuple(homes), tuple(readers))
    programs = {at: _program(names[at], at, terms) for at in grid}
    sizes = Sizes((0,) * len(rules), tuple((32,) * len(p) for p in parts))
    layout = Layout(terms, places, programs, parts, sizes, [str(i) for i in range(len(rules))])
    speculation = terms.speculation
    work = ledger.Work(
        replicas,
        items if speculation is None else items // replicas * terms.members,
        item_size=8,
        total_clocks=clocks,
        aligned=terms.aligned,
        portions=terms.members // replicas,
        copies=speculation.copies if speculation else None,
    )
    return World(layout, work, speeds, seed, twice, source=source)
