"""A replica's machine, one for each of its stages: which clock to run, whether it may read, when to give up.

The first stage leads: it gets work items, begins clocks, tells the other stages, and settles what became
of each item. The others follow its Begins in order. All hear every Commit, so that each finds the fate of
a step by itself, and all find the same:

* The step of a clock that has a decision is used if the commit includes this replica, and dropped if not.
  Where the decision needs every replica it cannot leave this one out, so the step counts as used at once.
* The step of a clock that has no decision is always finished and used: its gradient joins the next push.
* A step that is dropped while it runs is abandoned at the next task boundary. A Commit may overtake the
  Begin of its clock; that step then never starts.
* After a step the leader goes on with the next clock, or the one after the newest commit if that is later.
  It returns the items of clocks that it skips. Items are asked for `LOOK_AHEAD` clocks ahead of need.
* Fates take effect in the order of clocks. A step that pushes what several steps gathered starts only when
  the fate of all earlier ones is known, so that every stage pushes the same steps. If such a push is late
  only its own clock's gradient is dropped: what was gathered before goes with the next (see `accumulator`).
* An item is settled as used by the first commit from its clock on that includes the replica, because that
  one carries it; where nothing is decided upon, when its step has finished. What no commit carried by the end of
  the run is dropped.
* A replica without more work retires, stage by stage, each after its last push.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from flowml.policy import can_read, due
from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.terms import Committed, Terms

LOOK_AHEAD = 2
"""Clocks for which a replica holds work. Two: one to run, and one to know that the first is not the last."""

Fate = Literal["used", "dropped"]


@dataclass(frozen=True, slots=True)
class Started:
    """The run begins."""


@dataclass(frozen=True, slots=True)
class Granted:
    """The answer to one Ask, in the order of asking. An asked clock without an item will never get one."""

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
    """The executor has left `clock`: all is done and pushed, or it stopped because it should abandon it."""

    clock: int


@dataclass(frozen=True, slots=True)
class StorePublished:
    """A store that this stage reads is at `version`; `clocks` as the home has them."""

    store: int
    version: int
    clocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LeaderRetired:
    """The leading stage begins nothing more."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the driver for an item for each of `clocks` (the answer is one Granted), and give `returned` back."""

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
    """Stop `clock` at the next task boundary if it runs, and drop what came or comes for it."""

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
    """Tell the ledger what became of an item."""

    item: wire.Item
    fate: Fate


@dataclass(frozen=True, slots=True)
class Retire:
    """This stage pushes nothing more: tell the homes; the leading stage tells all others too."""


Event = Started | Granted | BeginReceived | StepFinished | Committed | StorePublished | LeaderRetired
Action = Ask | Begin | Start | Abandon | AdoptAccumulator | DiscardAccumulator | Settle | Retire


@dataclass(slots=True)
class _Step:
    """A clock that was begun and whose fate has not taken effect here. `used` is None while unknown."""

    clock: int
    item: wire.Item
    last: bool
    started: bool = False
    finished: bool = False
    used: bool | None = None


