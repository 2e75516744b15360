"""The driver's ledger of work decides which replica gets which item, and records the fate of each item.

A work item is `item_size` examples from one epoch's order. The machine counts items and holds no data.

* If the run is aligned (some store is clocked), each clock is a row with one item per replica, in the order of the
  epoch. So with full synchrony replica r gets exactly item c·R + r at clock c. A row is drawn when a replica
  first asks for its clock. An item that its replica has skipped, or got and never began, goes to the tail of
  its epoch's queue. An epoch has a fixed number of rows; the items left at its end are unseen.
* With a code a clock uses the whole row, whichever replicas are late, because others compute their items too. So an
  item never returns to the queue, and every item of a clock that is over counts as used.
* If batches are cut into portions, items are portions, and `speculation` decides which one a replica gets. A replica
  may get a copy of an item that another one has. One grant of each item is settled as used, all others as duplicates.
* Otherwise the next item goes to the next replica that asks, until all epochs are drained. Fast replicas take more. But
  replicas ask ahead, so for each one that has not asked yet an item is left. An epoch may end when a share of its items
  is used; replicas finish the items that they have. If a run goes on without a lost replica, the homes say what they
  have of it: items that no store has are taken back, and granted again (see `departed`). Where each replica has a shard
  of its own, `shards` decides which item is next.

Every granted item comes back exactly once: settled as used, dropped or folded in later, or given back (`returned`
if it was never begun, `requeued` if it was). The items of a lost replica whose fates it has not told stay outstanding
until the run is over. Then `untold` says what became of them, and the others count as dropped.

What the caller must do:

1. Give the messages of one replica in the order in which it sent them.
2. Send every Grant, in the order of the list.
3. Call `validate` when the run is over; nothing may be outstanding then.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import msgspec

from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError, ensure
from flowml_runtime.protocol.training.fates import Account, AccountState, Fate
from flowml_runtime.protocol.training.over import ItemsOver, State
from flowml_runtime.protocol.training.owed import Owed
from flowml_runtime.protocol.training.shards import ShardQueue
from flowml_runtime.protocol.training.speculation import PortionQueue
from flowml_runtime.protocol.training.summary import Summary
from flowml_runtime.protocol.training.terms import ReplicaLost
from flowml_runtime.protocol.training.work import QueueState, Work, WorkQueue

_PART = 4096
"""Examples that are counted together."""

Change = Literal["granted", "returned"] | Fate

ITEMS: dict[tuple[State, Change], State] = {
    ("waiting", "granted"): "granted",
    ("granted", "used"): "used",
    ("granted", "dropped"): "dropped",
    ("granted", "folded"): "folded",
    ("granted", "requeued"): "waiting",
    ("granted", "returned"): "waiting",
}
"""The life of a work item. It begins as "waiting", and may be granted, and come back, any number of times.

