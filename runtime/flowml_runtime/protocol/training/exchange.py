"""The homes of stores that the optimizer couples exchange values at each clock: the part of one worker in that.

* A worker *offers* each of its stores of the coupling once a clock, in order, when it knows what the store applies.
* When all are offered, it begins the clock: its homes share what the others need, in one round after the other. A
  round ends when what all stores share in it is here. The last one ends with the update of all stores.
* If a store has nothing to apply at a clock, its worker says so, and no store of the coupling is updated at this clock:
  all homes hear of it before they could end the first round.
* The clocks of a coupling follow one another. No worker is ahead of another by more than one round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from flowml_runtime.protocol.errors import ProtocolError, ensure
from flowml_runtime.protocol.training.store import Gathering, Handle

Given = tuple[tuple[int, ...], Handle]
"""Stores, and the message with what they share in a round."""


class Offer(msgspec.Struct, frozen=True):
    """What a store applies at a clock; as the arguments of `home.Home._make`."""

    store: int
    chosen: list[tuple[Gathering, float]]
    living: list[int] | None = None
    exact: bool = False

    @property
    def empty(self) -> bool:
        return not any(gathering.weight for gathering, _ in self.chosen)


class Begin(msgspec.Struct, frozen=True):
    """Begin the clock with what is offered."""

    clock: int
    offers: tuple[Offer, ...]


class Advance(msgspec.Struct, frozen=True):
    """Round `round` begins, with what all have shared in the one before; or, if it is the `last`, the update."""

    clock: int
    round: int
    given: tuple[Given, ...]
    last: bool


class Forgo(msgspec.Struct, frozen=True):
    """Update no store at this clock. `told`: the others already know; `begun`: the homes here have begun it."""

    clock: int
    offers: tuple[Offer, ...]
    told: bool
    begun: bool


class Forget(msgspec.Struct, frozen=True):
    """A message that nothing needs."""

    handle: Handle


Turn = Begin | Advance | Forgo | Forget


@dataclass
class Exchange:
    """One coupling on one worker. `mine` are its stores here, of all its `stores`."""

    number: int
    stores: frozenset[int]
    mine: tuple[int, ...]
    rounds: int
    offers: dict[int, dict[int, Offer]] = field(default_factory=dict[int, dict[int, Offer]])
    """Clock -> store -> what it applies."""
    heard: dict[tuple[int, int], list[Given]] = field(default_factory=dict[tuple[int, int], list[Given]])
    """(clock, round) -> what is here."""
    empty: set[int] = field(default_factory=set[int])
    """The clocks at which a store elsewhere has nothing to apply."""
    round: int = -1
    """That of the clock that has begun."""
    over: int = -1
    """The newest clock that is over."""

    @property
    def rests(self) -> bool:
        return not self.offers

    def handles(self) -> list[Handle]:
        """The payloads that are kept here."""
        waiting = [c for c in self.offers if self.round < 0 or c != min(self.offers)]
        found = [h for c in waiting for o in self.offers[c].values() for g, _ in o.chosen for h in g.handles()]
        return [*found, *(handle for given in self.heard.values() for _, handle in given if handle)]

    def offer(self, clock: int, offer: Offer) -> list[Turn]:
        if clock <= self.over or offer.store in self.offers.get(clock, {}):
            raise ProtocolError(f"store {offer.store} is offered twice at clock {clock}")
        self.offers.setdefault(clock, {})[offer.store] = offer
        return self._proceed()

    def hear(self, clock: int, round: int, stores: Sequence[int], handle: Handle | None) -> list[Turn]:
        """What these stores share has arrived; without a handle one of them has nothing to apply."""
        if not self.stores.issuperset(stores) or round >= self.rounds:
            raise ProtocolError(f"coupling {self.number} has no round {round} of stores {list(stores)}")
        if clock <= self.over:
            return [] if handle is None else [Forget(handle)]
        if handle is None:
            self.empty.add(clock)
            return self._proceed()
        given = self.heard.setdefault((clock, round), [])
        if self._covers(given).intersection(stores):  # of another copy of the store
            return [Forget(handle)]
        given.append((tuple(stores), handle))
        return self._proceed()

    def _covers(self, given: Iterable[Given]) -> set[int]:
        return {store for stores, _ in given for store in stores}

    def _proceed(self) -> list[Turn]:
        turns: list[Turn] = []
        while self.offers:
            clock = min(self.offers)
            offers = tuple(self.offers[clock][s] for s in self.mine if s in self.offers[clock])
            if len(offers) < len(self.mine):
                break
            empty = any(offer.empty for offer in offers)
            if empty or clock in self.empty:
                turns += [Forgo(clock, offers, told=not empty, begun=self.round >= 0), *self._end(clock)]
                continue
            if self.round < 0:
                self.round = 0
                turns.append(Begin(clock, offers))
            given = self.heard.get((clock, self.round), [])
            if not self.stores.issubset(self._covers(given)):
                break
            del self.heard[clock, self.round]
            self.round += 1
            last = self.round == self.rounds
            turns.append(Advance(clock, self.round, tuple(given), last))
            turns += self._end(clock) if last else []
        return turns

    def _end(self, clock: int) -> list[Turn]:
        del self.offers[clock]
        self.empty.discard(clock)
        self.round, self.over = -1, clock
        late = [key for key in self.heard if key[0] <= clock]
        return [Forget(handle) for key in late for _, handle in self.heard.pop(key)]

    def validate(self) -> None:
        """Check that what is kept is for a clock that is not over."""
        ensure(all(c > self.over for c in self.offers), "a coupling keeps an offer of a clock that is over")
        ensure(all(c > self.over for c, _ in self.heard), "a coupling keeps values of a clock that is over")
        ensure(self.round < 0 or bool(self.offers), "a coupling has begun a clock without an offer")
