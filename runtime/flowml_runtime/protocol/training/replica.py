"""A replica's state machine, one per stage, decides which clock to run, what it may read, and when to give up a step.

The first stage leads: it gets work items, begins clocks, tells the other stages, and reports the fate of each item to
the ledger. The others follow its Begins in order. All stages get every Commit, so that each one can determine the fate
of a step, with the same result. `STEPS` is the life of one step as a table. Its rules are:

* The step of a clock that has a decision is used if the commit includes this replica, and dropped if not.
  A decision that needs every replica cannot leave this one out, so the step counts as used at once.
* The step of a clock without a decision is always finished and used: its gradient joins the next push.
* A step that is dropped while it runs is abandoned at the next task boundary. A Commit may overtake the
  Begin of its clock; that step then never starts.
* After a step the leader continues with the next clock, or with the one after the newest commit if that is later.
  It returns the items of clocks that it skips. It asks for items before it needs them (`items`).
* Fates take effect in the order of clocks. A step that pushes the gradients of several steps starts only when
  the fate of all earlier ones is known, so that every stage pushes the same steps. If such a push is late,
  only its own clock's gradient is dropped; the gradients gathered before go with the next push (see `accumulator`).
* An item is settled as used by the first commit at or after its clock that includes the replica, because the push of
  that clock contains it. Without decisions it is settled when its step has finished. Items that no commit has included
  by the end of the run are dropped.
* A replica reads its own writes in stores that apply on arrival (Ho et al., stale synchronous parallel): it waits for
  the version that holds its last push. So a single replica is serial, and a slow home slows its replicas down instead
  of accumulating their pushes.
* A replica without more work retires, stage by stage, each after its last push.

What the caller must do:

1. Carry the actions out in the order of the list. A StepFinished must follow each Start.
2. Ask `may_read` before a step uses a store and again after each event. Ask `should_abandon` between tasks, and leave
   the step if it returns True.
3. At the end of a step, push to the stores for which `pushes` is true, and to no others.
4. Give the messages of one worker in the order in which it sent them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

from flowml.policy import can_read, window
from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError, ensure
from flowml_runtime.protocol.training.items import Items
from flowml_runtime.protocol.training.terms import Committed, Terms

Fate = Literal["used", "dropped"]


@dataclass(frozen=True, slots=True)
class Started:
    """The run begins."""


@dataclass(frozen=True, slots=True)
class Granted:
    """The answer to one Ask, in the order of the Asks. A clock without an item here will never get one."""

    items: tuple[tuple[int, wire.Item], ...]
    exhausted: bool = False


@dataclass(frozen=True, slots=True)
class BeginReceived:
    """The leading stage has begun `clock`."""

    clock: int
    item: wire.Item
    last: bool = False


@dataclass(frozen=True, slots=True)
class StepFinished:
    """The executor has left the step of `clock`: it has pushed everything, or has abandoned the step."""

    clock: int


@dataclass(frozen=True, slots=True)
class StorePublished:
    """A store that this stage reads is at `version`. It holds all pushes before `floor` of the replicas that count."""

    store: int
    version: int
    floor: int


@dataclass(frozen=True, slots=True)
class Applied:
    """`version` of a store that applies on arrival holds the push of this replica at `clock`."""

    store: int
    clock: int
    version: int


@dataclass(frozen=True, slots=True)
class LeaderRetired:
    """The leading stage begins no more clocks."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the driver for one item for each of `clocks` (the answer is one Granted), and give `returned` back."""

    clocks: tuple[int, ...]
    returned: tuple[wire.Item, ...] = ()


@dataclass(frozen=True, slots=True)
class Begin:
    """Tell the other stages of this replica to begin `clock`."""

    clock: int
    item: wire.Item
    last: bool


@dataclass(frozen=True, slots=True)
class Start:
    """Run `clock` on this stage. StepFinished must follow."""

    clock: int
    item: wire.Item
    last: bool


@dataclass(frozen=True, slots=True)
class Abandon:
    """Stop `clock` at the next task boundary if it runs, and drop all values for it."""

    clock: int


@dataclass(frozen=True, slots=True)
class AdoptAccumulator:
    """The gradients of `clock` count: see `accumulator`."""

    clock: int


@dataclass(frozen=True, slots=True)
class DiscardAccumulator:
    """The gradients of `clock` do not count: see `accumulator`."""

    clock: int


@dataclass(frozen=True, slots=True)
class Settle:
    """Tell the ledger the fate of an item."""

    item: wire.Item
    fate: Fate


@dataclass(frozen=True, slots=True)
class Retire:
    """This stage pushes nothing more: tell the homes. The leading stage also tells all other stages."""


Event = Started | Granted | BeginReceived | StepFinished | Committed | StorePublished | Applied | LeaderRetired
Action = Ask | Begin | Start | Abandon | AdoptAccumulator | DiscardAccumulator | Settle | Retire


