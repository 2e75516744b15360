"""A worker's state machine in training decides what the worker does with each message, and what it sends then.

It owns the machines of one worker and all routing between them: a `Replica` for each stage that runs here, the `Home`
of the stores that live here, and the `Decision` if this worker leads. A message arrives as the event `Received`, and
`step` returns the list of resulting actions. The machine holds no arrays: a *handle* stands for a message's arrays.

    StartTraining   a run begins. Its early messages are processed now, in the order of arrival.
    StopTraining    the run ends. Later messages for it are dropped.
    Grant           work items, for the first stage of a replica.
    Begin           the first stage has begun a clock, for the other stages of the replica.
    Contribution    a part of a replica's contribution to a store, for the home here.
    Arrived         a contribution is complete, for the leader of its group: the first home of the group's first store.
                    The home here tells the leader here without a message.
    Commit          a group has decided a clock. Everyone gets it. The stages here get it before the
                    home here, as a replica must know that its step counts before it sees the version with the step.
    Published       a new version, for all stages here. A version that is not newer than the one read here comes from
                    another copy of the store, and is ignored.
    Applied         the version that contains a push of a replica here, for its stages.
    Retired         a stage pushes nothing more: for the home, the leader, and the other stages if it was the first.
    StoreValue      the first value of a store, for the home.
    Source, Batch, OwnState, Gossip, Collective   values for the executors, which get them unchanged.

The loss of a replica (`ReplicaLost`) is for the leader and the home here, which stop waiting for it.

Each event gets a number, and each action carries the number of the event that caused it. A message carries this number
too, so that its receiver knows which event of which worker caused its own. Events and actions are in `actions`.

What the caller must do:

1. Give one event at a time, messages from one worker in the order in which it sent them. Messages of different workers
   may come in any order, also before the StartTraining of their run.
2. Carry the actions out in the order of the list. Start, Abandon, Count, Show and Hand must take effect before an
   executor queries the machine again. All other actions may be done later; only the messages to one worker, and the
   actions on one store, must keep their order.
3. Answer each Start with one StepFinished, after everything that the step sends.
4. Keep the arrays of a handle until an action names it: Load, Show, Apply, Release or Hand. That happens once.
5. Ask the `stage` what it may read and when to give up, and send what `contribution` returns.
6. Give the time in seconds with each event; times never go back. Give a Tick at the time of each Wake.
7. On Fail tell the driver, which ends the run. The message that caused it has had no other effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypedDict

from flowml.plan import ArraySpec
from flowml_runtime import wire
from flowml_runtime.protocol.errors import EarlyLimitError, ProtocolError, ensure
from flowml_runtime.protocol.training import decision, home, replica
from flowml_runtime.protocol.training.accounts import Settle, joined
from flowml_runtime.protocol.training.actions import (
    Abandon,
    Action,
    Apply,
    Close,
    Count,
    Event,
    Fail,
    Hand,
    Load,
    Open,
    Publish,
    Received,
    Release,
    Return,
    Send,
    Show,
    Start,
    StepFinished,
    TellTraffic,
    Tick,
    Updated,
    Wake,
)
from flowml_runtime.protocol.training.items import batch
from flowml_runtime.protocol.training.portions import Portions
from flowml_runtime.protocol.training.terms import Committed, Places, ReplicaLost, Terms
from flowml_runtime.protocol.training.terms import Tick as TimeCame

MAX_EARLY = 4096
"""The most messages that are kept for runs that have not begun here. Peers can be ahead by only a few steps."""

MAX_EARLY_BYTES = 2**30
"""The most bytes of arrays in those messages. The largest are contributions to the stores that live here."""

_LIFE = 0
"""The incarnation in contributions. It is constant, because a replica lives as long as its run."""

At = tuple[int, int]
"""(replica, stage)"""

Stage = replica.Replica | Portions


class TrainingWorker:
    """The machine of one worker of one training plan. It runs many fits, one at a time."""

    def __init__(self, me: str, driver: str, rules: Terms, places: Places) -> None:
        """`rules` apply to every run, except for the number of clocks, which StartTraining gives."""
        self._me = me
        self._driver = driver
        self._rules = rules
        self._places = places
        self._fit: _Fit | None = None
        self._plan_id = ""
        self.newest = -1
        """The newest run that has begun, or was stopped before it began."""
        self._early = _Early(me, driver)
        self._lost: list[ReplicaLost] = []
        """Lost replicas. They stay lost: later runs do not wait for them either."""
        self.number = 0
        """The number of the newest event."""
        self._now = 0.0
        """The time of the newest event, in seconds."""

    def step(self, event: Event, now: float = 0.0) -> list[Action]:
        """Process one event at time `now`, in seconds.

        Returns Fail for an event that breaks the protocol, and for too many early messages.
        """
        self.number += 1
        self._now = now
        if isinstance(event, Received):
            return self._take(self.number, event)
        fit = self._fit
        if isinstance(event, ReplicaLost):
            self._lost.append(event)
        if fit is None or (not isinstance(event, ReplicaLost) and event.run != fit.run):
            return []
        try:
            at = fit.at(self.number, self._now)
            return at.lose(event) if isinstance(event, ReplicaLost) else at.handle(event)
        except ProtocolError as error:
            return [Fail(fit.run, error, self.number)]

    def stage(self, at: At) -> Stage:
        """The machine of a stage that runs here. Executors ask it what they may read and when to give up."""
        if self._fit is None:
            raise ProtocolError(f"stage {at[1]} of replica {at[0]} is asked for while no run is under way")
        return self._fit.stages[at]

    def contribution(
        self, start: Start, store: int, part: int, *, base_version: int, weight: int, specs: tuple[ArraySpec, ...] = ()
    ) -> Send:
        """The message with which the step of `start` sends its part of a store. The step has read `base_version`.

        A step may end after its run. Its message is then still one of that run, which every receiver drops.
        """
        member, clock = self._rules.place(start.replica, start.clock, start.item.sequence)
        message = wire.Contribution(
            plan_id=self._plan_id,
            run=start.run,
            cause=start.cause,
            store=store,
            part=part,
            replica=member,
            incarnation=_LIFE,
            clock=clock,
            copy=start.item.copy,
            base_version=base_version,
            weight=weight,
            specs=specs,
        )
        return Send(self._places.homes[store][:1], message)

    def validate(self) -> None:
        """Check the rules of all machines here, and that all kept messages are for later runs."""
        self._early.validate(self.newest)
        if self._fit is not None:
            self._fit.validate()

    def _take(self, number: int, event: Received) -> list[Action]:
        try:
            return self._receive(number, event)
        except ProtocolError as error:
            forgotten: list[Action] = [] if event.handle is None else [Release(event.handle, number)]
            return [Fail(event.message.run, error, number), *forgotten]

    def _receive(self, number: int, event: Received) -> list[Action]:
        message, fit = event.message, self._fit
        if event.peer == self._driver:
            if isinstance(message, wire.StartTraining):
                return self._begin(number, message)
            if isinstance(message, wire.StopTraining):
                return self._end(number, message)
        if fit is not None and message.run == fit.run:
            return fit.at(number, self._now).take(event)
        if message.run > self.newest:
            self._early.keep(number, event)
            return []
        return [] if event.handle is None else [Release(event.handle, number)]

    def _begin(self, number: int, start: wire.StartTraining) -> list[Action]:
        if start.run <= self.newest:
            return []
        closed = self._fit.at(number, self._now).close() if self._fit else []
        self.newest, self._plan_id = start.run, start.plan_id
        terms = self._rules.lasting(start.total_clocks)
        self._fit = fit = _Fit(self._me, self._driver, start, terms, self._places, self._now).at(number, self._now)
        begun = [*fit.begin(), *(a for event in self._lost for a in fit.lose(event))]
        return [*closed, Open(start, number), *begun, *self._retake()]

    def _end(self, number: int, stop: wire.StopTraining) -> list[Action]:
        self.newest = max(self.newest, stop.run)
        closed: list[Action] = []
        if self._fit is not None and stop.run >= self._fit.run:
            closed = self._fit.at(number, self._now).close()
            self._fit = None
        return [*closed, *self._retake()]

    def _retake(self) -> list[Action]:
        """Process the early messages again. Some belong to the run that has begun, and some to runs that never will."""
        return [action for number, event in self._early.take_all() for action in self._take(number, event)]


class _Early:
    """Messages for runs that have not begun here, in the order of arrival. Their number and bytes are bounded."""

    def __init__(self, me: str, driver: str) -> None:
        self._me = me
        self._driver = driver
        self._events: list[tuple[int, Received]] = []
        self._nbytes = 0

    def keep(self, number: int, event: Received) -> None:
        """Keep a message. Raises EarlyLimitError if there is no room, which ends the run. No message is dropped."""
        nbytes = self._nbytes + sum(spec.nbytes for spec in event.message.specs)
        if len(self._events) >= MAX_EARLY or nbytes > MAX_EARLY_BYTES:
            raise EarlyLimitError(
                f"{self._me} has been sent {len(self._events)} messages with {self._nbytes} bytes for a fit that has "
                f"not begun there, and {type(event.message).__name__} from {event.peer} is one too many (at most "
                f"{MAX_EARLY} messages and {MAX_EARLY_BYTES} bytes are kept); see whether {self._driver} or its "
                "connection is stuck, and start the fit again"
            )
        self._events.append((number, event))
        self._nbytes = nbytes

    def take_all(self) -> list[tuple[int, Received]]:
        events, self._events, self._nbytes = self._events, [], 0
        return events

    def validate(self, newest: int) -> None:
        ensure(len(self._events) <= MAX_EARLY, "more is kept for later runs than the limit")
        ensure(all(e.message.run > newest for _, e in self._events), f"a message is kept for run {newest} or before")


class _Ids(TypedDict):
    plan_id: str
    run: int
    cause: int


class _Fit:
    """One run on one worker: its machines, and the routing of messages to them."""

    def __init__(
        self, me: str, driver: str, start: wire.StartTraining, terms: Terms, places: Places, began: float
    ) -> None:
        self.run = start.run
        self.plan_id = start.plan_id
        ahead = batch(terms, fed=start.source == "fed")
        self.stages: dict[At, Stage] = {
            at: replica.Replica(terms, *at, ahead) if terms.speculation is None else Portions(terms, *at)
            for at in places.stages_on(me)
        }
        self._me = me
        self._driver = driver
        self._terms = terms
        self._places = places
        self._home = home.Home(terms, places.stores_on(me))
        self._leaders = tuple(places.homes[group.stores[0]][0] for group in terms.groups)
        """The leader of each group."""
        self._decisions = {
            group.number: decision.Decision(terms, group, began)
            for group in terms.groups
            if self._leaders[group.number] == me
        }
        """The decisions that this worker makes, by group."""
        self._now = began
        self._shown: dict[int, tuple[int, int]] = {}
        """(version, floor) of each store that is read here."""
        self._ids: _Ids = {"plan_id": start.plan_id, "run": start.run, "cause": 0}
        """The common fields of every message of this worker."""

    def at(self, cause: int, now: float) -> _Fit:
        """Note the number of the event that is processed, and its time."""
        self._ids["cause"] = cause
        self._now = now
        return self

    def begin(self) -> list[Action]:
        return [a for at in self.stages for a in self._at_stage(at, replica.Started())]

    def close(self) -> list[Action]:
        """End the run here, and drop everything that its home has gathered."""
        return [Close(self.run, self._cause), *(Release(handle, self._cause) for handle in self._home.handles())]

    def take(self, event: Received) -> list[Action]:
        route = self._ROUTES.get(type(event.message))
        if route is None:
            raise ProtocolError(f"a worker has no use for {type(event.message).__name__} during training")
        return route(self, event.message, event)

    def handle(self, event: StepFinished | Updated | Tick) -> list[Action]:
        if isinstance(event, Tick):
            return [*self._decide(self._decisions, TimeCame()), *self._at_stages(self.stages, TimeCame())]
        if isinstance(event, Updated):
            return self._at_home(home.Updated(event.store, event.replica, event.clock, event.applied))
        return self._at_stage((event.replica, event.stage), replica.StepFinished(event.clock))

    def lose(self, event: ReplicaLost) -> list[Action]:
        """Make the home and the leader here stop waiting for a lost replica."""
        return [*self._decide(self._decisions, event), *self._at_home(event)]

    def validate(self) -> None:
        for machine in (*self.stages.values(), self._home, *self._decisions.values()):
            machine.validate()

    @property
    def _cause(self) -> int:
        return self._ids["cause"]

    # The handlers of messages.

    def _granted(self, message: wire.Grant, _: Received) -> list[Action]:
        return self._at_stage((message.replica, 0), replica.Granted(message.items, message.exhausted))

    def _begun(self, message: wire.Begin, _: Received) -> list[Action]:
        event = replica.BeginReceived(message.clock, message.item, message.last)
        return self._at_stages(self._of(message.replica, following=True), event)

    def _contributed(self, message: wire.Contribution, event: Received) -> list[Action]:
        part = home.ContributionReceived(
            message.store,
            message.part,
            message.replica,
            message.incarnation,
            message.clock,
            message.base_version,
            message.weight,
            event.handle or 0,
            message.empty,
            message.copy,
        )
        return self._at_home(part)

    def _arrived(self, message: wire.Arrived, _: Received) -> list[Action]:
        group = self._terms.group_of.get(message.store)
        if group not in self._decisions:
            raise ProtocolError(f"{self._me} hears of an arrival at store {message.store}, on which it does not decide")
        event = decision.Arrived(message.store, message.replica, message.clock, message.weight, message.copy)
        return self._decide((group,), event)

    def _committed(self, message: wire.Commit, _: Received) -> list[Action]:
        if message.group >= len(self._terms.groups):
            raise ProtocolError(f"group {message.group} has a commit, but there are {len(self._terms.groups)} groups")
        event = Committed(
            message.clock, message.excluded, message.group, message.coefficients, message.folded, message.copies
        )
        return [*self._at_stages(self.stages, event), *self._at_home(event)]

    def _published(self, message: wire.Published, event: Received) -> list[Action]:
        store, news, handle = message.store, (message.version, message.floor), event.handle
        if self._terms.stores[store].collective and news <= self._shown.get(store, (-1, -1)):
            return [] if handle is None else [Release(handle, self._cause)]
        self._shown[store] = news
        shown: list[Action] = [] if handle is None else [Show(store, message.version, handle, self._cause)]
        return [*shown, *self._at_stages(self.stages, replica.StorePublished(store, *news))]

    def _applied(self, message: wire.Applied, _: Received) -> list[Action]:
        event = replica.Applied(message.store, message.clock, message.version)
        return self._at_stages(self._of(message.replica), event)

    def _retired(self, message: wire.Retired, _: Received) -> list[Action]:
        actions = self._at_home(home.StageRetired(message.replica, message.stage))
        if message.stage == 0:
            actions += self._decide(self._decisions, decision.ReplicaRetired(message.replica))
            actions += self._at_stages(self._of(message.replica, following=True), replica.LeaderRetired())
        return actions

    def _loaded(self, message: wire.StoreValue, event: Received) -> list[Action]:
        loaded = Load(message.store, event.handle or 0, self._cause)
        return [loaded, *self._at_home(home.StoreLoaded(message.store, message.version))]

    def _handed(self, message: wire.TrainingMessage, event: Received) -> list[Action]:
        return [Hand(event.peer, message, event.handle, self._cause)]

    _ROUTES: ClassVar[dict[type, Callable[[_Fit, Any, Received], list[Action]]]] = {
        wire.Grant: _granted,
        wire.Begin: _begun,
        wire.Contribution: _contributed,
        wire.Arrived: _arrived,
        wire.Commit: _committed,
        wire.Published: _published,
        wire.Applied: _applied,
        wire.Retired: _retired,
        wire.StoreValue: _loaded,
        **dict.fromkeys((wire.Source, wire.OwnState, wire.Gossip, wire.Batch, wire.Collective), _handed),
    }

    # The actions of the machines here, as actions of the worker.

    def _of(self, number: int, *, following: bool = False) -> list[At]:
        """The stages of a replica that run here, without the replica's first stage if `following`."""
        return [at for at in self.stages if at[0] == number and not (following and at[1] == 0)]

    def _at_stages(self, stages: Iterable[At], event: replica.Event | TimeCame) -> list[Action]:
        return [action for at in stages for action in self._at_stage(at, event)]

    def _at_stage(self, at: At, event: replica.Event | TimeCame) -> list[Action]:
        machine = self.stages.get(at)
        if machine is None:
            raise ProtocolError(f"{self._me} is told of stage {at[1]} of replica {at[0]}, which does not run here")
        actions, made = list[Action](), machine.step(event, self._now)
        settled = joined(made) if made else ()
        for action in made:
            match action:
                case Settle():
                    ids: dict[str, Any] = {**self._ids, "replica": at[0]}
                    told = (wire.Settled(**ids, fates=tuple(f), missing=m, left_out=n) for (m, n), f in settled)
                    actions += [Send((self._driver,), message) for message in told]
                    settled = ()  # the first tells them all
                case replica.Start(clock, item):
                    actions.append(Start(self.run, *at, clock, item, self._cause))
                case replica.Ask(clocks, returned, copy):
                    ask = wire.Ask(**self._ids, replica=at[0], clocks=clocks, returned=returned, copy=copy)
                    actions.append(Send((self._driver,), ask))
                case replica.Begin(clock, item, last):
                    others = tuple(dict.fromkeys(self._places.stages[at[0]][1:]))
                    if others:
                        begin = wire.Begin(**self._ids, replica=at[0], clock=clock, item=item, last=last)
                        actions.append(Send(others, begin))
                case replica.Abandon(clock):
                    actions.append(Abandon(*at, clock, self._cause))
                case replica.Count(clock, counts, stores):
                    actions.append(Count(*at, clock, counts, stores, self._cause))
                case decision.Wake(when):
                    actions.append(Wake(self.run, when, self._cause))
                case replica.Retire():
                    actions += self._retire(at)
        return actions

    def _retire(self, at: At) -> list[Action]:
        """Tell all that wait for this stage. The driver gets the traffic first, because Retired may end the run."""
        stores = zip(self._terms.stores, self._places.homes, strict=True)
        told = [homes[0] for store, homes in stores if not store.clocked and at[1] in store.stages]
        if at[1] == 0:
            told += [*self._places.stages[at[0]][1:], *self._leaders]
        message = wire.Retired(**self._ids, replica=at[0], stage=at[1])
        others: list[Action] = [Send(tuple(dict.fromkeys(told)), message)] if told else []
        return [*others, TellTraffic(self._cause), Send((self._driver,), message)]

    def _decide(self, groups: Iterable[int], event: decision.Event) -> list[Action]:
        """Process an event in the decisions of these groups, which are made here."""
        actions: list[Action] = []
        for group in groups:
            for made in self._decisions[group].step(event, self._now):
                match made:
                    case decision.Wake(at):
                        actions.append(Wake(self.run, at, self._cause))
                    case Committed(clock, excluded, _, coefficients, folded, copies, waits):
                        rest: dict[str, Any] = {"coefficients": coefficients, "folded": folded, "waits": waits}
                        what: dict[str, Any] = {"clock": clock, "excluded": excluded, "group": group, "copies": copies}
                        commit = wire.Commit(**self._ids, **what, **rest)
                        actions.append(Send((*self._places.workers, self._driver), commit))
        return actions

    def _at_home(self, event: home.Event) -> list[Action]:
        cause, ids, places = self._cause, self._ids, self._places
        actions: list[Action] = []
        for action in self._home.step(event):
            match action:
                case home.SendArrived(store, who, clock, weight, copy):
                    group = self._terms.group_of[store]
                    if group in self._decisions:
                        actions += self._decide((group,), decision.Arrived(store, who, clock, weight, copy))
                        continue
                    arrived = wire.Arrived(**ids, store=store, replica=who, clock=clock, weight=weight, copy=copy)
                    actions.append(Send((self._leaders[group],), arrived))
                case home.SendApplied(store, who, clock, version):
                    message = wire.Applied(**ids, store=store, replica=who, clock=clock, version=version)
                    actions.append(Send(tuple(dict.fromkeys(places.stages[who])), message))
                case home.Apply(store, version, contributions, staleness):
                    actions.append(Apply(store, version, contributions, cause, staleness))
                case home.Publish(store, version, floor, value):
                    actions.append(Publish(store, version, floor, value, places.readers[store][self._me], cause))
                case home.Release(handle):
                    actions.append(Release(handle, cause))
                case home.Finished(store):
                    self._home.staleness.finish(store)
                    first = places.homes[store][0] == self._me
                    actions.append(Return(store, self._home.version(store), first, cause))
        if stale := self._home.staleness.take():
            actions.insert(0, Send((self._driver,), wire.Staleness(**ids, stores=stale)))
        return actions
