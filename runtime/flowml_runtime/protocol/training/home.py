"""A home's state machine gathers the contributions to the stores on one worker, and makes versions from them.

* A contribution is complete when all its parts have arrived, one from each stage that uses the store. Its parts have
  equal weights, because all stages send the same steps. If one part is empty, the whole contribution counts nothing.
* A clocked store tells the leader when a contribution is complete, and applies nothing until the clock is
  committed. Then it applies the contributions that the commit names, in the order of replicas, so that two runs agree
  to the bit. All others of that clock are late: they are released, never applied.
* The *floor* of a store limits how far its readers may go: the store holds everything that the replicas that count have
  sent before that clock. After the commit of clock c the floor is c + 1, because late contributions are not waited for.
* A late contribution is kept if the store's group folds late contributions in. Its completion is reported like that of
  any other, and it is applied with the commit that names it, multiplied by the decay for each clock that it is late.
* A store that is not clocked applies contributions when as many are complete as its quorum says, or as soon as a reader
  may wait for one of them. It tells a replica which version it may wait for: the one that holds its contribution, or
  the newest one if the contribution waits for others. The floor is the least over all replicas of one more than the
  clock of the newest contribution that is applied. What a replica leaves waiting when it retires is applied then. In
  a mean over fewer than the quorum, each contribution counts as in one over all of it. What is applied together is
  published once, so that readers get no version without what waited for the same. The first consensus that they get
  has a report of every replica: a report is the change since the replica's last one, or since version 0.
* If each take of a replica comes right after a push, and it may be as stale as it likes (`store.answers`), the home
  publishes to this replica alone, when it has that push. A version is sent to no one who does not take it then, and no
  floor, because none waits for it.
* Replicas update a shared store themselves, and its home counts the updates (`Updated`). A repeated one is an error.
* A collective store has a home on every worker that reads it. Each home gets the sum of all replicas' contributions of
  a clock, under the name of replica 0. It applies the sum when it is complete, and moves the floor. So all homes
  do the same, and no decision is needed.
* Each apply raises the version by one, and each change of version or floor is published. A commit whose
  contributions are all empty moves only the floor.
* Homes of stores that the optimizer couples exchange values before they apply a clock (see `exchange`). The floor moves
  when they have applied it.
* The first complete contribution for (store, replica, clock) counts. A part that is repeated, or of another copy, or of
  an older life of the replica, is ignored. A part of a younger life replaces the parts of an older one.
* Stages retire one by one, each after its last contribution on the same ordered link, so that none is lost in transit.
  A replica that is retired from a store no longer delays its readers.
* A store is finished when nothing more can change it: after the last commit or sum, or, if it is not clocked, when
  every replica is retired from it. Only then may its value be taken as the result.

Contributions are indexed by clock and counted, so that the cost of one does not depend on the number of replicas.

What the caller must do:

1. Keep the payload of each handle until an Apply or a Release names it, which happens exactly once.
2. Carry the actions out in the order of the list. A Publish sends the value after the preceding Apply.
3. Give the messages of one worker in the order in which it sent them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from flowml.policy import Consensus
from flowml.policy.apply import base_of, scales
from flowml.policy.late import factor
from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError, ensure
from flowml_runtime.protocol.training import exchange
from flowml_runtime.protocol.training.accounts import NO_ENTRIES, NONE
from flowml_runtime.protocol.training.clocks import Clocks, contained
from flowml_runtime.protocol.training.home_events import (
    Action,
    Apply,
    Couple,
    Event,
    Finished,
    Flush,
    Forgo,
    Publish,
    Release,
    SendApplied,
    SendArrived,
    SharedReceived,
    StageRetired,
    StoreLoaded,
    Updated,
    releases,
)
from flowml_runtime.protocol.training.staleness import Staleness
from flowml_runtime.protocol.training.store import (
    ContributionReceived,
    Gathering,
    Handle,
    Store,
    answers,
    parts,
    waiting_part,
)
from flowml_runtime.protocol.training.terms import RETIRED, Committed, ReplicaLost, Terms


class Home:
    """The stores of one worker."""

    def __init__(self, terms: Terms, stores: Iterable[int], stopped: wire.Stopped | None = None) -> None:
        """`stopped`: where stores stood at the snapshot from which the run goes on."""
        self._terms = terms
        self._lost = NONE
        found = {
            i: Store(s, senders, None if s.clocked else Clocks(terms.replicas, senders), answers(terms, s))
            for i, s, senders in ((i, terms.stores[i], terms.stores[i].senders(terms.members)) for i in stores)
        }
        self._stores: Mapping[int, Store] = found or NO_ENTRIES
        for state in stopped.stores if stopped else ():
            if state.store in self._stores:
                waiting = (w for w in stopped.waiting if w.store == state.store) if stopped else ()
                store = self._stores[state.store]
                store.restore(state, (w for w in waiting if w.of_site == store.terms.relayed))
        mine = [tuple(s for s in c.stores if s in self._stores) for c in terms.couplings]
        self._exchanges = tuple(
            exchange.Exchange(number, frozenset(c.stores), here, len(c.rounds))
            for number, (c, here) in enumerate(zip(terms.couplings, mine, strict=True))
        )
        exchange_of = {store: e for e in self._exchanges for store in e.mine}
        self._exchange_of: Mapping[int, exchange.Exchange] = exchange_of or NO_ENTRIES
        self.staleness = Staleness.of(terms, self._stores)

    def kept(self, store: int, pushed: Iterable[tuple[int, int, int]]) -> wire.StoreState:
        """Where a store stands, for a snapshot. `pushed` as in `rests`."""
        return self._stores[store].kept(store, {replica: clock for replica, index, clock in pushed if index == store})

    def waiting(self, index: int) -> list[tuple[wire.Waiting, Handle]]:
        """The parts of contributions that wait at a store, for a snapshot."""
        store = self._stores[index]
        return [waiting_part(part, of_site=store.terms.relayed) for part in store.waiting()]

    def rests(self, clocks: Sequence[int], pushed: Iterable[tuple[int, int, int]]) -> bool:
        """Whether everything that replicas with these next clocks have sent is applied, or waits here. `pushed` are
        rows (replica, store, clock) of the newest pushes to stores where they may wait."""
        if not all(found.rests for found in self._exchanges):
            return False
        for store in self._stores.values():
            every = store.terms.policy.every
            if store.clocks is None and store.floor < contained(self._terms, every, max(clocks)):
                return False
            owed = store.owed.items() if store.terms.forwarded else ()  # each site sends a sum of each clock
            if not all(store.has(leader, clock) for leader, late in owed for clock in late):
                return False
        for replica, index, clock in pushed:
            store = self._stores.get(index)
            mine = store is not None and replica in store.senders and not store.terms.forwarded
            if store is not None and mine and not store.has(replica, clock):
                return False
        return True

    def reached(self, replica: int) -> tuple[tuple[int, int], ...]:
        """How much of what a replica has sent is in the stores that apply on arrival: (store, its next clock there)."""
        clocks = ((index, store.clocks) for index, store in self._stores.items())
        return tuple((index, found[replica]) for index, found in clocks if found is not None)

    def version(self, store: int) -> int:
        """The number of applies so far; -1 before the store is loaded."""
        return self._stores[store].version

    def finished(self, store: int) -> bool:
        return self._stores[store].finished

    def handles(self) -> list[Handle]:
        """The payloads that are kept and may still be applied."""
        found: list[Handle] = []
        for store in self._stores.values():
            rows = store.gathering.values()
            for gathering in (*(g for row in rows for g in row.values()), *store.batch.values()):
                found += gathering.handles()
        for each in self._exchanges:
            found += each.handles()
        return found

    def step(self, event: Event) -> list[Action]:
        match event:
            case ContributionReceived():
                return self._receive(event)
            case Committed():
                return self._commit(event)
            case StoreLoaded(store, version):
                return self._load(store, version)
            case Updated():
                return self._count(event)
            case Flush():
                return self._flush()
            case StageRetired(replica, stage):
                return self._retire(replica, (stage,))
            case ReplicaLost(replica):
                return self._lose(replica)
            case SharedReceived(coupling, number, clock, stores, handle):
                if coupling >= len(self._exchanges) or not self._exchanges[coupling].mine:
                    raise ProtocolError(f"coupling {coupling} is not here")
                found = self._exchanges[coupling]
                return self._take_turns(found, found.hear(clock, number, stores, handle))

    def _load(self, index: int, version: int) -> list[Action]:
        store = self._stores[index]
        if store.loaded:
            raise ProtocolError(f"store {index} is loaded twice")
        store.loaded, store.version = True, version
        published, applied = Publish(index, version, store.floor), list[Action]()
        if store.batch and store.clocks is not None and self._is_enough(store, store.clocks):
            applied = self._apply_batch(index, store.clocks)  # of a snapshot, after which replicas were left out
            if store.answers:
                applied.append(Publish(index, store.version, store.floor))
        return [published, *applied, *self._finish(index)]

    def _count(self, update: Updated) -> list[Action]:
        """Count an update that a replica has made itself, once."""
        store = self._stores[update.store]
        if store.clocks is None or update.clock < store.clocks[update.replica]:
            raise ProtocolError(f"replica {update.replica} updates store {update.store} twice at clock {update.clock}")
        store.clocks.raise_to(update.clock + 1, update.replica)
        store.floor = store.clocks.floor
        store.version += update.applied
        return []

    def _receive(self, part: ContributionReceived) -> list[Action]:
        store = self._stores.get(part.store)
        if store is None:
            raise ProtocolError(f"store {part.store} is not homed here")
        store.check(part, self._terms)
        if self._too_late(store, part):
            return releases([part])
        row = store.gathering.setdefault(part.clock, {})
        gathering = row.get(part.replica)
        if gathering is None:
            gathering = row[part.replica] = Gathering(part.incarnation)
        replaced: list[Action] = []
        if gathering.incarnation < part.incarnation and not store.is_complete(gathering):
            replaced = releases(gathering.parts.values())
            gathering = row[part.replica] = Gathering(part.incarnation)
        if part.part in gathering.parts or gathering.incarnation != part.incarnation:
            return [*replaced, *releases([part])]
        gathering.parts[part.part] = part
        if not store.is_complete(gathering):
            return replaced
        if store.terms.decided:
            told = part.store, part.replica, part.clock, gathering.weight, part.copy, part.terms
            return [*replaced, SendArrived(*told)]
        return [*replaced, *self._take_arrival(part.store, part.replica, part.clock)]

    def _too_late(self, store: Store, part: ContributionReceived) -> bool:
        if store.terms.decided:
            return part.clock <= store.committed and part.clock not in store.owed.get(part.replica, ())
        if part.replica in self._lost or (part.replica, part.clock) in store.batch:
            return True
        floor = max(store.floor, store.committed + 1)
        return part.clock < (floor if store.clocks is None else store.clocks[part.replica])

    def _take_arrival(self, index: int, replica: int, clock: int) -> list[Action]:
        """Apply a complete contribution to a store without decisions, or keep it until there are enough."""
        store = self._stores[index]
        gathering = store.pop(clock, replica)
        if gathering is None:
            raise ProtocolError(f"the contribution of replica {replica} at clock {clock} is not there")
        if store.clocks is None:
            store.committed = clock
            return [*self._apply(index, [(gathering, 1.0)], clock), *self._finish(index)]
        store.batch[replica, clock] = gathering
        applied = self._apply_batch(index, store.clocks) if self._is_enough(store, store.clocks) else []
        if store.answers and store.loaded and store.terms.policy.every.asks(clock):
            applied.append(Publish(index, store.version, store.floor, replica=replica))
        return [*applied, SendApplied(index, replica, clock, store.version), *self._finish(index)]

    def _is_enough(self, store: Store, clocks: Clocks) -> bool:
        """Whether the kept contributions may be applied: there is a quorum of them, a reader may wait for them, or all
        replicas wait for them that could still contribute. None are before the store has its values."""
        if not store.loaded:
            return False
        all_wait = len(store.batch) >= clocks.active and (
            len({replica for replica, _ in store.batch if clocks[replica] < RETIRED}) == clocks.active
        )
        if all_wait or (isinstance(base_of(store.terms.policy.apply), Consensus) and not clocks.floor):
            return all_wait
        return len(store.batch) >= self._need(store) or clocks.awaits(store.batch, store.terms.policy.staleness)

    def _need(self, store: Store) -> int:
        """The number of contributions that are applied together. A share is one of the replicas that are not lost."""
        return store.terms.policy.quorum.need(len(store.senders) - len(self._lost.intersection(store.senders)))

    def _flush(self) -> list[Action]:
        stores = [(index, store.clocks) for index, store in self._stores.items() if store.batch]
        return [a for index, clocks in stores if clocks is not None for a in self._apply_batch(index, clocks)]

    def _apply_batch(self, index: int, clocks: Clocks) -> list[Action]:
        """Apply what is kept, a quorum at a time and the oldest first, and publish what that makes.

        If that is less than the quorum, as at the end, each still counts as in a full one.
        """
        store, actions = self._stores[index], list[Action]()
        before = store.version
        need = max(self._need(store), 1)
        kept, store.batch = sorted(store.batch.items(), key=lambda entry: entry[0][1]), {}
        for batch in (sorted(kept[at : at + need]) for at in range(0, len(kept), need)):
            for (replica, clock), _ in batch:
                if clocks[replica] < RETIRED:
                    clocks.raise_to(max(clocks[replica], clock + 1), replica)
            store.floor = clocks.floor
            chosen = [(gathering, 1.0) for _, gathering in batch]
            made = self._apply(index, chosen, missing=need - len(batch))
            actions += (a for a in made if not isinstance(a, Publish))
        return [*actions, *self._news(index, value=store.version > before)]

    def _news(self, index: int, *, value: bool) -> list[Publish]:
        """Tell all readers, unless each gets a version when it is about to take. These get none without its value."""
        store = self._stores[index]
        return [] if store.answers else [Publish(index, store.version, store.floor, value)]

    def _commit(self, event: Committed) -> list[Action]:
        actions: list[Action] = []
        for index in self._terms.groups[event.group].stores:
            store = self._stores.get(index)
            if store is not None and event.clock > store.committed:
                store.committed = event.clock
                actions += self._commit_store(index, event)
        return actions

    def _commit_store(self, index: int, event: Committed) -> list[Action]:
        store, clock, excluded = self._stores[index], event.clock, event.excluded
        late_rule = store.terms.policy.quorum.late
        row = store.gathering.pop(clock, {})
        late = {replica: row.pop(replica) for replica in excluded if replica in row}
        taken = [(replica, row[replica]) for replica in sorted(row)]
        each, tree = len(store.terms.stages), store.terms.tree
        absent = len(excluded) if tree is None else sum(map(event.leaves_out, store.senders))
        if len(taken) < len(store.senders) - absent or not all(len(g.parts) == each for _, g in taken):
            there = {replica for replica, gathering in row.items() if store.is_complete(gathering)}
            missing = next(r for r in store.senders if r not in there and r not in excluded)
            raise ProtocolError(f"clock {clock} is committed with replica {missing}, which store {index} lacks")
        chosen = [(gathering, 1.0) for _, gathering in taken]
        if not late_rule.folds:
            given = {r: a for r, a in event.coefficients if tree is None or r < tree.children}
            actions = self._decode(index, dict(taken), given, clock) if given else self._apply(index, chosen, clock)
            return [*actions, *releases(parts(late.values())), *self._finish(index)]
        if late:
            store.gathering[clock] = late
        for replica in excluded:
            store.owed.setdefault(replica, set()).add(clock)
        for replica, earlier in event.folded:
            gathering = store.pop(earlier, replica)
            if gathering is None or not store.is_complete(gathering):
                raise ProtocolError(f"the late contribution of replica {replica} at clock {earlier} is not there")
            chosen.append((gathering, factor(late_rule, clock - earlier)))
            store.owed[replica] = {c for c in store.owed.get(replica, ()) if c > earlier}
        living: list[int] | None = [r for r in store.senders if r not in excluded or r not in self._lost]
        if store.terms.policy.local:
            living = (
                None  # the mean is one over the steps that are here: a late change counts by its steps when it comes
            )
        return [*self._apply(index, chosen, clock, living=living), *self._finish(index)]

    def _decode(
        self, index: int, row: Mapping[int, Gathering], coefficients: Mapping[int, float], clock: int
    ) -> list[Action]:
        """Apply the contributions that a code needs with its coefficients: all of them, or none if one is empty."""
        unknown = coefficients.keys() - row.keys()
        if unknown:
            raise ProtocolError(f"replica {min(unknown)} has a coefficient, but is not in the commit")
        whole = all(row[replica].weight for replica in coefficients)
        used = [(row[replica], a) for replica, a in sorted(coefficients.items()) if whole]
        rest = releases(parts(g for replica, g in row.items() if not whole or replica not in coefficients))
        return [*rest, *self._apply(index, used, clock, exact=True)]

    def _apply(
        self,
        index: int,
        chosen: list[tuple[Gathering, float]],
        clock: int | None = None,
        *,
        living: list[int] | None = None,
        missing: int = 0,
        exact: bool = False,
    ) -> list[Action]:
        """Apply the contributions that have weight, and publish. The floor then follows `clock`, if there is one.

        Each comes with a factor of its coefficient, or with the coefficient itself if `exact`. A mean is one over the
        contributions that are here and as many more as are `missing`, or over those of all `living` senders.
        """
        store, found = self._stores[index], self._exchange_of.get(index)
        if found is not None and clock is not None:
            return self._take_turns(found, found.offer(clock, exchange.Offer(index, chosen, living, exact)))
        store.floor = store.floor if clock is None else clock + 1
        rest, made = self._make(index, chosen, living=living, missing=missing, exact=exact)
        if made is None:
            return [*rest, Publish(index, store.version, store.floor, value=False)]
        store.version += 1
        return [*rest, made, Publish(index, store.version, store.floor)]

    def _make(
        self,
        index: int,
        chosen: list[tuple[Gathering, float]],
        *,
        living: list[int] | None = None,
        missing: int = 0,
        exact: bool = False,
    ) -> tuple[list[Action], Apply | None]:
        """How the next version is made as `_apply` says, if some contribution has weight, after the first actions."""
        store = self._stores[index]
        weighed = [(g, factor, g.weight) for g, factor in chosen]
        full = [(g, factor) for g, factor, weight in weighed if weight]
        rest = releases(parts(g for g, _, weight in weighed if not weight)) if len(full) < len(chosen) else []
        staleness = self.staleness.add(index, [g for g, _ in full])
        if not full:
            return rest, None
        factors, part = [factor for _, factor in full], 1.0
        decays = () if exact or min(factors) == max(factors) == 1 else tuple(factors)
        if not exact:
            weights = [weight for _, _, weight in weighed if weight]
            absent = missing * max(weights) if living is None else store.absent((g for g, _ in full), living)
            summed = self._terms.replicas - len(self._lost) if store.terms.collective else 1
            each = store.terms.policy.coefficients(weights, self._terms.microbatches, absent, summed)
            part = sum(weights) / max(sum(weights) + absent, 1) if store.terms.policy.apply.averages else part
            factors = [c * factor for c, factor in zip(each, factors, strict=True)]
        contributions = tuple((g.handles(), c) for (g, _), c in zip(full, factors, strict=True))
        scaled = staleness if scales(store.terms.policy.apply) else ()
        return rest, Apply(index, store.version + 1, contributions, scaled, part, decays)

    def _take_turns(self, found: exchange.Exchange, turns: Iterable[exchange.Turn]) -> list[Action]:
        actions: list[Action] = []
        for turn in turns:
            match turn:
                case exchange.Begin(clock, offers):
                    applies: list[Apply] = []
                    for offer in offers:
                        self._stores[offer.store].floor = clock + 1
                        rest, made = self._make(offer.store, offer.chosen, living=offer.living, exact=offer.exact)
                        actions += rest
                        applies += [] if made is None else [made]
                    actions.append(Couple(found.number, clock, 0, found.mine, tuple(applies)))
                case exchange.Advance(clock, number, given, last):
                    actions.append(Couple(found.number, clock, number, found.mine, (), given, last))
                    actions += self._end_clock(found.mine, clock, updated=True) if last else ()
                case exchange.Forgo(clock, offers, told, begun):
                    actions.append(Forgo(found.number, clock, found.mine, told, begun))
                    left = [] if begun else [g for offer in offers for g, _ in offer.chosen]
                    actions += [*releases(parts(left)), *self._end_clock(found.mine, clock, updated=False)]
                case exchange.Forget(handle):
                    actions.append(Release(handle))
        return actions

    def _is_exchanging(self, index: int) -> bool:
        found = self._exchange_of.get(index)
        return found is not None and not found.rests

    def _end_clock(self, stores: Iterable[int], clock: int, *, updated: bool) -> list[Action]:
        """The stores of a coupling here have applied a clock, or given it up."""
        actions: list[Action] = []
        for index in stores:
            store = self._stores[index]
            store.floor, store.version = clock + 1, store.version + updated
            actions += [Publish(index, store.version, store.floor, updated), *self._finish(index)]
        return actions

    def _retire(self, replica: int, stages: Iterable[int]) -> list[Action]:
        actions: list[Action] = []
        for index, store in self._stores.items():
            if store.clocks is None or store.clocks[replica] == RETIRED:
                continue
            gone = store.retired.setdefault(replica, set())
            gone.update(stages)
            if not gone >= set(store.terms.stages):
                continue
            del store.retired[replica]
            store.clocks.raise_to(RETIRED, replica)
            store.floor = store.clocks.floor
            if store.batch and self._is_enough(store, store.clocks):
                actions += self._apply_batch(index, store.clocks)
            elif store.loaded:
                actions += self._news(index, value=False)
            actions += self._finish(index)
        return actions

    def _lose(self, replica: int) -> list[Action]:
        """Retire all stages of a lost replica. Stores that are not clocked drop its incomplete contributions."""
        self._lost |= {replica}
        actions: list[Action] = []
        for store in self._stores.values():
            if not store.terms.clocked:
                for clock in [c for c, row in store.gathering.items() if replica in row]:
                    gathering = store.pop(clock, replica)
                    actions += releases(gathering.parts.values()) if gathering else []
        return [*actions, *self._retire(replica, range(self._terms.stages))]

    def _finish(self, index: int) -> list[Action]:
        store = self._stores[index]
        if store.terms.clocked:
            done = store.floor > self._terms.last_clock and not self._is_exchanging(index)
        else:
            done = store.floor == RETIRED
        if not done or store.finished or not store.loaded:
            return []
        store.finished = True
        late = [gathering for row in store.gathering.values() for gathering in row.values()]
        store.gathering, store.owed = {}, {}
        return [*releases(parts(late)), Finished(index)]

    def validate(self) -> None:
        """Check that kept contributions can still be used, finished stores keep none, and each handle is kept once."""
        handles = self.handles()
        ensure(len(handles) == len(set(handles)), "a payload is kept twice")
        for index, store in self._stores.items():
            store.validate(index)
        for found in self._exchanges:
            found.validate()
