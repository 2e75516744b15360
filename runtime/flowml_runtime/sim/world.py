"""A simulated run: the workers of a plan, the clock, and the messages between them and the driver.

    World.deliver       the driver sends a message to a worker
    World.to_driver     called with each message that arrives at the driver
    World.clock         `step` lets the next event happen

It interprets the actions of the same machines as the real host (`protocol.training`). All decisions are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Protocol

import msgspec

from flowml.errors import FlowmlError
from flowml.instructions import Instruction
from flowml.plan import Part, Plan, Site
from flowml.policy.apply import scales
from flowml.sim import AT_ONCE, Homes, NetworkModel
from flowml_runtime import wire
from flowml_runtime.execution.faults import step_failed
from flowml_runtime.protocol.rendezvous import Rendezvous
from flowml_runtime.protocol.training import actions
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.terms import ReplicaLost, Terms
from flowml_runtime.sim.collectives import Collectives
from flowml_runtime.sim.copies import SimulatedCopies
from flowml_runtime.sim.executor import Executor
from flowml_runtime.sim.heap import Clock
from flowml_runtime.sim.network import DRIVER, Tamper, Wires
from flowml_runtime.sim.node import Node
from flowml_runtime.sim.post import Here, Nodes
from flowml_runtime.sim.program import At, Edge, Sizes, StageProgram, programs
from flowml_runtime.sim.values import Value, Values
from flowml_runtime.worker.training.exchange.positions import Backlog, Which, which
from flowml_runtime.worker.training.finite import sentence


class ComputeTimes(Protocol):
    """The compute time of each step of each worker, in seconds."""

    def seconds(self, worker: int, step: int, /) -> float: ...


@dataclass(frozen=True)
class Layout:
    """What is simulated: the parts of a plan that the simulator needs."""

    terms: Terms
    places: Places
    programs: Mapping[At, StageProgram]
    parts: Sequence[Sequence[Part]]
    """The parts of each store."""
    sizes: Sizes
    names: Sequence[str]
    """The name of each store."""
    item_size: int = 0
    """The examples of a work item; 0 if no item may have fewer."""
    local: frozenset[int] = frozenset()
    """The stores whose parameters replicas update themselves."""
    sites: Sequence[tuple[Site, ...]] = ()
    """The sites of each store; none if no store has any."""
    positions: Sequence[Which] = ()
    """Of each store, which of the arrays that mirrors send hold positions."""
    load: float = 1.0
    """How many work items' examples the step of a replica computes: those of its shares of a batch, under a code."""

    def site_of(self, store: int, replica: int) -> Site | None:
        """The site of a replica, if it adds up gradients with those there, or its leader decides about them alone."""
        terms = self.terms.stores[store]
        found = self.sites[store] if self.sites and (not terms.relayed or terms.sites_decide) else ()
        return next((site for site in found if replica in site.replicas), None)

    @staticmethod
    def of(plan: Plan) -> Layout:
        """The layout of a training plan, without the number of clocks."""
        training = plan.training
        assert training is not None
        stores = training.stores
        return Layout(
            Terms.of(training, 0),
            Places.of(training),
            programs(plan, training),
            [s.parts for s in stores],
            Sizes.of(training),
            [s.name for s in stores],
            training.item_size,
            frozenset(i for i, s in enumerate(stores) if s.local is not None),
            [s.sites for s in stores] if any(s.sites for s in stores) else (),
            list(map(which, stores)),
            float(training.code.load) * len(training.replicas) if training.code else 1.0,
        )

    def lasting(self, total_clocks: int) -> Layout:
        """The layout for a run of so many clocks."""
        return replace(self, terms=self.terms.lasting(total_clocks))


