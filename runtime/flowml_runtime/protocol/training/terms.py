"""The parts of a plan that the training machines use, and the events that several machines share.

`Terms` is a small frozen view of `plan.Training`: which stores push at which clock, how many replicas a
clock's decision needs, and which stages send the parts of a contribution. `places.Places` says which worker runs
which stages and holds which stores. All machines of a run compute the same answers from them, without messages.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import msgspec

from flowml.plan import Coupling, Training
from flowml.policy import (
    UNBOUNDED,
    Completion,
    Consensus,
    Deadline,
    Every,
    Gossip,
    Policy,
    Quorum,
    Speculate,
    cutting,
)
from flowml.policy.apply import base_of
from flowml.policy.late import Drop, Late
from flowml.policy.waits import Waits
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.store_terms import StoreTerms

RETIRED = 2**53 - 1
"""The clock of a replica that is no longer waited for: the largest that a message can carry."""

Sites = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Group:
    """The stores that share a quorum, a late rule and a rhythm. One decision for each clock covers all of them."""

    number: int
    quorum: Completion
    every: Every
    stores: tuple[int, ...]
    drops: bool
    """Whether a decision may leave a live replica out."""
    senders: Sequence[int]
    """The replicas whose contributions are counted."""
    discards: bool = False
    """Whether a replica that is left out loses all steps since its last push, which are in its own parameters: it takes
    the global ones instead."""
    sites: tuple[tuple[int, ...], ...] = ()
    """As in `StoreTerms`."""
    site_quorum: Completion | None = None
    """What completes the sum of a site, where its leader decides that. Its replicas get decisions about themselves."""
    late: Late = field(default_factory=Drop)
    """What becomes of late work of a replica, at whichever level it is late."""
    what: str = ""
    """What the decision is about, for errors; "" for the whole fit."""
    final: bool = False
    """Whether each site decides alone."""
    above: int | None = None
    """Of a final one, the group that decides which sites' parameters are in the global ones, if clocks do."""
    led: bool = False
    """Of a final one, whether the leader of a site updates its parameters."""
    needs: int | None = None
    """The replica without which there is no decision, unless it is gone: the leader of a site that updates it."""

    @cached_property
    def folds(self) -> bool:
        """Whether late contributions join a later clock."""
        return self.late.folds

    @property
    def relayed(self) -> bool:
        """Whether there are decisions at each site."""
        return self.site_quorum is not None

    def at_site(self, number: int) -> Group:
        """The group among the replicas of one site, whose decisions say what the sum of the site contains."""
        site, quorum = self.sites[number], self.site_quorum
        if quorum is None:
            raise ProtocolError(f"the sites of group {self.number} decide nothing")
        drops, what = not quorum.never_drops(len(site)), f" of site {number}, which replica {site[0]} leads,"
        needs = site[0] if self.led else None
        return Group(self.number, quorum, self.every, self.stores, drops, site, late=self.late, what=what, needs=needs)


