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
    Computed        a replica has computed some microbatches, for the worker that counts them (`pace`): the first home.
    Halt            the replicas have computed enough microbatches of a clock, for all stages here.
    Published       a new version, for all stages here. A version that is not newer than the one read here comes from
                    another copy of the store, and is ignored.
    Applied         the version that contains a push of a replica here, for its stages.
    Retired         a stage pushes nothing more: for the home, the leader, and the other stages if it was the first.
    StoreValue      the first value of a store, for the home.
    Source, Batch, OwnState, ModelState, Gossip, Collective   values for the executors, which get them unchanged.

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

from flowml.plan import ArraySpec
from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.actions import (
    Action,
    Computed,
    Event,
    Fail,
    Open,
    Received,
    Release,
    Send,
    Start,
    StepFinished,
    Tick,
    Updated,
)
from flowml_runtime.protocol.training.early import EarlyMessages
from flowml_runtime.protocol.training.fit import At, Fit, Stage
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.terms import ReplicaLost, Terms

_LIFE = 0
"""The incarnation in contributions. It is constant, because a replica lives as long as its run."""


class TrainingWorker:
    """The machine of one worker of one training plan. It runs many fits, one at a time."""

    def __init__(self, me: str, driver: str, rules: Terms, places: Places) -> None:
        """`rules` apply to every run, except for the number of clocks, which StartTraining gives."""
        self._me = me
        self._driver = driver
        self._rules = rules
        self._places = places
        self._fit: Fit | None = None
        self._plan_id = ""
        self.newest = -1
        """The newest run that has begun, or was stopped before it began."""
        self._early = EarlyMessages(me, driver)
        self._lost = [ReplicaLost(replica) for replica in places.lost]
        """Lost replicas. They stay lost: later runs do not wait for them either."""
        self.number = 0
        """The number of the newest event."""
        self._now = 0.0
        """The time of the newest event, in seconds."""

    def step(self, event: Event, now: float = 0.0) -> list[Action]:
        """Process one event at time `now`, in seconds.

        Returns Fail for an event that breaks the protocol, and for too many early messages.
        """
        self.number = number = self.number + 1
        self._now = now
        actions = self._take(number, event) if type(event) is Received else self._handle(number, event)
        fit = self._fit
        if fit is not None and fit.asked is not None:
            actions = [*actions, *fit.at(number, now).export()]
        return actions

    def _handle(self, number: int, event: StepFinished | Updated | Computed | ReplicaLost | Tick) -> list[Action]:
        fit = self._fit
        run = -1 if fit is None else fit.run
        try:
            if type(event) is not StepFinished and isinstance(
                event, ReplicaLost
            ):  # isinstance is slow where it is False
                self._lost.append(event)
                return [] if fit is None else fit.at(number, self._now).lose(event)
            return [] if fit is None or event.run != run else fit.at(number, self._now).handle(event)
        except ProtocolError as error:
            return [Fail(run, error, number)]

    def stage(self, at: At) -> Stage:
        """The machine of a stage that runs here. Executors ask it what they may read and when to give up."""
        if self._fit is None:
            raise ProtocolError(f"stage {at[1]} of replica {at[0]} is asked for while no run is under way")
        return self._fit.stages[at]

    @property
    def held(self) -> int:
        """The number of the newest Hold for all replicas of the run under way. A snapshot of an earlier one is over."""
        return 0 if self._fit is None else self._fit.held

    def contribution(
        self,
        start: Start,
        store: int,
        part: int,
        *,
        base_version: int,
        weight: int,
        specs: tuple[ArraySpec, ...] = (),
        inside: bool = False,
    ) -> Send:
        """The message with which the step of `start` sends its part of a store. The step has read `base_version`.
        `inside`: it is for the sum of its site, if that decides alone.

        A step may end after its run. Its message is then still one of that run, which every receiver drops.
        """
        member, clock = start.replica, start.clock
        if self._rules.speculation is not None:
            member, clock = self._rules.place(member, clock, start.item.sequence)
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
            of_site=self._rules.stores[store].sites_decide and not inside,
        )
        tree = self._rules.stores[store].tree
        if tree and (adder := tree.adder_of(member, summed=False)) is not None:
            return Send(self._places.stages[adder][:1], message)
        if self._rules.stores[store].relayed and not message.of_site:
            return Send((self._places.relay(self._rules.site_of(store, start.replica)),), message)
        return Send(self._places.homes[store][:1], message)

    def validate(self) -> None:
        """Check the rules of all machines here, and that all kept messages are for later runs."""
        self._early.validate(self.newest)
        if self._fit is not None:
            self._fit.validate()

    def _take(self, number: int, event: Received) -> list[Action]:
        message, fit = event.message, self._fit
        try:
            if fit is not None and message.run == fit.run:
                route = fit.ROUTES.get(type(message))
                if route is not None:
                    fit.cause, fit.now = number, self._now
                    return route(fit, message, event)
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
            raise ProtocolError(f"a worker has no use for {type(message).__name__} during training")
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
        self._fit = fit = Fit(self._me, self._driver, start, terms, self._places, self._now).at(number, self._now)
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
