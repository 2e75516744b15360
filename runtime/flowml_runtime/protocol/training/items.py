"""Keeps the work items of a replica in its first stage: requested, held, or given back. `accounts` has those begun."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError, ensure
from flowml_runtime.protocol.training.terms import Terms

LOOK_AHEAD = 2
"""The number of clocks for which a replica holds items: one to run, and one to know that the first is not the last."""


class Items:
    """The items of one replica."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self.opened = False
        self._next = 0
        self._exhausted = False
        self._asked: deque[tuple[int, ...]] = deque()
        self._held: dict[int, wire.Item] = {}
        self._returned: list[wire.Item] = []

    def grant(self, items: Iterable[tuple[int, wire.Item]], exhausted: bool) -> None:
        if not self._asked:
            raise ProtocolError("items are granted that were not asked for")
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

    def ask(self) -> tuple[int, ...]:
        """The clocks for which to ask for items now."""
        under_way = {c for clocks in self._asked for c in clocks}
        window = range(self._next, self._next + LOOK_AHEAD)
        wanted = tuple(c for c in window if c not in self._held and c not in under_way and self._exists(c))
        if wanted:
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
        item = self._held.get(self._next)
        if item is None:
            return None
        if self._terms.aligned:
            return self._next, item, self._next == self._terms.last_clock
        last = self._next + 1 not in self._held
        return None if last and not self._exhausted else (self._next, item, last)

    def take(self, clock: int) -> None:
        del self._held[clock]
        self._next = clock + 1

    def is_over(self) -> bool:
        """Whether there is nothing left to run, now or later."""
        return self.opened and not self._asked and not self._held and not self._exists(self._next)

    def validate(self) -> None:
        ensure(all(c >= self._next for c in self._held), "an item is held for a clock that is over")
        ensure(len(self._held) <= LOOK_AHEAD, "too many items are held")
        items = [*self._held.values(), *self._returned]
        ensure(len(items) == len({i.sequence for i in items}), "an item is in two places")
