"""Gathers what the policies of a fit did: adds it to the record of each step, and sums it up at the end.

    record["waits"]         policy -> what its clock waited for: "waited_s" since the decision before, "spread_s"
                            between the first and the last arrival, "late" (replica -> seconds that it cost), "left_out"
    record["pushed_bytes"]  layer -> bytes of the contributions that replicas have sent
    record["wire_bytes"]    layer -> all bytes for it that workers have sent to other workers: contributions, what sums
                            and averages exchange, parameters, and what homes share
    record["staleness"]     layer -> {number of versions that a contribution was behind: how many such}

The leader of a group of layers says what each of its clocks waited for, in its commit. Where replicas add up gradients
or average parameters among themselves there is no leader, where contributions are applied as they arrive there are no
clocks, and where replicas take portions of a batch arrivals belong to portions. There the reports to the driver say for
whom others waited (`waiting`). A record waits for the decisions about its clock, and until homes have said how stale
its contributions were, but not while MAX_AHEAD newer ones are there. All figures of a fit without common clocks are
those since the record before.

Workers count bytes when they send them, and report them when a step ends. The last record waits until the fit is over:
it gets what is known only then, such as what workers have sent since their last report.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowml.devices import worker_of
from flowml.plan import Training
from flowml.policy import UNBOUNDED
from flowml.policy.waits import Waits
from flowml_runtime import wire
from flowml_runtime.driver.training.history import MAX_AHEAD, Record
from flowml_runtime.driver.training.slow_homes import slow_homes
from flowml_runtime.driver.training.stragglers import Straggler, Stragglers, done, free_costs
from flowml_runtime.driver.training.tables import policy_name
from flowml_runtime.driver.training.waiting import Among, Bound, Portions, mixed, modelled, rough
from flowml_runtime.protocol.training.driver import NoteWaits
from flowml_runtime.protocol.training.staleness import Rows, counted, may_be_stale
from flowml_runtime.protocol.training.summary import Summary
from flowml_runtime.protocol.training.terms import RETIRED, Terms

TIRED = 2 / 3
"""A good replica would itself be left out at times. It then finishes its task before it begins the next clock, so it is
of little use there: this share of what a rested one would save is lost. Measured in simulated fits."""


@dataclass(slots=True)
class _Seen:
    """What belongs to one record."""

    waits: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    late: dict[int, tuple[float, float]] = field(default_factory=dict[int, tuple[float, float]])
    """Replica -> (seconds behind, seconds that it cost), the largest of all policies."""
    left_out: set[int] = field(default_factory=set[int])
    spare: float = 0.0
    """How much earlier the decision would have been with one more good replica, the largest of all policies."""
    pushed: Counter[int] = field(default_factory=Counter[int])
    crossed: Counter[int] = field(default_factory=Counter[int])
    stale: dict[int, Counter[int]] = field(default_factory=dict[int, Counter[int]])

    def take(self, policy: str, found: Waits, excluded: Sequence[int] = (), *, charge: bool = True) -> None:
        """A policy has decided its clock, or its replicas have waited once more in a fit without clocks. Without
        `charge` it does not know what that cost the fit."""
        entry = self.waits.setdefault(policy, {"waited_s": 0.0, "spread_s": 0.0, "late": {}, "left_out": []})
        entry["waited_s"] += found.waited_s
        entry["spread_s"] = max(entry["spread_s"], found.spread_s)
        entry["left_out"] += excluded
        self.left_out.update(excluded)
        self.spare = max(self.spare, found.spare_s if charge else 0.0)
        for replica, _, cost in found.late:
            entry["late"][replica] = entry["late"].get(replica, 0.0) + cost
        self.charge((replica, behind, entry["late"][replica] * charge) for replica, behind, _ in found.late)

    def charge(self, late: Iterable[tuple[int, float, float]]) -> None:
        """These replicas were late: how many seconds, and what it cost."""
        for replica, behind, cost in late:
            known = self.late.get(replica, (0.0, 0.0))
            self.late[replica] = max(known[0], behind), max(known[1], cost)


class Observer:
    """What the policies of one fit did. `began` is the time of its beginning."""

    def __init__(self, training: Training, terms: Terms, began: float, first: int = 0) -> None:
        """`first` is the step of the first record."""
        self._final = terms.total_clocks - 1
        """The step of the last record."""
        self._training = training
        self._terms = terms
        self._names = [policy_name(training, group.stores) for group in terms.groups]
        self._decided = [first - 1] * len(terms.groups)
        self._exact = [
            tuple(s for s in g.stores if not may_be_stale(terms.stores[s])) if g.above is None else ()
            for g in terms.groups
        ]
        """By group the stores whose contributions are never stale."""
        among, alone = modelled(terms)
        self._among = Among(terms, among, began, first) if among and not training.lost else None
        self._mixed = self._among is not None and mixed(terms)
        """Whether replicas wait by several rules, so that no leader knows what a late one cost."""
        self._alone = policy_name(training, alone) if alone else None
        self._modelled = [terms.speculation is not None or set(g.stores) <= set(alone) for g in terms.groups]
        """By group whether reports say what its clocks waited for, instead of the leader."""
        share = terms.speculation
        self._portions = None if share is None else Portions(terms, share.portions, began, training.lost)
        bound = [
            i
            for i, s in enumerate(terms.stores)
            if not s.clocked and not s.collective and s.policy.staleness < UNBOUNDED
        ]
        tightest = min(bound, key=lambda i: terms.stores[i].policy.staleness, default=None)
        self._bound = None if tightest is None else (policy_name(training, bound), Bound(terms, tightest))
        self._told = {number: first for number, store in enumerate(terms.stores) if counted(store)}
        """By store, the first step for which its home may tell more about staleness."""
        self._forwarded = {
            number: group.number for group in terms.groups for number in group.stores if terms.stores[number].forwarded
        }
        """Store -> its group, where leaders send the sums of sites."""
        self._sums: dict[int, set[tuple[int, int]]] = {}
        """Clock -> (store, leader) of the sums that were sent."""
        self._missing: tuple[int, set[tuple[int, int]]] = (-1, set())
        """A decided clock, and those of its sums that count and that were not sent yet."""
        self._without: dict[tuple[int, int], frozenset[int]] = {}
        """(group, clock) -> the replicas that the decision leaves out."""
        self._next = first
        """The step of the next record."""
        self._open: dict[int, _Seen] = {}
        self._held: deque[Record] = deque()
        self._told_bytes: Counter[int] = Counter()
        """By store, the bytes of all reports."""
        self._told_crossed: Counter[int] = Counter()
        """The same, of those that crossed to another worker."""
        self._last: tuple[Mapping[str, Any], ...] = ({}, {}, {})
        """The bytes and the staleness of the record before. Equal ones are shared, because records are many."""
        self._compared = 0
        self._late: Counter[int] = Counter()
        self._left_out: Counter[int] = Counter()
        self._arrived_late: Counter[int] = Counter()
        self._behind: Counter[int] = Counter()
        self._cost: Counter[int] = Counter()
        self._spare: Counter[int] = Counter()
        """By replica, how much earlier the decisions that left it out would have been with one more good one."""
        self._computed: Counter[int] = Counter()
        """By replica, the seconds of its own work."""
        self._stale: dict[int, Counter[int]] = {}
        self._began = began
        self._retired: dict[int, float] = {}
        """By replica, how many seconds after the beginning it had no more work."""
        for replica in training.lost:
            self.retired(replica, began)

    def committed(self, note: NoteWaits) -> None:
        """A group has decided a clock."""
        if note.clock <= self._decided[note.group]:
            return
        self._decided[note.group] = note.clock
        if note.excluded and self._forwarded:
            self._without[note.group, note.clock] = frozenset(note.excluded)
        seen = self._at(note.clock)
        if not self._modelled[note.group]:
            lost = self._training.lost  # they are not late
            late = [r for r in note.excluded if r not in lost] if lost else note.excluded
            seen.take(self._names[note.group], note.waits, late, charge=not self._mixed)
        group = self._terms.groups[note.group]
        if group.sites and not group.relayed:  # the leader sends for its site, which is left out as a whole
            fresh = len(frozenset(group.senders).difference(note.excluded))
        else:
            fresh = (self._terms.replicas if group.relayed else self._terms.members) - len(note.excluded)
        for store in self._exact[note.group]:
            seen.stale.setdefault(store, Counter())[0] += fresh

    def reported(self, report: wire.Report, now: float) -> None:
        """A stage has finished its step."""
        clock = report.clock
        if self._portions is not None:
            clock = self._terms.place(report.replica, clock, report.item.sequence)[1]
        seen = self._at(clock)
        for store, nbytes in report.pushed:
            seen.pushed[store] = seen.pushed.get(store, 0) + nbytes
            self._told_bytes[store] += nbytes
        for store, nbytes in report.crossed:
            seen.crossed[store] = seen.crossed.get(store, 0) + nbytes
            self._told_crossed[store] += nbytes
        if not report.slots:
            return  # the stage that has the loss counts for its replica
        self._computed[report.replica] += report.seconds  # pyright: ignore[reportArgumentType]
        if self._among is not None:
            self._note(self._among.reported(report, now))
        if self._portions is not None:
            found = self._portions.reported(report, now)
            if found is not None:
                seen.take(self._names[0], found)
        if self._bound is not None:
            self._advanced(report.replica, report.clock + 1, now, report.seconds)

    def _note(self, modelled: Iterable[tuple[int, Waits]]) -> None:
        """The model says what these clocks waited for."""
        for decided, found in modelled:
            if self._alone is None:
                self._at(decided).charge((r, behind, cost) for r, behind, cost in found.late if cost)
            else:
                self._at(decided).take(self._alone, found)

    def retired(self, replica: int, now: float) -> None:
        """A replica has no more work."""
        self._retired[replica] = now - self._began
        self._advanced(replica, RETIRED, now)

    def stale(self, rows: Rows) -> None:
        """Homes have applied contributions."""
        for store, reached, counts in rows:
            self._told[store] = max(self._told[store], reached)
            for step, behind, number in counts:
                self._of(max(step, self._next)).stale.setdefault(store, Counter())[behind] += number

    def forwarded(self, told: wire.Forwarded) -> None:
        """The leader of a site has sent its sum."""
        self._at(told.clock).pushed[told.store] += told.nbytes
        self._told_bytes[told.store] += told.nbytes
        self._sums.setdefault(told.clock, set()).add((told.store, told.leader))
        if told.clock == self._missing[0]:
            self._missing[1].discard((told.store, told.leader))

    @property
    def holds(self) -> bool:
        """Whether records wait for the decisions about their clocks."""
        return bool(self._held)

    def ready(self, records: Iterable[Record], seconds: float) -> Iterator[Record]:
        """Complete the records about which all is known, in order, but not the last one. They are ready after `seconds`
        of the fit."""
        self._held.extend(records)
        while self._held and self._is_known(self._held[0]["step"]):
            self._held[0].setdefault("seconds", seconds)
            if self._held[0]["step"] == self._final:
                return
            yield self._complete(self._held.popleft())

    def rest(
        self, records: Iterable[Record], seconds: float, sent: Mapping[int, int], crossed: Mapping[int, int]
    ) -> Iterator[Record]:
        """Complete all remaining records at the end of the fit. `sent`: by store, the bytes of all contributions.
        `crossed`: all that went to other workers."""
        self._held.extend(records)
        if self._among is not None:
            self._note(self._among.rest())
        while self._held:
            record = self._held.popleft()
            record.setdefault("seconds", seconds)
            if not self._held:
                self._add_rest(record["step"], sent, crossed)
            yield self._complete(record)

    def staleness(self) -> dict[str, dict[int, int]]:
        """By layer, how many contributions of the fit were behind by how many versions."""
        return {self._training.stores[s].name: dict(sorted(found.items())) for s, found in sorted(self._stale.items())}

    def stragglers(self, ledger: Summary, seconds: float, traffic: Iterable[wire.Traffic]) -> Stragglers:
        """The replicas that were late, and the homes that were slow."""
        until = [self._retired.get(r, seconds) for r in range(self._terms.replicas)]
        usual = None
        if self._terms.aligned:
            costs = self._costs(until)
        else:
            waited = self._bound[1].waited if self._bound else Counter[int]()
            active = [end - waited[r] for r, end in enumerate(until)]
            usual, costs = free_costs(list(map(done, ledger.replicas)), active, seconds, self._late)
        copied = (r for r, items in enumerate(ledger.replicas) if items.copied)
        found = [
            Straggler(
                replica=r,
                workers=tuple(dict.fromkeys(map(worker_of, self._training.replicas[r]))),
                late=self._late[r],
                left_out=self._left_out[r],
                behind_s=self._behind[r] / self._arrived_late[r] if self._arrived_late[r] else math.nan,
                cost_s=costs.get(r, 0.0),
                items=ledger.replicas[r],
            )
            for r in sorted({*self._late, *costs, *copied})
        ]
        found.sort(key=lambda s: (-s.cost_s, -s.late, s.replica))
        computed = sorted(self._computed.values())
        middle = computed[(len(computed) - 1) // 2] if computed else 0.0
        homes = slow_homes(self._training, self._terms, traffic, middle)
        worked = tuple(float(self._computed[r]) for r in range(self._terms.replicas))
        return Stragglers(self._compared, seconds, tuple(found), usual, homes, rough(self._terms), worked)

    def _costs(self, until: Sequence[float]) -> dict[int, float]:
        """What late replicas have cost by the records, and after the last one."""
        costs = {r: float(self._cost[r]) for r in self._late}
        usual = sum(self._left_out.values()) / self._terms.replicas  # if all were left out alike
        for r, times in self._left_out.items():
            if times > usual and not self._mixed:
                rested = 1 - TIRED * usual / self._compared
                costs[r] += self._spare[r] * rested * (times - usual) / (self._compared - usual)
        model = self._among if self._mixed else None
        if self._terms.drops and costs and (model is None or model.skips):
            # at the end the fit waits until a replica that is left out has stopped
            last = max(costs, key=until.__getitem__)
            left = 0.0 if model is None else model.left
            costs[last] += max(until[last] - sorted(until)[(len(until) - 1) // 2], left, 0.0)
        return costs

    def _at(self, clock: int) -> _Seen:
        """What belongs to the record of a clock, or to the next record if that one is out already."""
        return self._of(max(clock, self._next) if self._terms.aligned else self._next + len(self._held))

    def _of(self, step: int) -> _Seen:
        found = self._open.get(step)
        if found is None:
            found = self._open[step] = _Seen()
        return found

    def _advanced(self, replica: int, clock: int, now: float, own: float = 0.0) -> None:
        if self._bound is not None:
            name, bound = self._bound
            found = bound.reported(replica, clock, now, own)
            if found is not None:
                self._at(self._next).take(name, found, charge=not self._mixed)

    def _is_known(self, step: int) -> bool:
        """Whether a step is decided, and homes have told how stale its contributions were, or it has waited enough."""
        if self._terms.groups and any(self._decided[g.number] < step for g in self._terms.due_groups(step)):
            return False
        if len(self._held) > MAX_AHEAD:
            return True
        stores, last = self._terms.stores, self._terms.last_clock
        if self._forwarded and not self._are_sent(step):
            return False
        return all(told > step or not stores[s].policy.every.due(step, last) for s, told in self._told.items())

    def _are_sent(self, step: int) -> bool:
        """Whether the sums are sent of all sites that count in this decided step. It is asked after each message."""
        if self._missing[0] != step:
            missing = {sum_ for store, group in self._forwarded.items() for sum_ in self._sums_of(store, group, step)}
            self._missing = step, missing.difference(self._sums.get(step, ()))
        return not self._missing[1]

    def _sums_of(self, store: int, group: int, step: int) -> list[tuple[int, int]]:
        """(store, leader) of the sites that count."""
        terms = self._terms.stores[store]
        if not terms.policy.every.due(step, self._terms.last_clock):
            return []
        without = self._without.get((group, step), frozenset())
        return [(store, site[0]) for site in terms.sites if not without.issuperset(site)]

    def _counts(self, seen: _Seen) -> tuple[dict[str, int], dict[str, int], dict[str, dict[int, int]]]:
        """The bytes of both kinds and the staleness by layer. The staleness is added to that of the fit."""
        for store, found in seen.stale.items():
            self._stale.setdefault(store, Counter()).update(found)
        stores = self._training.stores
        pushed, crossed = ({stores[s].name: c[s] for s in sorted(c)} for c in (seen.pushed, seen.crossed))
        return pushed, crossed, {stores[s].name: dict(sorted(seen.stale[s].items())) for s in sorted(seen.stale)}

    def _add_rest(self, step: int, sent: Mapping[int, int], crossed: Mapping[int, int]) -> None:
        """Whatever is known at the end, and belongs to no record before, belongs to the last one."""
        seen = self._of(step)
        for other in [s for s in self._open if s != step]:
            late = self._open.pop(other)
            seen.pushed.update(late.pushed)
            seen.crossed.update(late.crossed)
            for store, found in late.stale.items():
                seen.stale.setdefault(store, Counter()).update(found)
        for store, nbytes in sent.items():
            if nbytes > self._told_bytes[store]:
                seen.pushed[store] += nbytes - self._told_bytes[store]
        for store, nbytes in crossed.items():
            if nbytes > self._told_crossed[store]:
                seen.crossed[store] += nbytes - self._told_crossed[store]

    def _complete(self, record: Record) -> Record:
        seen = self._open.pop(record["step"], None) or _Seen()
        self._sums.pop(record["step"], None)
        for key in [key for key in self._without if key[1] == record["step"]]:
            del self._without[key]
        self._next = record["step"] + 1
        found = self._counts(seen)
        self._last = tuple(b if b == new else new for b, new in zip(self._last, found, strict=True))
        record["waits"], (record["pushed_bytes"], record["wire_bytes"], record["staleness"]) = seen.waits, self._last
        self._compared += bool(seen.waits or seen.late) or not self._terms.aligned
        for replica, (behind, cost) in seen.late.items():
            self._behind[replica] += behind  # pyright: ignore[reportArgumentType]
            self._cost[replica] += cost  # pyright: ignore[reportArgumentType]
            self._arrived_late[replica] += 1
        self._late.update(seen.late.keys() | seen.left_out)
        self._left_out.update(seen.left_out)
        for replica in seen.left_out if seen.spare else ():
            self._spare[replica] += seen.spare  # pyright: ignore[reportArgumentType]
        return record
