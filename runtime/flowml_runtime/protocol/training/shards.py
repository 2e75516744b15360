"""Decides which item a replica gets that has a shard of its own and shares no clocks with others.

An epoch has the items c · R + r of replica r, for its steps c (`flowml.splits.Shards`). Each replica takes those of its
own shard in their order, at its own pace, for as many steps as the run has clocks. So one that is ahead begins its next
epoch while others are in the one before, in the order, and with the shard, that this epoch has.

What is left of the shard of a lost replica goes to the others: a replica that is done with its items of an epoch takes
those of that epoch before it begins the next. Fast replicas take more of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from heapq import heappop, heappush

from flowml_runtime import wire
from flowml_runtime.protocol.training.work import QueueState, Work

_Entry = tuple[int, wire.Item]
"""(sequence number, item)"""


class ShardQueue:
    """Decides which item is next. It keeps only the order, and not the fate of items. It does what a WorkQueue does."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._next = [0] * work.replicas
        """For each shard how many of its items were drawn for the first time."""
        self._back: list[list[_Entry]] = [[] for _ in range(work.replicas)]
        """For each shard a heap of the items that came back. They are before those that were not drawn yet."""
        self._gone: set[int] = set()

    @property
    def drawn(self) -> int:
        """The number of items that were drawn for the first time."""
        return sum(self._next)

    @property
    def kept(self) -> int:
        """The number of items that were drawn, and that no replica has."""
        return sum(map(len, self._back))

    def take(self, replica: int, clock: int) -> wire.Item | None:
        """The item of `replica` for its next step."""
        mine, other = self._first(replica), min(self._of_lost(), default=None)
        if other is not None and (mine is None or other[1].epoch < mine[1].epoch):
            return self._draw(self._shard(other[1]))
        return None if mine is None else self._draw(replica)

    def is_drained(self, replica: int) -> bool:
        """Whether no item is left for a replica."""
        return not self.has_more_than(0, replica)

    def has_more_than(self, number: int, replica: int) -> bool:
        """Whether more than so many items are left for a replica."""
        shards = {replica, *self._gone}
        return sum(self._work.total_clocks - self._next[s] + len(self._back[s]) for s in shards) > number

    def give_back(self, item: wire.Item) -> None:
        """Draw this item before those of its shard that were not drawn yet."""
        heappush(self._back[self._shard(item)], (item.sequence, item))

    requeue = give_back

    def leave(self, replica: int) -> None:
        """A replica is lost. Others take what is left of its shard."""
        self._gone.add(replica)

    def skipped(self, replica: int, clock: int) -> list[wire.Item]:
        """Nothing: no replica skips a step."""
        return []

    def end(self, epoch: int, done: int) -> None:
        """Nothing: an epoch of a shard ends with its last item."""

    def state(self, unbegun: Iterable[tuple[int, int, wire.Item]]) -> QueueState:
        """What it knows, for a snapshot, as if these items, (replica, clock, item), had not been granted.

        An epoch counts as drawn up to the last item that was, and those before it that were not as come back.
        """
        size, each = self._work.items_per_epoch, self._work.clocks_per_epoch
        back = {sequence for heap in self._back for sequence, _ in heap}
        back |= {item.sequence for _, _, item in unbegun}
        fresh: dict[int, int] = {}
        for epoch in range(-(-max(self._next) // each)):
            drawn = [min(max(n - epoch * each, 0), each) for n in self._next]
            fresh[epoch] = end = max(self._index(shard, n - 1) + 1 for shard, n in enumerate(drawn) if n)
            for shard, n in enumerate(drawn):
                back.update(epoch * size + i for i in range(self._index(shard, n), end, self._work.replicas))
        found: dict[int, list[wire.Item]] = {}
        for item in map(self._work.item, sorted(back)):
            found.setdefault(item.epoch, []).append(item)
        nothing: tuple[dict[int, wire.Item], ...] = tuple({} for _ in self._next)
        waiting = {epoch: tuple(items) for epoch, items in found.items()}
        return QueueState(fresh, sum(fresh.values()), 0, min(waiting, default=0), (), waiting, (), nothing)

    def restore(self, state: QueueState, done: Mapping[int, int]) -> None:
        """Go on where a snapshot was taken. No epoch ends before all its items are done, whatever was `done`."""
        size, each, replicas = self._work.items_per_epoch, self._work.clocks_per_epoch, self._work.replicas
        self._back = [[] for _ in self._next]
        for shard in range(replicas):
            drawn = {e: max(-(-(end - shard) // replicas), 0) for e, end in state.fresh.items()}
            last = max((epoch for epoch, n in drawn.items() if n), default=0)
            self._next[shard] = last * each + drawn.get(last, 0)
            for epoch in range(last):
                for n in range(drawn.get(epoch, 0), each):
                    self.give_back(self._work.item(epoch * size + self._index(shard, n)))
        for item in (*(item for found in state.back.values() for item in found), *state.requeued):
            self.give_back(item)

    def _index(self, shard: int, number: int) -> int:
        """The number in its epoch of an item of a shard."""
        return number * self._work.replicas + shard

    def _shard(self, item: wire.Item) -> int:
        return item.sequence % self._work.items_per_epoch % self._work.replicas

    def _first(self, shard: int) -> _Entry | None:
        """The next item of a shard."""
        if self._back[shard]:
            return self._back[shard][0]
        if self._next[shard] >= self._work.total_clocks:
            return None
        epoch, number = divmod(self._next[shard], self._work.clocks_per_epoch)
        item = self._work.item(epoch * self._work.items_per_epoch + self._index(shard, number))
        return item.sequence, item

    def _of_lost(self) -> Iterable[_Entry]:
        """The next item of each shard whose replica is lost."""
        return (found for shard in self._gone if (found := self._first(shard)) is not None)

    def _draw(self, shard: int) -> wire.Item | None:
        if self._back[shard]:
            return heappop(self._back[shard])[1]
        found = self._first(shard)
        self._next[shard] += found is not None
        return None if found is None else found[1]
