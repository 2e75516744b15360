"""A replica's state machine, one per stage, decides which clock to run, what it may read, and when to give up a step.

The first stage leads: it gets work items, begins clocks, tells the other stages, and reports the fate of each item to
the ledger. The others follow its Begins in order. All stages get every Commit, so that each one can determine the fate
of a step, with the same result. `stage.STEPS` is the life of one step as a table. Its rules are:

* A group of stores has a decision at each clock at which it is due (see `decision`). A step that no group includes,
  and that counts for no store anyway (see `Terms.counts_anyway`), is dropped. Every other step is used, if only for a
  part of the stores.
* A step that is dropped while it runs is abandoned at the next task boundary. A Commit may overtake the
  Begin of its clock; that step then never starts.
* After a step the leader continues with the next clock, but skips clocks that every group due there has decided, unless
  some store needs each replica there (see `Terms.may_skip` and `never_skipped`). It returns the items of clocks that
  it skips. It asks for items before it needs them (`items`).
* Fates take effect in the order of clocks. A step that pushes the gradients of several steps starts only when
  the fate of all earlier ones is known, so that every stage pushes the same steps. If such a push is late,
  only its own clock's gradient is dropped; the gradients gathered before go with the next push (see `accumulator`).
  If the group folds late contributions in, the late push goes as it is.
* An item is settled when the fate of its gradients in every group is known; `Account` says how. A replica that asks for
  several items at once tells their fates when it asks, or when it retires.
* A replica reads its own writes in stores that apply on arrival (Ho et al., stale synchronous parallel): it waits for
  the version that holds its last push. So a single replica is serial, and a slow home slows its replicas down instead
  of accumulating their pushes.
* A replica without more work retires, stage by stage, each after its last push and the end of its last sums.

What the caller must do:

1. Carry the actions out in the order of the list. A StepFinished must follow each Start.
2. Ask `takes` before a step uses a store. If it does, ask `may_read` before that and again after each event, and tell
   with `took` that it has. If not, give it the version that was taken last. Ask `should_abandon` between tasks, and
   leave the step if it returns True. Ask `cut` before each instruction of a microbatch.
3. At the end of a step, push to the stores for which `pushes` is true, and to no others.
4. Give the messages of one worker in the order in which it sent them.
"""

from __future__ import annotations

from collections.abc import Iterable

from flowml.policy import can_read, window
from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError, ensure
from flowml_runtime.protocol.training.accounts import NONE, NOTHING, Accounts, Settle
from flowml_runtime.protocol.training.clocks import contained
from flowml_runtime.protocol.training.cut import Cut
from flowml_runtime.protocol.training.items import LOOK_AHEAD, Items
from flowml_runtime.protocol.training.stage import (
    OVER,
    RUNNING,
    UNDECIDED,
    WAITING,
    Abandon,
    Action,
    Applied,
    Ask,
    Begin,
    BeginReceived,
    Count,
    Event,
    Granted,
    Hold,
    LeaderRetired,
    Paused,
    Retire,
    Start,
    Started,
    State,
    Step,
    StepFinished,
    StorePublished,
)
from flowml_runtime.protocol.training.terms import Committed, ReplicaLost, Terms, Tick


def _followers(terms: Terms, replica: int) -> set[int]:
    """The replicas that begin each of their steps with the parameters of `replica`, which leads their site."""
    found: set[int] = set()
    for number, store in enumerate(terms.stores):
        if store.sites_decide and store.policy.local and (site := terms.site_of(number, replica))[0] == replica:
            found.update(site[1:])
    return found


