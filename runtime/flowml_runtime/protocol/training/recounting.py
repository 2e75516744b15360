"""Counts the ledger of a snapshot in work items of another size, for a run with another number of replicas.

A batch is divided into an item for each replica, so items of another size begin and end elsewhere in the order of an
epoch. Both are parts of the same row of examples. A new item gets the fate that most of its examples had, and of
equal ones the better. If each item of a clock was used, as in a synchronous run, that is exact. Items behind the last
one that is over are drawn again, in the order of the epoch. The caller knows what becomes of an item
whose fate was unknown, or that was used and not sent to all stores yet: it counts as dropped if what it led to is left
out, and else as used.

Counts of events that are not fates of examples, such as returned items, are scaled. Those of other replicas than before
are divided evenly, since their numbers mean others now.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import cast

from flowml_runtime import wire
from flowml_runtime.protocol.training.fates import AccountState
from flowml_runtime.protocol.training.ledger import LedgerState
from flowml_runtime.protocol.training.over import ItemsOver, State
from flowml_runtime.protocol.training.work import QueueState, Work

_BEST: tuple[str, ...] = ("used", "folded", "dropped", "requeued", "waiting", "new")
"""What may have become of an example. "new": its item was never drawn."""
_OVER = frozenset({"used", "folded", "dropped"})


def recounted(state: LedgerState, before: Work, now: Work, rows: int, lost: Callable[[int, int], bool]) -> LedgerState:
    """The ledger in the items of `now`. `rows` is the number of clocks that are over, in an aligned run. `lost` says
    whether what a replica has computed at a clock is left out, if it waited to be applied."""
    fates = _fates(state, before, rows, lost)
    cuts: dict[int, dict[int, int]] = {}
    for sequence, examples in state.cut.items():
        epoch, index = divmod(sequence, before.items_per_epoch)
        cuts.setdefault(epoch, {})[index] = examples
    over = ItemsOver()
    cut: dict[int, int] = {}
    fresh: dict[int, int] = {}
    requeued: list[int] = []
    back: dict[int, list[int]] = {}
    epochs: dict[int, AccountState] = {}
    for epoch in sorted({*state.epochs, *state.queue.fresh}):
        found = _epoch(fates.get(epoch, {}), state.queue.fresh.get(epoch, 0), before, now)
        drawn = len(found)
        while drawn and found[drawn - 1] in ("waiting", "new"):
            drawn -= 1
        first = epoch * now.items_per_epoch
        mine: dict[int, State] = {first + i: cast(State, fate) for i, fate in enumerate(found) if fate in _OVER}
        requeued += [first + i for i, fate in enumerate(found) if fate == "requeued"]
        waiting = [first + i for i, fate in enumerate(found[:drawn]) if fate in ("waiting", "new")]
        fresh[epoch] = drawn
        if waiting:
            back[epoch] = waiting
        shorter = _cut(cuts.get(epoch, {}), first, before, now, mine)
        account = state.epochs.get(epoch, AccountState({}))
        epochs[epoch] = _account(account, mine.values(), sum(shorter.values()), before, now)
        for sequence, fate in mine.items():
            over[sequence] = fate
        cut |= shorter
    queue = QueueState(
        fresh,
        sum(fresh.values()),
        rows if now.aligned else 0,
        _first_left(state.queue, fresh, back, now),
        state.queue.ended,
        {epoch: tuple(map(now.item, found)) for epoch, found in back.items()},
        tuple(map(now.item, requeued)),
        tuple({} for _ in range(now.replicas)),
    )
    total = _added(epochs.values())
    groups = tuple(_scaled(group, before, now) for group in _fitting(state.groups, len(now.groups)))
    runs = tuple(over.runs())
    granted = sum(total.fates.values())
    replicas = _divided(total, now.replicas) if before != now else _with_outstanding(state, lost, now, rows)
    partly = round(state.partly * now.replicas / before.replicas)
    same = before.ungrouped == now.ungrouped
    lacks = {store: round(n * now.replicas / before.replicas) for store, n in state.lacks.items() if same}
    return LedgerState(granted, (), epochs, replicas, groups, cut, runs, queue, partly=partly, lacks=lacks)


def _fates(state: LedgerState, work: Work, rows: int, lost: Callable[[int, int], bool]) -> dict[int, dict[int, str]]:
    """Epoch -> number of an item in it -> what became of it, for items that were drawn and have another fate than to
    wait."""
    found: dict[int, dict[int, str]] = {}

    def note(sequence: int, fate: str) -> None:
        epoch, index = divmod(sequence, work.items_per_epoch)
        found.setdefault(epoch, {})[index] = fate

    for first, count, fate in state.over:
        for i in range(count):
            note(first + i, fate)
    for replica, clock, item in state.outstanding:
        note(item.sequence, "dropped" if lost(replica, clock) else "used")
    for replica, clock, item in state.unsent:
        if lost(replica, clock):
            note(item.sequence, "dropped")
    for one in state.owed:
        if lost(one.replica, -1):
            note(one.item.sequence, "dropped")
    for item in state.queue.requeued:
        note(item.sequence, "requeued")
    for _, item in _computed_by_others(state, work, rows):
        note(item.sequence, "used")
    return found


def _computed_by_others(state: LedgerState, work: Work, rows: int) -> Iterator[tuple[int, wire.Item]]:
    """(replica, its item), of clocks for which it will not ask any more. With a code others have computed them too."""
    for replica, reserved in enumerate(state.queue.reserved if work.coded else ()):
        yield from ((replica, item) for clock, item in reserved.items() if clock < rows)


def _epoch(fates: Mapping[int, str], drawn: int, before: Work, now: Work) -> list[str]:
    """What became of each new item of an epoch, to the last one that has an example of an item that was drawn."""
    ends = [sum(before.span(i)) for i in range(drawn)]
    states = [fates.get(i, "waiting") for i in range(drawn)]
    found: list[str] = []
    for index in range(now.items_per_epoch):
        start, size = now.span(index)
        if not ends or start >= ends[-1]:
            break
        shares, at, i = Counter[str](), start, bisect_right(ends, start)
        while at < start + size:
            end = min(start + size, ends[i]) if i < drawn else start + size
            shares[states[i] if i < drawn else "new"] += end - at
            at, i = end, i + 1
        found.append(max(_BEST, key=lambda fate: shares[fate]))  # of equal ones the first
    return found


def _cut(cut: Mapping[int, int], first: int, before: Work, now: Work, over: Mapping[int, State]) -> dict[int, int]:
    """The examples at the ends of used items of an epoch that were left out, by the new items that have them. The first
    new item of the epoch has the number `first`."""
    found: dict[int, int] = {}
    starts = [now.span(i)[0] for i in range(now.items_per_epoch)] if cut else []
    for index, examples in cut.items():
        last = sum(before.span(index)) - 1
        while examples > 0:
            place = bisect_right(starts, last) - 1
            here = min(examples, last + 1 - starts[place])
            if over.get(first + place) == "used":
                found[first + place] = found.get(first + place, 0) + here
            examples, last = examples - here, last - here
    return found


def _account(account: AccountState, over: Iterable[str], left_out: int, before: Work, now: Work) -> AccountState:
    """An account whose fates are those of `over`."""
    events = {fate: n for fate, n in _scaled(account, before, now).fates.items() if fate not in _OVER and n}
    return AccountState({**Counter(over), **events}, left_out, account.copied)


def _scaled(account: AccountState, before: Work, now: Work) -> AccountState:
    fates = {fate: round(n * now.replicas / before.replicas) for fate, n in account.fates.items()}
    return AccountState(fates, account.left_out, account.copied)


def _fitting(groups: Sequence[AccountState], count: int) -> Iterable[AccountState]:
    """The accounts of so many groups. Without those of the same groups, they begin anew."""
    return groups if len(groups) == count else [AccountState({})] * count


def _added(accounts: Iterable[AccountState]) -> AccountState:
    fates, left_out, copied = Counter[str](), 0, 0
    for account in accounts:
        fates.update(account.fates)
        left_out, copied = left_out + account.left_out, copied + account.copied
    return AccountState(dict(fates), left_out, copied)


def _divided(total: AccountState, replicas: int) -> tuple[AccountState, ...]:
    """The account of all, evenly among replicas."""

    def share(count: int, replica: int) -> int:
        return count // replicas + (replica < count % replicas)

    return tuple(
        AccountState(
            {fate: share(n, replica) for fate, n in total.fates.items()},
            share(total.left_out, replica),
            share(total.copied, replica),
        )
        for replica in range(replicas)
    )


def _with_outstanding(
    state: LedgerState, lost: Callable[[int, int], bool], work: Work, rows: int
) -> tuple[AccountState, ...]:
    """The accounts of the same replicas, with the items of which the fate was unknown."""
    fates = [Counter(account.fates) for account in state.replicas]
    for replica, clock, _ in state.outstanding:
        fates[replica]["dropped" if lost(replica, clock) else "used"] += 1
    for replica, clock, _ in state.unsent:
        if lost(replica, clock):
            fates[replica].update(used=-1, dropped=1)
    for one in state.owed:
        if lost(one.replica, -1):
            fates[one.done_by].update(used=-1, dropped=1)
    for replica, _ in _computed_by_others(state, work, rows):
        fates[replica]["used"] += 1
    return tuple(
        AccountState(dict(mine), account.left_out, account.copied)
        for mine, account in zip(fates, state.replicas, strict=True)
    )


def _first_left(queue: QueueState, fresh: Mapping[int, int], back: Mapping[int, object], now: Work) -> int:
    """The first epoch with items to draw, of a run that is not aligned."""
    begun = (e for e in fresh if e not in queue.ended and (e in back or fresh[e] < now.items_per_epoch))
    return min([queue.epoch, *begun])