@dataclass(frozen=True, slots=True)
class Bound:
    """What the executors of all replicas need to know of the instructions of a stage."""

    steps: Sequence[tuple[int, Any, Instruction]]
    """For each instruction that matters its position, the executor's function, and itself."""
    paced: frozenset[int]
    """The positions of the tasks that share the artificial delay of a step, if there is one."""
    ends: Mapping[int, int]
    """As `cuts.ends`, if the machine wants to know of computed microbatches."""
    receives: bool
    """Whether the stage waits for values of other stages."""


@dataclass
class World:
    """The workers of one plan. `tamper` and `stepped` are for faults and for tests."""

    clock: Clock
    layout: Layout
    values: Values
    times: ComputeTimes
    network: NetworkModel
    to_driver: Callable[[str, wire.Wire, Value], None]
    numbers: Mapping[str, int]
    """The number of each worker, for the models."""
    devices: int = 1
    """The devices of each worker. Each is a machine of its own for the compute times."""
    run: int = 0
    tamper: Tamper | None = None
    stepped: Callable[[Node, actions.Event, Sequence[actions.Action]], None] | None = None
    """Called after each event of a worker's machine, when the wanted actions have been carried out."""
    homes: Homes = AT_ONCE
    here: Here | None = None
    """Which of the workers are in this process; None if all are."""
    delays: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    """Seconds added to the steps of a worker, as in `wire.StartTraining`."""
    copies: SimulatedCopies | None = None
    """What workers keep of each other's state, if they do."""
    variants: Callable[[str], Mapping[At, StageProgram]] = lambda variant: {}
    """The programs of the stages for batches of another shape, by the variant that a batch names."""
    of_run: Callable[[int], World] | None = None
    """The world with the values and sums of a run, if one run follows another on the same workers."""

    def __post_init__(self) -> None:
        layout = self.layout
        self.terms, self.places, self.sizes = layout.terms, layout.places, layout.sizes
        self.programs = layout.programs
        self.work = layout.load * self.terms.replicas / self.terms.members
        """The examples of a step as a share of those of a work item: more under a code, fewer of a portion."""
        here = self.here
        self.wires = Wires(self.clock, self.network, self.numbers, self.tamper, None if here is None else here.put_for)
        self.backlog = Backlog(self.wires.waiting)
        self.mailbox: Rendezvous[list[Value], list[Value]] = Rendezvous()
        """Of all workers, if no stage waits for values of another."""
        workers = self.places.workers if here is None else filter(here.has, self.places.workers)
        self.payloads: dict[int, Value] = {}
        """The values of the handles of all machines. Few are there at a time, and a table for each worker is large."""
        self.handles = count(1)
        self.nodes = Nodes({name: Node(self, name, self.numbers[name]) for name in workers})
        self._bound: dict[tuple[tuple[Instruction, ...], tuple[float, ...]], Bound] = {}
        """Stages of replicas that have the same instructions share them."""
        self.collectives = Collectives(self, layout.parts)

    def clear(self) -> None:
        """The run is over. Parts refer to each other, and without this only the collector of cyclic garbage would find
        them, which looks at all of them again and again."""
        for node in self.nodes.values():
            node.stages.clear()
        self.nodes.clear()
        self.clock.clear()

    def deliver(self, worker: str, message: wire.TrainingMessage, value: Value = None) -> None:
        """The driver sends a message to a worker."""
        self.wires.exchange(DRIVER, worker, self.nodes[worker].receive, (DRIVER, message, value))

    def send(self, source: str, to: str, message: wire.Wire, value: Value = None, nbytes: int = 0) -> None:
        """A worker sends a message to another one, or to the driver. `nbytes` are those of its arrays."""
        if to == DRIVER:
            self.wires.exchange(source, to, self.to_driver, (source, message, value))
        else:
            self.wires.send(source, to, nbytes, self.nodes[to].receive, source, message, value)

    def broadcast(self, source: str, to: Sequence[str], message: Any) -> None:
        """A worker sends others one message without arrays; if the driver is one of them, it is the last. The workers
        share the event of its arrival."""
        sent = 0
        if len(to) > 1:
            event, nodes = (actions.Received(source, message),), self.nodes
            workers = to[:-1] if to[-1] == DRIVER else to
            sent = self.wires.broadcast(source, ((name, nodes[name].tell) for name in workers), event)
        for name in to[sent:]:
            self.send(source, name, message)

    def publish(self, source: str, to: Sequence[str], message: wire.Published, value: Value, nbytes: int) -> int:
        """Send a version of a store to readers, as long as its sending begins at once. Returns to how many."""
        nodes = self.nodes
        return self.wires.broadcast(
            source, ((name, nodes[name].receive) for name in to), (source, message, value), nbytes
        )

    def send_news(self, source: Node, to: str, news: Any, nbytes: int) -> float:
        """Send a version of a store. Returns when its sending begins; until then it may be changed."""
        return self.wires.send(source.name, to, nbytes, self.nodes[to].receive_news, source.name, news)

    def send_edge(self, source: str, edge: Edge, key: tuple[Any, ...], value: Value) -> None:
        """Send a value from one stage to another. None says that its microbatch is left out."""
        to = self.places.stages[edge.to[0]][edge.to[1]]
        self.wires.send(source, to, 0 if value is None else edge.nbytes, self.nodes[to].receive_edge, key, value)

    def bound(self, program: StageProgram) -> Bound:
        """What an executor does with the instructions that matter."""
        key = program.instructions, program.shares
        found = self._bound.get(key)
        if found is None:
            matter = program.matter(self.values.computes, bool(self.delays))
            given = [(n, program.instructions[n]) for n in matter]
            steps = [(n, Executor.action(self, i), i) for n, i in given]
            ends = program.ends if self.terms.paced is not None else {}
            paced = program.paced if self.delays else frozenset[int]()
            found = self._bound[key] = Bound(steps, paced, ends, program.receives)
        return found

    def is_plain(self, store: int) -> bool:
        """Whether replicas only read the store and push to it: they keep no parameters of it, share no copy of it, and
        add up nothing at their sites."""
        terms, layout = self.terms.stores[store], self.layout
        adds_up = bool(layout.sites and layout.sites[store]) and (not terms.relayed or terms.sites_decide)
        return not (terms.shared or store in layout.local or adds_up)

    @property
    def outlives(self) -> bool:
        """Whether a step may go on when its run is over: all that it does is to read, to compute and to push."""
        stores = enumerate(self.terms.stores)
        return all(self.is_plain(i) and not (s.collective or s.policy.filters) for i, s in stores)

    def machine(self, worker: int, device: str) -> int:
        """The number of a worker's device among the machines of the compute times."""
        return worker * self.devices + (int(device.rpartition(":")[2]) if self.devices > 1 else 0)

    def seconds(self, worker: int, step: actions.Start) -> float:
        """The compute time of a step, in proportion to its examples: a replica of a code computes several shares of the
        batch, a portion is a part of one, and a work item may have fewer examples than usual."""
        seconds = self.times.seconds(worker, step.clock) * self.work
        return seconds * step.item.size / self.layout.item_size if self.is_short(step.item) else seconds

    def is_short(self, item: wire.Item) -> bool:
        """Whether a work item has fewer examples than usual. The driver feeds these, if there is arithmetic."""
        return item.size != self.layout.item_size > 0

    def program(self, at: At, variant: str) -> StageProgram:
        """The program of a stage for the batches of a variant; "" is that of the fit's plan."""
        return (self.variants(variant) if variant else self.programs)[at]

    def delay(self, worker: str, clock: int) -> float:
        """The artificial delay of a step."""
        row = self.delays.get(worker)
        return row[clock % len(row)] if row else 0.0

    def checked(self, node: Node, replica: int, message: Any, value: Value) -> tuple[Any, Value]:
        """What a replica contributes, and its value. If that is not finite and must not be applied, it is empty.

        The message may name a portion of the batch instead of the replica."""
        part = message.part
        if self.values.is_finite(message.store, part, value) or node.start.on_nonfinite == "apply":
            return message, value
        self.refuse(node, message.store, part, message.clock, {replica: value}, "sends")
        return msgspec.structs.replace(message, weight=0, empty=True), None

    def filtered(self, at: At, message: Any, value: Value, parameters: Value = None) -> tuple[Value, int]:
        """What the home decodes of a contribution, and the bytes that are sent: at most, if there is no arithmetic.
        `parameters` are as in `Values.filtered`."""
        if value is None:
            return None, 0
        tree = self.terms.stores[message.store].tree
        if tree is not None and tree.adder_of(message.replica, summed=message.of_site) is not None:
            return value, self.sizes.parts[message.store][message.part]
        if self.filters(message.store):
            return self.values.filtered(at, message, value, parameters)
        return value, self.sizes.parts[message.store][message.part]

    def filters(self, store: int) -> bool:
        """Whether values are filtered on their way to a store."""
        return self.values.computes and bool(self.terms.stores[store].policy.home_filters)

    def share(self, node: Node, step: actions.Start, message: Any, value: Value) -> None:
        """Update a store that the replicas of a node share, and tell the machine, which counts."""
        store = message.store
        if self.values.computes:
            message, value = self.checked(node, step.replica, message, value)
        policy, before = self.terms.stores[store].policy, node.shared.get(store, 0)
        if not message.empty:
            (coefficient,) = policy.coefficients([message.weight], self.terms.microbatches)
            staleness = (before - message.base_version,) if scales(policy.apply) else ()
            node.shared = node.shared or {}
            node.shared[store] = before + 1
            self.values.apply(node.name, store, before + 1, [([value], coefficient)], staleness)
        node.note(actions.Updated(step.run, step.replica, store, step.clock, not message.empty))

    def checked_sum(self, node: Node, message: Any, value: Value, own: Mapping[int, Value]) -> tuple[Any, Value]:
        """The same for a sum over all replicas. `own` are the gradients of those on this worker."""
        store, part = message.store, message.part
        if self.values.is_finite(store, part, value) or node.start.on_nonfinite == "apply":
            return message, value
        bad = {r: own[r] for r in sorted(own) if not self.values.is_finite(store, part, own[r])}
        self.refuse(node, store, part, message.clock, bad, "sends", value)
        return msgspec.structs.replace(message, weight=0, empty=True), None

    def refuse(
        self, node: Node, store: int, part: int, clock: int, given: Mapping[int, Value], verb: str, total: Value = None
    ) -> None:
        """What replicas have given is not finite: report that it is left out, or end the fit."""
        values = [*given.values(), *([total] if total else ())]
        replicas, weight = tuple(given), any(self.values.blames_weight(store, part, value) for value in values)
        if node.start.on_nonfinite == "raise":
            terms = self.terms.stores[store]
            error = FlowmlError(sentence(self.layout.names[store], terms, replicas, verb, weight=weight))
            self.fail(node, node.start.run + clock, error, f"store {self.layout.names[store]}")
            return
        ids: dict[str, Any] = {**node.ids, "store": store, "clock": clock}
        self.send(node.name, DRIVER, wire.NonFinite(**ids, replicas=replicas, weight=weight))

    def fail(self, node: Node, step: int, error: BaseException, what: str = "training") -> None:
        """A worker reports a failure to the driver, which ends the fit, and does nothing more."""
        self.send(node.name, DRIVER, step_failed(node.ids["plan_id"], step, node.name, what, error))
        node.lives = False

    def silence(self, worker: str) -> None:
        """A worker stops: it does nothing more, and messages to it are lost."""
        self.nodes[worker].lives = False

    def tell_lost(self, worker: str, replica: int) -> None:
        """Tell a worker that a replica is lost."""
        self.nodes[worker].tell(ReplicaLost(replica))