class Replica:
    """One stage of one replica. Stage 0 leads."""

    def __init__(self, terms: Terms, replica: int, stage: int) -> None:
        self._terms = terms
        self._me = replica
        self._leads = stage == 0
        self._published: dict[int, StorePublished] = {}
        self._committed = -1
        self._included: set[int] = set()  # commits that include us and came before their clock's Begin
        self._steps: deque[_Step] = deque()
        self._begun = -1
        self._last_begun = False
        self._running: _Step | None = None
        self._leader_retired = False
        self._retired = False
        self._work = _Work(terms)

    @property
    def retired(self) -> bool:
        return self._retired

    @property
    def committed(self) -> int:
        """The newest decision heard of; -1 before the first."""
        return self._committed

    def can_read(self, store: int, clock: int) -> bool:
        """Whether the newest version of `store` published here is fresh enough for the step of `clock`."""
        news, terms = self._published.get(store), self._terms.stores[store]
        return news is not None and can_read(clock, news.clocks, terms.staleness, terms.every)

    def should_abandon(self, clock: int) -> bool:
        """Whether the step of `clock`, which runs, is in vain."""
        return self._running is not None and self._running.clock == clock and self._running.used is False

    def pushes(self, store: int, clock: int) -> bool:
        """Whether the step of `clock`, which runs, ends with a push to `store`."""
        step = self._running
        if step is None or step.clock != clock:
            raise ProtocolError(f"clock {clock} does not run on replica {self._me}")
        return step.last or due(clock, self._terms.stores[store].every, self._terms.last_clock)

    def step(self, event: Event) -> list[Action]:
        actions = self._take(event)
        actions += self._resolve()
        actions += self._advance()
        return actions

    def _take(self, event: Event) -> list[Action]:
        match event:
            case Started():
                if self._leads:
                    self._work.opened = True
            case Granted(items, exhausted):
                self._work.grant(items, exhausted)
            case BeginReceived(clock, item, last):
                return self._begin(clock, item, last)
            case StepFinished(clock):
                return self._finish(clock)
            case Committed(clock, replicas):
                return self._commit(clock, self._me in replicas)
            case StorePublished(store, version, _):
                known = self._published.get(store)
                if known is not None and version < known.version:
                    raise ProtocolError(f"store {store} went back from version {known.version} to {version}")
                self._published[store] = event
            case LeaderRetired():
                self._leader_retired = True
        return []

    def _begin(self, clock: int, item: wire.Item, last: bool) -> list[Action]:
        if clock <= self._begun or self._last_begun:
            raise ProtocolError(f"replica {self._me} begins clock {clock} after clock {self._begun}")
        self._begun, self._last_begun = clock, last
        step = _Step(clock, item, last)
        self._steps.append(step)
        if not self._terms.droppable(clock):
            step.used = True
        elif clock <= self._committed:
            step.used = clock in self._included
        self._included = {c for c in self._included if c > clock}
        return [] if step.used is not False else [Abandon(clock)]

    def _finish(self, clock: int) -> list[Action]:
        step = self._running
        if step is None or step.clock != clock:
            raise ProtocolError(f"replica {self._me} finished clock {clock}, which does not run")
        step.finished = True
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
            if step.clock == clock and step.used is None:
                step.used = included
                actions += [] if included else [Abandon(clock)]
        return [*actions, *self._settle(clock, included)]

    def _settle(self, clock: int, included: bool) -> list[Action]:
        """What the commit of `clock` means for items: it carries all before it, or loses its own."""
        unsettled = self._work.unsettled
        if included:
            return [Settle(unsettled.pop(c), "used") for c in sorted(unsettled) if c <= clock]
        return [Settle(unsettled.pop(clock), "dropped")] if clock in unsettled else []

    def _resolve(self) -> list[Action]:
        """Let known fates take effect, in the order of clocks."""
        actions: list[Action] = []
        while self._steps and self._is_resolved(self._steps[0]):
            step = self._steps.popleft()
            if step.started and self._terms.accumulates:
                actions.append(AdoptAccumulator(step.clock) if step.used else DiscardAccumulator(step.clock))
        return actions

    def _is_resolved(self, step: _Step) -> bool:
        if step.used is None:
            return False
        return step.finished or not (step.started or step.used)

    def _advance(self) -> list[Action]:
        """Start, begin, ask and retire, as far as nothing stands in the way."""
        actions: list[Action] = []
        if self._leads and self._work.opened and self._running is None and not self._retired:
            self._work.skip_to(max(self._begun, self._committed) + 1)
            actions += self._begin_next()
            actions += self._work.ask()
        if not self._leads:
            actions += self._start_queued()
        return [*actions, *self._retire()]

    def _may_start(self, clock: int, last: bool) -> bool:
        """Whether every earlier fate is known, where that matters."""
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
        waiting = next((s for s in self._steps if not s.started and s.used is not False), None)
        if waiting is None or not self._may_start(waiting.clock, waiting.last):
            return []
        return self._start(waiting)

    def _start(self, step: _Step) -> list[Action]:
        step.started = True
        self._running = step
        return [Start(step.clock, step.item, step.last)]

    def _retire(self) -> list[Action]:
        if self._retired or self._running is not None or any(not s.started for s in self._steps):
            return []
        if self._leads:
            if not self._work.is_over() or any(self._terms.need(c) for c in self._work.unsettled):
                return []
            self._retired = True
            return [*self._work.close(), Retire()]
        if not self._leader_retired:
            return []
        self._retired = True
        return [Retire()]

    def validate(self) -> None:
        """Steps are in order, at most one runs, and a running step is the newest that started."""
        clocks = [s.clock for s in self._steps]
        assert clocks == sorted(set(clocks))
        assert all(c <= self._begun for c in clocks)
        active = [s for s in self._steps if s.started and not s.finished]
        assert active == ([self._running] if self._running else [])
        started = [s.started for s in self._steps if s.used is not False]
        assert started == sorted(started, reverse=True), "a step started before an earlier one"
        assert all(c > self._begun for c in self._included)
        assert not (self._retired and (self._running or self._work.unsettled))
        self._work.validate(self._begun)