State = Literal[
    "queued",  # begun, and not started
    "queued, used",
    "running",
    "running, used",
    "abandoned",  # still runs, but does not count
    "finished",  # its fate is unknown
    "used",
    "dropped",
    "skipped",  # dropped before it started
]
Change = Literal["start", "finish", "include", "exclude"]

STEPS: dict[tuple[State, Change], State] = {
    ("queued", "start"): "running",
    ("queued", "include"): "queued, used",
    ("queued", "exclude"): "skipped",
    ("queued, used", "start"): "running, used",
    ("running", "finish"): "finished",
    ("running", "include"): "running, used",
    ("running", "exclude"): "abandoned",
    ("running, used", "finish"): "used",
    ("abandoned", "finish"): "dropped",
    ("finished", "include"): "used",
    ("finished", "exclude"): "dropped",
}
"""The life of a step. Its stage starts and finishes it, and the commit of its clock includes or excludes it.

A step begins as "queued". It begins as "queued, used" if the commit cannot leave it out or has already included it, and
as "skipped" if the commit has already excluded it.
"""
UNDECIDED = frozenset[State]({"queued", "running", "finished"})
WAITING = frozenset[State]({"queued", "queued, used"})
RUNNING = frozenset[State]({"running", "running, used", "abandoned"})
OVER = frozenset[State]({"used", "dropped", "skipped"})


@dataclass(slots=True)
class _Step:
    """A clock that has begun, and whose fate has not taken effect here yet."""

    clock: int
    item: wire.Item
    last: bool
    state: State

    def take(self, change: Change) -> None:
        after = STEPS.get((self.state, change))
        if after is None:
            raise ProtocolError(f"a step that is {self.state!r} cannot {change}, at clock {self.clock}")
        self.state = after


