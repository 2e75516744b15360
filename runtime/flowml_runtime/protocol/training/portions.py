"""A replica's state machine where batches are cut into portions. It has the events and actions of `replica`.

A *step* computes one portion, or a copy of one. Steps have numbers of their own, in the order in which the replica
begins them; the clock of a portion is the number of its batch. The first stage leads:

* It asks for one portion at a time, when it has finished the one before. It begins a portion when the batch before it
  is committed, and holds it until then.
* While it waits for a commit, it asks for a copy of another replica's portion at the time that the policy says. If the
  policy allows no copies, it does so once a replica is lost, and gets a portion that only lost replicas had. One that
  has computed no portion to its end does not know how long to wait: it asks at once, and only if a replica is lost.
* A commit decides which grant of each portion counts. Every other step of that portion is abandoned if it runs, and
  does not begin if it has not begun. The leading stage settles grants that count as used, and all others as duplicates.
* A Hold stops it before a batch. It tells the driver once it runs nothing and waits for no answer; a portion of that
  batch that it holds stays with it.
* It retires after the last commit.

The other stages follow its Begins in order. A commit may overtake the Begin of a step that counts; such a step still
runs, because its loss is reported.

The duties of the caller are those in `replica`, and one more: give each event with the time in seconds, and a Tick at
the time of each Wake.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError, ensure
from flowml_runtime.protocol.training.accounts import Settle
from flowml_runtime.protocol.training.cut import Cut
from flowml_runtime.protocol.training.decision import Wake
from flowml_runtime.protocol.training.items import NO_HOLD
from flowml_runtime.protocol.training.stage import (
    STEPS,
    UNDECIDED,
    Abandon,
    Action,
    Applied,
    Ask,
    Begin,
    BeginReceived,
    Change,
    Event,
    Granted,
    Hold,
    LeaderRetired,
    Paused,
    Retire,
    Start,
    Started,
    State,
    StepFinished,
    StorePublished,
)
from flowml_runtime.protocol.training.terms import Committed, ReplicaLost, Terms, Tick

PAUSE_S = 1e-3
"""The least time between two requests for a copy while there is none."""


@dataclass(slots=True)
class _Step:
    """A portion that is granted here, and whose result has not been decided."""

    item: wire.Item
    clock: int
    portion: int
    number: int = -1  # not begun
    state: State = "queued"

    def take(self, change: Change) -> None:
        after = STEPS.get((self.state, change))
        if after is None:
            raise ProtocolError(f"a step that is {self.state!r} cannot {change}, for item {self.item.sequence}")
        self.state = after


class Portions:
    """One stage of one replica. Stage 0 leads."""

    def __init__(self, terms: Terms, replica: int, stage: int, first: int = 0) -> None:
        """`first` is the first batch of the run."""
        speculation = terms.speculation
        if speculation is None:
            raise ProtocolError("the batches of this run are not cut into portions")
        self._terms = terms
        self._policy = speculation
        self.cut = Cut(terms, stage)
        """All microbatches of a portion are computed."""
        self._me = replica
        self._leads = stage == 0
        self._opened = self._asked = self._exhausted = self._leader_retired = self._retired = False
        self._asked_copy = False
        self._lost = False
        """Whether a replica is lost, so that a portion that only it had may have to be computed again."""
        self._requests = 0
        self._begun = -1
        self._committed = first - 1
        self._hold, self._held, self._paused = NO_HOLD, -1, False
        """No portion of this batch or a later one is begun. Whether the driver knows that the replica has stopped."""
        self._floors: dict[int, int] = {}
        self._steps: list[_Step] = []
        """The steps that are not over, in the order of grants, or of Begins."""
        self._queue: deque[_Step] = deque()
        """The steps that the leading stage has begun, and this stage has not started."""
        self._first: dict[int, dict[int, int]] = {}
        """Clock -> portion -> the copy that came first, of the commits that a Begin may still follow."""
        self._running: _Step | None = None
        self._began_s = self._idle_s = 0.0
        self._took_s: float | None = None
        """How long the last portion took that was computed to its end."""
        self._wake_s = math.inf
        """When to ask for a copy."""
        self._told_s = math.inf
        """The time of the last Wake."""

    @property
    def retired(self) -> bool:
        return self._retired

    @property
    def committed(self) -> int:
        """The clock of the newest commit received; -1 before the first."""
        return self._committed

    def holds(self, store: int) -> bool:
        """Whether later portions compute with what one has read of a store, which none does."""
        return False

    def takes(self, store: int, number: int) -> bool:
        """Whether a portion reads the newest version, as each does."""
        return True

    def took(self, store: int, number: int) -> bool:
        """A portion has read the newest version. Returns whether later ones compute with it too."""
        return False

    def may_read(self, store: int, number: int) -> bool:
        """Whether the newest version of `store` published here is that of the batch that step `number` is part of."""
        step = self._running
        return step is not None and step.number == number and self._floors.get(store, -1) >= step.clock

    def should_abandon(self, number: int) -> bool:
        """Whether the running step `number` can stop, because it will not count."""
        step = self._running
        return step is not None and step.number == number and step.state == "abandoned"

    def given_up(self, store: int, number: int) -> bool:
        """Whether a site has gone on without the running step. No batch that is cut into portions has sites."""
        return False

    def pushes(self, store: int, number: int) -> bool:
        """Whether the running step ends with a push to `store`: each does, to all."""
        return True

    def ends(self, number: int) -> bool:
        """Whether the running step is the last one of this replica, which is not known."""
        return False

    def step(self, event: Event | Tick, now: float = 0.0) -> list[Action | Wake]:
        """Process one event at time `now`, in seconds."""
        match event:
            case Committed():
                actions = self._commit(event)
            case Granted(items):
                actions = self._grant(items, now)
            case BeginReceived(number, item):
                actions = self._follow(number, item)
            case StepFinished(number):
                actions = self._finish(number, now)
            case StorePublished(store, _, floor):
                self._floors[store] = floor
                return []
            case Started():
                self._opened, self._idle_s = True, now
                actions = []
            case LeaderRetired():
                self._leader_retired = True
                actions = []
            case ReplicaLost():
                self._lost, actions = True, []
                if self._wake_s == math.inf:  # it has computed no portion to its end
                    self._wake_s = now
            case Hold(clock, number) if number > self._held:
                self._hold, self._held, self._paused, actions = clock, number, False, []
            case Tick() | Applied() | Hold():
                actions = []
        return [*actions, *self._advance(now)]

    def _place(self, item: wire.Item) -> _Step:
        clock, portion = divmod(item.sequence, self._terms.members)
        return _Step(item, clock, portion)

    def _counts(self, step: _Step) -> bool:
        """Whether a step of a committed batch counts."""
        return self._first.get(step.clock, {}).get(step.portion, 0) == step.item.copy

    def _grant(self, items: tuple[tuple[int, wire.Item], ...], now: float) -> list[Action | Wake]:
        if not self._asked:
            raise ProtocolError("items are granted that were not asked for")
        copy, self._asked, self._asked_copy = self._asked_copy, False, False
        if not items:
            self._exhausted |= not copy
            pause_s = now - self._idle_s if self._took_s is None else self._took_s
            self._wake_s = now + max(pause_s, PAUSE_S) if copy else self._wake_s
            return []
        step = self._place(items[0][1])
        if step.clock <= self._committed:
            actions: list[Action | Wake] = [Settle(step.item, "duplicate")]
            return actions
        self._steps.append(step)
        return []

    def _follow(self, number: int, item: wire.Item) -> list[Action | Wake]:
        step = self._place(item)
        if number <= self._begun:
            raise ProtocolError(f"replica {self._me} begins step {number} after step {self._begun}")
        self._begun = step.number = number
        self._first = {clock: first for clock, first in self._first.items() if clock >= step.clock}
        if step.clock <= self._committed:
            if not self._counts(step):
                return [Abandon(number)]
            step.take("include")
        else:
            self._steps.append(step)
        self._queue.append(step)
        return []

    def _commit(self, event: Committed) -> list[Action | Wake]:
        if event.clock <= self._committed:
            return []
        self._committed = event.clock
        self._first[event.clock] = dict(event.copies)
        actions: list[Action | Wake] = []
        for step in [s for s in self._steps if s.clock <= event.clock]:
            counts = self._counts(step)
            if counts and step.number < 0:
                where = f"item {step.item.sequence} is committed with replica {self._me}"
                raise ProtocolError(f"{where}, which has not begun it")
            step.take("include" if counts else "exclude")
            if step.state in ("abandoned", "skipped") and step.number >= 0:
                actions.append(Abandon(step.number))
            if self._leads:
                actions.append(Settle(step.item, "used" if counts else "duplicate"))
        self._steps = [s for s in self._steps if s.clock > event.clock]
        if self._leads:
            self._first.clear()  # it begins only what is not committed
        return actions

    def _finish(self, number: int, now: float) -> list[Action | Wake]:
        step = self._running
        if step is None or step.number != number:
            raise ProtocolError(f"replica {self._me} finished step {number}, which does not run")
        if step.state != "abandoned":
            self._took_s = now - self._began_s
        step.take("finish")
        self._running, self._idle_s = None, now
        if self._took_s is not None:
            self._wake_s = self._policy.copies_at(now, self._took_s)
        else:
            self._wake_s = now if self._lost else math.inf
        return []

    def _advance(self, now: float) -> list[Action | Wake]:
        if self._running is not None or self._retired:
            return []
        if not self._leads:
            return self._start_queued(now)
        if not self._opened:
            return []
        ready = next((s for s in self._steps if s.number < 0 and s.clock == self._committed + 1), None)
        if ready is not None and ready.clock < self._hold:
            self._begun += 1
            ready.number = self._begun
            return [Begin(ready.number, ready.item, last=False), *self._start(ready, now)]
        if self._hold != NO_HOLD and self._committed + 1 >= self._hold:
            return self._pause()
        if self._committed == self._terms.last_clock:
            return self._retire()
        return self._ask(now)

    def _pause(self) -> list[Action | Wake]:
        """Say once that a Hold has stopped the replica, which waits for no answer. It may hold a later portion."""
        if self._paused or self._asked:
            return []
        self._paused = True
        return [Paused(self._hold, self._committed + 1, number=self._held)]

    def rests(self, clock: int, newest: int) -> bool:
        """Whether nothing runs here, and all is decided about the batches before `clock`."""
        return self._running is None and not self._queue and self._committed + 1 == clock

    def _start_queued(self, now: float) -> list[Action | Wake]:
        while self._queue and self._queue[0].state == "skipped":
            self._queue.popleft()
        if self._queue:
            return self._start(self._queue.popleft(), now)
        if self._leader_retired:
            self._retired = True
            return [Retire()]
        return []

    def _start(self, step: _Step, now: float) -> list[Action | Wake]:
        step.take("start")
        self._running, self._began_s = step, now
        return [Start(step.number, step.item, last=False)]

    def _retire(self) -> list[Action | Wake]:
        if self._asked:
            return []
        self._retired = True
        return [Retire()]

    def _ask(self, now: float) -> list[Action | Wake]:
        """Ask for the next portion if none is held, or for a copy if the time has come."""
        if self._asked:
            return []
        holds = any(step.number < 0 for step in self._steps)
        copy = holds or self._exhausted
        if copy and (not (self._policy.copies or self._lost) or self._wake_s == math.inf):
            return []
        if copy and now < self._wake_s:
            told, self._told_s = self._told_s, self._wake_s
            return [] if told == self._wake_s else [Wake(self._wake_s)]
        self._asked, self._asked_copy = True, copy
        self._requests += 1
        return [Ask((self._requests - 1,), copy=self._committed + 1 if copy else None)]

    def validate(self) -> None:
        """Check that at most one step runs, that nothing decided is kept, and that a retired stage has no work left."""
        ensure(all(s.clock > self._committed for s in self._steps), "a step is kept whose batch is committed")
        active = [s for s in self._steps if s.state == "running"]
        ensure(not active or active == [self._running], "other steps run than the one that should")
        held = [s for s in self._steps if s.number < 0]
        ensure(len(held) <= 1 or not self._leads, "more than one portion is held for later")
        ensure(not (self._retired and (self._running or self._queue or held)), "a stage retired with work left")
        ensure(all(s.state in UNDECIDED for s in self._steps), "a step is kept that is decided")
