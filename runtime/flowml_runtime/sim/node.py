"""A worker in a simulation: carries out the actions of its machine, as `worker.training.host` does with threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import msgspec

from flowml.policy.filters import is_lossless
from flowml_runtime import wire
from flowml_runtime.protocol.rendezvous import Rendezvous
from flowml_runtime.protocol.training import actions as protocol
from flowml_runtime.protocol.training.accounts import NOTHING
from flowml_runtime.protocol.training.worker import TrainingWorker
from flowml_runtime.sim.copies import copying_of
from flowml_runtime.sim.executor import Executor
from flowml_runtime.sim.kept import export, residents_of
from flowml_runtime.sim.network import DRIVER, KINDS
from flowml_runtime.sim.program import At
from flowml_runtime.sim.values import Value
from flowml_runtime.worker.training.counts import Counts
from flowml_runtime.worker.training.examples import Fed
from flowml_runtime.worker.training.exchange.positions import NO_LISTS, heard
from flowml_runtime.worker.training.filtered import added
from flowml_runtime.worker.training.resident import Residents

if TYPE_CHECKING:
    from flowml_runtime.sim.world import World


class _Ids(TypedDict):
    plan_id: str
    run: int


_NONE: frozenset[Any] = frozenset()

NEVER = wire.StartTraining(plan_id="none", run=0, total_clocks=0, seed=0, shuffle=False, examples=0, source="shipped")
"""What a worker has that no run has begun on."""


class _News(msgspec.Struct):
    """A version of a store on its way to a reader. Until it is sent, a newer one may replace it."""

    message: wire.Published
    value: Value
    nbytes: int
    begins: float = 0.0


_NEWS = frozenset[type]({wire.Published, wire.Applied})
"""As `Node._news_types`, where no sites decide alone. There a step may wait for a sum that does not come."""

_WAKE = 3
"""The kind of the event that a Wake asked for; see `network.KINDS`."""

_TURN = 5
"""The kind of the event that work of a home is done."""


class Node:
    """One worker. It lives until a fault ends it."""

    def __init__(self, world: World, name: str, number: int) -> None:
        self.world = world
        self.name = name
        self.number = number
        self.lives = True
        self.machine = TrainingWorker(name, DRIVER, world.terms, world.places)
        self.mailbox: Rendezvous[list[Value], list[Value]] = world.mailbox if world.terms.stages == 1 else Rendezvous()
        self.start = NEVER
        self._fed = False
        """Whether the driver sends the examples of each work item."""
        self._stateful: frozenset[int] = frozenset()
        """The stages on which the driver's state of the model stays."""
        self._models: frozenset[At] = _NONE
        """Those whose first state is here."""
        self.given = False
        """Whether the driver gives the stages something that a step waits for."""
        self.shown: list[tuple[int, Value]] = []
        """(version, value) of each store, as read here."""
        self.batches: Fed[str] = Fed(ahead=world.terms.speculation is not None)
        """The variants of the batches that have come and that no step has begun with."""
        self.states: frozenset[int] = _NONE
        """The stores whose own optimizer state is here, if replicas update their parameters themselves."""
        self.told: dict[tuple[int, int, int, int], Value] = {}
        """(store, replica, source, clock) -> what a replica here has got from a neighbour."""
        self.lists = NO_LISTS
        self.shared: dict[int, int] = NOTHING
        """Store -> its version, where the replicas here update it themselves."""
        self.locked: dict[int, float] = NOTHING
        """Store -> when the replicas here, which update it themselves, have made the updates that have begun."""
        self.payloads = world.payloads
        """The values of the machine's handles."""
        self.stages: dict[At, Executor] = {}
        self.counts = Counts(0)
        self._news_types = _NEWS | {wire.Commit} if world.terms.final else _NEWS
        """Messages that may let a step go on although the machine wants nothing."""
        self._turns = 0
        """The work of the homes here that is not done yet."""
        self._free = 0.0
        """When all of it is done."""
        self._closed = 0
        """The runs that have ended here."""
        self._news: dict[tuple[str, int], _News] = NOTHING
        """(reader, store) -> the newest version that was not sent at once."""
        self._published: frozenset[int] = _NONE
        """The stores of which a version was published."""
        self._restoring = False
        """Whether buffers are still to come of the snapshot from which the run goes on."""
        self._asked: protocol.Export | None = None
        """What the driver has asked for, until all is here."""
        self.copying: Any = None
        """The copies of what lives here, if others keep them."""

    @property
    def ids(self) -> _Ids:
        """The common fields of the messages of the run."""
        return {"plan_id": self.start.plan_id, "run": self.start.run}

    def receive(self, peer: str, message: Any, value: Value) -> None:
        """A message has arrived. `value` stands for its arrays; None if it has none."""
        if value is None:
            self.tell(protocol.Received(peer, message))
        elif self.lives:
            handle = next(self.world.handles)
            self.payloads[handle] = value
            self.tell(protocol.Received(peer, message, handle))

    def receive_news(self, peer: str, news: _News) -> None:
        self.receive(peer, news.message, news.value)

    def receive_edge(self, key: tuple[Any, ...], value: Value) -> None:
        """A value from another stage has arrived."""
        if self.lives:
            waiter = self.mailbox.put(key, [value])
            if waiter is not None:
                waiter.append(value)
                self.walk()

    def tell(self, event: protocol.Event) -> None:
        if not self.lives:
            return
        wanted = self.machine.step(event, self.world.clock.now)
        for action in wanted:
            self._ACT[type(action)](self, action)
        if self.world.stepped is not None:
            self.world.stepped(self, event, wanted)
        if wanted or (type(event) is protocol.Received and type(event.message) in self._news_types):
            self.walk()

    def note(self, event: protocol.Updated | protocol.Computed) -> None:
        """Tell the machine of an event that lets no step go on. A step may call it."""
        wanted = self.machine.step(event, self.world.clock.now)
        for action in wanted:
            self._ACT[type(action)](self, action)
        if self.world.stepped is not None:
            self.world.stepped(self, event, wanted)

    def send(self, to: str, message: wire.Wire, value: Value = None, nbytes: int = 0) -> None:
        self.world.send(self.name, to, message, value, nbytes)

    def contribute(self, at: At, sent: protocol.Send, value: Value, counts: Counts) -> None:
        """Send what a stage contributes to a store, or to the sum of its site. `counts` are those of its run."""
        world, message = self.world, sent.message
        assert isinstance(message, wire.Contribution)
        if world.values.computes:
            message, value = world.checked(self, at[0], message, value)
        store, part, crosses = message.store, message.part, sent.to[:1] != (self.name,)
        if world.terms.stores[store].keeps_inside(message.replica, summed=message.of_site):
            nbytes = 0 if value is None else world.sizes.whole[store][part]
            counts.crossing(store, nbytes * crosses)  # the push of the sum is counted
        else:
            value, nbytes = world.filtered(at, message, value)
            counts.push(store, part, nbytes, crosses=crosses)
        for to in sent.to:
            self.send(to, message, value, nbytes)

    def walk(self) -> None:
        for stage in self.stages.values():
            if stage.waits:
                stage.walk()

    # The actions.

    def lacks(self, at: At, item: wire.Item) -> bool:
        """Whether a stage cannot begin a step on a work item, because what the driver gives it has not arrived."""
        fed = self._fed or (self.world.values.computes and self.world.is_short(item))
        lacks = fed and not self.batches.has(self.world.programs[at].device, item.sequence)
        return lacks or self._restoring or (at[1] in self._stateful and at not in self._models)

    def _open(self, action: protocol.Open) -> None:
        self.start = action.start
        self.world = self.world.of_run(action.start.run) if self.world.of_run else self.world
        self._fed, self._stateful = action.start.source == "fed", self.world.terms.stateful
        stopped = action.start.stopped
        self._restoring, self._asked = stopped is not None, None
        self.given = self._fed or bool(self._stateful) or self._restoring
        self.copying = copying_of(self, self.world.copies)
        places, programs = self.world.places, self.world.programs
        self.counts = Counts(len(self.world.terms.stores))
        self.shown = [(0, None)] * len(self.world.terms.stores)
        self._published = self._models = self.states = _NONE
        for table in (self.batches, self.told):
            table.clear()
        self.shared, self.locked, self._news = NOTHING, NOTHING, NOTHING
        if stopped:
            self.shared = {s.store: s.version for s in stopped.stores if self.world.terms.stores[s.store].shared}
        self.lists = NO_LISTS
        self.stages = {at: Executor(self, at, programs[at]) for at in places.stages_on(self.name)}
        for at, stage in self.stages.items():
            if stage.receives:
                self.mailbox.advance(at, action.start.run)

    def _close(self, action: protocol.Close) -> None:
        """End the run here. Work of the homes whose turn has not come is dropped, as on the lanes of a real worker."""
        for stage in self.stages.values():
            stage.stop()
        self.stages = {}
        self._closed += 1
        self._turns, self._free = 0, 0.0

    def _send(self, action: protocol.Send) -> None:
        self.world.broadcast(self.name, action.to, action.message)

    def _start(self, action: protocol.Start) -> None:
        self.stages[action.replica, action.stage].start(action)

    def _abandon(self, action: protocol.Abandon) -> None:
        self.stages[action.replica, action.stage].abandon(action.clock)

    def _count(self, action: protocol.Count) -> None:
        self.stages[action.replica, action.stage].settle(action.clock, action.stores, counts=action.counts)

    def _wake(self, action: protocol.Wake) -> None:
        self.world.clock.at(action.at, self.number * KINDS + _WAKE, self.tell, protocol.Tick(action.run))

    def _show(self, action: protocol.Show) -> None:
        self.shown[action.store] = action.version, self.payloads.pop(action.handle)

    def _load(self, action: protocol.Load) -> None:
        self.world.values.load(self.name, action.store, self.payloads.pop(action.handle))

    def _apply(self, action: protocol.Apply) -> None:
        pop = self.payloads.pop
        given = [([pop(h) for h in handles], factor) for handles, factor in action.contributions]
        world, store = self.world, action.store
        seconds = self._seconds(store, len(given) * sum(world.sizes.parts[store]))
        about = action.version, given, action.staleness, action.full, action.decays
        self._in_turn(seconds, world.values.apply, self.name, store, *about)

    def _couple(self, action: protocol.Couple) -> None:
        pop, world = self.payloads.pop, self.world
        sent = {a.store: [([pop(h) for h in hs], factor) for hs, factor in a.contributions] for a in action.applies}
        heard = [(stores, pop(h) if h else ()) for stores, h in action.given]
        nbytes = sum(len(given) * sum(world.sizes.parts[store]) for store, given in sent.items())
        seconds = self._seconds(action.stores[0], nbytes) if sent else 0.0
        self._in_turn(seconds, self._send_shared, action, sent, heard)

    def _send_shared(self, action: protocol.Couple, sent: Any, heard: Any) -> None:
        value = self.world.values.couple(self.name, action, sent, heard)
        about: dict[str, Any] = {"coupling": action.coupling, "round": action.round, "clock": action.clock}
        message = wire.Shared(**self.ids, cause=action.cause, **about, stores=action.stores)
        sizes = [(store, self.world.sizes.shared[store][action.round]) for store in action.stores if action.to]
        for worker in action.to:
            self.send(worker, message, value, sum(nbytes for _, nbytes in sizes))
        for store, nbytes in sizes:
            self.counts.share(store, nbytes * sum(worker != self.name for worker in action.to))

    def _uncouple(self, action: protocol.Uncouple) -> None:
        self._in_turn(0.0, self.world.values.uncouple, self.name)

    def _forward(self, action: protocol.Forward) -> None:
        pop = self.payloads.pop
        given = [([pop(h) for h in handles], factor) for handles, factor in action.contributions]
        world, store = self.world, action.parts[0].store
        seconds = world.homes.seconds(len(given) * sum(world.sizes.parts[store]), self.number)
        self._in_turn(seconds, self._send_sum, action, given, self.shown[store][1])

    def _send_sum(
        self, action: protocol.Forward, given: Sequence[tuple[Sequence[Value], float]], parameters: Value
    ) -> None:
        """Send the home of a store the sum of a site. `parameters` are the newest of the store here."""
        world, first, sent = self.world, action.parts[0], 0
        stages = world.terms.stores[first.store].stages
        for to, message in zip(action.to, action.parts, strict=True):
            if isinstance(message, wire.Gossip):
                mine = [(values[message.part or 0], factor) for values, factor in given]
                self._send_to_leader(to, message, mine, action.share)
                continue
            terms = [(values[message.part], factor) for values, factor in given]
            value, nbytes = (
                world.values.weighted(message.store, message.part, terms, action.share) if given else None,
                0,
            )
            if value is not None:
                value, nbytes = world.filtered((message.replica, stages[message.part]), message, value, parameters)
            self.counts.push(message.store, message.part, nbytes, crosses=to != self.name, told=True)
            self.send(to, message, value, nbytes)
            sent += nbytes
        if isinstance(first, wire.Contribution):
            self.send(DRIVER, wire.Forwarded.of(first, sent))

    def _count_sum(self, action: protocol.CountSum) -> None:
        if self.world.values.computes:
            self._in_turn(0.0, self._settle_sum, action)

    def _settle_sum(self, action: protocol.CountSum) -> None:
        terms, settle = self.world.terms, self.world.values.settle
        for stage in dict.fromkeys(s for store in action.stores for s in terms.stores[store].stages):
            settle((action.leader, stage), action.clock, action.stores, action.counts)

    def _send_to_leader(
        self, to: str, message: wire.Gossip, given: Sequence[tuple[Value, float]], share: float | None
    ) -> None:
        """Send the leader of a site that decides alone the sum of gradients."""
        world, part = self.world, message.part or 0
        value = world.values.of_site(message, given, share)
        nbytes = world.sizes.whole[message.store][part] if given else 0
        if to != self.name:
            self.counts.crossing(message.store, nbytes)
        self.send(to, message, value, nbytes)

    def _pass_on(self, action: protocol.PassOn) -> None:
        message, value = action.message, self.shown[action.message.store][1] if action.value else None
        nbytes = self.world.sizes.stores[message.store] if action.value else 0
        self._send_to_readers(message, value, nbytes, action.to)

    def _seconds(self, store: int, nbytes: int) -> float:
        """How long an apply of so many bytes takes here. It is counted."""
        return self.counts.worked(store, self.world.homes.seconds(nbytes, self.number))

    def _in_turn(self, seconds: float, work: Callable[..., None], *args: Any) -> None:
        """Do work of a home that takes so long after all that was given before, as on the lane of its device."""
        clock = self.world.clock
        if not seconds and not self._turns:
            work(*args)
            return
        self._turns += 1
        self._free = max(self._free, clock.now) + seconds
        clock.at(self._free, self.number * KINDS + _TURN, self._turn, self._closed, work, args)

    def _turn(self, closed: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
        self._turns -= closed == self._closed
        if self.lives and closed == self._closed:
            work(*args)

    def _publish(self, action: protocol.Publish) -> None:
        self._in_turn(0.0, self._send_version, action)

    def _send_version(self, action: protocol.Publish) -> None:
        """Send a version to its readers. As at a real home, a newer one replaces what a reader has not been sent."""
        store, value, nbytes = action.store, None, 0
        message = wire.Published(
            **self.ids, cause=action.cause, store=store, version=action.version, floor=action.floor
        )
        if action.value:
            value, nbytes = self._version_of(store, action.version)
        self._send_to_readers(message, value, nbytes, action.to)

    def _send_to_readers(self, message: wire.Published, value: Value, nbytes: int, readers: Sequence[str]) -> None:
        world, store, sent = self.world, message.store, 0
        if not self._news:
            sent = world.publish(self.name, readers, message, value, nbytes)
            self.counts.publish(store, nbytes * (sent - (self.name in readers[:sent])))
        for reader in readers[sent:]:
            waiting = self._news.get((reader, store))
            if waiting is not None and waiting.begins > world.clock.now:
                waiting.message = message
                if value is not None:
                    waiting.value = value
                    self._send_whole(store, waiting)
                continue
            news = _News(message, value, nbytes)
            news.begins = world.send_news(self, reader, news, nbytes)
            if nbytes and reader != self.name:
                if news.begins > world.clock.now:
                    self._news = self._news or {}
                    self._news[reader, store] = news
                self.counts.publish(store, nbytes)

    def _version_of(self, store: int, version: int) -> tuple[Value, int]:
        """A version to publish, and its bytes. The first is whole, unless filters encode each by itself."""
        world = self.world
        value, exact = world.values.current(self.name, store, version)
        first = store not in self._published and not is_lossless(world.terms.stores[store].policy.pull_filters)
        self._published |= {store}
        usual = world.sizes.stores[store] if first else world.sizes.published[store]
        return value, usual if exact is None else exact

    def _send_whole(self, store: int, news: _News) -> None:
        """A reader gets a version instead of the one before it, and not a difference to that."""
        world = self.world
        if is_lossless(world.terms.stores[store].policy.pull_filters):
            return
        self.counts.publish(store, world.sizes.stores[store] - news.nbytes)
        news.nbytes = world.sizes.stores[store]
        world.values.forget(self.name, store)

    def _return(self, action: protocol.Return) -> None:
        self._in_turn(0.0, self._send_back, action)

    def _send_back(self, action: protocol.Return) -> None:
        world = self.world
        self._tell_traffic(action)
        message = wire.StoreValue(**self.ids, cause=action.cause, store=action.store, version=action.version)
        self.send(DRIVER, message, world.values.final(self.name, action.store) if action.value else None)

    def _leave(self, action: protocol.Leave) -> None:
        if action.of is not None:
            replica, stage = action.of
            message = wire.ModelState(**self.ids, cause=action.cause, replica=replica, stage=stage)
            self.send(DRIVER, message, self.world.values.model_state(action.of))
        self._in_turn(0.0, self._send_retired, action)

    def _send_retired(self, action: protocol.Leave) -> None:
        self._tell_traffic(action)
        self.send(DRIVER, action.message)

    def _tell_traffic(self, action: protocol.Leave | protocol.Return) -> None:
        rows, homes, kept = self.counts.rows(), self.counts.work(), added(map(self.world.values.kept, self.stages))
        told = wire.Traffic(**self.ids, cause=action.cause, worker=self.name, stores=rows, kept=kept, homes=homes)
        self.send(DRIVER, told)

    def _export(self, action: protocol.Export) -> None:
        self._in_turn(0.0, self._send_buffers, action)

    def _send_buffers(self, newly: protocol.Export | None = None) -> None:
        """Tell the driver what lives here between steps, once all has come that neighbours have sent."""
        self._asked = asked = newly or self._asked
        kept = [stage.kept() for stage in self.stages.values()]
        if asked is None or not all(one.rests for one in kept):
            return
        self._asked = None
        export(self, asked)

    def _restore(self, message: wire.Buffers, value: Value) -> None:
        if not message.owner:
            self._restoring = False
            return
        residents = Residents({resident.owner: resident for resident in residents_of(self)})
        residents.restore(message.owner, dict(zip(message.names, value or (), strict=True)))

    def _hand(self, action: protocol.Hand) -> None:
        value = None if action.handle is None else self.payloads.pop(action.handle)
        if isinstance(action.message, wire.Batch):
            self.batches.give(action.message.device, action.message.sequence, action.message.variant)
        elif isinstance(action.message, wire.ModelState):
            self._models |= {(action.message.replica, action.message.stage)}
        elif isinstance(action.message, wire.OwnState):
            self.states |= {action.message.store}
        elif isinstance(action.message, wire.Buffers):
            self._restore(action.message, value)
            return
        elif isinstance(action.message, wire.Gossip):
            told = action.message
            if told.part is not None and self.world.terms.stores[told.store].collective:
                self.world.collectives.push(self.name, told, told.store, told.part, told.weight, value)
                return
            self.lists = heard(told, value, self.told, self.lists, self.world.layout.positions)
            if self._asked is not None:
                self._send_buffers()
            return
        elif isinstance(action.message, wire.Copy):
            copy = action.message
            self.copying.take(copy, dict(zip(() if copy.same else copy.names, value or (), strict=True)))
            return
        self.world.values.hand(self.name, action.message, value)

    def _fail(self, action: protocol.Fail) -> None:
        self.world.fail(self, action.run, action.error)

    def _release(self, action: protocol.Release) -> None:
        self.payloads.pop(action.handle, None)

    _ACT: ClassVar[dict[type, Callable[[Node, Any], None]]] = {
        protocol.Open: _open,
        protocol.Close: _close,
        protocol.Send: _send,
        protocol.Start: _start,
        protocol.Abandon: _abandon,
        protocol.Count: _count,
        protocol.Wake: _wake,
        protocol.Show: _show,
        protocol.Load: _load,
        protocol.Apply: _apply,
        protocol.Couple: _couple,
        protocol.Uncouple: _uncouple,
        protocol.Forward: _forward,
        protocol.CountSum: _count_sum,
        protocol.PassOn: _pass_on,
        protocol.Publish: _publish,
        protocol.Return: _return,
        protocol.Leave: _leave,
        protocol.Export: _export,
        protocol.Hand: _hand,
        protocol.Fail: _fail,
        protocol.Release: _release,
    }
