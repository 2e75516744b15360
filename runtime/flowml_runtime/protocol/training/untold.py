"""Works out the fates of the items of a lost replica, which it has not told, from the decisions that the driver hears.

A replica that asks for several items at once tells their fates late, and one that stops tells nothing more, although
what it has sent may count. So the driver keeps the decisions that may still concern an item whose fate it does not
know:

* A decision about the clock of the item, and those until the next push after it, which contains it too.
* A decision that folds such a push in, and, where a group above the sites decides about their pushes, its decisions
  until the next push of the site.

An item of a lost replica gets the fate that the replica would have told (`Accounts`), if its step was certainly
finished. That is so if a decision has its contribution, or if the replica has reported the step. A later contribution
or report is enough where the replica cannot have skipped the clock: because the policies skip none, or because the
next decision of each group contains work of the replica, or can leave out only lost ones. All other items are dropped.
A run whose steps leave out microbatches keeps no decisions, because they do not say how many, and neither does one with
a code or copies, whose items the ledger counts by itself. An item that would be drawn again is dropped, because the
run is over.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from msgspec.structs import replace

from flowml.policy import Coded, Speculate
from flowml_runtime import wire
from flowml_runtime.protocol.training.accounts import Accounts, Settle
from flowml_runtime.protocol.training.terms import Committed, Group, Terms

Held = tuple[int, int, wire.Item]
"""(replica, clock, item) of an item whose fate the driver does not know."""

_FEW = 64
"""So many decisions are kept without a search for those that are of no use any more."""

_ITEMS_EACH = 16
"""A search looks at no more items than this for each decision that has come since the one before."""


class Untold:
    """The decisions of one run that may concern items whose fates are unknown. `unsettled` are the accounts that a
    snapshot has of each replica, if the run goes on from one."""

    def __init__(self, terms: Terms, unsettled: dict[int, tuple[wire.Unsettled, ...]]) -> None:
        self._terms = terms
        self._unsettled = unsettled
        counted = terms.cut is None and not any(isinstance(g.quorum, Coded | Speculate) for g in terms.groups)
        self._keeps = bool(terms.groups) and counted
        self._reads = self._keeps and any(group.every.push > 1 for group in terms.groups)
        """Whether reports say something that decisions do not."""
        self._log: list[wire.Commit] = []
        self._reported: defaultdict[int, set[int]] = defaultdict(set)
        self._most = _FEW
        """The number of kept decisions, or of reports of a replica, at which it searches for those of no use."""

    @property
    def kept(self) -> int:
        """The number of decisions that it keeps."""
        return len(self._log)

    def note(self, commit: wire.Commit, held: Callable[[], Iterable[Held]]) -> None:
        """A group has decided. `held` returns the items whose fates are unknown."""
        if self._keeps:
            self._log.append(commit)
            if len(self._log) > self._most:
                self._forget(list(held()))

    def report(self, replica: int, clock: int) -> None:
        """A step of a replica has ended."""
        if self._reads:
            self._reported[replica].add(clock)

    def fates(self, replica: int, held: Iterable[Held]) -> list[Settle]:
        """The fates of the items of a lost replica, as far as decisions say something about them."""
        if not self._keeps:
            return []
        terms, mine = self._terms, [told for told in self._log if self._concerns(told, replica)]
        items, found = sorted((clock, item) for _, clock, item in held), list[Settle]()
        accounts = Accounts(terms, replica)
        accounts.restore(u for u in self._unsettled.get(replica, ()) if (u.clock, u.item) in items)
        known, begun = {*accounts.clocks}, _Steps(terms, replica, mine, self._reported[replica])
        for clock, item in items:
            if clock in known:
                continue
            if begun.has_finished(clock):
                accounts.open(clock, item, [-1] * len(terms.groups))
            else:
                found.append(Settle(item, "dropped"))
        newest = [-1] * len(terms.groups)
        for told in mine:
            if told.clock > newest[told.group]:
                newest[told.group] = told.clock
                found += accounts.commit(_decided(told))
        found += accounts.close()
        return [replace(told, fate="dropped") if told.fate == "requeued" else told for told in found]

    def is_sure(self, replica: int, held: Iterable[Held]) -> bool:
        """Whether `fates` is right about all items that it says are dropped: no push of several steps that counts may
        contain one."""
        if not self._reads:
            return self._keeps
        mine = [told for told in self._log if self._concerns(told, replica)]
        begun = _Steps(self._terms, replica, mine, self._reported[replica])
        return all(clock >= begun.newest or begun.has_finished(clock) for _, clock, _ in held)

    def _concerns(self, told: wire.Commit, replica: int) -> bool:
        """Whether the replica's first stage gets this message."""
        group = self._terms.groups[told.group]
        if told.site is None:
            return not group.relayed
        return replica in group.sites[told.site]

    def _forget(self, held: Sequence[Held]) -> None:
        """Keep only what may concern an item whose fate is unknown. The next search comes when as many decisions are
        kept as a share of these items, so that the time of searches is one of the decisions."""
        waiting = sorted({clock for _, clock, _ in held})
        kept: list[wire.Commit] = []
        joined = list(waiting)
        """With the clocks at which a site has taken such items in late, as the groups above see them."""
        for told in self._log:
            group = self._terms.groups[told.group]
            folds = any(self._near(waiting, group, clock) for _, clock in told.folded)
            if folds and group.final:
                insort(joined, told.clock)
            above = joined if group.number in self._terms.above else waiting
            if folds or self._near(above, group, told.clock):
                kept.append(told)
        self._log, self._most = kept, max(_FEW, 2 * len(kept), len(held) // _ITEMS_EACH)
        oldest = waiting[0] if waiting else 0
        for replica, clocks in self._reported.items():
            self._reported[replica] = {clock for clock in clocks if clock >= oldest}

    def _near(self, clocks: Sequence[int], group: Group, clock: int) -> bool:
        """Whether a decision of `group` about `clock` may contain the step of one of `clocks`."""
        place = bisect_right(clocks, clock)
        return place > 0 and clock <= group.every.next_due(clocks[place - 1], self._terms.last_clock)


class _Steps:
    """The steps of a lost replica that are known to be finished."""

    def __init__(self, terms: Terms, replica: int, told: Iterable[wire.Commit], reported: set[int]) -> None:
        self._terms = terms
        self._sure = set(reported)
        self._decided: defaultdict[int, list[tuple[int, bool]]] = defaultdict(list)
        """Group -> its decisions in order: (clock, whether it may have left the replica out while that lived)."""
        for commit in told:
            group, event = terms.groups[commit.group], _decided(commit)
            if terms.counted_as(group, replica) != replica or group.number in terms.above:
                continue  # it is about the push of a site
            self._sure.update(clock for who, clock in commit.folded if who == replica)
            out = event.leaves_out(replica)
            self._decided[group.number].append((commit.clock, out and group.drops))
            if not out:
                self._sure.add(commit.clock)
        self.newest = max(self._sure, default=-1)
        """The newest one that is certain."""

    def has_finished(self, clock: int) -> bool:
        if clock in self._sure or clock >= self.newest:
            return clock in self._sure
        runs_all = bool(self._terms.never_skipped) or not self._terms.may_skip(clock)
        return runs_all or not any(self._has_overtaken(told, clock) for told in self._decided.values())

    @staticmethod
    def _has_overtaken(told: Sequence[tuple[int, bool]], clock: int) -> bool:
        """Whether a group may have decided about `clock` or a later one before the replica began its step."""
        return next((out for decided, out in told if decided >= clock), False)


def _decided(told: wire.Commit) -> Committed:
    return Committed(told.clock, told.excluded, told.group, folded=told.folded)
