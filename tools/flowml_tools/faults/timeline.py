"""What a history says about decisions, contributions and versions, put in order for the rules of `checker`.

A *place* is a position in the history. Contributions are taken from the messages that reached a home: the first part
with a number counts, as a repeated one changes nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from flowml.policy import Fold, Gossip
from flowml_runtime import wire
from flowml_runtime.protocol.training import actions, driver
from flowml_runtime.protocol.training.terms import Group, ReplicaLost
from flowml_tools.faults.history import DRIVER, Fact, History, Made, Matrix, Sent, Shown, Turn

Key = tuple[int, int]
"""(replica, clock)"""


@dataclass(frozen=True, slots=True)
class Commit:
    """A decision, where and when it was made."""

    place: int
    at: float
    message: wire.Commit


@dataclass(frozen=True, slots=True)
class Applied:
    """A version that a home was to make, from whose contributions and with which coefficients."""

    place: int
    action: actions.Apply
    keys: tuple[Key, ...]
    factors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SiteSum:
    """What the worker of the leader of a site with a quorum sends for a clock, and the contributions in it."""

    place: int
    who: str
    clock: int
    keys: tuple[Key, ...]
    there: frozenset[int]
    """The replicas whose contributions to this clock had reached the leader."""


@dataclass(frozen=True, slots=True)
class InnerSum:
    """What the leader of a site that decides alone gets for a clock: a sum, and the weight by which it is divided."""

    place: int
    who: str
    clock: int
    keys: tuple[Key, ...]
    weight: int


@dataclass
class Timeline:
    """The facts of a history by what they are about."""

    history: History
    commits: dict[int, list[Commit]] = field(default_factory=lambda: defaultdict(list))
    """By group."""
    applies: dict[tuple[str, int], list[Applied]] = field(default_factory=lambda: defaultdict(list))
    """By home and store."""
    began: dict[str, float] = field(default_factory=dict[str, float])
    """When each worker began the run."""
    _arrived: dict[tuple[int, int, int, int], tuple[int, int]] = field(default_factory=dict)
    """(group, replica, clock, store) -> the place of the first report, and its weight."""
    _parts: dict[tuple[str, int], dict[Key, dict[int, wire.Contribution]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )
    """(home, store) -> contribution -> its parts."""
    site_sums: dict[tuple[int, int], list[SiteSum]] = field(default_factory=lambda: defaultdict(list))
    """(store, leader of the site) -> its sums."""
    _at_leaders: dict[int, dict[Key, dict[int, int]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )
    """Store with a quorum in sites -> contribution -> its parts at the leader of its site -> their weights."""
    site_commits: dict[tuple[int, int], dict[int, wire.Commit]] = field(default_factory=lambda: defaultdict(dict))
    """(group, site) -> clock -> what a site that decides alone has decided first."""
    inner_sums: dict[tuple[int, int], list[InnerSum]] = field(default_factory=lambda: defaultdict(list))
    """(store, leader) -> the sums of such a site."""
    _heard: dict[tuple[str, int], list[Commit]] = field(default_factory=lambda: defaultdict(list))
    """(worker, group) -> the decisions that it has heard of."""
    _sites_gone: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    """As `_gone`, the leaders of sites that send nothing more."""
    _gone: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    """By worker: the replicas that it knew to be lost or retired, and from which place on."""
    _leaving: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    """As `_gone`, with replicas of which any stage has retired."""
    flushed: dict[str, int] = field(default_factory=dict[str, int])
    """By worker: where it was asked for the last snapshot, for which it applies what waits for others."""
    _lost: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    left_out: dict[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])
    """The lost replicas without which the run went on, and before which clock each store has what they did."""

    def __post_init__(self) -> None:
        history = self.history
        self.terms, self.places, self.work = history.terms, history.places, history.work
        self.summary, self.traffic, self.facts = history.summary, history.traffic, history.facts
        self.crashed, self.rhythm = history.crashed, history.rhythm
        self.whole = history.summary is not None
        """Whether the run has ended well."""
        self.coded = self.work.coded
        self.counted = any(isinstance(f, Sent) for f in self.facts)
        self.made = [f for f in self.facts if isinstance(f, Made)]
        self.shown = [f for f in self.facts if isinstance(f, Shown)]

    @staticmethod
    def of(history: History) -> Timeline:
        found = Timeline(history)
        handles: dict[tuple[str, int], wire.Contribution] = {}
        for place, fact in enumerate(history.facts):
            if not isinstance(fact, Turn):
                continue
            if isinstance(fact.event, actions.Received):
                found._hear(place, fact, fact.event, handles)
            elif isinstance(fact.event, ReplicaLost):
                found._lose(place, fact.who, fact.event.replica)
            for action in fact.wanted:
                found._want(place, fact, action, handles)
        return found

    def _lose(self, place: int, who: str, replica: int) -> None:
        for known in (self._gone, self._leaving, self._lost):
            known[who].append((place, replica))

    def _hear(
        self, place: int, turn: Turn, event: actions.Received, handles: dict[tuple[str, int], wire.Contribution]
    ) -> None:
        match event.message:
            case wire.Contribution() as told:
                if event.handle is not None:
                    handles[turn.who, event.handle] = told
                if self.terms.stores[told.store].relayed and not told.of_site:
                    known = self._at_leaders[told.store][told.replica, told.clock]
                    known.setdefault(told.part, 0 if told.empty else told.weight)
                    return
                tree = self.terms.stores[told.store].tree
                if tree and tree.adder_of(told.replica, summed=told.of_site) is not None:
                    return  # what a home decodes shows whether parents have added it up
                parts = self._parts[turn.who, told.store][told.replica, told.clock]
                parts.setdefault(told.part, told)
                self._arrive_here(place, turn.who, told)
            case wire.Arrived(store=store, replica=replica, clock=clock, weight=weight):
                key = self.terms.group_of.get(store, -1), replica, clock, store
                self._arrived.setdefault(key, (place, weight))
            case wire.LeaveOut(replica=replica):
                self._lose(place, turn.who, replica)
            case wire.Export(last=True):
                self.flushed.setdefault(turn.who, place)
            case wire.Commit(site=None) as told:
                self._heard[turn.who, told.group].append(Commit(place, turn.at, told))
            case wire.Retired(replica=replica, of_site=True):
                self._sites_gone[turn.who].append((place, replica))
            case wire.Retired(replica=replica, stage=stage):
                self._leaving[turn.who].append((place, replica))
                if stage == 0:
                    self._gone[turn.who].append((place, replica))
            case _:
                pass

    def _arrive_here(self, place: int, home: str, told: wire.Contribution) -> None:
        """A home that is on the leader's worker tells the leader without a message."""
        group = self.terms.group_of.get(told.store)
        parts = self._parts[home, told.store][told.replica, told.clock]
        if group is None or self.leader(self.terms.groups[group]) != home:
            return
        if len(parts) == len(self.terms.stores[told.store].stages):
            weight = min(p.weight for p in parts.values())
            self._arrived.setdefault((group, told.replica, told.clock, told.store), (place, weight))

    def _want(self, place: int, turn: Turn, action: object, handles: dict[tuple[str, int], wire.Contribution]) -> None:
        match action:
            case driver.LeaveOut(_, replicas):
                for replica in replicas:
                    self._lose(place, turn.who, replica)
            case driver.NoteLeftOut(replica, reached):
                self.left_out[replica] = reached
            case actions.Open():
                self.began[turn.who] = turn.at
            case actions.Send(message=wire.Commit(site=None) as told) if turn.who == self.leader(
                self.terms.groups[told.group]
            ):
                known = self.commits[told.group]
                if told not in [c.message for c in known[-1:]]:
                    known.append(Commit(place, turn.at, told))
            case actions.Apply(store, _, contributions):
                whose = [
                    [handles[turn.who, h] for h in handled if (turn.who, h) in handles] for handled, _ in contributions
                ]
                keys = tuple((w[0].replica, w[0].clock) if w else (-1, -1) for w in whose)
                applied = Applied(place, action, keys, tuple(f for _, f in contributions))
                self.applies[turn.who, store].append(applied)
            case actions.Forward(parts=(wire.Contribution() as told, *_)) if self.terms.stores[told.store].relayed:
                whose = [handles[turn.who, handled[0]] for handled, _ in action.contributions]
                keys = tuple((w.replica, w.clock) for w in whose)
                made = SiteSum(place, turn.who, told.clock, keys, self.there(told.store, told.replica, told.clock))
                self.site_sums[told.store, told.replica].append(made)
            case actions.Forward(parts=(wire.Gossip() as told, *_)):
                whose = [handles[turn.who, handled[0]] for handled, _ in action.contributions]
                inner = InnerSum(place, turn.who, told.clock, tuple((w.replica, w.clock) for w in whose), told.weight)
                if not told.part:
                    self.inner_sums[told.store, told.replica].append(inner)
            case actions.Send(message=wire.Commit(site=int(site), group=group) as told) if self.terms.groups[
                group
            ].final:
                self.site_commits[group, site].setdefault(told.clock, told)
            case _:
                pass

    def weight_inside(self, store: int, key: Key) -> int:
        """The weight of a contribution to the sum of a site."""
        return min(self._at_leaders[store][key].values(), default=0)

    def sum_weight(self, store: int, made: InnerSum) -> int:
        """What the sum of a site that decides alone is divided by: the weight of all contributions of its clock, of
        those that come later too if they are folded in then."""
        group = self.terms.groups[self.terms.site_groups[store]]
        site = self.site_of(store, made.keys[0][0])
        weights = {key: self.weight_inside(store, key) for key in made.keys}
        absent = 0
        if group.folds:
            decided = self.site_commits[group.number, group.sites.index(site)][made.clock]
            absent = len({*decided.excluded} - self.lost_to(made.who, made.place))
        on_time = sum(weight for (_, clock), weight in weights.items() if clock == made.clock)
        return max(on_time + absent * max(weights.values()), 1)

    def shares_inside(self, store: int) -> dict[Key, float]:
        """How much a microbatch of each contribution counts in the step of its site, which decides alone."""
        found: dict[Key, float] = {}
        decays = self.decays_inside(store)
        for site in self.terms.stores[store].sites:
            for made in self.inner_sums[store, site[0]]:
                found |= {key: decays[key] / self.sum_weight(store, made) for key in made.keys}
        return found

    def decays_inside(self, store: int) -> dict[Key, float]:
        """What each contribution to the sum of its site is multiplied by there; 0 of those in no sum."""
        late = self.terms.stores[store].policy.late
        decay = late.decay if isinstance(late, Fold) else 1.0
        found = dict.fromkeys(self._at_leaders[store], 0.0)
        for site in self.terms.stores[store].sites:
            for made in (*self.site_sums[store, site[0]], *self.inner_sums[store, site[0]]):
                found |= {key: decay ** (made.clock - key[1]) for key in made.keys}
        return found

    def there(self, of: int, leader: int, clock: int) -> frozenset[int]:
        """The replicas of a site whose contributions to all stores of the group are at its leader."""
        stores = self.terms.groups[self.terms.site_groups[of]].stores
        found = set(self.site_of(of, leader))
        for store in stores:
            whole, known = len(self.terms.stores[store].stages), self._at_leaders[store]
            found = {r for r in found if len(known.get((r, clock), ())) == whole}
        return frozenset(found)

    def site_decided(self, group: Group, leader: int, place: int) -> tuple[int, float]:
        """The newest clock that a site has decided before a place, or that the others have decided without it, and when
        it has done so or heard of it."""
        who, store = self.places.relay((leader,)), group.stores[0]
        sums = (*self.site_sums[store, leader], *self.inner_sums[store, leader])
        at = [(s.clock, self.facts[s.place]) for s in sums if s.place < place]
        found = [(clock, fact.at) for clock, fact in at if isinstance(fact, Turn)]
        above = group.number if group.above is None else group.above
        heard = (c for c in self._heard[who, above] if c.place < place and leader in c.message.excluded)
        found += [(c.message.clock, c.at) for c in heard]
        newest = max((clock for clock, _ in found), default=-1)
        return newest, min((at for clock, at in found if clock == newest), default=self.began.get(who, math.inf))

    @property
    def turns(self) -> Iterable[Turn]:
        return (f for f in self.facts if isinstance(f, Turn))

    def leader(self, group: Group) -> str:
        return self.places.homes[group.stores[0]][0]

    def site_of(self, store: int, replica: int) -> tuple[int, ...]:
        """The replicas whose work comes together in one contribution to a store."""
        return next((site for site in self.terms.stores[store].sites if replica in site), (replica,))

    def follows(self, store: int, replica: int) -> bool:
        """Whether a replica computes with the parameters of its site, which the leader updates and tells."""
        terms = self.terms.stores[store]
        return terms.sites_decide and terms.policy.local and self.site_of(store, replica)[0] != replica

    def folds_inside(self, store: int) -> bool:
        """Whether late contributions join later sums of their site. Their weight stays with their clock."""
        terms = self.terms.stores[store]
        return terms.relayed and isinstance(terms.policy.late, Fold)

    def coefficients(self, store: int, weights: Sequence[int], absent: int = 0) -> list[float]:
        """What contributions of these weights are multiplied by: equal for all gradients of a microbatch, or so that
        own parameters and their changes count by the microbatches in them."""
        policy = self.terms.stores[store].policy
        averages = policy.apply.averages or isinstance(policy.remote, Gossip)
        total = max(sum(weights) + absent, 1)
        if policy.local:
            return [w / total if averages else 1.0 for w in weights]
        return [1 / total if averages else 1 / self.terms.microbatches] * len(weights)

    # Replicas that leave.

    @cached_property
    def lost(self) -> frozenset[int]:
        return frozenset(r for known in self._lost.values() for _, r in known)

    def lost_at(self, turn: Turn) -> frozenset[int]:
        """The replicas that the driver knew to be lost before this turn."""
        place = next(n for n, f in enumerate(self.facts) if f is turn) if self.lost else 0
        return frozenset(r for at, r in self._lost[DRIVER] if at < place)

    def gone_at(self, who: str, place: int, *, sites: bool = False) -> frozenset[int]:
        known = self._sites_gone if sites else self._gone
        return frozenset(r for at, r in known[who] if at <= place)

    def lost_to(self, who: str, place: int) -> frozenset[int]:
        return frozenset(r for at, r in self._lost[who] if at <= place)

    def leaving_at(self, who: str, place: int) -> frozenset[int]:
        return frozenset(r for at, r in self._leaving[who] if at <= place)

    # Arrivals, as the leader of a group knew them.

    def has_arrived(self, group: Group, replica: int, clock: int, place: int) -> bool:
        """Whether the leader knew before `place` that every store of the group had the contribution."""
        known = [self._arrived.get((group.number, replica, clock, s)) for s in group.stores]
        return all(k is not None and k[0] <= place for k in known)

    def arrival_weight(self, group: Group, replica: int, clock: int) -> int:
        """The weight in the report that completed the contribution."""
        known = [self._arrived[group.number, replica, clock, s] for s in group.stores]
        return max(known)[1]

    # Contributions, as homes got them.

    def complete(self, home: str, store: int) -> list[Key]:
        """The contributions that have all parts and are not empty."""
        return [key for key in self._parts[home, store] if self.weight(home, store, *key)]

    def weight(self, home: str, store: int, replica: int, clock: int) -> int:
        parts = self._parts[home, store].get((replica, clock), {})
        if len(parts) < len(self.terms.stores[store].stages):
            return 0
        return min(p.weight for p in parts.values())

    def bases(self, home: str, store: int, replica: int, clock: int) -> list[int]:
        """The versions that the parts of a contribution are based on."""
        return [p.base_version for p in self._parts[home, store][replica, clock].values()]

    def base(self, home: str, store: int, replica: int, clock: int) -> int:
        return min(self.bases(home, store, replica, clock), default=0)

    # Versions.

    def expected(self, home: str, store: int) -> list[list[tuple[int, int, float]]]:
        """What each version of a store with decisions must be made of: (replica, clock, coefficient)."""
        group = self.terms.groups[self.terms.group_of[store]]
        return [made for commit in self.commits[group.number] if (made := self._version(home, store, commit))]

    def _version(self, home: str, store: int, commit: Commit) -> list[tuple[int, int, float]]:
        policy, clock = self.terms.stores[store].policy, commit.message.clock
        late = policy.quorum.late
        decay = late.decay if isinstance(late, Fold) else 1.0
        senders = self.terms.stores[store].senders(self.terms.members)
        on_time = [(r, clock) for r in senders if r not in commit.message.excluded]
        chosen = [k for k in (*on_time, *commit.message.folded) if self.weight(home, store, *k)]
        if not chosen:
            return []
        weights = [self.weight(home, store, *k) for k in chosen]
        absent = 0
        if isinstance(late, Fold) and not policy.local:  # all replicas that live count alike, on time or late
            lost = self._lost_at_home(home, commit)
            sizes = {r: len(self.site_of(store, r)) for r in senders}
            living = sum(sizes[r] for r in senders if r not in commit.message.excluded or r not in lost)
            each = max(w / sizes[r] for (r, _), w in zip(chosen, weights, strict=True))
            absent = round((living - sum(sizes[r] for r, _ in chosen)) * each)
        factors = self.coefficients(store, weights, absent)
        return [(r, c, f * decay ** (clock - c)) for (r, c), f in zip(chosen, factors, strict=True)]

    def _lost_at_home(self, home: str, commit: Commit) -> frozenset[int]:
        """The replicas that a home knew to be lost when it heard of a decision."""
        if not self._lost[home]:
            return frozenset()
        place = next(
            n for n, fact in enumerate(self.facts) if _hears(fact, home, commit.message) or n == len(self.facts) - 1
        )
        return frozenset(r for at, r in self._lost[home] if at < place)

    def holds(self, store: int) -> bool:
        """Whether steps between two takes compute gradients with the same parameters. A replica with parameters of its
        own reads only to take, and in shared memory, and without staleness, each step takes."""
        policy = self.terms.stores[store].policy
        return policy.staleness > 0 and not policy.local and not policy.shared

    def taken(self, store: int, clock: int) -> int:
        """The first step that may have taken the version that the step of `clock` reads."""
        return self.terms.stores[store].policy.every.taken(clock) if self.holds(store) else clock

    @cached_property
    def values(self) -> dict[int, list[Matrix]]:
        """Store -> the value of each version, of a run that computes with matrices. They are those of the first of the
        homes that have made the most: another home may have crashed before."""
        found: dict[int, dict[str, list[Matrix]]] = {}
        for made in self.made:
            if made.value is not None:
                homes = found.setdefault(made.store, {home: [] for home in self.places.homes[made.store]})
                homes[made.home].append(made.value)
        longest = {store: max(homes.values(), key=len) for store, homes in found.items()}
        return {store: [np.zeros_like(values[0]), *values] for store, values in longest.items()}

    @cached_property
    def read_values(self) -> dict[int, list[Matrix]]:
        """Store -> the value of each version as its readers hold it, which filters may make another one."""
        found = {store: [*values] for store, values in self.values.items()}
        for shown in self.shown:
            if shown.version and shown.version < len(found.get(shown.store, ())):
                found[shown.store][shown.version] = shown.value
        return found

    @cached_property
    def _versions_before(self) -> dict[int, list[int]]:
        return {}

    def version_before(self, store: int, clock: int) -> int:
        """The number of versions that are made of the clocks before `clock`, of a store with decisions or sums."""
        counted = self._versions_before.get(store)
        if counted is None:
            counted = self._versions_before[store] = self._count_versions(store)
        return counted[max(min(clock, len(counted) - 1), 0)]

    def _count_versions(self, store: int) -> list[int]:
        terms, home = self.terms.stores[store], self.places.homes[store][0]
        if terms.collective:
            every, last = terms.policy.every, self.terms.last_clock
            made = [c for c in range(self.terms.total_clocks) if every.due(c, last)]
        else:
            commits = self.commits[self.terms.group_of[store]]
            made = [c.message.clock for c in commits if self._version(home, store, c)]
        return [sum(c < clock for c in made) for clock in range(self.terms.total_clocks + 1)]

    def inside(self, store: int, version: int) -> frozenset[Key]:
        """The contributions in a version of a store that applies them as they arrive."""
        inside = self._inside.get(store)
        if inside is None:
            applies: Sequence[Applied] = self.applies.get((self.places.homes[store][0], store), ())
            inside = self._inside[store] = [frozenset()]
            for apply in applies:
                inside.append(inside[-1] | set(apply.keys))
        return inside[min(version, len(inside) - 1)]

    @cached_property
    def _inside(self) -> dict[int, list[frozenset[Key]]]:
        return {}


def _hears(fact: Fact, who: str, message: wire.Commit) -> bool:
    return (
        isinstance(fact, Turn)
        and fact.who == who
        and isinstance(fact.event, actions.Received)
        and isinstance(fact.event.message, wire.Commit)
        and (fact.event.message.group, fact.event.message.clock) == (message.group, message.clock)
    )
