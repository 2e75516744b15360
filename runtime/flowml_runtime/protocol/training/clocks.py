"""Counts how far each replica of a store is, so that the least clock is found without reading all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from math import gcd, lcm

from flowml.policy import Every, window
from flowml_runtime.protocol.errors import ensure
from flowml_runtime.protocol.training.terms import RETIRED, Terms


def contained(terms: Terms, every: Every, clock: int) -> int:
    """How many clocks the pushes of this rhythm contain that replicas make before `clock`."""
    return clock if terms.aligned and clock > terms.last_clock else window(clock, every.push, every.offset)


def after_push(rhythms: Iterable[Every], clock: int, within: int) -> int:
    """The clock from this one on, and at most `within` later, before which to stop so that stores have just got what
    replicas had gathered: the first one before which all have.

    If none is so soon, those that push least often come first, which have most to lose: the first clock of such a one,
    at which as many others as can push too. `clock` if no store pushes so soon.
    """
    found, step = clock, 1  # those so far have pushed before `found`, and `step` later again
    for push, offset in sorted({(every.push, every.offset) for every in rhythms}, reverse=True):
        common = gcd(step, push)
        turns, apart = divmod(offset - found, common)
        turns = turns * pow(step // common, -1, push // common) % (push // common)
        if not apart and found + turns * step <= clock + within:
            found, step = found + turns * step, lcm(step, push)
    return found


class Clocks:
    """The clock of each replica and the least of all, which is found without reading all."""

    def __init__(self, replicas: int, senders: Collection[int]) -> None:
        """Replicas other than the `senders` are not waited for."""
        waited = frozenset(senders)
        self._of = [0 if replica in waited else RETIRED for replica in range(replicas)]
        self._at = dict(Counter(self._of))  # how many replicas are at each clock
        self.floor = 0

    def __getitem__(self, replica: int) -> int:
        return self._of[replica]

    @property
    def all(self) -> tuple[int, ...]:
        """The clock of each replica."""
        return tuple(self._of)

    @property
    def active(self) -> int:
        """The number of replicas that are not retired."""
        return len(self._of) - self._at.get(RETIRED, 0)

    def raise_to(self, clock: int, replica: int) -> None:
        before, self._of[replica] = self._of[replica], clock
        self._at[clock] = self._at.get(clock, 0) + 1
        self._at[before] -= 1
        if not self._at[before]:
            del self._at[before]
            self.floor = min(self._at)

    def awaits(self, kept: Collection[tuple[int, int]], staleness: float) -> bool:
        """Whether a reader may wait for one of these contributions, (replica, clock), which are not applied yet.

        If the floor is above one of them, its replica has retired, and no reader would wait for it any more.
        """
        newest, oldest = max(clock for _, clock in kept), min(clock for _, clock in kept)
        return newest + 1 - self.floor >= staleness or self.floor > oldest

    def validate(self) -> None:
        ensure(self.floor == min(self._of), "the least clock is wrong")
        counted = all(self._of.count(clock) == number for clock, number in self._at.items())
        ensure(counted and sum(self._at.values()) == len(self._of), "clocks are counted wrongly")
