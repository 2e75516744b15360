"""Closes the accounts of work items that a snapshot has as unsettled, for a run whose machines do not have them.

A replica that is lost settles nothing more. If a run begins with other replicas or layers, every machine begins anew,
and so do the accounts of all. At a snapshot every decision about earlier clocks is made. So what a group has not
decided of an item is gathered for the next push of the replica, or waits for a later clock:

* What a group has decided stays as it is.
* A group that has not decided counts the item if what was gathered goes on in the next run, and has lost it if that is
  left out. What waits for a later clock is left out.
* A store without decisions counts the item if it has the push with it, or if what was gathered goes on.

Then the item has the fate that its replica would have told at the end of a run (`Accounts`), group by group. One that
is used, and that some layer has lost by that, counts as `partly`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from msgspec.structs import replace

from flowml_runtime import wire
from flowml_runtime.protocol.training.accounts import Accounts, Settle, joined
from flowml_runtime.protocol.training.departed import lose
from flowml_runtime.protocol.training.ledger import Ledger, LedgerState, Settled
from flowml_runtime.protocol.training.owed import Owed, reached
from flowml_runtime.protocol.training.terms import Terms
from flowml_runtime.protocol.training.work import Work

_ANYWAY = -1
"""The number that stands for stores without decisions among the groups of an account."""


def closed(
    state: LedgerState,
    work: Work,
    terms: Terms,
    stopped: wire.Stopped,
    replicas: Collection[int],
    goes_on: Callable[[int], bool],
) -> LedgerState:
    """The ledger of a snapshot when all items of these replicas have fates. `goes_on` says of a store whether what the
    replicas had gathered for it goes on in the next run.

    Items are settled before stores without decisions have them, and `unsent` and `owed` say which. The ledger is the
    same with a code and with portions, where others do what a replica has not sent.
    """
    if work.coded or work.copies is not None:
        return state
    unsettled = {stage.replica: stage.unsettled for stage in stopped.stages if stage.stage == 0}
    ledger = Ledger(work)
    ledger.restore(state, stopped.clocks)
    owed = [one for one in state.owed if one.replica not in replicas]
    for replica in replicas:
        held = {(clock, item) for _, clock, item in ledger.held(replica)}
        known = [u for u in unsettled.get(replica, ()) if (u.clock, u.item) in held]
        fate = _Fates(terms, stopped, replica, goes_on)
        settled = fate.of(known) if terms.aligned else []
        for (missing, left_out, late), fates in joined(settled):
            ledger.step(Settled(replica, tuple(fates), missing, left_out, late))
        clocks = {one.item.sequence: one.clock for one in known}
        for told in settled:
            counts = told.fate in ("used", "folded")
            owed += fate.note(ledger, told.item, clocks[told.item.sequence]) if counts else []
        for _, _, item in ledger.held(replica) if terms.aligned else ():  # it is not known what these steps left out
            ledger.step(Settled(replica, ((item, "dropped"),)))
        sent = [
            (Owed(replica, replica, i, fate.behind(c)), fate.lacking(c)) for r, c, i in state.unsent if r == replica
        ]
        before = [(one, fate.left(one.lacking)) for one in state.owed if one.replica == replica]
        for one, left in (*before, *sent):
            lose(ledger, replace(one, lacking=left), terms)
            rest = tuple(store for store in one.lacking if store not in left)
            owed += [replace(one, lacking=rest, lost=(*one.lost, *left))] if rest else []
    unsent = tuple(one for one in state.unsent if one[0] not in replicas)
    return replace(ledger.kept(stopped.clocks), unsent=unsent, owed=tuple(owed))


class _Fates:
    """What becomes of the unsettled items of a replica."""

    def __init__(self, terms: Terms, stopped: wire.Stopped, replica: int, goes_on: Callable[[int], bool]) -> None:
        self._terms, self._stopped, self._me, self._goes_on = terms, stopped, replica, goes_on
        self._waiting = [(w.store, w.clock) for w in stopped.waiting if w.replica == replica]
        self._reached = reached(terms, stopped, replica)
        self._undecided = [number for number in range(len(terms.stores)) if number not in terms.group_of]
        self._partly: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        """The number of an item that some layer loses -> the stores without decisions, and with them, that do not have
        it."""

    def of(self, unsettled: Iterable[wire.Unsettled]) -> list[Settle]:
        accounts = Accounts(self._terms, self._me)
        accounts.restore(map(self._known, unsettled))
        return accounts.close()

    def _known(self, account: wire.Unsettled) -> wire.Unsettled:
        clock, groups = account.clock, self._terms.groups
        kept = {g for g in account.open if any(self._stays(store, clock) for store in groups[g].stores)}
        counted = {*account.counted, *kept}
        lacking = self.lacking(clock)
        if len(lacking) == len(self._undecided):
            counted.discard(_ANYWAY)
        lost = {*account.open} - kept
        if lacking or lost:
            self._partly[account.item.sequence] = lacking, tuple(s for g in sorted(lost) for s in groups[g].stores)
        return replace(account, open=tuple(lost), counted=tuple(counted))

    def note(self, ledger: Ledger, item: wire.Item, clock: int) -> list[Owed]:
        """Note that some layers lose a used item. Returns what the replica owes to others of it."""
        lacking, decided = self._partly.get(item.sequence, ((), ()))
        if lacking or decided:
            ledger.note_partly(lacking)
        rest = tuple(store for store in self.behind(clock) if store not in lacking)
        return [Owed(self._me, self._me, item, rest, (*lacking, *decided))] if rest else []

    def lacking(self, clock: int) -> tuple[int, ...]:
        """The stores without decisions that do not have the step of `clock`, and do not get it any more."""
        return tuple(store for store in self._undecided if not self._has(store, clock))

    def behind(self, clock: int) -> tuple[int, ...]:
        """The stores without decisions that do not have the step of `clock` yet."""
        return tuple(store for store in self._undecided if clock >= self._reached[store])

    def left(self, stores: Iterable[int]) -> tuple[int, ...]:
        """Those of these stores that do not get what the replica had gathered before its first push in this run."""
        waits = {store for store, _ in self._waiting}
        return tuple(store for store in stores if store in waits or not self._goes_on(store))

    def _stays(self, store: int, clock: int) -> bool:
        """Whether what is gathered of the step of `clock` goes on, and is no push that waits."""
        push = self._terms.stores[store].policy.every.next_due(clock, self._terms.last_clock)
        return self._goes_on(store) and (store, push) not in self._waiting

    def _has(self, store: int, clock: int) -> bool:
        """The same of a store without decisions, which may have the push."""
        if clock < self._reached[store]:
            return True
        waits = any(number == store and clock <= push for number, push in self._waiting)  # no replica leaves one out
        return self._goes_on(store) and not waits