class _Work:
    """The leading stage's items: asked for, held, given back, and begun but not settled."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self.opened = False
        self._next = 0
        self._exhausted = False
        self._asked: deque[tuple[int, ...]] = deque()
        self._held: dict[int, wire.Item] = {}
        self._returned: list[wire.Item] = []
        self.unsettled: dict[int, wire.Item] = {}

    def grant(self, items: Iterable[tuple[int, wire.Item]], exhausted: bool) -> None:
        if not self._asked:
            raise ProtocolError("items are granted that nobody asked for")
        asked = self._asked.popleft()
        granted = dict(items)
        if not set(granted) <= set(asked):
            raise ProtocolError(f"items are granted for clocks {sorted(granted)}; asked for {asked}")
        self._exhausted |= exhausted or len(granted) < len(asked)
        for clock, item in granted.items():
            if clock < self._next:
                self._returned.append(item)
            else:
                self._held[clock] = item

    def skip_to(self, clock: int) -> None:
        self._next = max(self._next, clock)
        for skipped in sorted(c for c in self._held if c < self._next):
            self._returned.append(self._held.pop(skipped))

    def ask(self) -> list[Action]:
        under_way = {c for clocks in self._asked for c in clocks}
        window = range(self._next, self._next + LOOK_AHEAD)
        wanted = tuple(c for c in window if c not in self._held and c not in under_way and self._exists(c))
        if not wanted:
            return []
        self._asked.append(wanted)
        return [Ask(wanted, self._give_back())]

    def _exists(self, clock: int) -> bool:
        return not self._exhausted and not (self._terms.aligned and clock > self._terms.last_clock)

    def ready(self) -> tuple[int, wire.Item, bool] | None:
        """The next clock with its item, and whether it is the last: known if the one after is here, or is none."""
        item = self._held.get(self._next)
        if item is None:
            return None
        if self._terms.aligned:
            return self._next, item, self._next == self._terms.last_clock
        last = self._next + 1 not in self._held
        return None if last and not self._exhausted else (self._next, item, last)

    def take(self, clock: int) -> None:
        self.unsettled[clock] = self._held.pop(clock)
        self._next = clock + 1

    def is_over(self) -> bool:
        """Whether there is nothing to run, now or later."""
        return self.opened and not self._asked and not self._held and not self._exists(self._next)

    def close(self) -> list[Action]:
        """Give back what was never begun, and drop what no commit carried."""
        settled: list[Action] = [Settle(self.unsettled.pop(c), "dropped") for c in sorted(self.unsettled)]
        returned = self._give_back()
        return [*settled, *([Ask((), returned)] if returned else [])]

    def _give_back(self) -> tuple[wire.Item, ...]:
        returned, self._returned = tuple(self._returned), []
        return returned

    def validate(self, begun: int) -> None:
        assert all(c <= begun for c in self.unsettled)
        assert all(c >= self._next for c in self._held)
        assert len(self._held) <= LOOK_AHEAD
        items = [*self._held.values(), *self._returned, *self.unsettled.values()]
        assert len(items) == len({i.sequence for i in items}), "an item is in two places"
