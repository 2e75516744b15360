"""A site's state machine gathers the contributions of its replicas at their leader, and decides which of them count.

The worker of the leader's first stage runs one for each group of stores. Towards the replicas of the site it is a home
and the leader of their group; towards the homes of the stores, and the leader of the group of all sites, it is one
replica. So no worker has to do with all replicas.

* The quorum of the site completes its sum of a clock (see `decision`). `Forward` then sends the sum to the homes, as
  the contribution of the leader. Its weight is the number of gradients in it, so a mean over sites is one over the
  gradients that arrived. If no contribution has weight, the sum is empty.
* A replica learns the fate of its step from one commit. It follows the decision about the sites: a replica takes part
  if the sum of its site does, and has its contribution.
* If late contributions are folded in, one that comes too late for its sum joins the next sum of the site, multiplied by
  the decay. Its weight stays with the clock that it belongs to, as at a home. A sum that comes too late for its clock
  joins a later one as a whole.
* Otherwise a late contribution is released, and all of a clock if the site is too late for it.
* If the sites go on without a site that has not decided its sum of a clock, it decides none: what its replicas send for
  that clock is late. If late contributions are folded in, it sends an empty sum, so that a home knows what has still to
  come.
* If sites have parameters of their own, what a site decides is final (`Group.final`): its replicas are told at
  once, and `Forward` sends the sum to the leader, which updates the parameters. The leader is in each sum. If the
  decision about sites drops one, that gives up its steps until then, because it takes the global parameters.
* What filters with error feedback keep of a sum follows its fate, which `SumSettled` tells. A sum that is folded in
  later counts. Otherwise the fate of a sum is known before a replica begins the step of the next one.
* A site that all of its replicas have left sends nothing more, and the leader of the group is told.

What the caller must do is the same as for `home` and `decision`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flowml.policy.late import factor
from flowml.policy.waits import Waits
from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError, ensure
from flowml_runtime.protocol.training.clocks import contained
from flowml_runtime.protocol.training.decision import Arrived, Decision, ReplicaRetired, Wake
from flowml_runtime.protocol.training.home_events import Release, releases
from flowml_runtime.protocol.training.store import ContributionReceived, Gathering, Handle, parts, waiting_part
from flowml_runtime.protocol.training.terms import Committed, Group, ReplicaLost, Terms, Tick


@dataclass(frozen=True, slots=True)
class Forward:
    """Send the sum of these contributions to the home of the store, each part for itself and times its factor.

    Without contributions the sum is empty. The host may free the handles afterwards. `share` is the weight of the sum
    by that of the contributions, for gradients that carry weights of their own, which have no factors. None stands for
    a sum with coefficients, which multiply the weights too.
    """

    store: int
    clock: int
    weight: int
    base_version: int
    contributions: tuple[tuple[tuple[Handle, ...], float], ...]
    share: float | None = None


@dataclass(frozen=True, slots=True)
class SumSettled:
    """Whether the sums of `clock` to these stores, whose filters feed back, count. They were forwarded before, if the
    site has decided the clock."""

    clock: int
    stores: tuple[int, ...]
    counts: bool


@dataclass(frozen=True, slots=True)
class SiteLeft:
    """No replica of the site sends anything more. If sites decide alone, it is enough that its leader retires."""


Event = ContributionReceived | Committed | ReplicaRetired | ReplicaLost | Tick
Action = Forward | SumSettled | Committed | Release | Wake | SiteLeft


@dataclass(frozen=True, slots=True)
class _Sum:
    """What the sum of a clock contains: the replicas that were in time, and (replica, clock) of late contributions."""

    there: frozenset[int]
    folded: tuple[tuple[int, int], ...]
    waits: Waits


class Site:
    """One site, for one group of stores. `began` is the time in seconds at which the run begins."""

    def __init__(
        self, terms: Terms, group: Group, number: int, began: float = 0.0, stopped: wire.Stopped | None = None
    ) -> None:
        """`stopped`: where machines stood at the snapshot from which the run goes on."""
        self._terms, self._group, self._number = terms, group, number
        self._inside = group.at_site(number)
        self.members = group.sites[number]
        self.leader = self.members[0]
        self._within = frozenset(self.members)
        waiting = [w for w in stopped.waiting if self._waits_here(w)] if stopped else []
        late, first = {(w.replica, w.clock) for w in waiting}, max(stopped.clocks) if stopped else 0
        self._decision = Decision(terms, self._inside, began, first, late)
        self._rows: dict[int, dict[tuple[int, int], Gathering]] = {}
        """Clock -> (store, replica) -> its contribution."""
        self._owed: dict[int, set[int]] = {}
        """If late contributions are folded in: replica -> the clocks without it, for which it may still contribute."""
        self._committed = -1
        """The newest clock about which the sites have decided. A decision that comes again changes nothing."""
        self._sums: dict[int, _Sum] = {}
        """The sums that were forwarded and are not in a commit yet."""
        self._fed_back = tuple(s for s in group.stores if terms.stores[s].feeds_back)
        self._left: set[int] = set()
        self._lost: set[int] = set()
        for replica, clock in late:
            self._owed.setdefault(replica, set()).add(clock)
        for state in stopped.sites if stopped else ():
            if (state.group, state.site) == (group.number, number):
                self._committed = state.committed
                self._sums = {c: _Sum(frozenset(there), folded, Waits()) for c, there, folded in state.sums}

    def _waits_here(self, part: wire.Waiting) -> bool:
        return part.store in self._group.stores and not part.of_site and part.replica in self._within

    def kept(self) -> wire.SiteState:
        """Where the machine stands, for a snapshot."""
        sums = tuple((c, tuple(sorted(s.there)), s.folded) for c, s in sorted(self._sums.items()))
        return wire.SiteState(self._group.number, self._number, self._committed, sums)

    def waiting(self) -> list[tuple[wire.Waiting, Handle]]:
        """The parts of contributions that wait here, for a snapshot."""
        gathered = (gathering for row in self._rows.values() for gathering in row.values())
        return [waiting_part(part, of_site=False) for part in parts(gathered)]

    def rests(self, clocks: Sequence[int], pushed: Iterable[tuple[int, int, int]]) -> bool:
        """Whether all is decided about what replicas with these next clocks have sent, and all that is late waits here.
        `pushed` as in `Home.rests`."""
        group, last = self._group, max(clocks)
        above = group if not group.final else None if group.above is None else self._terms.groups[group.above]
        if self._decision.clock < contained(self._terms, group.every, last):
            return False
        if above is not None and self._committed + 1 < contained(self._terms, above.every, last):
            return False
        if not group.folds:
            return True
        newest = [(r, s, clocks[r] - 1) for r in self.members for s in group.stores] if group.led else pushed
        return all(self._has(store, replica, clock) for replica, store, clock in newest)

    def _has(self, store: int, replica: int, clock: int) -> bool:
        """Whether a push to this site is in a sum, or waits here."""
        if store not in self._group.stores or clock not in self._owed.get(replica, ()):
            return True
        found = self._rows.get(clock, {}).get((store, replica))
        return found is not None and len(found.parts) == len(self._terms.stores[store].stages)

    def handles(self) -> list[Handle]:
        """The payloads that are kept and may still be forwarded."""
        return [h for row in self._rows.values() for gathering in row.values() for h in gathering.handles()]

    def step(self, event: Event, now: float = 0.0) -> list[Action]:
        """Process one event at time `now`, in seconds."""
        match event:
            case ContributionReceived():
                return self._receive(event, now)
            case Committed():
                return self._commit(event, now)
            case Tick():
                return self._decide(event, now)
            case ReplicaRetired(replica) | ReplicaLost(replica):
                return self._leave(event, replica, now)

    def _receive(self, part: ContributionReceived, now: float) -> list[Action]:
        terms = self._terms.stores[part.store]
        if part.part >= len(terms.stages) or part.replica not in self._within:
            raise ProtocolError(
                f"part {part.part} of replica {part.replica} does not belong to the site of {self.leader}"
            )
        late = part.clock < self._decision.clock
        if late and part.clock not in self._owed.get(part.replica, ()):
            return releases([part])
        row = self._rows.setdefault(part.clock, {})
        gathering = row.setdefault((part.store, part.replica), Gathering(part.incarnation))
        if part.part in gathering.parts:
            return releases([part])
        gathering.parts[part.part] = part
        if len(gathering.parts) < len(terms.stages):
            return []
        return self._decide(Arrived(part.store, part.replica, part.clock, gathering.weight, part.copy), now)

    def _decide(self, event: Arrived | ReplicaRetired | ReplicaLost | Tick, now: float) -> list[Action]:
        actions: list[Action] = []
        for made in self._decision.step(event, now):
            if isinstance(made, Wake):
                actions.append(made)
            else:
                actions += self._sum(made)
        return actions

    def _sum(self, made: Committed) -> list[Action]:
        """The site has decided what its sum of a clock contains."""
        excluded, clock = set(made.excluded), made.clock
        folds = self._group.folds
        for replica in made.excluded if folds else ():
            self._owed.setdefault(replica, set()).add(clock)
        if not self._group.final:
            self._sums[clock] = _Sum(self._within - excluded, made.folded, made.waits)
        row = self._rows.pop(clock, {})
        late = {at: row.pop(at) for at in list(row) if at[1] in excluded}
        if late and folds:
            self._rows[clock] = late
        actions: list[Action] = [] if folds else releases(parts(late.values()))
        for store in self._group.stores:
            actions += self._forward(store, clock, row, made.folded, absent=len(excluded - self._lost) if folds else 0)
        for replica, earlier in made.folded:
            self._owed[replica] = {c for c in self._owed.get(replica, ()) if c > earlier}
        return [*actions, made] if self._group.final else actions

    def _forward(
        self,
        store: int,
        clock: int,
        row: dict[tuple[int, int], Gathering],
        folded: Iterable[tuple[int, int]],
        *,
        absent: int,
    ) -> list[Action]:
        """Forward the sum of one store. `absent` replicas have a share in its weight, and come later."""
        chosen = [(row[at], clock) for at in sorted(row) if at[0] == store]
        for replica, earlier in folded:
            found = self._rows.get(earlier, {}).pop((store, replica), None)
            if found is None:
                raise ProtocolError(f"the late contribution of replica {replica} at clock {earlier} is not there")
            if not self._rows[earlier]:
                del self._rows[earlier]
            chosen.append((found, earlier))
        full = [(gathering, at) for gathering, at in chosen if gathering.weight]
        rest = releases(parts(gathering for gathering, _ in chosen if not gathering.weight))
        if not full:
            return [*rest, Forward(store, clock, 0, 0, ())]
        late = self._group.late
        weight = sum(g.weight for g, at in full if at == clock) + absent * max(g.weight for g, _ in full)
        base = min(gathering.base_version for gathering, _ in full)
        terms = tuple((gathering.handles(), factor(late, clock - at) if at < clock else 1.0) for gathering, at in full)
        weight = max(weight, 1)
        return [*rest, Forward(store, clock, weight, base, terms, weight / sum(g.weight for g, _ in full))]

    def _commit(self, event: Committed, now: float) -> list[Action]:
        """The group has decided which sites a clock contains. Say which replicas of this one it contains."""
        clock, folds = event.clock, self._group.folds
        actions: list[Action] = []
        if clock <= self._committed:
            return actions
        self._committed = clock
        if self._group.final:
            return actions if folds or not event.leaves_out(self.leader) else self._skip_to(clock, now)
        if self._fed_back:
            actions.append(SumSettled(clock, self._fed_back, folds or not event.leaves_out(self.leader)))
        known = self._sums.get(clock)
        if not event.leaves_out(self.leader):
            if known is None:
                raise ProtocolError(f"clock {clock} is committed with the site of {self.leader}, which lacks it")
            taken = [(self.leader, clock)]
            excluded = tuple(r for r in self.members if r not in known.there)
        else:
            taken, excluded = [], self.members
            if not folds:
                self._sums.pop(clock, None)
            actions += self._give_up(clock, now)
        folded: list[tuple[int, int]] = []
        for replica, earlier in (*event.folded, *taken):
            if replica == self.leader:
                late = self._sums.pop(earlier)
                folded += late.folded
                folded += [(r, earlier) for r in late.there if earlier < clock]
        waits = known.waits if known else Waits()
        told = Committed(clock, excluded, event.group, folded=tuple(sorted(folded)), waits=waits)
        return [told, *actions]

    def _skip_to(self, clock: int, now: float) -> list[Action]:
        """The global parameters of `clock` are made without those of the site, which gives up its steps until then."""
        over = range(self._decision.clock, clock + 1)
        told = (Committed(c, self.members, self._group.number) for c in over)
        return [*told, *self._give_up(clock, now)]

    def _give_up(self, clock: int, now: float) -> list[Action]:
        """The group has gone on without the site. If that has decided the clock, its sum is late as a whole."""
        actions: list[Action] = []
        for over in range(self._decision.clock, clock + 1) if self._group.folds else ():
            for replica in self.members:
                self._owed.setdefault(replica, set()).add(over)
            if not self._group.final and self._group.every.due(over, self._terms.last_clock):
                self._sums[over] = _Sum(frozenset(), (), Waits())
                actions += [Forward(store, over, 0, 0, ()) for store in self._group.stores]
        if not self._group.folds:
            late = [self._rows.pop(c) for c in list(self._rows) if c <= clock]
            actions += releases(parts(g for row in late for g in row.values()))
        for made in self._decision.pass_over(clock, now):
            actions += [made] if isinstance(made, Wake) else self._sum(made)
        return actions

    def _leave(self, event: ReplicaRetired | ReplicaLost, replica: int, now: float) -> list[Action]:
        if replica not in self._within or replica in self._left:
            return []
        self._left.add(replica)
        if isinstance(event, ReplicaLost):
            self._lost.add(replica)
        actions = self._decide(event, now)
        all_left = len(self._left) == len(self.members) and not self._group.final
        return [*actions, SiteLeft()] if all_left else actions

    def validate(self) -> None:
        """Check that only what may still be forwarded is kept, once."""
        self._decision.validate()
        handles = self.handles()
        ensure(len(handles) == len(set(handles)), "a payload is kept twice")
        for clock, row in self._rows.items():
            ensure(row, f"the site of replica {self.leader} keeps nothing for clock {clock}")
            for _, replica in row if clock < self._decision.clock else ():
                ensure(
                    clock in self._owed.get(replica, ()),
                    f"clock {clock} of replica {replica} is kept, which is decided",
                )
