"""Follows the items of a replica from their steps to their fates, in the replica's first stage.

Each group of stores decides alone which contributions count, so an item may count for one group and be late for
another. An account closes when the fate of the item's gradients is known in every group:

* A group that is due at the item's clock counts it if the commit of that clock includes this replica.
* A group that gathers several steps counts it with the first commit at or after its clock that includes this replica,
  because the push of that clock contains it.
* A group whose replicas update parameters of their own, and that folds nothing in, loses all steps since a replica's
  last push if its commit leaves the replica out, because the replica then takes the global parameters.
* A late contribution is folded in when a commit names it. Otherwise it is lost for its group.
* Stores without decisions count every step that has finished.
* If steps may leave out microbatches, the step must have finished too, because only then it is known how many.

An item is settled as used if some store counts it; `missing` names the groups that have lost it. Otherwise it is
settled as folded if a later commit of some group contains it, as requeued if the late rule of a group that has lost
it says so, and as dropped in any other case. At the end of a run, a group that has not counted an item has lost it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from flowml.policy import Requeue
from flowml_runtime import wire
from flowml_runtime.protocol.training.terms import Committed, Group, Terms

Fate = Literal["used", "dropped", "folded", "requeued", "duplicate"]


class Settle(msgspec.Struct, frozen=True):
    """Tell the ledger the fate of an item, and the groups for which it does not count although it is used."""

    item: wire.Item
    fate: Fate
    missing: tuple[int, ...] = ()
    left_out: int = 0
    """The number of its microbatches that were not computed, of an item that counts."""


def joined(actions: Iterable[object]) -> Iterable[tuple[tuple[tuple[int, ...], int], list[tuple[wire.Item, Fate]]]]:
    """The items that are settled by these actions and their fates, by the groups that do without them and by the number
    of microbatches that were left out."""
    found: dict[tuple[tuple[int, ...], int], list[tuple[wire.Item, Fate]]] = {}
    for action in actions:
        if type(action) is Settle:
            found.setdefault((action.missing, action.left_out), []).append((action.item, action.fate))
    return found.items()


class _Account(msgspec.Struct):
    item: wire.Item
    open: set[int]
    """The groups in which its fate is unknown."""
    counted: bool = False
    folded: bool = False
    left_out: int | None = None
    """The number of its microbatches that its step left out; None while the step may still leave some out."""
    lost: set[int] = set()


class Accounts:
    """The items of one replica that have begun and are not settled."""

    def __init__(self, terms: Terms, replica: int) -> None:
        self._terms = terms
        self._me = replica
        self._groups = range(len(terms.groups))
        self._waits = terms.cut is not None
        self._anyway = len(terms.group_of) < len(terms.stores)
        """Whether some store has no decisions."""
        self._accounts: dict[int, _Account] = {}

    def kept(self) -> tuple[wire.Unsettled, ...]:
        """The items that are not settled, for a snapshot."""
        return tuple(
            wire.Unsettled(c, a.item, tuple(sorted(a.open)), tuple(sorted(a.lost)), a.counted, a.folded, a.left_out)
            for c, a in self._accounts.items()
        )

    def restore(self, kept: Iterable[wire.Unsettled]) -> None:
        """Go on where a snapshot was taken."""
        for u in kept:
            self._accounts[u.clock] = _Account(u.item, set(u.open), u.counted, u.folded, u.left_out, set(u.lost))

    @property
    def clocks(self) -> tuple[int, ...]:
        """The clocks of the items that are not settled, in order."""
        return tuple(self._accounts)

    def open(self, clock: int, item: wire.Item, committed: Sequence[int]) -> None:
        """The step of `clock` begins. `committed` is the newest clock of each group."""
        left_out = None if self._waits else 0
        account = self._accounts[clock] = _Account(item, set(self._groups), self._anyway, left_out=left_out)
        decided = [g for g in self._terms.groups if clock <= committed[g.number]]
        if decided:
            due = {g.number for g in self._terms.due_groups(clock)}
            account.lost = {g.number for g in decided if g.discards or (g.number in due and not g.folds)}
            account.open -= account.lost

    def finish(self, clock: int, left_out: int = 0) -> list[Settle]:
        """The step of `clock` has finished without its last `left_out` microbatches. Without decisions, that settles
        its item."""
        if self._groups and not self._waits:
            return []
        self._accounts[clock].left_out = left_out
        return self._settle([clock])

    def commit(self, event: Committed) -> list[Settle]:
        group = self._terms.groups[event.group]
        sender = self._terms.counted_as(group, self._me)
        if event.leaves_out(sender):
            self._lose(group, event.clock)
        else:
            self._count(group.number, event.clock, folded=False)
        for replica, clock in event.folded:
            if replica == sender:
                self._count(group.number, clock, folded=True)
        clocks = [c for c in self._accounts if c <= event.clock]
        return self._settle(clocks) if clocks else []

    def waits(self, committed: Sequence[int]) -> bool:
        """Whether a commit that is still to come may settle an item. `committed` is the newest clock of each group."""
        last = self._terms.last_clock
        return any(committed[g] < last for account in self._accounts.values() for g in account.open)

    def close(self) -> list[Settle]:
        """Settle all items at the end of the run."""
        for account in self._accounts.values():
            account.lost |= account.open
            account.open.clear()
        return self._settle(list(self._accounts))

    def _lose(self, group: Group, clock: int) -> None:
        """The commit of `clock` leaves this replica out."""
        if group.folds:
            return
        lost = [c for c in self._accounts if c == clock or (c < clock and group.discards)]
        for account in map(self._accounts.__getitem__, lost):
            if group.number in account.open:
                account.open.discard(group.number)
                account.lost.add(group.number)

    def _count(self, group: int, newest: int, *, folded: bool) -> None:
        """A commit contains the push of `newest`, with all gradients since the push before that is still late."""
        every, last = self._terms.groups[group].every, self._terms.last_clock
        mine = [c for c, account in self._accounts.items() if c <= newest and group in account.open]
        late = -1 if mine == [newest] else max((c for c in mine if c < newest and every.due(c, last)), default=-1)
        for clock in mine:
            if clock > late:
                account = self._accounts[clock]
                account.open.discard(group)
                account.counted |= not folded
                account.folded |= folded

    def _settle(self, clocks: Sequence[int]) -> list[Settle]:
        found: list[Settle] = []
        for clock in sorted(clocks):
            account = self._accounts[clock]
            if not account.open and account.left_out is not None:
                del self._accounts[clock]
                found.append(self._fate(account))
        return found

    def _fate(self, account: _Account) -> Settle:
        if account.counted:
            lost = tuple(sorted(account.lost)) if account.lost else ()
            return Settle(account.item, "used", lost, account.left_out or 0)
        if account.folded:
            return Settle(account.item, "folded", tuple(sorted(account.lost)))
        requeues = any(isinstance(self._terms.groups[g].late, Requeue) for g in account.lost)
        return Settle(account.item, "requeued" if requeues else "dropped")
