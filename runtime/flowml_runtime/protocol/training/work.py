"""Says how much work a run has, and which item is next. The `ledger` grants the items and records their fates."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from flowml.errors import FlowmlError
from flowml_runtime import wire


class QueueState(msgspec.Struct, frozen=True):
    """Which items were drawn, and which of them wait, at a snapshot. `reserved` has those of each replica by clock."""

    fresh: dict[int, int]
    drawn: int
    rows: int
    epoch: int
    ended: tuple[int, ...]
    back: dict[int, tuple[wire.Item, ...]]
    requeued: tuple[wire.Item, ...]
    reserved: tuple[dict[int, wire.Item], ...]


@dataclass(frozen=True, slots=True)
class Work:
    """The amount of work: a fixed number of clocks with a row each, or as many items for the replicas that ask."""

    replicas: int
    items_per_epoch: int
    item_size: int
    total_clocks: int
    aligned: bool
    coded: bool = False
    microbatches: int = 1
    """The number of microbatches of an item."""
    groups: tuple[str, ...] = ()
    """The names of the groups of layers that decide alone what they use."""
    ungrouped: tuple[tuple[int, str], ...] = ()
    """The stores without decisions, and the names of their rows."""
    portions: int = 1
    """The items of a clock for each replica."""
    epoch_share: float = 1.0
    """The share of its items at which an epoch of a run ends that is not aligned."""
    requeues: bool = False
    """Whether the items that are left then are done first in the next epoch."""
    short: tuple[int, ...] = ()
    """The sizes of the items of the last clock of an epoch, if they are smaller than the others."""
    copies: int | None = None
    """The most copies of an item, if idle replicas take the next item of a clock, or a copy; see `speculation`."""
    sharded: bool = False
    """Whether each replica has a shard of its own in a run that is not aligned; see `shards`."""

    def __post_init__(self) -> None:
        if self.items_per_epoch < self.replicas:
            raise FlowmlError(
                f"an epoch has {self.items_per_epoch} work items of {self.item_size} examples, too few for "
                f"{self.replicas} replicas; use a smaller batch, fewer replicas or more examples"
            )

    @property
    def row(self) -> int:
        """The items of a clock."""
        return self.replicas * self.portions

    @property
    def clocks_per_epoch(self) -> int:
        """The clocks of an epoch, in which each replica gets one item. Up to R - 1 items of an epoch are left over."""
        return self.items_per_epoch // self.row

    def span(self, index: int) -> tuple[int, int]:
        """Where an item of an epoch begins, and how many examples it has."""
        whole = self.items_per_epoch - len(self.short)
        if index < whole:
            return index * self.item_size, self.item_size
        return whole * self.item_size + sum(self.short[: index - whole]), self.short[index - whole]

    def item(self, sequence: int) -> wire.Item:
        """The item with this number."""
        epoch, index = divmod(sequence, self.items_per_epoch)
        if not self.short:
            return wire.Item(sequence, epoch, index * self.item_size, self.item_size)
        return wire.Item(sequence, epoch, *self.span(index))

    @property
    def epochs(self) -> int:
        """The number of epochs begun. The last one may be incomplete."""
        return -(-self.total_clocks // self.clocks_per_epoch)

    @property
    def total_items(self) -> int:
        """The items of a run that is not aligned: all of whole epochs, then one per replica and remaining clock."""
        whole, rest = divmod(self.total_clocks, self.clocks_per_epoch)
        return whole * self.items_per_epoch + rest * self.row


_APART = -1


class WorkQueue:
    """Decides which item is next. It keeps only the order, and not the fate of items."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._fresh: dict[int, int] = {}  # epoch -> items drawn for the first time
        self.drawn = 0
        """The number of items that were drawn for the first time."""
        self._back: dict[int, deque[wire.Item]] = {}
        self._requeued: deque[wire.Item] = deque()
        self._rows: list[int] = []
        """Of each row that was drawn the number of its first item, if its items are new ones in their order. The items
        of a row are then not made before replicas take them. Else it is `_APART`."""
        self._apart: dict[int, dict[int, wire.Item]] = {}
        """Row -> replica -> its item, of other rows."""
        self._next = [0] * work.replicas
        """The first row of each replica that it may still take an item of."""
        self._epoch = 0  # the epoch that is being drained, if not aligned
        self._gone: set[int] = set()
        self._ended: set[int] = set()

    def state(self, unbegun: Iterable[tuple[int, int, wire.Item]]) -> QueueState:
        """What it knows, for a snapshot, as if these items, (replica, clock, item), had not been granted."""
        reserved = [dict(self._reserved(replica, len(self._rows))) for replica in range(self._work.replicas)]
        back = {e: [*found] for e, found in self._back.items()}
        epoch = self._epoch
        for replica, clock, item in unbegun:
            epoch = epoch if self._work.aligned else min(epoch, item.epoch)
            if self._work.aligned:
                reserved[replica][clock] = item
            else:
                back.setdefault(item.epoch, []).append(item)
        return QueueState(
            dict(self._fresh),
            self.drawn,
            len(self._rows),
            epoch,
            tuple(sorted(self._ended)),
            {e: tuple(found) for e, found in back.items() if found},
            tuple(self._requeued),
            tuple(dict(sorted(found.items())) for found in reserved),
        )

    def restore(self, state: QueueState, done: Mapping[int, int]) -> None:
        """Go on where a snapshot was taken, by when so many items of each epoch were done. Its run may have been
        shorter, and have ended within an epoch, of which more is left now."""
        self._fresh, self.drawn = dict(state.fresh), state.drawn
        self._rows, self._apart = [_APART] * state.rows, {}
        self._next = [min(found, default=state.rows) for found in state.reserved]
        self._ended = {epoch for epoch in state.ended if self._is_enough(epoch, done.get(epoch, 0))}
        self._requeued = deque(state.requeued)
        self._back = {e: deque(found) for e, found in state.back.items()}
        for replica, found in enumerate(state.reserved):
            for row, item in found.items():
                self._apart.setdefault(row, {})[replica] = item
        self._epoch = min([state.epoch, *(e for e in self._fresh if e < state.epoch and self._left(e))])

    def take(self, replica: int, clock: int) -> wire.Item | None:
        """The item of `replica` for `clock`. The clocks of a replica must ascend."""
        if self._work.aligned:
            return self._take_from_row(replica, clock)
        while self._epoch < self._work.epochs:
            item = None if self._epoch in self._ended else self._draw(self._epoch)
            if item is not None:
                return item
            self._epoch += 1
        return None

    def is_drained(self, replica: int) -> bool:
        """Whether no item is left, for any replica. An aligned run ends by its clocks instead."""
        if self._work.aligned:
            return False
        return not self._requeued and all(self._left(e) == 0 for e in range(self._epoch, self._work.epochs))

    def has_more_than(self, number: int, replica: int) -> bool:
        """Whether more than so many items are left to draw, for any replica, in a run that is not aligned."""
        left = len(self._requeued)
        for epoch in range(self._epoch, self._work.epochs):
            if left > number:
                break
            left += self._left(epoch)
        return left > number

    @property
    def kept(self) -> int:
        """The number of items that were drawn, and that no replica has."""
        back = sum(map(len, self._back.values()))
        rows = len(self._rows)
        reserved = sum(len(self._reserved(replica, rows)) for replica, row in enumerate(self._next) if row < rows)
        return len(self._requeued) + back + reserved

    def requeue(self, item: wire.Item) -> None:
        """Draw this item before any other, because a replica was too late with it."""
        self._requeued.append(item)
        self._epoch = min(self._epoch, item.epoch)

    def end(self, epoch: int, done: int) -> None:
        """End the epoch if `done` of its items are enough. Those that are left are unseen, or go to the next one."""
        if not self._is_enough(epoch, done):
            return
        while self._work.requeues and epoch + 1 < self._work.epochs and self._left(epoch):
            item = self._fresh_item(epoch) or self._back[epoch].popleft()
            self._requeued.append(item)
        self._ended.add(epoch)

    def _is_enough(self, epoch: int, done: int) -> bool:
        return done >= math.ceil(self._work.epoch_share * self._size(epoch) - 1e-9)

    def give_back(self, item: wire.Item) -> None:
        self._back.setdefault(item.epoch, deque()).append(item)
        self._epoch = min(self._epoch, item.epoch)

    def skipped(self, replica: int, clock: int) -> list[wire.Item]:
        """Take the items that were drawn for clocks of `replica` before `clock`, which it will never ask for."""
        return [item for _, item in self._take_reserved(replica, clock)]

    def leave(self, replica: int) -> None:
        """Draw no more items for a lost replica, and give those already drawn to others.

        With a code its clocks keep their items, which others compute too: the items of a row are one batch.
        """
        if self._work.coded:
            return
        self._gone.add(replica)
        for _, item in self._take_reserved(replica, self._work.total_clocks):
            self.give_back(item)

    def _take_from_row(self, replica: int, clock: int) -> wire.Item | None:
        if clock >= self._work.total_clocks:
            return None
        while len(self._rows) <= clock:
            self._draw_row()
        first = self._rows[clock]
        if self._next[replica] == clock and first != _APART:  # nearly always; it takes a third of the time of the rest
            self._next[replica] = clock + 1
            return self._work.item(first + replica)
        found = self._take_reserved(replica, clock + 1)
        mine = found.pop()[1] if found and found[-1][0] == clock else None
        for _, item in found:
            self.give_back(item)
        return mine

    def _draw_row(self) -> None:
        row, epoch = len(self._rows), len(self._rows) // self._work.clocks_per_epoch
        first, replicas = self._fresh.get(epoch, 0), self._work.replicas
        if not self._gone and not self._requeued and first + replicas <= self._size(epoch):
            self._fresh[epoch] = first + replicas
            self.drawn += replicas
            self._rows.append(epoch * self._work.items_per_epoch + first)
            return
        found = self._apart[row] = dict[int, wire.Item]()
        for replica in range(replicas):
            item = None if replica in self._gone else self._draw(epoch)
            if item is not None:
                found[replica] = item
        self._rows.append(_APART)

    def _reserved(self, replica: int, end: int) -> list[tuple[int, wire.Item]]:
        """(row, item) of what a replica may still take of the rows before `end`."""
        found: list[tuple[int, wire.Item]] = []
        for row in range(self._next[replica], min(end, len(self._rows))):
            first = self._rows[row]
            if first != _APART:
                found.append((row, self._work.item(first + replica)))
            elif (item := self._apart.get(row, {}).get(replica)) is not None:
                found.append((row, item))
        return found

    def _take_reserved(self, replica: int, end: int) -> list[tuple[int, wire.Item]]:
        """The same, and it takes them."""
        found = self._reserved(replica, end)
        self._next[replica] = max(self._next[replica], min(end, len(self._rows)))
        for row, _ in found:
            if self._rows[row] == _APART:
                del self._apart[row][replica]
                if not self._apart[row]:
                    del self._apart[row]
        return found

    def _draw(self, epoch: int) -> wire.Item | None:
        """The next item: first those that were late, then the epoch's order, then the items that came back."""
        if self._requeued:
            return self._requeued.popleft()
        item = self._fresh_item(epoch)
        if item is not None:
            return item
        back = self._back.get(epoch)
        return back.popleft() if back else None

    def _fresh_item(self, epoch: int) -> wire.Item | None:
        """The next item of an epoch that was not drawn before."""
        index = self._fresh.get(epoch, 0)
        if index >= self._size(epoch):
            return None
        self._fresh[epoch] = index + 1
        self.drawn += 1
        return self._work.item(epoch * self._work.items_per_epoch + index)

    def _size(self, epoch: int) -> int:
        if self._work.aligned:
            return self._work.items_per_epoch
        return min(self._work.items_per_epoch, self._work.total_items - epoch * self._work.items_per_epoch)

    def _left(self, epoch: int) -> int:
        if epoch in self._ended:
            return 0
        return self._size(epoch) - self._fresh.get(epoch, 0) + len(self._back.get(epoch, ()))