class Replica:
    """One stage of one replica. Stage 0 leads."""

    def __init__(self, terms: Terms, replica: int, stage: int) -> None:
        self._terms = terms
        self._me = replica
        self._leads = stage == 0
        self._published: dict[int, StorePublished] = {}
        self._applied: dict[int, Applied] = {}
        self._committed = -1
        self._included: set[int] = set()  # clocks whose commit includes this replica and came before their Begin
        self._steps: deque[_Step] = deque()
        self._begun = -1
        self._last_begun = False
        self._running: _Step | None = None
        self._leader_retired = False
        self._retired = False
        self._work = Items(terms)

    @property
    def retired(self) -> bool:
        return self._retired

    @property
    def committed(self) -> int:
        """The clock of the newest commit received; -1 before the first."""
        return self._committed

    def may_read(self, store: int, clock: int) -> bool:
        """Whether the newest version of `store` published here is fresh enough for the step of `clock`."""
        news, terms = self._published.get(store), self._terms.stores[store]
        if news is None:
            return False
        every = terms.policy.every
        if not can_read(clock, (news.floor,), terms.policy.staleness, every.push, every.offset, every.delay):
            return False
        pushed = window(max(clock - every.delay, 0), every.push, every.offset)
        if terms.clocked or not pushed:
            return True
        own = self._applied.get(store)
        return own is not None and own.clock + 1 >= pushed and own.version <= news.version

    def version(self, store: int) -> int:
        """The newest version of `store` published here; -1 before the first."""
        news = self._published.get(store)
        return -1 if news is None else news.version

    def should_abandon(self, clock: int) -> bool:
        """Whether the running step of `clock` can stop, because it will not count."""
        return self._running is not None and self._running.clock == clock and self._running.state == "abandoned"

    def pushes(self, store: int, clock: int) -> bool:
        """Whether the running step of `clock` ends with a push to `store`."""
        step = self._running
        if step is None or step.clock != clock:
            raise ProtocolError(f"clock {clock} does not run on replica {self._me}")
        return step.last or self._terms.stores[store].policy.every.due(clock, self._terms.last_clock)

    def ends(self, clock: int) -> bool:
        """Whether the running step of `clock` is the last one of this replica."""
        step = self._running
        return step is not None and step.clock == clock and (step.last or clock == self._terms.last_clock)

    def step(self, event: Event) -> list[Action]:
        actions = self._take(event)
        if isinstance(event, StorePublished | Applied):
            return actions  # these events change only what may be read
        actions += self._resolve()
        actions += self._advance()
        return actions

    def _take(self, event: Event) -> list[Action]:
        match event:
            case StepFinished(clock):
                return self._finish(clock)
            case Committed(clock, excluded):
                return self._commit(clock, self._me not in excluded)
            case StorePublished(store, version, _):
                known = self._published.get(store)
                if known is not None and version < known.version:
                    raise ProtocolError(f"store {store} went back from version {known.version} to {version}")
                self._published[store] = event
            case Applied(store):
                self._applied[store] = event
            case Granted(items, exhausted):
                self._work.grant(items, exhausted)
            case BeginReceived(clock, item, last):
                return self._begin(clock, item, last)
            case Started():
                if self._leads:
                    self._work.opened = True
            case LeaderRetired():
                self._leader_retired = True
        return []

    def _begin(self, clock: int, item: wire.Item, last: bool) -> list[Action]:
        if clock <= self._begun or self._last_begun:
            raise ProtocolError(f"replica {self._me} begins clock {clock} after clock {self._begun}")
        self._begun, self._last_begun = clock, last
        state: State = "queued"
        if not self._terms.droppable(clock) or clock in self._included:
            state = "queued, used"
        elif clock <= self._committed:
            state = "skipped"
        self._steps.append(_Step(clock, item, last, state))
        if self._included:
            self._included = {c for c in self._included if c > clock}
        return [Abandon(clock)] if state == "skipped" else []

    def _finish(self, clock: int) -> list[Action]:
        step = self._running
        if step is None or step.clock != clock:
            raise ProtocolError(f"replica {self._me} finished clock {clock}, which does not run")
        step.take("finish")
        self._running = None
        if self._leads and not self._terms.decides:
            return [Settle(self._work.unsettled.pop(clock), "used")]
        return []

    def _commit(self, clock: int, included: bool) -> list[Action]:
        if clock <= self._committed:
            return []
        self._committed = clock
        if included and clock > self._begun:
            if self._leads:
                raise ProtocolError(f"clock {clock} is committed with replica {self._me}, which has not begun it")
            self._included.add(clock)
        actions: list[Action] = []
        for step in self._steps:
            if step.clock == clock and step.state in UNDECIDED:
                step.take("include" if included else "exclude")
                actions += [] if included else [Abandon(clock)]
        return [*actions, *self._settle(clock, included)]

    def _settle(self, clock: int, included: bool) -> list[Action]:
        """Settle items by the commit of `clock`: it uses all items up to its clock, or drops that of its clock."""
        unsettled = self._work.unsettled
        if included:
            return [Settle(unsettled.pop(c), "used") for c in sorted(unsettled) if c <= clock]
        return [Settle(unsettled.pop(clock), "dropped")] if clock in unsettled else []

    def _resolve(self) -> list[Action]:
        """Put known fates into effect, in the order of clocks."""
        actions: list[Action] = []
        while self._steps and self._steps[0].state in OVER:
            step = self._steps.popleft()
            if self._terms.accumulates and step.state != "skipped":
                used = step.state == "used"
                actions.append(AdoptAccumulator(step.clock) if used else DiscardAccumulator(step.clock))
        return actions

    def _advance(self) -> list[Action]:
        """Start, begin, ask and retire, as far as the rules allow."""
        actions: list[Action] = []
        if self._leads and self._work.opened and self._running is None and not self._retired:
            self._work.skip_to(max(self._begun, self._committed) + 1)
            actions += self._begin_next()
            wanted = self._work.ask()
            actions += [Ask(wanted, self._work.give_back())] if wanted else []
        if not self._leads:
            actions += self._start_queued()
        return [*actions, *self._retire()]

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
        self._begin(clock, item, last)
        return [Begin(clock, item, last), *self._start(self._steps[-1])]

    def _start_queued(self) -> list[Action]:
        if self._running is not None:
            return []
        waiting = next((s for s in self._steps if s.state in WAITING), None)
        if waiting is None or not self._may_start(waiting.clock, waiting.last):
            return []
        return self._start(waiting)

    def _start(self, step: _Step) -> list[Action]:
        step.take("start")
        self._running = step
        return [Start(step.clock, step.item, step.last)]

    def _retire(self) -> list[Action]:
        if self._retired or self._running is not None or any(s.state in WAITING for s in self._steps):
            return []
        if self._leads:
            if not self._work.is_over() or any(self._terms.need(c) for c in self._work.unsettled):
                return []
            self._retired = True
            return [*self._close(), Retire()]
        if not self._leader_retired:
            return []
        self._retired = True
        return [Retire()]

    def _close(self) -> list[Action]:
        """Drop the items that no commit has included, and give back those that were never begun."""
        unsettled, returned = self._work.unsettled, self._work.give_back()
        settled: list[Action] = [Settle(unsettled.pop(c), "dropped") for c in sorted(unsettled)]
        return [*settled, *([Ask((), returned)] if returned else [])]

    def validate(self) -> None:
        """Check that steps are in order, that at most one runs, and that it is the newest that started."""
        clocks = [s.clock for s in self._steps]
        ensure(clocks == sorted(set(clocks)), f"clocks {clocks} are out of order")
        ensure(all(c <= self._begun for c in clocks), f"a clock after {self._begun} is kept, which has not begun")
        active = [s for s in self._steps if s.state in RUNNING]
        ensure(active == ([self._running] if self._running else []), "other steps run than the one that should")
        started = [s.state not in WAITING for s in self._steps if s.state != "skipped"]
        ensure(started == sorted(started, reverse=True), "a step started before an earlier one")
        ensure(all(c > self._begun for c in self._included), "the commit of a clock that has begun is kept")
        ensure(not (self._retired and (self._running or self._work.unsettled)), "a stage retired with work left")
        self._work.validate(self._begun)