A grant that comes back as a "duplicate" does not change the item, because another grant of it counts.
"""


_Grant = int | tuple[int, int]
"""The sequence number of an item, or that and the number of a copy. Nearly all are of the first kind, and a number
takes less memory."""
_NONE: tuple[int, int, wire.Item | None] = (-1, -1, None)
"""What is outstanding of a grant that there is not."""


def _at(sequence: int, copy: int) -> _Grant:
    return (sequence, copy) if copy else sequence


class Asked(msgspec.Struct, frozen=True):
    """A replica asks for an item for each of `clocks`, and gives back those that it never began.

    `copy`: it asks for an item of this clock that another replica has.
    """

    replica: int
    clocks: tuple[int, ...]
    returned: tuple[wire.Item, ...] = ()
    copy: int | None = None


class Settled(msgspec.Struct, frozen=True):
    """The fate of items of a replica. `missing` are the groups that do not use them, although others do, and `late`
    those that fold them in, although others use them in time. `left_out` is the number of microbatches of each that
    were not computed."""

    replica: int
    fates: tuple[tuple[wire.Item, Fate], ...]
    missing: tuple[int, ...] = ()
    left_out: int = 0
    late: tuple[int, ...] = ()


class Grant(msgspec.Struct, frozen=True):
    """Answer the replica. `exhausted`: there are no more items to ask for."""

    replica: int
    items: tuple[tuple[int, wire.Item], ...]
    exhausted: bool


Event = Asked | Settled | ReplicaLost


class LedgerState(msgspec.Struct, frozen=True):
    """All accounts at a snapshot. `over` has runs of items with one fate, as (first, number, fate), and `outstanding`
    those that replicas have begun, as (replica, clock, item)."""

    granted: int
    outstanding: tuple[tuple[int, int, wire.Item], ...]
    epochs: dict[int, AccountState]
    replicas: tuple[AccountState, ...]
    groups: tuple[AccountState, ...]
    cut: dict[int, int]
    over: tuple[tuple[int, int, State], ...]
    queue: QueueState
    unsent: tuple[tuple[int, int, wire.Item], ...] = ()
    """The items that are used, and that their replicas had not sent to all stores yet, as `outstanding`."""
    partly: int = 0
    """As in `Summary`."""
    lacks: dict[int, int] = {}
    """Store without decisions -> the used items that it does not have."""
    owed: tuple[Owed, ...] = ()
    """What replicas had not sent when the run of the snapshot began, and have not sent since."""

    @property
    def used(self) -> int:
        """The number of items that were used."""
        return sum(account.fates.get("used", 0) for account in self.replicas)


class Ledger:
    """Grants the items of a WorkQueue or ShardQueue, or the portions of a PortionQueue, and records their fates."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._queue = ShardQueue(work) if work.sharded else WorkQueue(work)
        self._portions = None if work.copies is None else PortionQueue(work)
        self._leaves_none = work.aligned or work.sharded or work.copies is not None
        """Whether no item is left for replicas that have not asked yet."""
        self._granted = 0
        self._outstanding: dict[_Grant, tuple[int, int, wire.Item]] = {}
        """The replica that has the item, the clock for which it got it, and the item."""
        self._epochs: defaultdict[int, Account] = defaultdict(Account)  # only epochs begun: there may be millions
        self._replicas = [Account() for _ in range(work.replicas)]
        self._groups = [Account() for _ in work.groups]
        self._cut: dict[int, int] = {}
        """Sequence number -> the number of examples at the end of a used item that were left out."""
        self._over = ItemsOver()
        self._newest = [-1] * work.replicas
        self._unasked = set(range(work.replicas))
        """The replicas that are not lost and have not asked for an item in this run. An item is left for each: one that
        goes on pushes with its last step what it had gathered before."""
        self._lost: set[int] = set()
        self.partly = 0
        """The used items that only some stores have, because what others had of them was lost or left out."""
        self._lacks: Counter[int] = Counter()

    def kept(self, clocks: Sequence[int]) -> LedgerState:
        """All accounts, for a snapshot of replicas with these next clocks. What they have not begun is not granted."""
        held = self.held()
        unbegun = [(r, clock, item) for r, clock, item in held if clock >= clocks[r]]
        return LedgerState(
            self._granted - len(unbegun),
            tuple((r, clock, item) for r, clock, item in held if clock < clocks[r]),
            {e: account.kept() for e, account in sorted(self._epochs.items())},
            tuple(account.kept() for account in self._replicas),
            tuple(account.kept() for account in self._groups),
            dict(self._cut),
            tuple(self._over.runs()),
            self._queue.state(unbegun),
            partly=self.partly,
            lacks=dict(sorted(self._lacks.items())),
        )

    def restore(self, state: LedgerState, clocks: Sequence[int]) -> None:
        """Go on where a snapshot was taken."""
        self._granted, self._cut, self._newest = state.granted, dict(state.cut), [clock - 1 for clock in clocks]
        self.partly, self._lacks = state.partly, Counter(state.lacks)
        if self._portions is not None:
            self._portions.restore(max(clocks))
            self._newest = [-1] * len(clocks)  # requests are numbered, and not for clocks
        self._unasked = set(range(len(clocks)))
        for replica, clock, item in state.outstanding:
            self._outstanding[_at(item.sequence, item.copy)] = replica, clock, item
        self._epochs.update((e, Account.of(account)) for e, account in state.epochs.items())
        self._replicas = list(map(Account.of, state.replicas))
        self._groups = list(map(Account.of, state.groups))
        self._over = ItemsOver(state.over)
        self._queue.restore(state.queue, {e: account.fates.get("used", 0) for e, account in self._epochs.items()})

    def _clock_of(self, clock: int, item: wire.Item) -> int:
        """The clock of an item that was granted for `clock`. Requests for portions are numbered."""
        return clock if self._portions is None else item.sequence // self._work.row

    @property
    def newest(self) -> int:
        """The newest clock for which a replica has asked for work."""
        return max(self._newest) if self._portions is None else self._portions.batches - 1

    @property
    def outstanding(self) -> int:
        """The number of items granted and not yet settled or given back."""
        return len(self._outstanding)

    def step(self, event: Event) -> list[Grant]:
        if type(event) is Asked:  # not `match`, as each step of each replica passes here
            return self._answer(event.replica, event.clocks, event.returned, event.copy)
        if type(event) is Settled:
            self._settle(event.replica, event.fates, event.missing, event.left_out, event.late)
        elif isinstance(event, ReplicaLost):
            self._lose(event.replica)
        return []

    def _answer(
        self, replica: int, clocks: Sequence[int], returned: Iterable[wire.Item], copy: int | None
    ) -> list[Grant]:
        if replica in self._lost and self._portions:
            return []
        if returned:
            self._account(replica, [(item, "returned") for item in returned])
        if not clocks or replica in self._lost:
            return []
        if list(clocks) != sorted(set(clocks)) or clocks[0] <= self._newest[replica]:
            raise ProtocolError(f"replica {replica} asks for clocks {clocks} after clock {self._newest[replica]}")
        first = replica in self._unasked
        self._unasked.discard(replica)
        self._newest[replica] = clocks[-1]
        items: list[tuple[int, wire.Item]] = []
        coded, free, outstanding = self._work.coded, self._leaves_none, self._outstanding
        for clock in clocks:
            if coded:
                self._use_skipped(replica, clock)
            item = self._next(replica, clock, copy) if free or first or self._is_free(replica) else None
            first = False
            if item is not None:
                if item.copy:
                    self._count_copy(item)
                outstanding[_at(item.sequence, item.copy)] = replica, clock, item
                items.append((clock, item))
        self._granted += len(items)
        short = len(items) < len(clocks)
        drained = copy is None and short if self._portions else short or self._queue.is_drained(replica)
        return [Grant(replica, tuple(items), exhausted=drained)]

    def has_more_than(self, number: int, replica: int) -> bool:
        """Whether more than so many items are left for a replica that has asked before, in a run that is not
        aligned."""
        return self._queue.has_more_than(number + len(self._unasked) * (not self._work.sharded), replica)

    @property
    def has_one_each(self) -> bool:
        """Whether an item is left for each replica that is not lost, in a run that is not aligned. With shards one that
        has none left knew its last one, and has pushed."""
        return self._work.sharded or self._queue.has_more_than(self._work.replicas - len(self._lost) - 1, 0)

    def clock_of(self, item: wire.Item) -> int:
        """The clock for which an item that is outstanding was granted; -1 if it is not."""
        return self._outstanding.get(_at(item.sequence, item.copy), _NONE)[1]

    def take_back(self, replica: int, clock: int, item: wire.Item, lost: Sequence[int] = ()) -> None:
        """An item that was settled as used was lost with its replica: it is outstanding as before. It is noted that
        `lost` lack it."""
        if self._over.get(item.sequence) != "used" or item.sequence in self._cut:
            raise ProtocolError(
                f"item {item.sequence} of replica {replica} is taken back, but does not count as a whole"
            )
        for account in (self._epochs[item.epoch], self._replicas[replica], *self._groups):
            account.fates["used"] -= 1
        del self._over[item.sequence]
        self._outstanding[_at(item.sequence, item.copy)] = replica, clock, item
        self.partly -= bool(lost)
        self._lacks.subtract(lost)

    def note_partly(self, lacking: Iterable[int], lost: Sequence[int] = ()) -> None:
        """Some stores have a used item, and others do not: of those without decisions these. Those with decisions have
        accounts of their own. It was noted before that `lost` lack it."""
        self.partly += not lost
        self._lacks.update(lacking)

    def _is_free(self, replica: int) -> bool:
        """Whether the next item need not be left for a replica that has not asked yet."""
        return not self._unasked or self._queue.has_more_than(len(self._unasked), replica)

    def _next(self, replica: int, clock: int, copy: int | None) -> wire.Item | None:
        if self._portions is None:
            return self._queue.take(replica, clock)
        return self._portions.take(replica) if copy is None else self._portions.copy(replica, copy)

    def _count_copy(self, item: wire.Item) -> None:
        """Another replica gets an item too, because the one that has had it longest takes long."""
        self._epochs[item.epoch].copied += 1
        for copy in range(item.copy):
            if (at := _at(item.sequence, copy)) in self._outstanding:
                self._replicas[self._outstanding[at][0]].copied += 1
                return

    def held(self, replica: int | None = None) -> list[tuple[int, int, wire.Item]]:
        """The items that are outstanding, of one replica or of all: (replica, the clock of the grant, item)."""
        found = self._outstanding.values()
        return [(r, self._clock_of(clock, item), item) for r, clock, item in found if replica in (None, r)]

    @property
    def lost(self) -> list[int]:
        """The lost replicas."""
        return sorted(self._lost)

    def is_over(self, item: wire.Item) -> bool:
        """Whether some grant of an item is settled, so that its fate is known."""
        return item.sequence in self._over

    def close(self) -> None:
        """The run has ended well. With a code, late replicas may not have asked for their last clocks. What lost
        replicas still have is dropped. Of portions, what they have sent counts where no other grant does."""
        for replica, _, item in list(self._outstanding.values()):
            if replica in self._lost and self._portions is None:
                self._account(replica, [(item, "dropped")])
            elif replica in self._lost:
                self._account(replica, [(item, "duplicate" if item.sequence in self._over else "used")])
        for replica in range(self._work.replicas if self._work.coded else 0):
            self._use_skipped(replica, self._work.total_clocks)

    def _use_skipped(self, replica: int, clock: int) -> None:
        """The replica is at `clock`: the items of its earlier clocks were used without it."""
        for item in self._queue.skipped(replica, clock):
            self._granted += 1
            self._outstanding[_at(item.sequence, item.copy)] = replica, clock, item
            self._account(replica, [(item, "used")])

    def _settle(
        self,
        replica: int,
        fates: Sequence[tuple[wire.Item, Fate]],
        missing: tuple[int, ...] = (),
        left_out: int = 0,
        late: tuple[int, ...] = (),
    ) -> None:
        if replica in self._lost and self._portions:
            return  # others compute its portions
        self._account(replica, fates, missing, late)
        for item, fate in fates if left_out else ():
            self._leave_out(replica, item, fate, left_out)

    def _leave_out(self, replica: int, item: wire.Item, fate: Fate, microbatches: int) -> None:
        if fate != "used" or not microbatches < self._work.microbatches:
            raise ProtocolError(
                f"replica {replica} left {microbatches} microbatches out of item {item.sequence}, which is {fate} and "
                f"has {self._work.microbatches}"
            )
        examples = item.size * microbatches // self._work.microbatches
        self._cut[item.sequence] = examples
        for account in (self._epochs[item.epoch], self._replicas[replica], *self._groups):
            account.left_out += examples

    def _account(
        self,
        replica: int,
        fates: Iterable[tuple[wire.Item, Change]],
        missing: tuple[int, ...] = (),
        late: tuple[int, ...] = (),
    ) -> None:
        """Items of a replica come back. Each item of a run passes here, so the loop calls little."""
        outstanding, own, coded = self._outstanding, self._replicas[replica].fates, self._work.coded
        for item, told in fates:
            sequence, at = item.sequence, (item.sequence, item.copy) if item.copy else item.sequence
            owner, _, granted = outstanding.get(at, _NONE)
            if owner != replica or granted != item:
                raise ProtocolError(f"replica {replica} says that item {sequence} was {told}, but does not have it")
            fate = "used" if coded else told
            del outstanding[at]
            epoch = self._epochs[item.epoch].fates
            epoch[fate] = epoch.get(fate, 0) + 1
            own[fate] = own.get(fate, 0) + 1
            for group, account in enumerate(self._groups):
                counted = "dropped" if group in missing else "folded" if group in late else fate
                account.fates[counted] = account.fates.get(counted, 0) + 1
            if fate != "duplicate":
                self._change(item, fate, epoch)

    def _change(self, item: wire.Item, fate: Change, epoch: dict[str, int]) -> None:
        """What becomes of an item that comes back. `epoch` counts those of its epoch by fate."""
        after = ITEMS["granted", fate]
        if after != "waiting":
            self._over[item.sequence] = after
            if self._work.epoch_share < 1:
                self._queue.end(item.epoch, epoch.get("used", 0))
        if self._portions is not None:
            if after == "used":
                self._portions.over(item.sequence)
        elif fate == "requeued":
            self._queue.requeue(item)
        elif after == "waiting":
            self._queue.give_back(item)

    def _lose(self, replica: int) -> None:
        if self._portions is None:
            self._queue.leave(replica)
        else:
            self._portions.leave(replica)  # which grants them again; `close` settles them
        self._unasked.discard(replica)
        self._lost.add(replica)

    def summary(self, order: Callable[[int], Sequence[int]] | None = None) -> Summary:
        """The summary so far. With `order`, which returns an epoch's examples in order, it also has `seen`."""
        size = self._work.items_per_epoch
        unseen = (size - self._over.within(e * size, (e + 1) * size) for e in range(self._work.epochs))
        epochs = tuple(self._epochs[e].tally(unseen=left) for e, left in enumerate(unseen))
        total: Counter[str] = Counter()
        for account in self._epochs.values():
            total.update(account.fates)
        whole = Account(total, sum(self._cut.values())).tally(sum(t.unseen for t in epochs))
        return Summary(
            used=total["used"],
            dropped=total["dropped"],
            folded=total["folded"],
            requeued=total["requeued"],
            returned=total["returned"],
            unseen=sum(t.unseen for t in epochs),
            duplicate=total["duplicate"],
            outstanding=len(self._outstanding),
            item_size=self._work.item_size,
            epochs=epochs,
            replicas=tuple(a.tally() for a in self._replicas),
            seen=self._seen(order) if order else (),
            left_out=sum(self._cut.values()),
            lacking=self._lacking(),
            partly=self.partly,
            groups={
                **{name: a.tally() for name, a in zip(self._work.groups, self._groups, strict=True)},
                **{n: whole.lacking(self._lacks[store]) for store, n in self._work.ungrouped if self._lacks[store]},
            },
        )

    def _lacking(self) -> int:
        """The examples by which the short items that count are smaller than others."""
        work = self._work
        lack = [(work.items_per_epoch - 1 - i, work.item_size - size) for i, size in enumerate(reversed(work.short))]
        firsts = [epoch * work.items_per_epoch for epoch in range(work.epochs)] if lack else []
        return sum(few for at in firsts for i, few in lack if self._over.get(at + i) in ("used", "folded"))

    def _seen(self, order: Callable[[int], Sequence[int]]) -> tuple[tuple[int, int], ...]:
        """(times, number of examples that took part so many times), including 0 times."""
        times: Counter[int] = Counter()
        everything: set[int] = set()
        for epoch in range(self._work.epochs):
            examples = order(epoch)
            everything.update(examples)
            base = epoch * self._work.items_per_epoch
            parts: list[int] = []  # examples that are not counted yet: a Counter takes many at once much faster
            for index in range(self._work.items_per_epoch):
                if self._over.get(base + index) in ("used", "folded"):
                    start, size = self._work.span(index)
                    parts += examples[start : start + size - self._cut.get(base + index, 0)]
                    if len(parts) > _PART:
                        times.update(parts)
                        parts.clear()
            times.update(parts)
        return tuple(sorted(Counter(times[e] for e in everything).items()))

    def validate(self) -> None:
        """Check that each granted item is settled, outstanding or given back, that none is settled twice, and that
        those given back wait to be granted again."""
        totals = _added(self._epochs.values())
        ensure(totals == _added(self._replicas), "epochs and replicas have different accounts")
        given = sum(totals.values()) + len(self._outstanding)
        ensure(self._granted == given, "an item was neither settled nor given back")
        settled = sum(totals.get(fate, 0) for fate in ("used", "dropped", "folded"))
        ensure(settled == len(self._over), "an item was settled twice")
        cut = sum(self._cut.values())
        ensure(cut == sum(a.left_out for a in self._epochs.values()), "examples left out are counted wrongly")
        ensure(cut == sum(a.left_out for a in self._replicas), "epochs and replicas left out different examples")
        twice = self._portions is None and any(i.sequence in self._over for _, _, i in self._outstanding.values())
        ensure(not twice, "an item is settled and outstanding")
        if self._portions is not None:
            self._portions.validate()
        else:
            somewhere = settled + len(self._outstanding) + self._queue.kept
            ensure(self._queue.drawn == somewhere, "an item that was given back is lost, or there twice")


def _added(accounts: Iterable[Account]) -> dict[str, int]:
    """How many items of all accounts had each fate."""
    totals: dict[str, int] = {}
    for account in accounts:
        for fate, count in account.fates.items():
            totals[fate] = totals.get(fate, 0) + count
    return totals