class Replica:
    """One stage of one replica. Stage 0 leads."""

    def __init__(
        self, terms: Terms, replica: int, stage: int, ahead: int = LOOK_AHEAD, state: wire.StageState | None = None
    ) -> None:
        """`ahead`: the number of clocks for which the first stage holds items (`items.batch`). `state`: where it stood
        at the snapshot from which the run goes on."""
        self._terms, self._me = terms, replica
        self._stage = stage
        self._leads = stage == 0
        self._published: list[StorePublished | None] = [None] * len(terms.stores)
        """The newest version of each store."""
        self._applied: dict[int, Applied] = NOTHING
        self._holds = frozenset(i for i, s in enumerate(terms.stores) if s.policy.holds) or NONE
        self._taken: dict[int, int] = NOTHING
        """The clock at which each store of `_holds` was taken last."""
        above = (g for g in terms.groups if g.number in terms.above)
        self._follows = frozenset(g.number for g in above if terms.counted_as(g, replica) != replica) or NONE
        """The groups above its site, about which the leader of the site decides what to do."""
        followers = _followers(terms, replica)
        self._followed = bool(followers)
        """Whether others begin each of their steps with its parameters."""
        self._needed = any(
            terms.site_of(g.stores[0], other) != terms.site_of(g.stores[0], replica)
            for g in terms.groups
            if g.sites
            for other in followers
        )
        """Whether one of those may run a step about which all sites of this replica have decided without it."""
        self._committed = [-1] * len(terms.groups)
        """The newest clock that each group has decided."""
        self.committed = -1
        """The clock of the newest commit received; -1 before the first."""
        self._pushed: dict[int, int] = NOTHING
        """For each store at whose home a push may wait, the newest clock at which this stage has pushed."""
        self._included: list[tuple[int, int]] = []
        """(group, clock) of the commits that include this replica and came before their Begin."""
        self._steps: list[Step] = []
        self._begun, self._last_begun = -1, False
        self._running: Step | None = None
        self._leader_retired = self._retired = False
        self.cut = Cut(terms, stage)
        self._work = Items(terms, ahead, 0 if state is None else state.begun + 1)
        self._held = -1
        """The number of the newest Hold."""
        self._paused = False
        """Whether the driver knows that a Hold has stopped the replica."""
        self._waits_to_tell = ahead > LOOK_AHEAD
        self._fates: list[Settle] = []
        """The fates of items that go with the next Ask."""
        self._accounts = Accounts(terms, replica)
        if state is not None:
            self._restore(state)

    def _restore(self, state: wire.StageState) -> None:
        self._begun, self._committed = state.begun, list(state.committed)
        self.committed = max(state.committed, default=-1)
        self._pushed, self._taken = dict(state.pushed), dict(state.taken)
        self._applied = {store: Applied(store, clock, version) for store, clock, version in state.applied}
        self._accounts.restore(state.unsettled)

    def kept(self) -> wire.StageState:
        """Where the stage stands, for a snapshot between two clocks."""
        return wire.StageState(
            self._me,
            self._stage,
            self._begun,
            tuple(self._committed),
            tuple(sorted(self._pushed.items())),
            tuple((a.store, a.clock, a.version) for a in self._applied.values()),
            tuple(sorted(self._taken.items())),
            self._accounts.kept(),
        )

    def rests(self, clock: int, newest: int) -> bool:
        """Whether nothing runs or waits for a decision here, `clock` is the next to begin, all decisions are known
        about clocks before `newest`, and which versions hold its pushes: a run that goes on does not hear of them."""
        terms = self._terms
        told = (s for s in self._pushed if terms.tells_applied(s, self._me))
        known = all(s in self._applied and self._applied[s].clock >= self._pushed[s] for s in told)
        known = known and all(self._committed[g.number] + 1 >= contained(terms, g.every, newest) for g in terms.groups)
        return known and self._running is None and not self._steps and self._begun + 1 == clock

    @property
    def retired(self) -> bool:
        return self._retired

    def holds(self, store: int) -> bool:
        """Whether later steps compute with what one has read of a store."""
        return store in self._holds

    def takes(self, store: int, clock: int) -> bool:
        """Whether the step of `clock` reads the newest version, and not the one that was taken last."""
        if store not in self._holds:
            return True
        return self._taken.get(store, -1) < self._terms.stores[store].policy.every.taken(clock)

    def took(self, store: int, clock: int) -> bool:
        """The step of `clock` has read the newest version. Returns whether later steps may compute with it too."""
        if store not in self._holds:
            return False
        self._taken = self._taken or {}
        self._taken[store] = clock
        return True

    def may_read(self, store: int, clock: int) -> bool:
        """Whether the newest version of `store` published here is fresh enough for the step of `clock`."""
        news, terms = self._published[store], self._terms.stores[store]
        if news is None or terms.shared:
            return news is not None
        if news.floor < clock - terms.staleness and terms.steps_alike:  # asked again after each event that may help
            return False
        every = terms.policy.every
        if news.floor < clock and not (
            can_read(clock, (news.floor,), terms.policy.staleness, every.push, every.offset, every.delay)
            and news.floor >= every.needed(clock, terms.policy.staleness)
        ):
            return False
        if terms.clocked:
            return True
        pushed = min(window(max(clock - every.delay, 0), every.push, every.offset), self._pushed.get(store, -1) + 1)
        if not pushed:
            return True
        own = self._applied.get(store)
        return own is not None and own.clock + 1 >= pushed and own.version <= news.version

    def version(self, store: int) -> int:
        """The newest version of `store` published here; -1 before the first."""
        news = self._published[store]
        return -1 if news is None else news.version

    def should_abandon(self, clock: int) -> bool:
        """Whether the running step of `clock` can stop, because it will not count."""
        return self._running is not None and self._running.clock == clock and self._running.state == "abandoned"

    def given_up(self, store: int, clock: int) -> bool:
        """Whether the site of a store has gone on without the running step of `clock`, which may count for others."""
        step = self._running
        return step is not None and step.clock == clock and self._terms.site_groups.get(store) in step.lost

    def pushes(self, store: int, clock: int) -> bool:
        """Whether the running step of `clock` ends with a push to `store`."""
        step = self._running
        if step is None or step.clock != clock:
            raise ProtocolError(f"clock {clock} does not run on replica {self._me}")
        terms = self._terms.stores[store]
        return step.last or terms.every == 1 or terms.policy.every.due(clock, self._terms.last_clock)

    def ends(self, clock: int) -> bool:
        """Whether the running step of `clock` is the last one of this replica."""
        step = self._running
        return step is not None and step.clock == clock and (step.last or clock == self._terms.last_clock)

    def step(self, event: Event | Tick, now: float = 0.0) -> list[Action]:
        """Process one event. The time is of no importance here."""
        if type(event) is StorePublished:  # it changes only what may be read, and may end sums
            self._publish(event)
            return self._retire() if self._terms.adds_up else []
        if type(event) is Applied:
            self._applied = self._applied or {}
            self._applied[event.store] = event
            return self._retire() if self._terms.adds_up else []
        if type(event) is StepFinished:
            actions = self._finish(event.clock)
        elif isinstance(event, Committed):
            actions = self._commit(event)
        elif isinstance(event, Tick):
            return []
        else:
            actions = self._take(event)
        steps = self._steps
        if steps and steps[0].state in OVER:
            actions += self._resolve()
        if self._running is None:
            actions += self._advance()
        return actions

    def _publish(self, event: StorePublished) -> None:
        known = self._published[event.store]
        if known is not None and event.version < known.version:
            raise ProtocolError(f"store {event.store} went back from version {known.version} to {event.version}")
        self._published[event.store] = event

    def _take(self, event: Granted | BeginReceived | Started | LeaderRetired | Hold | ReplicaLost) -> list[Action]:
        match event:
            case Granted(items, exhausted):
                self._work.grant(items, exhausted)
            case BeginReceived(clock, item, last):
                return self._begin(clock, item, last)
            case Started():
                self._work.opened |= self._leads
            case LeaderRetired():
                self._leader_retired = True
            case Hold(clock, number, within) if number > self._held:
                self._work.hold_before(clock, within)
                self._held, self._paused = number, False
            case Hold() | ReplicaLost():
                pass  # it came again; the home and the leader of decisions stop waiting for the replica
        return []

    def _begin(self, clock: int, item: wire.Item, last: bool) -> list[Action]:
        if clock <= self._begun or self._last_begun:
            raise ProtocolError(f"replica {self._me} begins clock {clock} after clock {self._begun}")
        self._begun, self._last_begun = clock, last
        due, undecided, lost = self._terms.due_groups(clock), self._terms.dropping, NONE
        if due is not self._terms.groups or self._follows:
            undecided &= {group.number for group in due if group.number not in self._follows}
        included = False
        if clock <= self.committed:
            decided = frozenset(g for g in undecided if clock <= self._committed[g])
            counted = frozenset(g for g in undecided if (g, clock) in self._included)
            undecided, lost, included = undecided - decided - counted, decided - counted, bool(counted)
        state: State = "queued"
        if included or self._counts_anyway(clock):
            state = "queued, used"
        elif not undecided:
            state = "skipped"
        self._steps.append(Step(clock, item, last, state, undecided, lost))
        if self._included:
            self._included = [(g, c) for g, c in self._included if c > clock]
        return [Abandon(clock)] if state == "skipped" else []

    def _finish(self, clock: int) -> list[Action]:
        step = self._running
        if step is None or step.clock != clock:
            raise ProtocolError(f"replica {self._me} finished clock {clock}, which does not run")
        step.take("finish")
        self._running = None
        for store in self._terms.may_wait:
            if step.last or self._terms.stores[store].policy.every.due(clock, self._terms.last_clock):
                self._pushed = self._pushed or {}
                self._pushed[store] = clock
        fates = self._accounts.finish(clock, self.cut.left_out, last=step.last) if self._leads else ()
        return [*self._settle(fates)] if fates else []

    def _commit(self, event: Committed) -> list[Action]:
        group, clock = event.group, event.clock
        if clock <= self._committed[group]:
            return []
        self._committed[group] = clock
        if clock > self.committed:
            self.committed = clock
        terms = self._terms.groups[group]
        included = not event.leaves_out(self._terms.counted_as(terms, self._me))
        if included and clock > self._begun and terms.drops and group not in self._follows:
            if self._leads:
                raise ProtocolError(f"clock {clock} is committed with replica {self._me}, which has not begun it")
            self._included.append((group, clock))
        actions: list[Action] = []
        for step in self._steps:
            if step.clock == clock and group in step.undecided:
                actions += self._decide(step, group, included)
        if self._leads and (fates := self._accounts.commit(event)):
            actions += self._settle(fates)
        return actions

    def _settle(self, fates: list[Settle]) -> Iterable[Action]:
        """The fates to tell now. Those of a replica that asks for several items at once wait until it asks or stops."""
        if self._waits_to_tell and not self._paused:
            self._fates += fates
            return ()
        return fates

    def _decide(self, step: Step, group: int, included: bool) -> list[Action]:
        step.undecided -= {group}
        if not included:
            step.lost |= {group}
        if step.state not in UNDECIDED:
            return []
        if included:
            step.take("include")
        elif not step.undecided:
            step.take("exclude")
            return [Abandon(step.clock)]
        return []

    def _resolve(self) -> list[Action]:
        """Put known fates into effect, in the order of clocks."""
        actions: list[Action] = []
        while self._steps and self._steps[0].state in OVER and not self._steps[0].undecided:
            step = self._steps.pop(0)
            if step.state != "skipped" and self._terms.accumulating:
                actions += self._counts(step)
        return actions

    def _counts(self, step: Step) -> list[Action]:
        """Say of each store that gathers several steps whether the gradients of this step count for it."""
        used: list[int] = []
        lost: list[int] = []
        for group, stores in self._terms.accumulating.items():
            dropped = step.state == "dropped" or group in step.lost
            (lost if dropped else used).extend(stores)
        found = [Count(step.clock, True, tuple(sorted(used)))] if used else []
        return [*found, *([Count(step.clock, False, tuple(sorted(lost)))] if lost else [])]

    def _advance(self) -> list[Action]:
        """Start, begin, ask and retire, as far as the rules allow."""
        actions: list[Action] = []
        if self._leads and self._work.opened and not self._retired:
            self._work.skip_to(self._next_clock())
            actions = self._begin_next()
            wanted = self._work.ask()
            if wanted:
                actions += [*self._told_fates(), Ask(wanted, self._work.give_back())]
        if not self._leads:
            actions += self._start_queued()
        if self._running is None:
            actions += self._pause() if self._work.held_back else self._retire()
        return actions

    def _pause(self) -> list[Action]:
        """Say once that a Hold has stopped the replica."""
        if self._paused or not self._leads or not self._work.opened:
            return []
        self._paused = True
        returned, pushed = self._work.give_back(), tuple(sorted(self._pushed.items()))
        given_back = [Ask((), returned)] if returned else []
        return [*self._told_fates(), *given_back, Paused(self._work.hold, self._begun + 1, pushed, self._held)]

    def _next_clock(self) -> int:
        """The clock after the newest one that has begun, without those that every group due there has decided."""
        clock, newest, terms = self._work.next, self.committed, self._terms
        if clock > newest:
            return clock
        if any(self._committed[group] < terms.last_clock for group in terms.never_skipped):
            return clock  # it runs all
        while clock <= newest and self._may_skip(clock):
            clock += 1
        return clock

    def _may_skip(self, clock: int) -> bool:
        """Whether no one needs the step of a clock that is not newer than the newest commit."""
        if not self._terms.may_skip(clock) or (self._followed and self._counts_anyway(clock)):
            return False  # others may run it
        due = (g.number for g in self._terms.due_groups(clock) if g.number not in self._follows)
        return all(clock <= self._committed[number] for number in due)

    def _counts_anyway(self, clock: int) -> bool:
        """Whether the step of `clock` runs to its end, whatever is decided about it."""
        return self._needed or self._terms.counts_anyway(clock)

    def _may_start(self, clock: int, last: bool) -> bool:
        """Whether the step of `clock` may start: if it pushes gathered gradients, all earlier fates must be known."""
        return not self._terms.flushes(clock, last) or all(s.clock >= clock for s in self._steps)

    def _begin_next(self) -> list[Action]:
        found = self._work.ready()
        if found is None:
            return []
        clock, item, last = found
        if not self._may_start(clock, last):
            return []
        self._work.take(clock)
        self._accounts.open(clock, item, self._committed)
        self._begin(clock, item, last)
        return [Begin(clock, item, last), *self._start(self._steps[-1])]

    def _start_queued(self) -> list[Action]:
        if self._running is not None:
            return []
        waiting = next((s for s in self._steps if s.state in WAITING), None)
        if waiting is None or not self._may_start(waiting.clock, waiting.last):
            return []
        return self._start(waiting)

    def _start(self, step: Step) -> list[Action]:
        step.take("start")
        self._running = step
        self.cut.begin(step.clock)
        return [Start(step.clock, step.item, step.last)]

    def _retire(self) -> list[Action]:
        busy = self._running is not None or any(s.state in WAITING for s in self._steps)
        if self._retired or busy or not self._has_sums():
            return []
        settled = self._work.is_over() and not self._accounts.waits(self._committed)
        if not (settled if self._leads else self._leader_retired):
            return []
        self._retired = True
        return [*(self._close() if self._leads else ()), Retire()]

    def _has_sums(self) -> bool:
        """Whether the last version of each sum is here. Until then this worker passes on what others send of it."""
        news = map(self._published.__getitem__, self._terms.summed_at[self._stage])
        return all(n is not None and n.floor > self._terms.last_clock for n in news)

    def _close(self) -> list[Action]:
        """Settle the items whose fate no commit will change, and give back those that were never begun."""
        returned = self._work.give_back()
        return [*self._told_fates(), *self._accounts.close(), *([Ask((), returned)] if returned else [])]

    def _told_fates(self) -> list[Settle]:
        fates, self._fates = self._fates, []
        return fates

    def validate(self) -> None:
        """Check that steps are in order, that at most one runs, and that it is the newest that started."""
        last, active, waits = -1, None, False
        for step in self._steps:
            ensure(step.clock > last, "clocks are out of order")
            last = step.clock
            if step.state in RUNNING:
                ensure(active is None and step is self._running, "other steps run than the one that should")
                active = step
            if step.state in WAITING:
                waits = True
            elif step.state != "skipped":
                ensure(not waits, "a step started before an earlier one")
        ensure(active is self._running, "other steps run than the one that should")
        ensure(last <= self._begun, "a clock is kept that has not begun")
        early = self._included and any(c <= self._begun for _, c in self._included)
        ensure(not early, "the commit of a clock that has begun is kept")
        unsettled = self._accounts.clocks
        ensure(not (self._retired and (self._running or unsettled)), "a stage retired with work left")
        self._work.validate()
        ensure(not unsettled or max(unsettled) <= self._begun, "an item is unsettled that was not begun")
