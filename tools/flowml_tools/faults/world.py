"""Whole training runs in the simulator, with integers instead of arrays, bad networks, and a history of all of it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal

from msgspec.structs import replace

from flowml.plan import Training
from flowml.sim import AT_ONCE, Homes, Network, NetworkModel
from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError, ensure
from flowml_runtime.protocol.training import actions, driver, ledger
from flowml_runtime.protocol.training.snapshot import Rhythm, Save
from flowml_runtime.protocol.training.terms import ReplicaLost
from flowml_runtime.sim import network, world
from flowml_runtime.sim.collectives import Collectives
from flowml_runtime.sim.heap import Act, Clock
from flowml_runtime.sim.node import Node
from flowml_runtime.worker.training.exchange.positions import Backlog
from flowml_tools.faults.checker import unmet
from flowml_tools.faults.history import DRIVER, History, Saved, Sent, Turn
from flowml_tools.faults.matrices import Matrices
from flowml_tools.faults.timeline import Timeline
from flowml_tools.faults.values import Digits

PLAN = "plan"
RUN = 100
WITHOUT_LATE_S = 0.2
"""How long after one is withdrawn a snapshot is asked for that leaves out late replicas, where policies allow it."""
STOP_AT_ONCE = driver.Pause()
MOST_EVENTS = 50_000

HARMLESS = (
    *(wire.Contribution, wire.Arrived, wire.Commit, wire.StartTraining, wire.Retired),
    *(wire.Hold, wire.Paused, wire.Export, wire.Exported, wire.Buffers),
)
"""The messages that change nothing when they come again, also later than others of their sender. To the driver, a
StoreValue is one more."""


class Disturbed:
    """Random delays between any two. Implements `network.Tamper`."""

    def __init__(self, rng: random.Random, under: network.Tamper | None) -> None:
        self._rng = rng
        self._under = under

    def delays(self, source: str, to: str, message: object) -> tuple[float, ...]:
        rng = self._rng
        if self._under is not None:
            return self._under.delays(source, to, message)
        return (rng.choice([0.01, 0.1, 1.0, 5.0]) * rng.random(),)


class Speeds:
    """Random compute times. `speeds` are by replica, each of which has `stages` workers in a row."""

    def __init__(self, rng: random.Random, speeds: Sequence[float], stages: int) -> None:
        self._rng, self._speeds, self._stages = rng, speeds, stages

    def seconds(self, worker: int, step: int) -> float:
        return 3 * self._rng.random() * self._speeds[worker // self._stages % len(self._speeds)]


class _Counted(network.Wires):
    """Notes the bytes that workers give to the network for each store, and lets messages come again."""

    histories: dict[int, History]
    news: list[tuple[History, int, Any]]
    """The publications, each with its place in a history. While one waits to be sent, a newer version may replace it,
    which may have more bytes."""
    rng: random.Random
    twice: float
    """The share of messages that come again, of those that may."""

    def _come_again(self, to: str, message: object, act: Act) -> Act:
        """What a message does that comes once more, after it has come and perhaps after later ones of its sender."""
        harmless = isinstance(message, HARMLESS) or (to == DRIVER and isinstance(message, wire.StoreValue))
        if not harmless or self.rng.random() >= self.twice:
            return act
        delay = self.rng.choice([0.1, 1.0, 5.0]) * self.rng.random()

        def come(*args: Any) -> None:
            act(*args)
            self._clock.after(delay, 0, act, *args)

        return come

    def send(self, source: str, to: str, nbytes: int, act: Act, *args: Any) -> float:
        if nbytes and source != to:
            about: Any = args[1]
            message = getattr(about, "message", about)
            if isinstance(message, wire.Contribution | wire.Published | wire.Gossip):
                sent = Sent(message.store, nbytes, isinstance(message, wire.Published))
                history = self.histories[message.run]
                if sent.published:
                    self.news.append((history, len(history.facts), about))
                history.facts.append(sent)
            elif isinstance(args[0], tuple):  # a chunk of a sum, whose key begins with the store
                run = act.__self__.run  # pyright: ignore[reportFunctionMemberAccess]
                self.histories[run].facts.append(Sent(args[0][0], nbytes, published=False))
        if self.twice and source != to:
            act = self._come_again(to, args[1], act)
        return super().send(source, to, nbytes, act, *args)

    def broadcast(
        self, source: str, receivers: Iterable[tuple[str, Act]], args: tuple[Any, ...], nbytes: int = 0
    ) -> int:
        receivers = list(receivers)
        sent = super().broadcast(source, receivers, args, nbytes)
        if nbytes:
            message, to = args[1], [name for name, _ in receivers[:sent] if name != source]
            facts = self.histories[message.run].facts
            facts.extend(Sent(message.store, nbytes, published=True) for _ in to)
        return sent

    def settle(self) -> None:
        """All that was published has been sent."""
        for history, place, about in self.news:
            fact = history.facts[place]
            assert isinstance(fact, Sent)
            history.facts[place] = replace(fact, nbytes=about.nbytes)


class Payloads(dict[int, Any]):
    """The values of handles. Each is taken once: it is applied, forwarded, read or freed."""

    def __init__(self, histories: Mapping[int, History]) -> None:
        super().__init__()
        self._histories = histories

    def pop(self, handle: int, *default: Any) -> Any:
        if not default and handle not in self:  # only then: what brought it is found by a walk over all facts
            ensure(False, f"{self._of(handle)} is used again, or after it was freed")
        return super().pop(handle, *default)

    def _of(self, handle: int) -> str:
        for history in self._histories.values():
            for who, given, message in history.given():
                if given == handle:
                    about = ((name, getattr(message, name, None)) for name in ("replica", "store", "clock"))
                    told = ", ".join(f"{name} {value}" for name, value in about if value is not None)
                    return f"{type(message).__name__} ({told}) at {who}"
        return f"payload {handle}, which came just now,"


@dataclass
class World:
    """The driver, the simulated workers by name, and what was seen of the run."""

    layout: world.Layout
    work: ledger.Work
    speeds: Sequence[float]
    seed: int
    twice: float = 0.0
    times: world.ComputeTimes | None = None
    homes: Homes = AT_ONCE
    network: NetworkModel | None = None
    """None: messages take no time, except for random delays."""
    under: network.Tamper | None = None
    disturbed: bool = True
    """Whether anything happens to messages: what `under` says, or random delays, and repetitions."""
    clock: Clock = field(default_factory=Clock)
    dead: set[int] = field(default_factory=set[int])
    """The replicas that are lost."""
    crashed: set[str] = field(default_factory=set[str])
    """The workers whose loss ends a fit."""
    source: Literal["fed", "shipped"] = "fed"
    training: Training | None = None
    """The plan's part about training, if the run computes with matrices instead of integers."""
    rhythm: Rhythm | None = None
    """When snapshots are taken; None: never."""
    outlives: bool = False
    """Whether the driver's machine goes on for good without a lost replica, where it can."""
    pauses: Sequence[float] = ()
    """When snapshots are asked for, beside those of the rhythm."""
    pause: driver.Pause = STOP_AT_ONCE
    """How they are asked for."""
    patience_s: float | None = None
    """How long replicas stand for a snapshot before it is withdrawn; None: until all have stopped."""

    def __post_init__(self) -> None:
        layout, self.rng = self.layout, random.Random(self.seed)
        self.terms, self.places = layout.terms, layout.places
        self.histories: dict[int, History] = {}
        self.history = self._begin(RUN)
        self.values = self._values()
        self.driver = Driver(self, self.history)
        model = self.network or Network(latency_s=0.0, bytes_per_s=1e30)
        numbers = {name: n for n, name in enumerate(self.places.workers)}
        tamper = Disturbed(self.rng, self.under) if self.disturbed else None
        self.simulation = world.World(
            clock=self.clock,
            layout=layout,
            values=self.values,
            times=self.times or Speeds(self.rng, self.speeds, self.terms.stages),
            network=model,
            homes=self.homes,
            to_driver=self._receive,
            numbers=numbers,
            tamper=tamper,
            stepped=self._stepped,
        )
        self._wires = _Counted(self.clock, model, numbers, tamper)
        self._wires.histories, self._wires.news = self.histories, []
        self._wires.rng, self._wires.twice = self.rng, self.twice
        self.simulation.wires, self.simulation.backlog = self._wires, Backlog(self._wires.waiting)
        self.nodes = self.simulation.nodes
        self.simulation.payloads = Payloads(self.histories)
        for node in self.nodes.values():
            node.payloads = self.simulation.payloads
        self._runs: dict[int, world.World] = {}
        self.simulation.of_run = self._of_run

    def _values(self) -> Digits | Matrices:
        layout, seen = self.layout, (self.histories, self._run_of)
        if self.training is None:
            return Digits(layout.programs, layout.places, *seen)
        return Matrices(layout.programs, self.training, *seen)

    def _of_run(self, run: int) -> world.World:
        """What real workers make anew for each run: values and sums. Messages, the clock and the workers are common."""
        found = self._runs.get(run)
        if found is None:
            self.values = self._values() if self._runs else self.values
            found = self._runs[run] = copy(self.simulation)
            found.run, found.values = run, self.values
            found.collectives = Collectives(found, self.layout.parts)
        return found

    @property
    def applied(self) -> dict[int, list[list[tuple[int, int, int, float]]]]:
        """Store -> what each of its versions is made of: (replica, clock, sum, coefficient)."""
        assert isinstance(self.values, Digits)
        return self.values.applied

    def own_states(self, store: int) -> tuple[str, ...]:
        """The workers that keep an optimizer state of a store, because replicas update it themselves."""
        if store not in self.layout.local:
            return ()
        stage = self.terms.stores[store].stages[0]
        return tuple(dict.fromkeys(stages[stage] for stages in self.places.stages))

    def _begin(self, run: int) -> History:
        self.histories[run] = history = History(run, self.terms, self.places, self.work, rhythm=self.rhythm)
        return history

    def _receive(self, peer: str, message: wire.Wire, value: Any) -> None:
        self.driver.receive(peer, message, value)

    def _run_of(self, worker: str) -> int:
        return self.nodes[worker].start.run

    def _stepped(self, node: Node, event: actions.Event, wanted: Sequence[actions.Action]) -> None:
        about = event.message if isinstance(event, actions.Received) else event
        runs = self.histories if isinstance(about, ReplicaLost) else (about.run,)
        for run in runs:
            self.histories[run].facts.append(Turn(self.clock.now, node.name, node.machine.number, event, wanted))
        node.machine.validate()
        node.mailbox.validate()

    def go(self) -> None:
        """Let the run, or the second one if the first is interrupted, come to its end."""
        self.clock.after(0, 0, self.driver.tell, driver.Begin())
        for when in self.pauses:
            self.clock.after(when, 0, self.ask)
        self.clock.run(MOST_EVENTS)
        self._wires.settle()
        self.history.crashed = frozenset(self.crashed)
        if self.driver.machine.over:
            self.history.summary = self.driver.machine.ledger.summary()
            for told in self.driver.machine.traffic.values():
                for store, _, _, pushed, published, _ in told.stores:
                    before = self.history.traffic.get(store, (0, 0))
                    self.history.traffic[store] = before[0] + pushed, before[1] + published

    def ask(self) -> None:
        """Ask for a snapshot."""
        if not self.driver.machine.over and not self.driver.ended:
            self.driver.tell(self.pause)

    def interrupt(self, when: float) -> None:
        """End the first fit at this time, as an exception in a callback does, and begin another one at once."""
        self.clock.after(when, 0, self._interrupt)

    def _interrupt(self) -> None:
        if self.driver.machine.over or self.driver.ended:
            return
        self.driver.tell(driver.Stop())
        self.driver.ended = True
        self.history = self._begin(RUN + self.terms.most_clocks)
        self.driver = Driver(self, self.history)
        self.driver.tell(driver.Begin())

    def crash(self, worker: int, when: float, noticed_s: float = 1.0) -> None:
        """A worker falls silent, which ends the fit when the driver learns of it."""
        name = self.worker(worker)
        self.clock.after(when, 0, self._crash, name)
        self.clock.after(when + noticed_s, 0, self._notice, name)

    def worker(self, number: int) -> str:
        """The name of a worker."""
        return self.places.workers[number % len(self.places.workers)]

    def _crash(self, name: str) -> None:
        if not self.driver.machine.over:
            self.crashed.add(name)
            self.simulation.silence(name)

    def _notice(self, name: str) -> None:
        if name in self.crashed and not self.driver.ended:
            self.driver.tell(driver.WorkerLost(name, "it stopped"))

    def lose(self, victim: int, when: float) -> None:
        """All workers of a replica fall silent; the others are told one after the other. If the run goes on without it
        for good, the driver tells them."""
        self.clock.after(when, 0, self._die, victim)

    def _die(self, victim: int) -> None:
        if self.driver.machine.over:
            return
        self.dead.add(victim)
        for name in filter(self.is_dead, self.nodes):
            self.simulation.silence(name)
        self.clock.after(self.rng.random() * 3, 0, self._tell_lost, victim)
        if not self.outlives:
            self._tell_workers(victim)

    def _tell_workers(self, victim: int) -> None:
        for name in self.nodes:
            if not self.is_dead(name):
                self.clock.after(self.rng.random() * 3, 0, self.simulation.tell_lost, name, victim)

    def _tell_lost(self, victim: int) -> None:
        worker = self.places.stages[victim][0]
        if self.driver.machine.goes_on_without(worker):
            self.driver.tell(driver.WorkerLost(worker, "it stopped", may_leave=True))
            return
        self.driver.tell(driver.ReplicaLost(victim))
        if self.outlives:
            self._tell_workers(victim)

    def is_dead(self, worker: str) -> bool:
        return worker in self.crashed or any(replica in self.dead for replica, _ in self.places.stages_on(worker))


