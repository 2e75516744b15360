"""One run on one worker: its machines, and the routing of events and messages to them.

`worker` says what each message is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypedDict

import msgspec

from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training import branch, decision, forwarding, home, pace, replica, resting, site, stage
from flowml_runtime.protocol.training.accounts import NO_ENTRIES, Settle, joined
from flowml_runtime.protocol.training.actions import (
    Abandon,
    Action,
    Apply,
    Close,
    Computed,
    Count,
    Hand,
    Leave,
    Load,
    PassOn,
    Publish,
    Received,
    Release,
    Return,
    Send,
    Show,
    Start,
    StepFinished,
    Tick,
    Updated,
    Wake,
)
from flowml_runtime.protocol.training.couple import couple, shared
from flowml_runtime.protocol.training.items import NO_HOLD, batch
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.portions import Portions
from flowml_runtime.protocol.training.terms import Committed, Group, ReplicaLost, Terms
from flowml_runtime.protocol.training.terms import Tick as TimeCame

At = tuple[int, int]
"""(replica, stage)"""

Stage = resting.Stage


class _Ids(TypedDict):
    plan_id: str
    run: int
    cause: int


class Fit:
    """One run on one worker: its machines, and the routing of messages to them."""

    def __init__(
        self, me: str, driver: str, start: wire.StartTraining, terms: Terms, places: Places, began: float
    ) -> None:
        self.run = start.run
        self.plan_id = start.plan_id
        ahead = batch(terms, fed=start.source == "fed")
        stopped = start.stopped or wire.Stopped((0,), (), ())
        states, first = {(s.replica, s.stage): s for s in stopped.stages}, max(stopped.clocks)
        self.stages: dict[At, Stage] = {
            at: replica.Replica(terms, *at, ahead, states.get(at))
            if terms.speculation is None
            else Portions(terms, *at, first)
            for at in places.stages_on(me)
        }
        self._me = me
        self._driver = (driver,)
        self._terms = terms
        self._places = places
        self._stores = places.stores_on(me)
        self._home = home.Home(terms, self._stores, stopped)
        self._leaders = tuple(places.homes[group.stores[0]][0] for group in terms.groups)
        """The leader of each group."""
        late = {(w.store, w.replica, w.clock) for w in stopped.waiting if w.of_site == terms.stores[w.store].relayed}
        decisions = {
            group.number: decision.Decision(
                terms, group, began, first, {(r, c) for s, r, c in late if s in group.stores}
            )
            for group in terms.groups
            if self._leaders[group.number] == me and not group.final
        }
        self._decisions: Mapping[int, decision.Decision] = decisions or NO_ENTRIES
        """The decisions that this worker makes, by group."""
        paced = terms.paced if places.homes[0][0] == me else None
        self._pace = pace.Pace(terms, paced) if paced else None
        """Counts the microbatches of all replicas, if this worker does."""
        self._relayed = tuple(number for number in self._decisions if terms.groups[number].relayed)
        """Those about sites that decide for themselves."""
        sites = {
            (group.number, number): site.Site(terms, group, number, began, start.stopped)
            for group in terms.groups
            if group.relayed
            for number in (places.led_by(me, group.stores[0]))
        }
        self._sites: Mapping[tuple[int, int], site.Site] = sites or NO_ENTRIES
        """The sites that this worker leads, by group and number."""
        self._branches = branch.branches(me, terms, places, began, first)
        self._sums = forwarding.Forwarding(terms, places, self._driver)
        self.now = began
        self.cause = 0
        """The number of the event that is processed. `now` is its time."""
        self._alone = next(iter(self.stages)) if len(self.stages) == 1 else None
        """The only stage here, as on most workers."""
        self._shown = [(-1, -1)] * len(terms.stores)
        """(version, floor) of each store, as read here."""
        self._hold, self._exported, self.held = start.hold, -1, 0
        """The numbers of the newest Export and of the newest Hold for all replicas."""
        self.asked: wire.Export | None = None
        """What the driver has asked for, until everything is applied."""

    def at(self, cause: int, now: float) -> Fit:
        """Note the number of the event that is processed, and its time."""
        self.cause, self.now = cause, now
        return self

    def begin(self) -> list[Action]:
        held = [] if self._hold == NO_HOLD else self._at_stages(self._leading, stage.Hold(self._hold))
        return [*held, *(a for at in self.stages for a in self._at_stage(at, stage.Started())), *self._tick()]

    def _tick(self) -> list[Action]:
        """Decide what time alone decides. When a run begins, this asks for the time of the first clock's limit."""
        decided = self._decide(self._decisions, TimeCame())
        return decided + [a for at in self._sites for a in self._at_site(at, TimeCame())]

    def close(self) -> list[Action]:
        """End the run here, and drop everything that its home has gathered."""
        adding: tuple[site.Site | branch.Branch, ...] = (*self._sites.values(), *self._branches.values())
        gathered = [*self._home.handles(), *(h for machine in adding for h in machine.handles())]
        return [Close(self.run, self.cause), *(Release(handle, self.cause) for handle in gathered)]

    def handle(self, event: StepFinished | Updated | Computed | Tick) -> list[Action]:
        if type(event) is StepFinished:
            return self._at_stage((event.replica, event.stage), stage.StepFinished(event.clock))
        if isinstance(event, Tick):
            return [*self._tick(), *self._at_stages(self.stages, TimeCame())]
        if isinstance(event, Updated):
            return self._at_home(home.Updated(event.store, event.replica, event.clock, event.applied))
        return self._tell_computed((event.replica, event.stage))

    def lose(self, event: ReplicaLost) -> list[Action]:
        """Make the home and the leaders here stop waiting for a lost replica."""
        portions = self._at_stages([at for at, made in self.stages.items() if isinstance(made, Portions)], event)
        return [*self._leave(event), *self._at_home(event), *self._at_pace(event), *portions]

    def export(self) -> list[Action]:
        """Tell the driver what lives here between steps, once everything is applied that replicas have sent."""
        asked = self.asked
        if asked is None or asked.number < self.held or not self._rests(asked):
            return []
        self.asked = None
        flushed = self._at_home(home.Flush()) if asked.last else []
        mine = [s for s in self._stores if self._places.homes[s][0] == self._me]
        sites = self._sites.values()
        return [*flushed, resting.export(self.stages.values(), self._home, mine, sites, asked, self.cause)]

    def _rests(self, asked: wire.Export) -> bool:
        readers = enumerate(self._places.readers)
        read = [number for number, told in readers if any(self._me in names for names in told.values())]
        machines = self.stages, self._sites.values(), self._home
        return resting.knows_all(self._terms, read, self._shown, asked) and resting.all_rest(*machines, asked)

    def validate(self) -> None:
        paced = () if self._pace is None else (self._pace,)
        adding: tuple[site.Site | branch.Branch, ...] = (*self._sites.values(), *self._branches.values())
        for machine in (*self.stages.values(), self._home, *self._decisions.values(), *adding, *paced):
            machine.validate()

    @property
    def _ids(self) -> _Ids:
        """The common fields of every message of this worker."""
        return {"plan_id": self.plan_id, "run": self.run, "cause": self.cause}

    def _granted(self, message: wire.Grant, _: Received) -> list[Action]:
        return self._at_stage((message.replica, 0), stage.Granted(message.items, message.exhausted))

    def _begun(self, message: wire.Begin, _: Received) -> list[Action]:
        event = stage.BeginReceived(message.clock, message.item, message.last)
        return self._at_stages(self._of(message.replica, following=True), event)

    def _contributed(self, message: wire.Contribution, event: Received) -> list[Action]:
        m, handle = message, event.handle or 0
        part = home.ContributionReceived(
            m.store,
            m.part,
            m.replica,
            m.incarnation,
            m.clock,
            m.base_version,
            m.weight,
            handle,
            m.empty,
            m.copy,
            m.terms,
        )
        tree = self._terms.stores[part.store].tree
        if tree and (adder := tree.adder_of(m.replica, summed=m.of_site)) is not None:
            return self._at_branch((self._terms.group_of[part.store], adder), part)
        if self._terms.stores[part.store].relayed and not message.of_site:
            group = self._terms.site_groups[part.store]
            return self._at_site((group, self._terms.site_numbers[part.store][part.replica]), part)
        return self._at_home(part)

    def _arrived(self, message: wire.Arrived, _: Received) -> list[Action]:
        group = self._terms.group_of.get(message.store)
        if group is None or group not in self._decisions:
            raise ProtocolError(f"{self._me} hears of an arrival at store {message.store}, on which it does not decide")
        told = message.store, message.replica, message.clock, message.weight, message.copy, message.terms
        return self._decide((group,), decision.Arrived(*told))

    def _committed(self, message: wire.Commit, _: Received) -> list[Action]:
        if message.group >= len(self._terms.groups):
            raise ProtocolError(f"group {message.group} has a commit, but there are {len(self._terms.groups)} groups")
        event = Committed(
            message.clock, message.excluded, message.group, message.coefficients, message.folded, message.copies
        )
        group = self._terms.groups[message.group]
        if message.site is not None:
            numbers = self._terms.site_numbers[group.stores[0]]
            return self._at_stages([at for at in self.stages if numbers[at[0]] == message.site], event)
        if group.relayed:
            told = [action for at in self._sites if at[0] == group.number for action in self._at_site(at, event)]
            return [*told, *self._at_home(event)]
        actions = self._at_stages(self.stages, event)
        above = (at for at in self._sites if self._terms.groups[at[0]].above == group.number)
        actions += (action for at in above for action in self._at_site(at, event))
        actions += (a for at in self._branches if at[0] == message.group for a in self._at_branch(at, event))
        return actions + self._at_home(event) if self._stores else actions

    def _computed(self, message: wire.Computed, _: Received) -> list[Action]:
        if self._pace is None:
            raise ProtocolError(
                f"{self._me} hears of microbatches of replica {message.replica}, which it does not count"
            )
        return self._at_pace(pace.Computed(message.replica, message.clock, message.microbatches))

    def _halted(self, message: wire.Halt, _: Received) -> list[Action]:
        for machine in self.stages.values():
            machine.cut.halt(message.clock)
        return []

    def _published(self, message: wire.Published, event: Received) -> list[Action]:
        store, news, handle = message.store, (message.version, message.floor), event.handle
        terms = self._terms.stores[store]
        if (terms.collective or terms.relayed) and news <= self._shown[store]:
            return [] if handle is None else [Release(handle, self.cause)]
        self._shown[store] = news
        actions = self._at_stages(self.stages, stage.StorePublished(store, message.version, message.floor))
        others = self._places.others(self._me, store) if terms.relayed else ()
        if others:
            actions = [PassOn(others, msgspec.structs.replace(message, cause=self.cause), handle is not None), *actions]
        shown = () if handle is None else (Show(store, message.version, handle, self.cause, message.base),)
        return [*shown, *actions]

    def _applied(self, message: wire.Applied, _: Received) -> list[Action]:
        return self._at_stages(self._of(message.replica), stage.Applied(message.store, message.clock, message.version))

    def _shared(self, message: wire.Shared, event: Received) -> list[Action]:
        return self._at_home(shared(message, event.handle))

    def _retired(self, message: wire.Retired, _: Received) -> list[Action]:
        if message.of_site:
            return self._decide(self._relayed, decision.ReplicaRetired(message.replica))
        actions = self._at_home(home.StageRetired(message.replica, message.stage))
        if message.stage == 0:
            actions += self._leave(decision.ReplicaRetired(message.replica))
            actions += self._at_stages(self._of(message.replica, following=True), stage.LeaderRetired())
        return actions

    def _loaded(self, message: wire.StoreValue, event: Received) -> list[Action]:
        loaded = Load(message.store, event.handle or 0, self.cause)
        return [loaded, *self._at_home(home.StoreLoaded(message.store, message.version))]

    @property
    def _leading(self) -> list[At]:
        return [at for at in self.stages if at[1] == 0]

    def _held(self, message: wire.Hold, _: Received) -> list[Action]:
        meant = [at for at in self._leading if message.replica in (None, at[0])]
        if message.replica is None:
            self.held = max(self.held, message.number)
        return self._at_stages(meant, stage.Hold(message.clock, message.number, message.within))

    def _leave_out(self, message: wire.LeaveOut, _: Received) -> list[Action]:
        """Say what the home here has of a lost replica. From then on it takes nothing more from it."""
        if message.replica in self._places.lost:
            return []
        self._places, reached = self._places.without((message.replica,)), self._home.reached(message.replica)
        answer = wire.LeftOut(**self._ids, replica=message.replica, stores=reached)
        return [*self.lose(ReplicaLost(message.replica)), *([Send(self._driver, answer)] if reached else [])]

    def _export(self, message: wire.Export, _: Received) -> list[Action]:
        if message.number > self._exported:
            self.asked, self._exported = message, message.number
        return []

    def _handed(self, message: wire.TrainingMessage, event: Received) -> list[Action]:
        return [Hand(event.peer, message, event.handle, self.cause)]

    ROUTES: ClassVar[dict[type, Callable[[Fit, Any, Received], list[Action]]]] = {
        wire.Grant: _granted,
        wire.Begin: _begun,
        wire.Contribution: _contributed,
        wire.Arrived: _arrived,
        wire.Commit: _committed,
        wire.Computed: _computed,
        wire.Halt: _halted,
        wire.Published: _published,
        wire.Applied: _applied,
        wire.Shared: _shared,
        wire.Retired: _retired,
        wire.StoreValue: _loaded,
        wire.Hold: _held,
        wire.Export: _export,
        wire.LeaveOut: _leave_out,
        **dict.fromkeys((wire.Source, wire.OwnState, wire.ModelState, wire.Gossip, wire.Batch), _handed),
        **dict.fromkeys((wire.Collective, wire.Buffers, wire.Copy), _handed),
    }

    # The actions of the machines here, as actions of the worker.

    def _of(self, number: int, *, following: bool = False) -> list[At]:
        """The stages of a replica that run here, without the replica's first stage if `following`."""
        return [at for at in self.stages if at[0] == number and not (following and at[1] == 0)]

    def _at_stages(self, stages: Iterable[At], event: stage.Event | TimeCame) -> list[Action]:
        if self._alone is not None and stages is self.stages:
            return self._at_stage(self._alone, event)
        return [action for at in stages for action in self._at_stage(at, event)]

    def _at_stage(self, at: At, event: stage.Event | TimeCame) -> list[Action]:
        machine = self.stages.get(at)
        if machine is None:
            raise ProtocolError(f"{self._me} is told of stage {at[1]} of replica {at[0]}, which does not run here")
        made = machine.step(event, self.now)
        if not made:
            return []
        actions, settled = list[Action](), False
        for action in made:
            kind = type(action)  # not `match`, which is slow here, where every step passes
            if kind is Settle:
                if not settled:
                    self._settle(at, made, actions)
                settled = True  # the first tells them all
            else:
                self._WANTED[kind](self, at, action, actions)
        return actions

    def _settle(self, at: At, made: Sequence[stage.Action | decision.Wake], actions: list[Action]) -> None:
        for (missing, left_out, late), fates in joined(made):
            about: dict[str, Any] = {"missing": missing, "left_out": left_out, "late": late, "fates": tuple(fates)}
            actions.append(Send(self._driver, wire.Settled(**self._ids, replica=at[0], **about)))

    def _start(self, at: At, start: stage.Start, actions: list[Action]) -> None:
        actions.append(Start(self.run, at[0], at[1], start.clock, start.item, self.cause))

    def _ask(self, at: At, ask: stage.Ask, actions: list[Action]) -> None:
        told = wire.Ask(**self._ids, replica=at[0], clocks=ask.clocks, returned=ask.returned, copy=ask.copy)
        actions.append(Send(self._driver, told))

    def _pause(self, at: At, paused: stage.Paused, actions: list[Action]) -> None:
        actions.append(Send(self._driver, wire.Paused(**self._ids, replica=at[0], **msgspec.structs.asdict(paused))))

    def _begin(self, at: At, begin: stage.Begin, actions: list[Action]) -> None:
        others = self._places.stages[at[0]][1:]
        if others:
            told = wire.Begin(**self._ids, replica=at[0], clock=begin.clock, item=begin.item, last=begin.last)
            actions.append(Send(tuple(dict.fromkeys(others)), told))

    def _abandon(self, at: At, abandon: stage.Abandon, actions: list[Action]) -> None:
        actions.append(Abandon(*at, abandon.clock, self.cause))

    def _count(self, at: At, count: stage.Count, actions: list[Action]) -> None:
        actions.append(Count(*at, count.clock, count.counts, count.stores, self.cause))

    def _wake(self, at: At, wake: decision.Wake, actions: list[Action]) -> None:
        actions.append(Wake(self.run, wake.at, self.cause))

    def _retire(self, at: At, _: stage.Retire, actions: list[Action]) -> None:
        """Tell all that wait for this stage. The driver gets all else first, because Retired may end the run."""
        stores = zip(self._terms.stores, self._places.homes, strict=True)
        told = [homes[0] for store, homes in stores if not store.clocked and at[1] in store.stages]
        if at[1] == 0:
            told += [*self._places.stages[at[0]][1:], *(self._leader_of(g, at[0]) for g in self._terms.groups)]
        message = wire.Retired(**self._ids, replica=at[0], stage=at[1])
        actions += [Send(tuple(dict.fromkeys(told)), message)] if told else []
        actions.append(Leave(self._driver, message, self.cause, at if at[1] in self._terms.stateful else None))

    _WANTED: ClassVar[dict[type, Callable[[Fit, At, Any, list[Action]], None]]] = {
        stage.Start: _start,
        stage.Ask: _ask,
        stage.Begin: _begin,
        stage.Paused: _pause,
        stage.Abandon: _abandon,
        stage.Count: _count,
        stage.Retire: _retire,
        decision.Wake: _wake,
    }

    def _decide(self, groups: Iterable[int], event: decision.Event) -> list[Action]:
        """Process an event in the decisions of these groups, which are made here."""
        actions: list[Action] = []
        for group in groups:
            for made in self._decisions[group].step(event, self.now):
                match made:
                    case decision.Wake(at):
                        actions.append(Wake(self.run, at, self.cause))
                    case Committed():
                        rest: dict[str, Any] = {"coefficients": made.coefficients, "waits": made.waits}
                        what: dict[str, Any] = {"clock": made.clock, "excluded": made.excluded, "folded": made.folded}
                        commit = wire.Commit(**self._ids, **what, **rest, group=group, copies=made.copies)
                        told = self._places.told_commits(self._terms.groups[group])
                        actions.append(Send((*told, *self._driver), commit))
        return actions

    def _tell_computed(self, at: At) -> list[Action]:
        """Tell how many microbatches the running step of a stage has computed."""
        event = pace.Computed(at[0], (cut := self.stages[at].cut).clock, cut.told())
        if self._pace is not None:
            return self._at_pace(event)
        count: dict[str, Any] = {"replica": event.replica, "clock": event.clock, "microbatches": event.microbatches}
        return [Send(self._places.homes[0][:1], wire.Computed(**self._ids, **count))]

    def _at_pace(self, event: pace.Computed | ReplicaLost) -> list[Action]:
        """Count microbatches, if this worker does, and tell those that still compute when there are enough."""
        found: list[Action] = []
        for halt in self._pace.step(event) if self._pace else ():
            late = dict.fromkeys(self._places.stages[r][self._terms.cuts_at] for r in halt.replicas)
            found.append(Send(tuple(late), wire.Halt(**self._ids, clock=halt.clock)))
        return found

    def _leader_of(self, group: Group, replica: int) -> str:
        """The worker that decides about the work of a replica."""
        if group.relayed:
            return self._places.relay(self._terms.site_of(group.stores[0], replica))
        return self._leaders[group.number]

    def _leave(self, event: decision.ReplicaRetired | ReplicaLost) -> list[Action]:
        """A replica is retired or lost: tell those that decide about its work here."""
        actions = self._decide([g for g in self._decisions if g not in self._relayed], event)
        return [*actions, *(action for at in self._sites for action in self._at_site(at, event))]

    def _at_site(self, at: tuple[int, int], event: site.Event) -> list[Action]:
        machine = self._sites.get(at)
        if machine is None:
            raise ProtocolError(f"{self._me} hears of site {at[1]}, which it does not lead")
        leader = self._leaders[at[0]]
        return self._sums.of_site(at, machine, machine.step(event, self.now), leader, self._ids)

    def _at_branch(self, at: tuple[int, int], event: branch.Event) -> list[Action]:
        """A parent in a tree has something to add up, or has not any more."""
        machine = self._branches.get(at)
        if machine is None:
            raise ProtocolError(f"{self._me} hears of what replica {at[1]} adds up, whose first stage is not here")
        return self._sums.of_branch(machine, machine.step(event, self.now), self._ids)

    def _at_home(self, event: home.Event) -> list[Action]:
        cause, places = self.cause, self._places
        actions: list[Action] = []
        for action in self._home.step(event):
            match action:
                case home.SendArrived():
                    actions += self._arrive(action)
                case home.SendApplied(store, who, clock, version):
                    message = wire.Applied(**self._ids, store=store, replica=who, clock=clock, version=version)
                    actions.append(Send(tuple(dict.fromkeys(places.stages[who])), message))
                case home.Apply(store, version, contributions, staleness, full, decays):
                    actions.append(Apply(store, version, contributions, cause, staleness, full, decays))
                case home.Couple() | home.Forgo():
                    actions += couple(action, places.partners[action.coupling][self._me], **self._ids)
                case home.Publish(store, version, floor, value, who):
                    actions.append(Publish(store, version, floor, value, places.told(store, self._me, who), cause))
                case home.Release(handle):
                    actions.append(Release(handle, cause))
                case home.Finished(store):
                    self._home.staleness.finish(store)
                    first = places.homes[store][0] == self._me
                    actions.append(Return(store, self._home.version(store), first, cause))
        if stale := self._home.staleness.take():
            actions.insert(0, Send(self._driver, wire.Staleness(**self._ids, stores=stale)))
        return actions

    def _arrive(self, arrival: home.SendArrived) -> list[Action]:
        """A contribution is complete: tell its leader, which may be here."""
        group = self._terms.group_of[arrival.store]
        a = arrival
        if group in self._decisions:
            event = decision.Arrived(a.store, a.replica, a.clock, a.weight, a.copy, a.terms)
            return self._decide((group,), event)
        about: dict[str, Any] = {"store": a.store, "replica": a.replica, "clock": a.clock, "weight": a.weight}
        return [Send((self._leaders[group],), wire.Arrived(**self._ids, **about, copy=a.copy, terms=a.terms))]
