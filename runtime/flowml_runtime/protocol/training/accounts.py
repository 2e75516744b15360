"""Follows the items of a replica from their steps to their fates, in the replica's first stage.

Each group of stores decides alone which contributions count, so an item may count for one group and be late for
another. An account closes when the fate of the item's gradients is known in every group:

* A group that is due at the item's clock counts it if the commit of that clock includes this replica.
* A group that gathers several steps counts it with the first commit at or after its clock that includes this replica,
  because the push of that clock contains it.
* A group whose replicas update parameters of their own, and that folds nothing in, loses all steps since a replica's
  last push if its commit leaves the replica out, because the replica then takes the global parameters.
* A late contribution is folded in when a commit names it. Otherwise it is lost for its group.
* Where sites decide alone, a group above them counts what the site has counted until it pushed.
* Stores without decisions count every step that has finished. The account stays open until they have it, as far as
  the replica knows: until the push after it, or a later one where pushes wait for those of others (`Terms.behind`). A
  snapshot then says which steps these stores may lack.
* If steps may leave out microbatches, the step must have finished too, because only then it is known how many.

An item is settled as used if some store counts it; `missing` names the groups that have lost it, and `late` those
that count it in a later clock. Otherwise it is
settled as folded if a later commit of some group contains it, as requeued if the late rule of a group that has lost
it says so, and as dropped in any other case. At the end of a run, a group that has not counted an item has lost it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.fates import Fate
from flowml_runtime.protocol.training.terms import Committed, Group, Terms


class Settle(msgspec.Struct, frozen=True):
    """Tell the ledger the fate of an item, and the groups for which it does not count although it is used, or counts
    late."""

    item: wire.Item
    fate: Fate
    missing: tuple[int, ...] = ()
    left_out: int = 0
    """The number of its microbatches that were not computed, of an item that counts."""
    late: tuple[int, ...] = ()
    """The groups that count it in a later clock, although others count it in time."""


Alike = tuple[tuple[int, ...], int, tuple[int, ...]]
"""What items share that are told together: `missing`, `left_out` and `late`."""


def joined(actions: Iterable[object]) -> Iterable[tuple[Alike, list[tuple[wire.Item, Fate]]]]:
    """The items that are settled by these actions and their fates, by the groups that do without them, by the number of
    microbatches that were left out, and by the groups that count them late."""
    found: dict[Alike, list[tuple[wire.Item, Fate]]] = {}
    for action in actions:
        if type(action) is Settle:
            alike = action.missing, action.left_out, action.late
            found.setdefault(alike, []).append((action.item, action.fate))
    return found.items()


NONE: frozenset[int] = frozenset()
"""The empty set that all machines of a simulation share."""

NO_ENTRIES: Mapping[Any, Any] = MappingProxyType({})
"""The empty table that they share."""

NOTHING: dict[Any, Any] = {}
"""The same in place of a table that most of them never fill. It is not written: who fills a table begins with
`table or {}`."""

_ANYWAY = frozenset((-1,))
"""What counts an item if some store has no decisions."""


class _Account(msgspec.Struct):
    """Its sets are frozen, so that the accounts of all replicas can share them."""

    clock: int
    item: wire.Item
    open: frozenset[int]
    """The groups in which its fate is unknown."""
    counted: frozenset[int] = NONE
    """The groups that count it in time, and -1 for stores without decisions."""
    folded: frozenset[int] = NONE
    """Those that count it in a later clock."""
    left_out: int | None = None
    """The number of its microbatches that its step left out; None while the step may still leave some out."""
    lost: frozenset[int] = NONE
    joined: tuple[tuple[int, int], ...] = ()
    """(group whose sites decide alone, the later step of the site of which the gradient is a part), if it came too late
    for its own."""


class Accounts:
    """The items of one replica that have begun and are not settled."""

    def __init__(self, terms: Terms, replica: int) -> None:
        self._terms = terms
        self._me = replica
        self._waits = terms.cut is not None
        self._accounts: list[_Account] = []
        """In the order of clocks. They are few, and a table of them is larger."""
        self._pushed: dict[tuple[int, int], Fate] = NOTHING
        """(group above, clock) -> what became of the push of the site."""
        self._sent: dict[int, tuple[int, ...]] = NOTHING
        """Store of `Terms.behind` -> the clocks of the newest pushes. It has those before the first one of as many as
        may wait, and that itself."""

    def kept(self) -> tuple[wire.Unsettled, ...]:
        """The items that are not settled, for a snapshot."""

        def row(groups: frozenset[int]) -> tuple[int, ...]:
            return tuple(sorted(groups))

        return tuple(
            wire.Unsettled(
                a.clock, a.item, row(a.open), row(a.lost), row(a.counted), row(a.folded), a.left_out, a.joined
            )
            for a in self._accounts
        )

    def restore(self, kept: Iterable[wire.Unsettled]) -> None:
        """Go on where a snapshot was taken."""
        for u in kept:
            groups = frozenset(u.open), frozenset(u.counted), frozenset(u.folded), u.left_out, frozenset(u.lost)
            self._accounts.append(_Account(u.clock, u.item, *groups, u.joined))

    @property
    def clocks(self) -> tuple[int, ...]:
        """The clocks of the items that are not settled, in order."""
        return tuple(account.clock for account in self._accounts)

    def _at(self, clock: int) -> _Account | None:
        for account in reversed(self._accounts):
            if account.clock == clock:
                return account
        return None

    def open(self, clock: int, item: wire.Item, committed: Sequence[int]) -> None:
        """The step of `clock` begins. `committed` is the newest clock of each group."""
        left_out = None if self._waits else 0
        terms = self._terms
        anyway = NONE if len(terms.group_of) == len(terms.stores) else _ANYWAY
        account = _Account(clock, item, terms.numbers, anyway, left_out=left_out)
        self._accounts.append(account)
        decided = [g for g in self._terms.groups if clock <= committed[g.number] and g.number not in self._terms.above]
        if decided:
            due = {g.number for g in self._terms.due_groups(clock)}
            account.lost = frozenset(g.number for g in decided if g.discards or (g.number in due and not g.folds))
            account.open -= account.lost

    def finish(self, clock: int, left_out: int = 0, *, last: bool = False) -> list[Settle]:
        """The step of `clock`, the `last` one, has finished without its last `left_out` microbatches. Without
        decisions, that settles its item."""
        pushes = bool(self._terms.behind) and self._push(clock, last=last)
        if self._terms.groups and not self._waits:
            return self._settle([*self._accounts]) if pushes else []
        account = self._at(clock)
        if account is None:
            raise ProtocolError(f"replica {self._me} finishes clock {clock}, which it has not begun")
        account.left_out = left_out
        return self._settle([*self._accounts] if pushes else [account])

    def _push(self, clock: int, *, last: bool) -> bool:
        """The step of `clock` has finished. Whether it ends with a push to a store that may not have earlier ones."""
        pushes, ended = False, last or clock == self._terms.last_clock  # nothing waits at the end
        for store, most in self._terms.behind:
            if ended or self._terms.stores[store].policy.every.due(clock, self._terms.last_clock):
                self._sent = self._sent or {}
                sent = (clock,) * (most + 1) if ended else (*self._sent.get(store, ()), clock)
                self._sent[store] = sent[-1 - most :]
                pushes = True
        return pushes

    def _may_lack(self, clock: int) -> bool:
        """Whether some store without decisions may not have the step of `clock` yet."""
        for store, most in self._terms.behind:
            sent = self._sent.get(store, ())
            if len(sent) <= most or sent[0] < clock:
                return True
        return False

    def commit(self, event: Committed) -> list[Settle]:
        group = self._terms.groups[event.group]
        sender = self._terms.counted_as(group, self._me)
        if group.number in self._terms.above:
            self._note(group, event, sender)
            return self._settle([*self._accounts])
        if event.leaves_out(sender):
            self._lose(group, event.clock)
        else:
            self._count(group.number, event.clock, folded=False)
        for replica, clock in event.folded:
            if replica == sender:
                self._count(group.number, clock, folded=True)
                account = self._at(clock) if group.final else None
                if account is not None:
                    account.joined += ((group.number, event.clock),)
        known = [account for account in self._accounts if account.clock <= event.clock]
        return self._settle(known) if known else []

    def waits(self, committed: Sequence[int]) -> bool:
        """Whether a commit that is still to come may settle an item. `committed` is the newest clock of each group."""
        last = self._terms.last_clock
        return any(committed[g] < last for account in self._accounts for g in account.open)

    def close(self) -> list[Settle]:
        """Settle all items at the end of the run."""
        for account in self._accounts:
            self._follow(account)
            account.lost |= account.open | {g.number for g in self._terms.final if g.above in account.open}
            account.open = NONE
        return self._settle([*self._accounts], ended=True)

    def _lose(self, group: Group, clock: int) -> None:
        """The commit of `clock` leaves this replica out."""
        if group.folds:
            return
        for account in self._accounts:
            lost = account.clock == clock or (account.clock < clock and group.discards)
            if lost and group.number in account.open:
                account.open -= {group.number}
                account.lost |= {group.number}

    def _count(self, group: int, newest: int, *, folded: bool) -> None:
        """A commit contains the push of `newest`, with all gradients since the push before that is still late."""
        every, last = self._terms.groups[group].every, self._terms.last_clock
        mine = [account for account in self._accounts if account.clock <= newest and group in account.open]
        earlier = (account.clock for account in mine if account.clock < newest and every.due(account.clock, last))
        late = -1 if len(mine) == 1 and mine[0].clock == newest else max(earlier, default=-1)
        for account in mine:
            if account.clock > late:
                account.open -= {group}
                if folded:
                    account.folded |= {group}
                else:
                    account.counted |= {group}

    def _note(self, group: Group, event: Committed, leader: int) -> None:
        """The group above has decided what becomes of the pushes of the site."""
        pushed = self._pushed or {}
        if not event.leaves_out(leader):
            pushed[group.number, event.clock] = "used"
        elif not group.folds:
            pushed[group.number, event.clock] = "dropped"
        pushed |= {(group.number, clock): "folded" for replica, clock in event.folded if replica == leader}
        oldest = self._accounts[0].clock if self._accounts else event.clock
        self._pushed = {at: fate for at, fate in pushed.items() if at[1] >= oldest}

    def _follow(self, account: _Account) -> None:
        """If the fate of the item is known in its site, and that of the push of the site, note that of the item."""
        for group in self._terms.final:
            inside, above = group.number, group.above
            if above is None or inside in account.open or above not in account.open:
                continue
            every, last = self._terms.groups[above].every, self._terms.last_clock
            push = every.next_due(dict(account.joined).get(inside, account.clock), last)
            fate = "dropped" if inside in account.lost else self._pushed.get((above, push))
            if fate is None:
                continue
            account.open -= {above}
            if fate == "dropped":
                account.lost |= {inside, above}
            elif fate == "folded" or inside in account.folded:
                account.folded |= {above}
            else:
                account.counted |= {above}

    def _settle(self, accounts: Iterable[_Account], *, ended: bool = False) -> list[Settle]:
        """Settle those of these accounts whose items' fates are known. They are in the order of clocks. Every store has
        all steps of a run that has `ended`."""
        found: list[Settle] = []
        for account in accounts:
            self._follow(account)
            known = not account.open and account.left_out is not None
            if known and (ended or not self._terms.behind or not self._may_lack(account.clock)):
                self._accounts.remove(account)
                found.append(self._fate(account))
        return found

    def _fate(self, account: _Account) -> Settle:
        late = tuple(sorted(account.folded)) if account.folded else ()
        if self._terms.final:  # the groups above them say what counts
            inside = {g.number for g in self._terms.final if g.above is not None}
            account.counted -= inside
            account.folded -= inside
        if account.counted:
            lost = tuple(sorted(account.lost)) if account.lost else ()
            return Settle(account.item, "used", lost, account.left_out or 0, late)
        if account.folded:
            return Settle(account.item, "folded", tuple(sorted(account.lost)))
        requeues = any(self._terms.groups[g].late.requeues for g in account.lost)
        return Settle(account.item, "requeued" if requeues else "dropped")