class Driver:
    """Carries out what the driver's machine says."""

    def __init__(self, world: World, history: History) -> None:
        self.world = world
        self.history = history
        ids: dict[str, Any] = {"total_clocks": world.terms.total_clocks, "seed": 0, "shuffle": False, "examples": 1}
        start = wire.StartTraining(plan_id=PLAN, run=history.run, source=world.source, **ids)
        rhythm = world.rhythm and replace(world.rhythm, partial=True)
        about = world.terms, world.work, world.places, rhythm
        self.machine = driver.TrainingDriver(start, *about, outlives=world.outlives)
        self.final: dict[int, Any] = {}
        self.ended = False
        """Whether the fit has ended before it was over."""
        self.commits: list[driver.NoteCommit] = []
        self.duplicates: list[wire.Item] = []
        """The items of which another copy counts."""
        self._heard = self._waits = 0
        """How much had come of a snapshot that is held up, at the newest event, and the number of that wait."""
        self._peer = ""
        self._payloads: dict[int, Any] = {}
        self._handles = itertools.count(1)

    def receive(self, peer: str, message: Any, value: Any) -> None:
        if isinstance(message, wire.StepFailed):
            if message.step < self.history.run:  # of the fit before: this worker had not heard that it was over
                self.world.crashed.add(message.worker)
                self.tell(driver.StepFailed(message))  # which is about no step of this fit
                self.tell(driver.WorkerLost(message.worker, "it does nothing more"))
                return
            if message.worker not in unmet(Timeline.of(self.history), self.world.clock.now):
                raise ProtocolError(f"{message.worker} fails at step {message.step}: {message.error}")
            self.world.crashed.add(message.worker)  # it does nothing more
            self.tell(driver.StepFailed(message))
            return
        handle = None
        if value is not None:
            handle = next(self._handles)
            self._payloads[handle] = value
        self._peer = peer
        self.tell(actions.Received(peer, message, handle))

    def tell(self, event: driver.Event) -> None:
        wanted = self.machine.step(event)
        run = event.message.run if isinstance(event, actions.Received) else self.history.run
        turn = Turn(self.world.clock.now, DRIVER, self.machine.number, event, wanted)
        self.world.histories[run].facts.append(turn)
        self.machine.validate()
        if self.machine.heard != self._heard:
            self._heard, self._waits = self.machine.heard, self._waits + 1
            if self._heard and self.world.patience_s is not None:
                self.world.clock.after(self.world.patience_s, 0, self._withdraw, self._waits)
        for action in wanted:
            self._act(action)

    def _withdraw(self, wait: int) -> None:
        if wait == self._waits and not self.ended:
            self.tell(driver.Withdraw())
            self.world.clock.after(WITHOUT_LATE_S, 0, self.world.ask)  # of those that are not late

    def _act(self, action: driver.Action) -> None:
        simulation, ids = self.world.simulation, {"plan_id": PLAN, "run": self.history.run}
        match action:
            case actions.Send(to, message):
                for name in to:
                    simulation.deliver(name, message)  # pyright: ignore[reportArgumentType]
            case driver.SendStore(store, to):
                for name in to:
                    value = self.world.values.first(store)
                    simulation.deliver(name, wire.StoreValue(**ids, store=store, version=0), value)  # pyright: ignore
                for name in self.world.own_states(store):
                    simulation.deliver(name, wire.OwnState(**ids, store=store), ())  # pyright: ignore
            case driver.Feed(who, item):
                for stage, name in enumerate(self.world.places.stages[who]):
                    device = simulation.programs[who, stage].device
                    batch = wire.Batch(**ids, device=device, sequence=item.sequence, slots=(0,))  # pyright: ignore
                    simulation.deliver(name, batch, ())
            case driver.SendSource():
                pass  # the values of items need no data
            case driver.Note() | driver.NoteWaits() | driver.NoteStaleness() | driver.NoteForwarded():
                pass  # for the history of a fit
            case driver.NoteLeftOut() | driver.LeaveOut():
                pass  # for the history of a fit
            case driver.KeepState(_, handle):
                self._payloads.pop(handle or 0)
            case Save(stopped, buffers):
                kept = {
                    owner: dict(zip(names, self._payloads.pop(handle or 0, ()), strict=True))
                    for owner, names, handle in buffers
                }
                ledger = self.machine.kept(action) if action.without else None
                self.history.facts.append(Saved(stopped, kept, action.last, action.without, ledger))
            case driver.NoteCommit():
                self.commits.append(action)
            case driver.Keep(store, handle):
                if store in self.final:
                    raise ProtocolError(f"the final value of store {store} has come twice")
                self.final[store] = self._payloads.pop(handle or 0)
            case actions.Release(handle):
                del self._payloads[handle]
            case driver.Over():
                self.tell(driver.Stop())
            case driver.Fail():
                self.ended = True
                self.tell(driver.Stop())
            case driver.NoteFates(fates):
                self.duplicates += [item for item, fate in fates if fate == "duplicate"]
            case _:
                raise ProtocolError(f"the driver of a simulated run cannot carry out {action}")
