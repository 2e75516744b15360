"""Decides which portion of a batch a replica computes, and of which portion it computes a copy.

Portions are granted in the order of the epoch, so a batch is granted before the next one. A replica asks for one at a
time, when it has finished the one before; a portion of a later batch it holds until the batch before it is complete.
While it waits, it may ask for a copy: it gets one of a portion of that batch, of those with the fewest copies the one
that was granted first. A portion that only lost replicas had is granted again, and the copy of a lost replica may be.

Which result of a portion counts is decided elsewhere (`decision`). Here a portion is finished when one of its replicas
asks for more work, so that it is not copied any more, and over when the ledger knows which grant counts. One that asks
for more may stop before its result is sent: a replica that has asked for a copy in vain, and asks again, gets one of a
finished portion too if nobody who has the portion has asked for anything since it was finished. Where results are only
slow to arrive, their replicas ask for copies themselves meanwhile. A later stage may stop as well, whose replica still
asks: after `MOST_IN_VAIN` requests any portion that is not over is copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from flowml_runtime import wire
from flowml_runtime.protocol.errors import ensure
from flowml_runtime.protocol.training.work import Work

MOST_IN_VAIN = 8
"""How often a replica asks for a copy of a batch in vain before it gets one of a portion that is said to be finished.
It waits for as long as a portion takes between two requests."""


@dataclass(slots=True)
class _Open:
    """A portion that is granted and not over. `holders` are the replicas with a grant of it that are not lost."""

    item: wire.Item
    copies: int = 0
    """The number of the last copy."""
    holders: set[int] = field(default_factory=set[int])
    finished: dict[int, int] = field(default_factory=dict[int, int])
    """Holder -> its request with which it had finished the portion."""


class PortionQueue:
    """The portions of the batches of a run."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._next = 0
        """The number of the next portion."""
        self._open: dict[int, _Open] = {}
        self._unfinished: dict[int, None] = {}
        """The portions that a replica computes or holds, in the order of grants."""
        self._doing: list[set[int]] = [set() for _ in range(work.replicas)]
        """The unfinished portions of each replica."""
        self._orphans: dict[int, None] = {}
        """The portions that only lost replicas had."""
        self._requests = [0] * work.replicas
        """How often each replica has asked for work."""
        self._in_vain: dict[int, tuple[int, int]] = {}
        """Replica -> the last batch of which there was no copy for it, and how often it has asked."""

    @property
    def batches(self) -> int:
        """The number of batches of which portions are granted."""
        return -(-self._next // self._work.row)

    def restore(self, batches: int) -> None:
        """Go on where a snapshot was taken, after so many batches."""
        self._next = batches * self._work.row

    def take(self, replica: int) -> wire.Item | None:
        """The next portion, for a replica that has finished all it had."""
        self._finish(replica, self._doing[replica])
        if self._orphans:
            return self._grant(replica, next(iter(self._orphans)))
        if self._next >= self._work.total_clocks * self._work.row:
            return None
        sequence = self._next
        self._next += 1
        item = self._work.item(sequence)
        self._open[sequence] = _Open(item, holders={replica})
        self._unfinished[sequence] = None
        self._doing[replica].add(sequence)
        return item

    def copy(self, replica: int, batch: int) -> wire.Item | None:
        """A copy of a portion of `batch`, for a replica that has finished all it had of this batch."""
        self._finish(replica, [s for s in self._doing[replica] if s // self._work.row <= batch])
        orphan = next((s for s in self._orphans if s // self._work.row == batch), None)
        if orphan is not None:
            return self._grant(replica, orphan)
        found = self._copied_less(batch, self._unfinished)
        asked, times = self._in_vain.get(replica, (batch, 0))
        times = times if asked == batch else 0
        if not found and times:
            others = (s for s, portion in self._open.items() if replica not in portion.holders)
            found = self._copied_less(batch, [s for s in others if times >= MOST_IN_VAIN or self._is_doubtful(s)])
        if not found:
            self._in_vain[replica] = batch, times + 1
            return None
        return self._grant(replica, min(found, key=lambda s: len(self._open[s].holders)))

    def over(self, sequence: int) -> None:
        """A grant of the portion counts."""
        self._open.pop(sequence, None)
        self._unfinished.pop(sequence, None)
        self._orphans.pop(sequence, None)

    def leave(self, replica: int) -> None:
        """A replica is lost, and what it has sent may be lost too."""
        self._doing[replica].clear()
        for sequence, portion in self._open.items():
            if replica in portion.holders:
                portion.holders.discard(replica)
                if not portion.holders:
                    self._unfinished.pop(sequence, None)
                    self._orphans[sequence] = None

    def _copied_less(self, batch: int, portions: Iterable[int]) -> list[int]:
        """Those of a batch that have fewer copies than they may."""
        most, row = self._work.copies or 0, self._work.row
        return [s for s in portions if s // row == batch and len(self._open[s].holders) <= most]

    def _is_doubtful(self, sequence: int) -> bool:
        """Whether none that has a portion has asked for anything since it had finished it."""
        portion = self._open[sequence]
        return all(
            portion.finished.get(holder, self._requests[holder]) == self._requests[holder] for holder in portion.holders
        )

    def _grant(self, replica: int, sequence: int) -> wire.Item:
        """The next copy of a portion."""
        portion = self._open[sequence]
        self._orphans.pop(sequence, None)
        self._unfinished[sequence] = None
        self._doing[replica].add(sequence)
        portion.copies += 1
        portion.holders.add(replica)
        first = portion.item
        return wire.Item(first.sequence, first.epoch, first.start, first.size, portion.copies)

    def _finish(self, replica: int, sequences: Iterable[int]) -> None:
        """Note that a replica has asked for work, and that it has finished these portions."""
        self._requests[replica] += 1
        for sequence in list(sequences):
            self._doing[replica].discard(sequence)
            self._unfinished.pop(sequence, None)
            if sequence in self._open:
                self._open[sequence].finished[replica] = self._requests[replica]

    def validate(self) -> None:
        """Check that each open portion has a replica or waits for one, and that no other is kept."""
        ensure(all(p.holders or s in self._orphans for s, p in self._open.items()), "a portion has no replica")
        ensure({*self._unfinished, *self._orphans} <= self._open.keys(), "a portion is kept that is over")
        ensure(not self._unfinished.keys() & self._orphans.keys(), "a portion is computed and waits for a replica")
