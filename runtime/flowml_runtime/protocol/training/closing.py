"""Closes the accounts of work items that a snapshot has as unsettled, for a run whose machines do not have them.

A replica that is lost settles nothing more. If a run begins with other replicas or layers, every machine begins anew,
and so do the accounts of all. At a snapshot every decision about earlier clocks is made. So what a group has not
decided of an item is gathered for the next push of the replica, or waits for a later clock:

* What a group has decided stays as it is.
* A group that has not decided counts the item if what was gathered goes on in the next run, and has lost it if that is
  left out. What waits for a later clock is left out.
* A store without decisions counts the item if it has the push with it, or if what was gathered goes on.

Then the item has the fate that its replica would have told at the end of a run (`Accounts`), group by group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from msgspec.structs import replace

from flowml_runtime import wire
from flowml_runtime.protocol.training.accounts import Accounts, Settle, joined
from flowml_runtime.protocol.training.clocks import contained
from flowml_runtime.protocol.training.ledger import Ledger, LedgerState, Settled
from flowml_runtime.protocol.training.terms import Terms
from flowml_runtime.protocol.training.work import Work

_ANYWAY = -1
"""The number that stands for stores without decisions among the groups of an account."""


def closed(
    state: LedgerState,
    work: Work,
    terms: Terms,
    stopped: wire.Stopped,
    replicas: Iterable[int],
    goes_on: Callable[[int], bool],
) -> LedgerState:
    """The ledger of a snapshot when all items of these replicas have fates. `goes_on` says of a store whether what the
    replicas had gathered for it goes on in the next run.

    The same ledger without common clocks, with a code and with portions, where others do what a replica has not sent.
    """
    if not terms.aligned or work.coded or work.copies is not None:
        return state
    unsettled = {stage.replica: stage.unsettled for stage in stopped.stages if stage.stage == 0}
    ledger = Ledger(work)
    ledger.restore(state, stopped.clocks)
    for replica in replicas:
        held = {(clock, item) for _, clock, item in ledger.held(replica)}
        known = (u for u in unsettled.get(replica, ()) if (u.clock, u.item) in held)
        for (missing, left_out, late), fates in joined(_fates(known, terms, stopped, replica, goes_on)):
            ledger.step(Settled(replica, tuple(fates), missing, left_out, late))
        for _, _, item in ledger.held(replica):  # it is not known what these steps left out
            ledger.step(Settled(replica, ((item, "dropped"),)))
    return ledger.kept(stopped.clocks)


def _fates(
    unsettled: Iterable[wire.Unsettled],
    terms: Terms,
    stopped: wire.Stopped,
    replica: int,
    goes_on: Callable[[int], bool],
) -> list[Settle]:
    """The fates of these items of a replica."""
    waiting = {(w.store, w.clock) for w in stopped.waiting if w.replica == replica}
    undecided = [number for number in range(len(terms.stores)) if number not in terms.group_of]

    def stays(store: int, clock: int) -> bool:
        """Whether what is gathered of the step of `clock` goes on, and is no push that waits."""
        push = terms.stores[store].policy.every.next_due(clock, terms.last_clock)
        return goes_on(store) and (store, push) not in waiting

    def has(store: int, clock: int) -> bool:
        """The same of a store without decisions, which may have the push."""
        every = terms.stores[store].policy.every
        if clock >= contained(terms, every, stopped.clocks[replica]):
            return goes_on(store)
        return (store, every.next_due(clock, terms.last_clock)) not in waiting

    def known(account: wire.Unsettled) -> wire.Unsettled:
        clock, groups = account.clock, terms.groups
        kept = {g for g in account.open if any(stays(store, clock) for store in groups[g].stores)}
        counted = {*account.counted, *kept}
        if not any(has(store, clock) for store in undecided):
            counted.discard(_ANYWAY)
        return replace(account, open=tuple({*account.open} - kept), counted=tuple(counted))

    accounts = Accounts(terms, replica)
    accounts.restore(map(known, unsettled))
    return accounts.close()
