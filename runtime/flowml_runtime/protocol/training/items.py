"""Keeps the work items of a replica in its first stage: requested, held, or given back. `accounts` has those begun."""

from __future__ import annotations

from collections.abc import Iterable

from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError, ensure
from flowml_runtime.protocol.training.clocks import after_push
from flowml_runtime.protocol.training.terms import RETIRED, Terms

NO_HOLD = RETIRED
"""The hold of a replica that runs to the end of the run."""

LOOK_AHEAD = 2
"""The number of clocks for which a replica holds items: one to run, and one to know that the first is not the last."""

MOST_AHEAD = 8
"""The most clocks for which a replica asks at once."""


def batch(terms: Terms, *, fed: bool) -> int:
    """The number of clocks for which a replica holds items after it has asked. It asks again when it has less than
    LOOK_AHEAD, so that there are fewer messages.

    It is LOOK_AHEAD if items are costly to hold: if their data come with them, if a late item goes to the next replica
    that asks, if replicas share the items by their speed, and in a run of few clocks. Otherwise it is at most about a
    third of them, so that the fates of items, which a replica tells when it asks, are known in the course of the run.
    """
    requeues = any(g.late.requeues for g in terms.groups)
    if fed or requeues or not terms.aligned or terms.total_clocks <= MOST_AHEAD:
        return LOOK_AHEAD
    return min(MOST_AHEAD, terms.total_clocks // 3 + 1)


class Items:
    """The items of one replica."""

    def __init__(self, terms: Terms, ahead: int, first: int = 0) -> None:
        """`ahead`: see `batch`. `first` is the first clock of the replica in this run."""
        self._terms = terms
        self._ahead = ahead
        self.opened = False
        self.hold = NO_HOLD
        """No item is begun for a clock from this one on."""
        self._next = first
        self._newest = first - 1
        """The newest clock that was asked for."""
        self._exhausted = False
        self._asked: list[tuple[int, ...]] = []
        self._held: list[tuple[int, wire.Item]] = []
        """(clock, item), in the order of clocks. They are few, and a table of them is larger."""
        self._returned: list[wire.Item] = []

    def grant(self, items: Iterable[tuple[int, wire.Item]], exhausted: bool) -> None:
        if not self._asked:
            raise ProtocolError("items are granted that were not asked for")
        asked = self._asked.pop(0)
        granted = tuple(items)
        clocks = [clock for clock, _ in granted]
        if clocks != [clock for clock in asked if clock in clocks]:
            raise ProtocolError(f"items are granted for clocks {clocks}; asked for {asked}")
        self._exhausted |= exhausted or len(granted) < len(asked)
        self._returned += [item for clock, item in granted if clock < self._next]
        self._held += [entry for entry in granted if entry[0] >= self._next]

    @property
    def next(self) -> int:
        """The clock of the next step, unless it is skipped. All before it have begun or are skipped."""
        return self._next

    def skip_to(self, clock: int) -> None:
        if clock <= self._next:
            return
        self._next = clock
        while self._held and self._held[0][0] < clock:
            self._returned.append(self._held.pop(0)[1])

    def ask(self) -> tuple[int, ...]:
        """The clocks for which to ask for items now."""
        first = self._newest + 1 if self._newest >= self._next else self._next
        if first >= self._next + LOOK_AHEAD or not self._exists(first):
            return ()
        wanted = tuple(c for c in range(first, self._next + self._ahead) if self._exists(c))
        self._newest = wanted[-1]
        self._asked.append(wanted)
        return wanted

    def give_back(self) -> tuple[wire.Item, ...]:
        """The items that were skipped without being begun, since the last call."""
        returned, self._returned = tuple(self._returned), []
        return returned

    def _exists(self, clock: int) -> bool:
        return not self._exhausted and not (self._terms.aligned and clock > self._terms.last_clock)

    def ready(self) -> tuple[int, wire.Item, bool] | None:
        """The next clock, its item, and whether it is the last. None until it is known whether another one follows."""
        held = self._held
        if not held or held[0][0] != self._next or self._next >= self.hold:
            return None
        item = held[0][1]
        if self._terms.aligned:
            return self._next, item, self._next == self._terms.last_clock
        last = len(held) == 1 or held[1][0] != self._next + 1
        return None if last and not self._exhausted else (self._next, item, last)

    def hold_before(self, clock: int, within: int = 0) -> None:
        """Begin no item for a clock from this one on, or after the next push, if that is `within` so many clocks."""
        if within:
            clock = after_push((store.policy.every for store in self._terms.stores), max(clock, self._next), within)
        self.hold = clock

    def take(self, clock: int) -> None:
        del self._held[0]
        self._next = clock + 1

    def is_over(self) -> bool:
        """Whether there is nothing left to run, now or later."""
        return self.opened and not self._asked and not self._held and not self._exists(self._next)

    @property
    def held_back(self) -> bool:
        """Whether the hold allows nothing more: not the next clock, or not the end."""
        return self.hold != NO_HOLD and (self._next >= self.hold or self.is_over())

    def validate(self) -> None:
        if self._held or self._returned:
            clocks = [clock for clock, _ in self._held]
            ensure(min(clocks, default=self._next) >= self._next, "an item is held for a clock that is over")
            ensure(clocks == sorted(set(clocks)), "items are held out of the order of clocks")
            ensure(len(clocks) <= self._ahead, "too many items are held")
            items = [*(item for _, item in self._held), *self._returned]
            ensure(len(items) == len({i.sequence for i in items}), "an item is in two places")
