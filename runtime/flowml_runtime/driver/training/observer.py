"""Gathers what the policies of a fit did: adds it to the record of each step, and sums it up at the end.

    record["waits"]         policy -> what its clock waited for: "waited_s" since the decision before, "spread_s"
                            between the first and the last arrival, "late" (replica -> seconds that it cost), "left_out"
    record["pushed_bytes"]  layer -> bytes of the contributions that replicas have sent
    record["staleness"]     layer -> {number of versions that a contribution was behind: how many such}

The leader of a group of layers says what each of its clocks waited for, in its commit. Where replicas add up gradients
or average parameters among themselves there is no leader, and their reports to the driver count as arrivals. Where
contributions are applied as they arrive, a replica waits if it would run further ahead of the slowest one than the
staleness allows; then the report that ends the wait says for whom. A record waits for the decisions about its clock.
All figures of a fit without common clocks are those since the record before.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowml.devices import worker_of
from flowml.plan import Training
from flowml.policy import UNBOUNDED, Gossip, can_read
from flowml.policy.waits import Waits, waits
from flowml_runtime import wire
from flowml_runtime.driver.training.history import Record
from flowml_runtime.driver.training.stragglers import Straggler, Stragglers, slow
from flowml_runtime.driver.training.tables import policy_name
from flowml_runtime.protocol.training.clocks import Clocks
from flowml_runtime.protocol.training.driver import NoteWaits
from flowml_runtime.protocol.training.staleness import Rows, may_be_stale
from flowml_runtime.protocol.training.summary import Summary
from flowml_runtime.protocol.training.terms import RETIRED, Terms


@dataclass(slots=True)
class _Seen:
    """What belongs to one record."""

    waits: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    late: dict[int, tuple[float, float]] = field(default_factory=dict[int, tuple[float, float]])
    """Replica -> (seconds behind, seconds that it cost), the largest of all policies."""
    left_out: set[int] = field(default_factory=set[int])
    pushed: Counter[int] = field(default_factory=Counter[int])
    stale: dict[int, Counter[int]] = field(default_factory=dict[int, Counter[int]])

    def take(self, policy: str, found: Waits, excluded: Sequence[int] = ()) -> None:
        """A policy has decided its clock, or its replicas have waited once more in a fit without clocks."""
        entry = self.waits.setdefault(policy, {"waited_s": 0.0, "spread_s": 0.0, "late": {}, "left_out": []})
        entry["waited_s"] += found.waited_s
        entry["spread_s"] = max(entry["spread_s"], found.spread_s)
        entry["left_out"] += excluded
        self.left_out.update(excluded)
        for replica, behind, cost in found.late:
            entry["late"][replica] = entry["late"].get(replica, 0.0) + cost
            known = self.late.get(replica, (0.0, 0.0))
            self.late[replica] = max(known[0], behind), max(known[1], entry["late"][replica])


@dataclass(slots=True)
class _Sums:
    """The clocks of layers that the replicas keep in step among themselves."""

    replicas: int
    began: float
    arrived: dict[int, dict[int, float]] = field(default_factory=dict[int, dict[int, float]])

    def reported(self, replica: int, clock: int, now: float) -> Waits | None:
        """What the clock waited for, if this was its last report."""
        times = self.arrived.setdefault(clock, {})
        times[replica] = now
        if len(times) < self.replicas:
            return None
        began, self.began = self.began, now
        return waits(self.arrived.pop(clock), self.replicas, began=began, start=began, decided=now)


class _Bound:
    """The waits of replicas that may not run further ahead of the slowest one."""

    def __init__(self, terms: Terms, store: int) -> None:
        self._policy = terms.stores[store].policy
        self._clocks = Clocks(terms.replicas, terms.stores[store].senders(terms.members))
        self._others = max(terms.replicas - 1, 1)
        self._waiting: dict[int, tuple[int, float]] = {}
        """Replica that waits -> the clock that it cannot begin, and since when."""

    def reported(self, replica: int, clock: int, now: float) -> Waits | None:
        """What others have waited for this replica, which now is at `clock`; `RETIRED` if it has no more work."""
        if clock <= self._clocks[replica]:
            return None
        self._clocks.raise_to(clock, replica)
        freed = [(r, since) for r, (at, since) in self._waiting.items() if self._may_begin(at)]
        for waiting, _ in freed:
            del self._waiting[waiting]
        self._waiting.pop(replica, None)
        if clock < RETIRED and not self._may_begin(clock):
            self._waiting[replica] = (clock, now)
        waited = [now - since for r, since in freed if r != replica]
        if not waited:
            return None
        cost = sum(waited) / self._others
        return Waits(cost, 0.0, ((replica, max(waited), cost),))

    def _may_begin(self, clock: int) -> bool:
        every, floor = self._policy.every, self._clocks.floor
        return can_read(clock, (floor,), self._policy.staleness, every.push, every.offset, every.delay)


class Observer:
    """What the policies of one fit did. `began` is the time of its beginning."""

    def __init__(self, training: Training, terms: Terms, began: float) -> None:
        self._training = training
        self._terms = terms
        self._names = [policy_name(training, group.stores) for group in terms.groups]
        self._decided = [-1] * len(terms.groups)
        self._exact = [tuple(s for s in g.stores if not may_be_stale(terms.stores[s])) for g in terms.groups]
        """By group the stores whose contributions are never stale."""
        among = (i for i, s in enumerate(terms.stores) if s.collective or isinstance(s.policy.topology, Gossip))
        summed = tuple(among)
        self._sums = (policy_name(training, summed), _Sums(terms.replicas, began)) if summed else None
        bound = [
            i
            for i, s in enumerate(terms.stores)
            if not s.clocked and not s.collective and s.policy.staleness < UNBOUNDED
        ]
        tightest = min(bound, key=lambda i: terms.stores[i].policy.staleness, default=None)
        self._bound = None if tightest is None else (policy_name(training, bound), _Bound(terms, tightest))
        self._next = 0
        """The step of the next record."""
        self._open: dict[int, _Seen] = {}
        self._held: deque[Record] = deque()
        self._newest: Record | None = None
        self._last: tuple[Mapping[str, int], Mapping[str, Mapping[int, int]]] = ({}, {})
        """The bytes and the staleness of the record before. Equal ones are shared, because records are many."""
        self._compared = 0
        self._late: Counter[int] = Counter()
        self._left_out: Counter[int] = Counter()
        self._arrived_late: Counter[int] = Counter()
        self._behind: Counter[int] = Counter()
        self._cost: Counter[int] = Counter()
        self._stale: dict[int, Counter[int]] = {}

    def committed(self, note: NoteWaits) -> None:
        """A group has decided a clock."""
        if note.clock <= self._decided[note.group]:
            return
        self._decided[note.group] = note.clock
        seen = self._at(note.clock)
        if self._terms.speculation is None:
            seen.take(self._names[note.group], note.waits, note.excluded)
        else:  # arrivals are those of portions, which belong to no replica
            seen.take(self._names[note.group], Waits(note.waits.waited_s, note.waits.spread_s))
        for store in self._exact[note.group]:
            seen.stale.setdefault(store, Counter())[0] += len(self._terms.groups[note.group].senders) - len(
                note.excluded
            )

    def reported(self, report: wire.Report, now: float) -> None:
        """A stage has finished its step."""
        seen = self._at(self._terms.place(report.replica, report.clock, report.item.sequence)[1])
        for store, nbytes in report.pushed:
            seen.pushed[store] += nbytes
        if not report.slots:
            return  # the stage that has the loss counts for its replica
        if self._sums is not None:
            name, sums = self._sums
            found = sums.reported(report.replica, report.clock, now)
            if found is not None:
                seen.take(name, found)
        self._advanced(report.replica, report.clock + 1, now)

    def retired(self, replica: int, now: float) -> None:
        """A replica has no more work."""
        self._advanced(replica, RETIRED, now)

    def stale(self, rows: Rows) -> None:
        """Homes have applied contributions."""
        seen = self._at(self._next)
        for store, counted in rows:
            seen.stale.setdefault(store, Counter()).update(dict(counted))

    def ready(self, records: Iterable[Record], *, over: bool = False) -> Iterator[Record]:
        """Complete the records whose clocks are decided, in order. At the end of a fit all of them are."""
        self._held.extend(records)
        while self._held and (over or self._is_decided(self._held[0]["step"])):
            yield self._complete(self._held.popleft())
        if over and self._newest is not None:
            self._add_rest(self._newest)

    def staleness(self) -> dict[str, dict[int, int]]:
        """By layer, how many contributions of the fit were behind by how many versions."""
        return {self._training.stores[s].name: dict(sorted(found.items())) for s, found in sorted(self._stale.items())}

    def stragglers(self, ledger: Summary, seconds: float) -> Stragglers:
        """The replicas that were late."""
        few, usual = slow(ledger.replicas) if not self._terms.aligned else (frozenset[int](), None)
        found = [
            Straggler(
                replica=r,
                workers=tuple(dict.fromkeys(map(worker_of, self._training.replicas[r]))),
                late=self._late[r],
                left_out=self._left_out[r],
                behind_s=self._behind[r] / self._arrived_late[r] if self._arrived_late[r] else math.nan,
                cost_s=float(self._cost[r]),
                items=ledger.replicas[r],
            )
            for r in sorted({*self._late, *few})
        ]
        found.sort(key=lambda s: (-s.cost_s, -s.late, s.replica))
        return Stragglers(self._compared, seconds, tuple(found), usual)

    def _at(self, clock: int) -> _Seen:
        """What belongs to the record of a clock, or to the next record if that one is out already."""
        step = max(clock, self._next) if self._terms.aligned else self._next
        found = self._open.get(step)
        if found is None:
            found = self._open[step] = _Seen()
        return found

    def _advanced(self, replica: int, clock: int, now: float) -> None:
        if self._bound is not None:
            name, bound = self._bound
            found = bound.reported(replica, clock, now)
            if found is not None:
                self._at(self._next).take(name, found)

    def _is_decided(self, step: int) -> bool:
        if not self._terms.groups:
            return True
        return all(self._decided[group.number] >= step for group in self._terms.due_groups(step))

    def _counts(self, seen: _Seen) -> tuple[dict[str, int], dict[str, dict[int, int]]]:
        """The bytes and the staleness by layer. The staleness is added to that of the fit."""
        for store, found in seen.stale.items():
            self._stale.setdefault(store, Counter()).update(found)
        stores = self._training.stores
        pushed = {stores[s].name: seen.pushed[s] for s in sorted(seen.pushed)}
        return pushed, {stores[s].name: dict(sorted(seen.stale[s].items())) for s in sorted(seen.stale)}

    def _add_rest(self, record: Record) -> None:
        """What homes and stages have told after the last record was complete belongs to it."""
        for step in sorted(self._open):
            pushed, stale = self._counts(self._open.pop(step))
            record["pushed_bytes"] = dict(Counter(record["pushed_bytes"]) + Counter(pushed))
            known = record["staleness"]
            added = {n: dict(sorted((Counter(known.get(n)) + Counter(found)).items())) for n, found in stale.items()}
            record["staleness"] = {**known, **added}

    def _complete(self, record: Record) -> Record:
        seen = self._open.pop(record["step"], None) or _Seen()
        self._next, self._newest = record["step"] + 1, record
        pushed, stale = self._counts(seen)
        before = self._last
        self._last = (before[0] if before[0] == pushed else pushed, before[1] if before[1] == stale else stale)
        record["waits"], (record["pushed_bytes"], record["staleness"]) = seen.waits, self._last
        self._compared += bool(seen.waits) or not self._terms.aligned
        for replica, (behind, cost) in seen.late.items():
            self._behind[replica] += behind  # pyright: ignore[reportArgumentType]
            self._cost[replica] += cost  # pyright: ignore[reportArgumentType]
            self._arrived_late[replica] += 1
        self._late.update(seen.late.keys() | seen.left_out)
        self._left_out.update(seen.left_out)
        return record
