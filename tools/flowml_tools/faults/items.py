"""Counts the work items of a history, from the messages that grant, settle and return them, and compares the ledger.

What became of the items of a lost replica is what the driver says at the end. `contents` compares it, and what workers
have said, with what the stores contain.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from flowml_runtime import wire
from flowml_runtime.protocol.training import actions, driver
from flowml_runtime.protocol.training.summary import Tally
from flowml_tools.faults.contents import Fate, contents
from flowml_tools.faults.history import DRIVER, Turn
from flowml_tools.faults.timeline import Timeline

FATES = ("used", "dropped", "folded", "requeued", "returned", "duplicate")


@dataclass
class _Count:
    """The naive count of one history."""

    seen: Timeline
    granted: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    """(item, copy) -> its replica, and the clock of its step, of those that are out."""
    fates: dict[int, Fate] = field(default_factory=dict[int, Fate])
    _settled: set[int] = field(default_factory=set[int])
    """The lost replicas whose items are all settled."""
    by: defaultdict[Any, Counter[str]] = field(default_factory=lambda: defaultdict(Counter[str]))
    """("all", 0), ("epoch", number), ("replica", number) or ("group", number) -> items by fate."""

    def tell(self, turn: Turn) -> Iterator[str]:
        """What an event of the driver says about items."""
        told = turn.event.message if isinstance(turn.event, actions.Received) else None
        ignored = isinstance(told, wire.Settled | wire.Ask) and self._is_ignored(told.replica, turn)
        if isinstance(told, wire.Settled) and not ignored:
            for item, fate in told.fates:
                yield from self._end(item, fate, told.replica, told.missing, told.left_out, told.late)
        elif isinstance(told, wire.Ask) and not ignored:
            for item in told.returned:
                yield from self._end(item, "returned", told.replica)
        for action in turn.wanted:
            if isinstance(action, driver.NoteFates) and not isinstance(told, wire.Settled):
                for item, fate in action.fates:  # of a lost replica
                    replica, _ = self.granted.get((item.sequence, item.copy), (-1, -1))
                    yield from self._end(item, fate, replica, action.missing, late=action.late)
            elif isinstance(action, driver.NoteLeftOut):
                yield from self._leave_out(action)
            elif isinstance(action, actions.Send) and isinstance(action.message, wire.Grant):
                yield from self._grant(action.message)

    def _leave_out(self, told: driver.NoteLeftOut) -> Iterator[str]:
        """All items of a lost replica are settled. Those that no store has go back, even if they were settled."""
        work, replica = self.seen.work, told.replica
        self._settled.add(replica)
        for item in told.returned:
            fate = self.fates.pop(item.sequence, None)
            if fate is not None:
                self.granted[item.sequence, item.copy] = fate.replica, fate.clock
                for key in (("all", 0), ("epoch", item.epoch), ("replica", replica)):
                    self.by[key][fate.name] -= 1
            yield from self._end(item, "returned", replica)
        for sequence, _ in [at for at, (holder, _) in self.granted.items() if holder == replica]:
            yield from self._end(work.item(sequence), "used", replica)

    def _is_ignored(self, replica: int, turn: Turn) -> bool:
        """Others compute the portions of a lost replica, or its items are settled."""
        if replica in self._settled:
            return True
        return self.seen.terms.speculation is not None and replica in self.seen.lost_at(turn)

    def _grant(self, told: wire.Grant) -> Iterator[str]:
        for clock, item in told.items:
            key = item.sequence, item.copy
            settled = item.sequence in self.fates and self.fates[item.sequence].name != "requeued"
            if key in self.granted or (settled and not item.copy):
                yield f"item {item.sequence} is granted again"
            self.granted[key] = told.replica, clock

    def _end(
        self,
        item: wire.Item,
        fate: str,
        replica: int,
        missing: tuple[int, ...] = (),
        left_out: int = 0,
        late: tuple[int, ...] = (),
    ) -> Iterator[str]:
        holder, clock = self.granted.pop((item.sequence, item.copy), (-1, -1))
        if holder != replica:
            yield f"item {item.sequence} is {fate} at replica {replica}, which does not have it"
        self._add(item.epoch, replica, fate, missing, late)
        if fate not in ("duplicate", "returned"):
            self.fates[item.sequence] = Fate(fate, replica, clock, missing, left_out)

    def _add(
        self, epoch: int, replica: int, fate: str, missing: tuple[int, ...] = (), late: tuple[int, ...] = ()
    ) -> None:
        for key in (("all", 0), ("epoch", epoch), ("replica", replica)):
            self.by[key][fate] += 1
        for group in range(len(self.seen.work.groups)):
            self.by["group", group]["dropped" if group in missing else "folded" if group in late else fate] += 1

    def end(self) -> None:
        """What lost replicas still have is dropped. Of portions one result counts."""
        speculates, size = self.seen.terms.speculation is not None, self.seen.work.items_per_epoch
        for (sequence, copy), (replica, clock) in [
            (i, at) for i, at in self.granted.items() if at[0] in self.seen.lost
        ]:
            fate = "dropped" if not speculates else "duplicate" if sequence in self.fates else "used"
            self.fates.setdefault(sequence, Fate(fate, replica, clock))
            self._add(sequence // size, replica, fate)
            del self.granted[sequence, copy]

    def ledger(self) -> Iterator[str]:
        """Whether the driver's ledger says the same."""
        summary, work = self.seen.summary, self.seen.work
        assert summary is not None
        if self.granted:
            yield f"items {sorted(self.granted)} were granted and never settled"
        rows: list[tuple[Any, Tally]] = [(("epoch", n), tally) for n, tally in enumerate(summary.epochs)]
        rows += [(("replica", n), tally) for n, tally in enumerate(summary.replicas)]
        rows += [(("group", n), tally) for n, tally in enumerate(summary.groups.values())]
        for (kind, number), tally in [(("all", 0), summary), *rows]:
            told = {n: getattr(tally, n) for n in FATES}
            counted = {n: self.by[kind, number][n] for n in FATES}
            if told != counted:
                yield f"the ledger of {kind} {number} says {told}, and workers settled {counted}"
        total = summary.used + summary.dropped + summary.folded + summary.unseen
        if total != work.epochs * work.items_per_epoch:
            yield f"the ledger has {total} items in all, and the epochs have {work.epochs * work.items_per_epoch}"


def items(seen: Timeline) -> Iterator[str]:
    count = _Count(seen)
    for turn in seen.turns:
        if turn.who == DRIVER:
            yield from count.tell(turn)
            if any(isinstance(action, driver.Over) for action in turn.wanted):
                break  # the ledger is settled: what a lost replica had sent before comes too late
    count.end()
    if seen.summary is not None:
        if not seen.coded:
            yield from count.ledger()
        yield from contents(seen, count.fates)