@dataclass(frozen=True)
class Terms:
    """A training run in numbers. `total_clocks` counts the clocks of each replica, if any store is clocked.

    `rows` is the number of examples in a microbatch. `cuts_at` is the stage that decides when a replica stops between
    two microbatches. State of the model stays on the stages `stateful`.
    """

    replicas: int
    stages: int
    microbatches: int
    stores: tuple[StoreTerms, ...]
    total_clocks: int
    rows: float = 1.0
    cuts_at: int = 0
    stateful: frozenset[int] = frozenset()
    couplings: tuple[Coupling, ...] = ()

    @staticmethod
    def of(training: Training, total_clocks: int) -> Terms:
        stores = tuple(
            StoreTerms(tuple(p.stage for p in s.parts), s.policy, s.collective, tuple(x.replicas for x in s.sites))
            for s in training.stores
        )
        replicas, stages = len(training.replicas), len(training.replicas[0])
        rows = training.item_size * (training.code.load * replicas if training.code else 1) / training.microbatches
        rest = float(rows), training.cuts_at, frozenset(leaf.stage for leaf in training.state), training.couplings
        return Terms(replicas, stages, training.microbatches, stores, total_clocks, *rest)

    @cached_property
    def speculation(self) -> Speculate | None:
        """How batches are cut into portions, if they are."""
        quorum = self.stores[0].policy.quorum if self.stores else None
        return quorum if isinstance(quorum, Speculate) else None

    @cached_property
    def members(self) -> int:
        """How many contributions a clock may have: one of each replica, or of each portion of the batch."""
        return self.replicas * (self.speculation.portions if self.speculation else 1)

    def place(self, replica: int, clock: int, item: int) -> tuple[int, int]:
        """The member and the clock of what a step of `replica` contributes: those of its portion, if there are any."""
        if self.speculation is None:
            return replica, clock
        batch, portion = divmod(item, self.members)
        return portion, batch

    def lasting(self, total_clocks: int) -> Terms:
        """The same terms for a run of `total_clocks`: themselves if they are for one, as machines share them."""
        return self if total_clocks == self.total_clocks else replace(self, total_clocks=total_clocks)

    @cached_property
    def cut(self) -> Quorum | Deadline | None:
        """What says when a replica stops between two microbatches, for all stores; None if nothing does."""
        return cutting(self.stores[0].policy.quorum) if self.stores else None

    @property
    def paced(self) -> Quorum | None:
        """The rule by which replicas stop once all of them together have computed enough microbatches."""
        return self.cut if isinstance(self.cut, Quorum) else None

    @cached_property
    def aligned(self) -> bool:
        """Whether all replicas run the same clocks. Otherwise each runs as many as it can."""
        return any(s.policy.aligns or s.sites for s in self.stores)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups of stores with decisions, in the order of their first stores. Stores whose sites decide alone, by
        different rules, are in different groups: an item of a site may be in some of its sums and not in others."""
        found: dict[tuple[Completion, Completion | None, bool, Every, bool, Sites], list[int]] = {}
        for number, store in enumerate(self.stores):
            if store.decided:
                policy, sites = store.policy, store.sites
                discards = self._may_drop(store) and policy.local and not policy.late.folds
                inside = policy.site_quorum if sites else None
                key = policy.quorum, inside, store.sites_decide, policy.every, discards, sites
                found.setdefault(key, []).append(number)
        groups: list[Group] = []
        for number, ((quorum, inside, decide, every, discards, sites), stores) in enumerate(found.items()):
            first = self.stores[stores[0]]
            senders, drops, late = first.senders(self.members), self._may_drop(first), first.policy.late
            inside = None if decide else inside
            groups.append(Group(number, quorum, every, tuple(stores), drops, senders, discards, sites, inside, late))
        return (*groups, *self._final(groups))

    def _final(self, groups: Sequence[Group]) -> list[Group]:
        """The groups whose sites decide alone at each step, where `groups` are all others."""
        above = {store: group for group in groups for store in group.stores}
        found: dict[tuple[Completion, Late, Sites, int | None, Every, bool], list[int]] = {}
        for number, store in enumerate(self.stores):
            inside, policy = store.policy.site_quorum, store.policy
            if store.sites_decide and inside is not None:
                over = above[number].number if number in above else None
                every = Every() if policy.local else policy.every  # own parameters have a sum at each step
                found.setdefault((inside, policy.late, store.sites, over, every, policy.local), []).append(number)
        made: list[Group] = []
        for number, ((inside, late, sites, over, every, led), stores) in enumerate(found.items(), len(groups)):
            drops = any(not inside.never_drops(len(site)) for site in sites)
            drops = drops or (over is not None and groups[over].drops)
            senders = range(self.replicas)
            group = Group(number, inside, every, tuple(stores), drops, senders, False, sites, inside, late)
            made.append(replace(group, final=True, above=over, led=led))
        return made

    def _may_drop(self, store: StoreTerms) -> bool:
        """Whether a decision about the store may leave a replica out, at any level that it takes part in."""
        policy, inside = store.policy, None if store.sites_decide else store.policy.site_quorum
        if not policy.quorum.never_drops(len(store.sites) or self.replicas):
            return True
        return inside is not None and any(not inside.never_drops(len(site)) for site in store.sites)

    @cached_property
    def site_numbers(self) -> dict[int, tuple[int, ...]]:
        """For each store with sites, the number of the site of each replica; -1 for a lost one."""
        found: dict[Sites, tuple[int, ...]] = {}
        for sites in {store.sites for store in self.stores if store.sites}:
            numbers = {replica: number for number, site in enumerate(sites) for replica in site}
            found[sites] = tuple(numbers.get(replica, -1) for replica in range(self.replicas))
        return {number: found[store.sites] for number, store in enumerate(self.stores) if store.sites}

    def site_of(self, store: int, replica: int) -> tuple[int, ...]:
        """The replicas of the site of `replica`."""
        return self.stores[store].sites[self.site_numbers[store][replica]]

    def counted_as(self, group: Group, replica: int) -> int:
        """The replica by whose number a commit says whether it includes the work of `replica`."""
        if not group.sites or group.relayed:
            return replica
        return self.site_of(group.stores[0], replica)[0]

    @cached_property
    def group_of(self) -> dict[int, int]:
        """The group of each store that has decisions: the one above, if its sites decide alone."""
        return {store: group.number for group in reversed(self.groups) for store in group.stores}

    @cached_property
    def site_groups(self) -> dict[int, int]:
        """The group of each store that has decisions at its sites."""
        return {store: group.number for group in self.groups if group.relayed for store in group.stores}

    @cached_property
    def final(self) -> tuple[Group, ...]:
        """The groups whose sites decide alone."""
        return tuple(group for group in self.groups if group.final)

    @cached_property
    def above(self) -> frozenset[int]:
        """The groups that decide about sites, where these have decided about each step before."""
        return frozenset(group.above for group in self.final if group.above is not None)

    @cached_property
    def drops(self) -> bool:
        """Whether any decision may leave a live replica out."""
        return any(group.drops for group in self.groups)

    @cached_property
    def sums(self) -> bool:
        """Whether replicas add up the gradients of some store, so that each of them must run every clock."""
        return any((s.collective and not s.sites_decide) or (s.sites and not s.relayed) for s in self.stores)

    @cached_property
    def adds_up(self) -> bool:
        """Whether a stage has to pass on parts of sums until the last of them is over."""
        return self.sums or any(s.collective for s in self.stores)

    @cached_property
    def summed_at(self) -> tuple[tuple[int, ...], ...]:
        """For each stage, the stores of which it adds a part up with the other replicas."""
        sums = [(number, store) for number, store in enumerate(self.stores) if store.collective]
        return tuple(tuple(n for n, s in sums if stage in s.stages) for stage in range(self.stages))

    @cached_property
    def arrives(self) -> bool:
        """Whether some store applies contributions as they arrive."""
        return any(not s.clocked for s in self.stores)

    @cached_property
    def may_wait(self) -> tuple[int, ...]:
        """The stores at whose homes a contribution may wait: for the staleness of others or, if late, a later clock."""
        stores = enumerate(self.stores)
        return tuple(n for n, s in stores if not s.clocked or (s.decided and s.policy.late.folds))

    def tells_applied(self, store: int, replica: int) -> bool:
        """Whether the home of a store tells the replica which versions hold its pushes."""
        terms = self.stores[store]
        return not (terms.clocked or terms.shared) and replica in terms.senders(self.members)

    @cached_property
    def _counts_always(self) -> bool:
        """Whether every step counts for some store: one without decisions, or of a group that leaves no replica out."""
        whole = any(not s.decided and not s.sites_decide for s in self.stores)
        return whole or any(not g.drops or g.folds for g in self.groups if g.number not in self.above)

    @cached_property
    def behind(self) -> tuple[tuple[int, int], ...]:
        """The stores without decisions that may not have a step of an aligned run that is over: it waits for the next
        push, or at the home for those of others. Each with the number of pushes that may wait there."""
        others = ((n, s) for n, s in enumerate(self.stores) if self.aligned and n not in self.group_of)
        waits = ((n, s, 0 if s.clocked else s.policy.quorum.need(self.replicas) - 1) for n, s in others)
        return tuple((n, max(most, 0)) for n, s, most in waits if s.every > 1 or most > 0)

    @cached_property
    def accumulating(self) -> dict[int, tuple[int, ...]]:
        """The stores that keep gradients of one step for a later push, by their group; -1 stands for no group."""
        found: dict[int, list[int]] = {}
        for number, store in enumerate(self.stores):
            if store.keeps:
                found.setdefault(self.group_of.get(number, -1), []).append(number)
        return {group: tuple(stores) for group, stores in found.items()}

    @property
    def most_clocks(self) -> int:
        """The most steps of one replica. One may do all the work if replicas share no clocks, or portions."""
        if self.speculation:
            return self.total_clocks * self.members
        return self.total_clocks if self.aligned else self.total_clocks * self.replicas

    @cached_property
    def last_clock(self) -> int:
        """The last clock of an aligned run; -1 if each replica has its own."""
        return self.total_clocks - 1 if self.aligned else -1

    @cached_property
    def _at_every_clock(self) -> bool:
        """Whether every group has a decision at every clock, which then needs no search."""
        return all(group.every == Every() for group in self.groups)

    def due_groups(self, clock: int) -> tuple[Group, ...]:
        """The groups that have a decision at `clock`."""
        always, last = self._at_every_clock, self.last_clock
        return self.groups if always else tuple(g for g in self.groups if g.every.due(clock, last))

    @cached_property
    def dropping(self) -> frozenset[int]:
        """The groups that may leave a step out for good: one set for all machines of a simulation."""
        return frozenset(g.number for g in self.groups if g.drops and not g.folds)

    @cached_property
    def numbers(self) -> frozenset[int]:
        """Those of all groups."""
        return frozenset(group.number for group in self.groups)

    @cached_property
    def never_skipped(self) -> tuple[int, ...]:
        """The groups that fold in late pushes of several steps. A slow replica that skipped clocks would never come
        to its push, so it runs all of them, and each of its pushes joins some decision."""
        return tuple(g.number for g in self.groups if g.folds and g.every.push > 1)

    def may_skip(self, clock: int) -> bool:
        """Whether a replica may leave out `clock`, if all its groups have decided it.

        It may not if neighbours wait for its parameters, if replicas add up the gradients of some store, or if a store
        that applies contributions as they arrive needs its push: readers within a bound wait for it, the last push
        takes all gathered gradients along, and own parameters are pushed before they are replaced.
        """
        if self.sums or (self._arriving and clock == self.last_clock):
            return False
        if any(gossip.due(clock) or clock == self.last_clock for gossip in self._gossip):
            return False
        return not any(rhythm.due(clock, self.last_clock) for rhythm in self._awaited)

    @cached_property
    def _gossip(self) -> frozenset[Gossip]:
        """How replicas average parameters with their neighbours, which takes all of them in each round."""
        mine = (s.policy.remote for s in self.stores if not s.sites_decide)  # else only leaders do, which skip nothing
        return frozenset(remote for remote in mine if isinstance(remote, Gossip))

    @cached_property
    def _arriving(self) -> tuple[Policy, ...]:
        """The policies of the stores to which each replica sends what is applied as it arrives."""
        return tuple(s.policy for s in self.stores if not s.clocked and not s.sites_decide)

    @cached_property
    def _awaited(self) -> frozenset[Every]:
        """The rhythms of the stores that apply contributions as they arrive, and whose pushes no replica may leave out:
        readers within a bound wait for them, and own parameters that are not pushed would be replaced."""
        arriving = self._arriving
        return frozenset(p.every for p in arriving if p.staleness < UNBOUNDED or (p.local and not p.owes))

    @cached_property
    def paced_by_slowest(self) -> bool:
        """Whether replicas share no clocks and yet wait for slower ones: within a bound, or for the first reports."""
        waiting = (p for p in self._arriving if p.staleness < UNBOUNDED or isinstance(base_of(p.apply), Consensus))
        return not self.aligned and any(not p.shared for p in waiting)

    def counts_anyway(self, clock: int) -> bool:
        """Whether the step of `clock` counts for some store, whatever is decided: for one without decisions, or of a
        group that gathers it for a later push, waits for every replica, or folds late contributions in."""
        if self._at_every_clock or self._counts_always:
            return self._counts_always
        return any(not g.every.due(clock, self.last_clock) for g in self.groups if g.number not in self.above)

    def flushes(self, clock: int, last: bool) -> bool:
        """Whether a store pushes at `clock` what it may have kept of earlier steps."""
        rhythms = self._kept_rhythms
        return bool(rhythms) and (last or any(every.due(clock, self.last_clock) for every in rhythms))

    @cached_property
    def _kept_rhythms(self) -> frozenset[Every]:
        return frozenset(s.policy.every for s in self.stores if s.keeps)


NO_WAITS = Waits()


class Committed(msgspec.Struct, frozen=True, eq=False):
    """The decision of a group for `clock`: it includes the work of every replica except those in `excluded`, in order.

    `coefficients` maps replicas to the coefficients of their contributions; empty if weights determine them. `folded`
    are contributions to earlier clocks, as (replica, clock), which were late and are included now. `copies` maps
    portions to the copies that came first, where that was not the first grant. `waits` says what the clock waited for.
    """

    clock: int
    excluded: tuple[int, ...] = ()
    group: int = 0
    coefficients: tuple[tuple[int, float], ...] = ()
    folded: tuple[tuple[int, int], ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    waits: Waits = NO_WAITS

    def __eq__(self, other: object) -> bool:
        """Whether both decide the same, whatever they waited for."""
        return isinstance(other, Committed) and self._decided() == other._decided()

    def __hash__(self) -> int:
        return hash(self._decided())

    def _decided(self) -> tuple[object, ...]:
        return self.clock, self.excluded, self.group, self.coefficients, self.folded, self.copies

    def leaves_out(self, replica: int) -> bool:
        """Whether it excludes the replica. A search by halves, because thousands may ask about thousands."""
        place = bisect_left(self.excluded, replica)
        return place < len(self.excluded) and self.excluded[place] == replica


class Tick(msgspec.Struct, frozen=True):
    """The time has come that a Wake named."""


class ReplicaLost(msgspec.Struct, frozen=True):
    """A worker of `replica` is lost, so nothing more from this replica is waited for."""

    replica: int
