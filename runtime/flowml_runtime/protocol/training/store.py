"""What a home keeps of one store: its version and floor, and the contributions that it has not applied or released."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from flowml.policy import UNBOUNDED, Consensus, Mix
from flowml.policy.apply import base_of
from flowml.policy.filters import is_lossless
from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError, ensure
from flowml_runtime.protocol.training.clocks import Clocks
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import RETIRED, Terms

Handle = int
"""Names a payload that the host keeps for the machine until it is applied or released."""


class ContributionReceived(msgspec.Struct, frozen=True):
    """A part of a contribution has arrived. `weight` is the number of microbatch gradients in it."""

    store: int
    part: int
    replica: int
    incarnation: int
    clock: int
    base_version: int
    weight: int
    handle: Handle
    empty: bool = False
    copy: int = 0
    terms: tuple[tuple[int, float], ...] = ()


class Gathering(msgspec.Struct):
    """The parts of one contribution that have arrived."""

    incarnation: int
    parts: dict[int, ContributionReceived] = {}

    @property
    def replica(self) -> int:
        return next(iter(self.parts.values())).replica

    @property
    def clock(self) -> int:
        return next(iter(self.parts.values())).clock

    @property
    def weight(self) -> int:
        """The weight of each part; 0 if one part is empty."""
        least = RETIRED  # more than any weight; a loop takes a third of the time of `min`
        for part in self.parts.values():
            least = min(least, part.weight)
        return least

    @property
    def base_version(self) -> int:
        """The oldest version that a stage read."""
        oldest = RETIRED
        for part in self.parts.values():
            oldest = min(oldest, part.base_version)
        return oldest

    @property
    def terms(self) -> tuple[tuple[int, float], ...]:
        """Whose gradients are in it, if it is a sum."""
        return next(iter(self.parts.values())).terms

    def handles(self) -> tuple[Handle, ...]:
        if len(self.parts) == 1:
            (part,) = self.parts.values()
            return () if part.empty else (part.handle,)
        return tuple(self.parts[p].handle for p in sorted(self.parts) if not self.parts[p].empty)


@dataclass(slots=True)
class Store:
    """One store of a home."""

    terms: StoreTerms
    senders: Sequence[int]  # the replicas, or portions, that are counted
    clocks: Clocks | None
    """The clocks of a store that applies on arrival. Other stores have one clock for all replicas, `floor`."""
    answers: bool = False
    """Whether it is published to a replica only as the answer to a push after which the replica takes."""
    floor: int = 0
    version: int = -1
    loaded: bool = False
    gathering: dict[int, dict[int, Gathering]] = field(default_factory=dict[int, dict[int, Gathering]])
    """Clock -> replica -> its contribution."""
    committed: int = -1
    """The newest clock that the store's group has decided."""
    owed: dict[int, set[int]] = field(default_factory=dict[int, set[int]])
    """If late contributions are folded in: replica -> the clocks without it, for which it may still contribute."""
    batch: dict[tuple[int, int], Gathering] = field(default_factory=dict[tuple[int, int], Gathering])
    """If the store is not clocked: (replica, clock) -> a complete contribution that waits for the quorum of others."""
    retired: dict[int, set[int]] = field(default_factory=dict[int, set[int]])
    finished: bool = False

    def kept(self, number: int, pushed: Mapping[int, int]) -> wire.StoreState:
        """Where it stands, for a snapshot. `pushed`: the newest pushes of replicas, some of which may have retired
        already; a run that goes on may have work for them."""
        if self.clocks is None:
            return wire.StoreState(number, self.version, self.floor, self.committed, ())
        left = {replica: clock + 1 for replica, clock in pushed.items()}
        left |= dict(sorted(self.batch, reverse=True))
        clocks, senders = self.clocks.all, frozenset(self.senders)
        clocks = tuple(left.get(r, 0) if c == RETIRED and r in senders else c for r, c in enumerate(clocks))
        return wire.StoreState(number, self.version, min(clocks), self.committed, clocks)

    def restore(self, state: wire.StoreState, waiting: Iterable[wire.Waiting]) -> None:
        """Go on where a snapshot was taken. The values, and the contributions that are `waiting`, come later."""
        self.version, self.floor, self.committed = state.version, state.floor, state.committed
        for replica, clock in enumerate(state.clocks):
            if self.clocks is not None and self.clocks[replica] < clock:
                self.clocks.raise_to(clock, replica)
        for part in waiting if self.clocks is None else ():
            self.owed.setdefault(part.replica, set()).add(part.clock)

    def has(self, replica: int, clock: int) -> bool:
        """Whether the push of a replica is applied, refused, or waits here."""
        if self.clocks is not None:
            return self.clocks[replica] > clock or (replica, clock) in self.batch
        if clock > self.committed:
            return False
        late = self.gathering.get(clock, {}).get(replica)
        return clock not in self.owed.get(replica, ()) or (late is not None and self.is_complete(late))

    def waiting(self) -> list[ContributionReceived]:
        """What waits here for a later clock or for others, at a snapshot."""
        return parts([*(g for row in self.gathering.values() for g in row.values()), *self.batch.values()])

    def absent(self, full: Iterable[Gathering], living: Iterable[int]) -> int:
        """The weight of the `living` senders of a clock without that of the contributions that are here, where each
        replica counts alike: the most that one here has."""
        sizes = {site[0]: len(site) for site in self.terms.sites}
        here = [(sizes.get(g.replica, 1), g.weight) for g in full]
        each = max(weight / size for size, weight in here)
        return round(each * (sum(sizes.get(r, 1) for r in living) - sum(size for size, _ in here)))

    def is_complete(self, contribution: Gathering) -> bool:
        return len(contribution.parts) == len(self.terms.stages)

    def pop(self, clock: int, replica: int) -> Gathering | None:
        row = self.gathering.get(clock, {})
        found = row.pop(replica, None)
        if not row:
            self.gathering.pop(clock, None)
        return found

    def check(self, part: ContributionReceived, terms: Terms) -> None:
        """Refuse a part that breaks the protocol."""
        if part.part >= len(self.terms.stages) or part.replica >= terms.members:
            raise ProtocolError(f"{_where(part)} does not exist in this plan")
        if part.base_version > self.version:
            raise ProtocolError(
                f"{_where(part)} is based on version {part.base_version}, but {self.version} is the newest"
            )
        if (part.weight == 0) != part.empty:
            raise ProtocolError(f"{_where(part)} has weight {part.weight}; it is 0 exactly for an empty contribution")
        asks = self.terms.clocked and self.terms.every > 1
        if asks and not self.terms.policy.every.due(part.clock, terms.last_clock):
            raise ProtocolError(f"{_where(part)}: nothing is due at that clock")
        row = self.gathering.get(part.clock)
        other = None if row is None else row.get(part.replica)
        if other is not None and other.incarnation == part.incarnation:
            for weight in {p.weight for p in other.parts.values()} - {0, part.weight}:
                if not part.empty:
                    raise ProtocolError(f"{_where(part)} has weight {part.weight}, another part of it {weight}")

    def validate(self, index: int) -> None:
        """Check that what is kept can still be used. `index` is the number of the store."""
        if self.clocks is not None:
            self.clocks.validate()
            ensure(self.floor == self.clocks.floor, f"store {index} has the floor of other clocks")
            early = self.batch and min(c for _, c in self.batch) < self.floor
            ensure(not early, f"the floor of store {index} is above what is kept")
        if not self.gathering:
            return
        ensure(not self.finished, f"store {index} is finished but keeps contributions")
        for clock, row in self.gathering.items():
            ensure(row, f"store {index} keeps nothing for clock {clock}")
            for replica in row if self.terms.decided and clock <= self.committed else ():
                owes = clock in self.owed.get(replica, ())
                ensure(owes, f"store {index} keeps clock {clock} of replica {replica}, which is decided")
            for replica, gathering in row.items():
                self._validate_gathering(gathering, f"store {index}, replica {replica}, clock {clock}")

    def _validate_gathering(self, gathering: Gathering, where: str) -> None:
        parts = gathering.parts.values()
        ensure(parts, f"{where}: a contribution of no parts is kept")
        weights = {p.weight for p in parts if p.weight}
        ensure(len(weights) <= 1, f"{where}: parts have unequal weights")
        ensure(all(p.incarnation == gathering.incarnation for p in parts), f"{where}: parts are of two lives")
        complete = self.is_complete(gathering)
        ensure(self.terms.decided or not complete, f"{where}: a complete contribution was not applied on arrival")


def answers(terms: Terms, store: StoreTerms) -> bool:
    """Whether a store is published to a replica only when that is about to take.

    So it is if each take comes right after a push, and no replica leaves a push out. Readers must not wait for others,
    or need each version in turn. A replica with `Mix` takes before its push is applied, to see what others have sent.
    """
    policy, every = store.policy, store.policy.every
    own = store.clocked or store.shared or store.collective or store.sites or terms.drops
    waits = policy.staleness < UNBOUNDED or isinstance(base_of(policy.apply), Mix | Consensus)
    return not (own or waits) and every.takes_after_push and is_lossless(policy.pull_filters)


def parts(gathered: Iterable[Gathering]) -> list[ContributionReceived]:
    """All parts of some contributions."""
    return [part for gathering in gathered for part in gathering.parts.values()]


def waiting_part(part: ContributionReceived, *, of_site: bool) -> tuple[wire.Waiting, Handle]:
    """A part that waits, for a snapshot."""
    about = part.store, part.part, part.replica, part.clock, part.base_version, part.weight, part.empty
    return wire.Waiting(*about, of_site), part.handle


def _where(part: ContributionReceived) -> str:
    return f"store {part.store}: part {part.part} of replica {part.replica} at clock {part.clock}"
