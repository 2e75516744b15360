"""A home's machine: it gathers the contributions to the stores that live on one worker, and versions them.

* A contribution is complete when every part of it is in, one from each stage that shares in the store. Its
  parts carry equal weights, because all stages send the same steps; or all are empty.
* A clocked store tells the leader when a contribution is complete, and applies nothing until the clock is
  committed. Then it applies what the commit names, in the order of replicas, so that two runs agree to the
  bit. Whatever else it holds for that clock is late: it is released and never applied.
* After the commit of clock c its clock vector reads c + 1 for all, the late included: nobody waits for them.
* A store that is not clocked applies each contribution when it is complete. `clocks[r]` is one more than the
  clock of the newest complete contribution of replica r.
* A collective store has a home on every worker that reads it. What comes there is the sum of what all replicas sent
  at a clock, under the name of replica 0; it is applied when it is complete, and moves the clocks of all. So all homes
  do the same, and nobody decides.
* Each apply raises the version by one, and each change of version or clocks is published. A commit whose
  contributions are all empty moves the clocks only.
* The first complete contribution for (store, replica, clock) counts. The same part again is ignored, and so
  is one of an older life of the replica; one of a younger life replaces what an older had begun.
* Stages retire one by one, each after its last contribution on the same ordered link, so that nothing is
  forgotten that is still under way. A replica that is retired from a store no longer holds its readers up.
* A store is finished when nothing more can change it: after the last commit or sum, or if it is not clocked when
  every replica is retired from it. Only then may its value be taken as the result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from flowml.policy import coefficients, due
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.terms import RETIRED, Committed, ReplicaLost, StoreTerms, Terms

Handle = int
"""Names a payload that the host keeps for the machine until it is applied or released."""


@dataclass(frozen=True, slots=True)
class StoreLoaded:
    """The store's first value is here."""

    store: int
    version: int = 0


@dataclass(frozen=True, slots=True)
class ContributionReceived:
    """A part of a contribution came in. `weight` counts the microbatch gradients in it."""

    store: int
    part: int
    replica: int
    incarnation: int
    clock: int
    base_version: int
    weight: int
    handle: Handle
    empty: bool = False


@dataclass(frozen=True, slots=True)
class StageRetired:
    """Stage `stage` of `replica` sends no more contributions."""

    replica: int
    stage: int


@dataclass(frozen=True, slots=True)
class Apply:
    """Make version `version` of the store: for each replica the payloads of its parts, and their coefficient.

    The handles are the host's again afterwards.
    """

    store: int
    version: int
    contributions: tuple[tuple[tuple[Handle, ...], float], ...]


@dataclass(frozen=True, slots=True)
class Publish:
    """Send the store's clocks to its readers, and its value too if `value`; after any Apply that precedes it."""

    store: int
    version: int
    clocks: tuple[int, ...]
    value: bool = True


@dataclass(frozen=True, slots=True)
class SendArrived:
    """Tell the leader that this contribution is complete."""

    store: int
    replica: int
    clock: int


@dataclass(frozen=True, slots=True)
class Release:
    """Forget a payload that will never be applied."""

    handle: Handle


@dataclass(frozen=True, slots=True)
class Finished:
    """Nothing can change this store any more."""

    store: int


Event = StoreLoaded | ContributionReceived | Committed | StageRetired | ReplicaLost
Action = Apply | Publish | SendArrived | Release | Finished


@dataclass(slots=True)
class _Gathering:
    """The parts of one contribution that are in."""

    incarnation: int
    parts: dict[int, ContributionReceived] = field(default_factory=dict[int, ContributionReceived])

    @property
    def weight(self) -> int:
        return next(iter(self.parts.values())).weight

    def handles(self) -> tuple[Handle, ...]:
        return tuple(self.parts[p].handle for p in sorted(self.parts) if not self.parts[p].empty)


@dataclass(slots=True)
class _Store:
    terms: StoreTerms
    clocks: list[int]
    retired: list[set[int]]
    version: int = -1  # not loaded
    gathering: dict[tuple[int, int], _Gathering] = field(default_factory=dict[tuple[int, int], _Gathering])
    finished: bool = False

    def is_complete(self, contribution: _Gathering) -> bool:
        return len(contribution.parts) == len(self.terms.stages)


class Home:
    """The stores of one worker."""

    def __init__(self, terms: Terms, stores: Iterable[int]) -> None:
        self._terms = terms
        self._lost: set[int] = set()
        self._committed = -1
        self.late = 0
        """Parts that came after their clock was decided without them, or belonged to such a contribution."""
        self.duplicates = 0
        """Parts that came again."""
        self._stores = {
            i: _Store(terms.stores[i], [0] * terms.replicas, [set() for _ in range(terms.replicas)]) for i in stores
        }

    def version(self, store: int) -> int:
        """How many applies the store has had; -1 before it is loaded."""
        return self._stores[store].version

    def finished(self, store: int) -> bool:
        return self._stores[store].finished

    def step(self, event: Event) -> list[Action]:
        match event:
            case ContributionReceived():
                return self._receive(event)
            case Committed(clock, replicas):
                return self._commit(clock, replicas)
            case StoreLoaded(store, version):
                return self._load(store, version)
            case StageRetired(replica, stage):
                return self._retire(replica, (stage,))
            case ReplicaLost(replica):
                return self._lose(replica)

    def _load(self, index: int, version: int) -> list[Action]:
        store = self._stores[index]
        if store.version >= 0:
            raise ProtocolError(f"store {index} is loaded twice")
        store.version = version
        return [Publish(index, version, tuple(store.clocks)), *self._finish(index)]

    def _receive(self, part: ContributionReceived) -> list[Action]:
        store = self._stores.get(part.store)
        if store is None:
            raise ProtocolError(f"store {part.store} is not homed here")
        self._check(store, part)
        if self._too_late(store, part):
            return self._release([part])
        key = (part.replica, part.clock)
        gathering = store.gathering.setdefault(key, _Gathering(part.incarnation))
        replaced: list[Action] = []
        if gathering.incarnation < part.incarnation and not store.is_complete(gathering):
            replaced = self._release(gathering.parts.values())
            gathering = store.gathering[key] = _Gathering(part.incarnation)
        if part.part in gathering.parts or gathering.incarnation != part.incarnation:
            self.duplicates += 1
            return [*replaced, *self._release([part])]
        gathering.parts[part.part] = part
        if not store.is_complete(gathering):
            return replaced
        if store.terms.decided:
            return [*replaced, SendArrived(part.store, part.replica, part.clock)]
        return [*replaced, *self._apply_on_arrival(part.store, key)]

    def _check(self, store: _Store, part: ContributionReceived) -> None:
        where = f"store {part.store}: part {part.part} of replica {part.replica} at clock {part.clock}"
        if part.part >= len(store.terms.stages) or part.replica >= self._terms.replicas:
            raise ProtocolError(f"{where} does not exist in this plan")
        if part.base_version > store.version:
            raise ProtocolError(f"{where} is based on version {part.base_version}, but {store.version} is the newest")
        if (part.weight == 0) != part.empty:
            raise ProtocolError(f"{where} has weight {part.weight}; it is 0 exactly for an empty contribution")
        if store.terms.clocked and not due(part.clock, store.terms.every, self._terms.last_clock):
            raise ProtocolError(f"{where}: nothing is due at that clock")
        other = store.gathering.get((part.replica, part.clock))
        if other and other.parts and other.incarnation == part.incarnation and other.weight != part.weight:
            raise ProtocolError(f"{where} has weight {part.weight}, another part of it {other.weight}")

    def _too_late(self, store: _Store, part: ContributionReceived) -> bool:
        if store.terms.decided:
            late = part.clock <= self._committed
            self.late += late
            return late
        if part.replica in self._lost:
            return True
        again = part.clock < store.clocks[part.replica]
        self.duplicates += again
        return again

    def _apply_on_arrival(self, index: int, key: tuple[int, int]) -> list[Action]:
        store = self._stores[index]
        gathering = store.gathering.pop(key)
        replica, clock = key
        if store.terms.collective:
            store.clocks = [clock + 1] * self._terms.replicas
        else:
            store.clocks[replica] = clock + 1
        return [*self._apply(index, [gathering]), *self._finish(index)]

    def _commit(self, clock: int, replicas: tuple[int, ...]) -> list[Action]:
        if clock <= self._committed:
            return []
        self._committed = clock
        actions: list[Action] = []
        for index, store in self._stores.items():
            if store.terms.decided and due(clock, store.terms.every, self._terms.last_clock):
                actions += self._commit_store(index, clock, replicas)
        return actions

    def _commit_store(self, index: int, clock: int, replicas: tuple[int, ...]) -> list[Action]:
        store = self._stores[index]
        taken = [store.gathering.pop((r, clock), None) for r in sorted(replicas)]
        for replica, gathering in zip(sorted(replicas), taken, strict=True):
            if gathering is None or not store.is_complete(gathering):
                raise ProtocolError(f"clock {clock} is committed with replica {replica}, which store {index} lacks")
        late = [store.gathering.pop(key) for key in [k for k in store.gathering if k[1] <= clock]]
        late_parts = [part for gathering in late for part in gathering.parts.values()]
        self.late += len(late_parts)
        store.clocks = [clock + 1] * self._terms.replicas
        applied = self._apply(index, [g for g in taken if g is not None])
        return [*applied, *self._release(late_parts), *self._finish(index)]

    def _apply(self, index: int, gathered: list[_Gathering]) -> list[Action]:
        """Apply what has weight, and publish. Clocks are set before."""
        store = self._stores[index]
        full = [g for g in gathered if g.weight]
        if not full:
            return [Publish(index, store.version, tuple(store.clocks), value=False)]
        store.version += 1
        factors = coefficients(store.terms.apply, [g.weight for g in full], self._terms.microbatches)
        contributions = tuple((g.handles(), f) for g, f in zip(full, factors, strict=True))
        return [Apply(index, store.version, contributions), Publish(index, store.version, tuple(store.clocks))]

    def _retire(self, replica: int, stages: Iterable[int]) -> list[Action]:
        actions: list[Action] = []
        for index, store in self._stores.items():
            gone = store.retired[replica]
            gone.update(stages)
            if store.terms.clocked or store.clocks[replica] == RETIRED or not gone >= set(store.terms.stages):
                continue
            store.clocks[replica] = RETIRED
            if store.version >= 0:
                actions.append(Publish(index, store.version, tuple(store.clocks), value=False))
            actions += self._finish(index)
        return actions

    def _lose(self, replica: int) -> list[Action]:
        """As if all its stages had retired; but what it had not completed stays so, where no decision waits."""
        self._lost.add(replica)
        released: list[Action] = []
        for store in self._stores.values():
            if not store.terms.clocked:
                for key in [k for k in store.gathering if k[0] == replica]:
                    released += self._release(store.gathering.pop(key).parts.values())
        return [*released, *self._retire(replica, range(self._terms.stages))]

    def _finish(self, index: int) -> list[Action]:
        store = self._stores[index]
        if store.terms.collective:
            done = store.clocks[0] > self._terms.last_clock
        elif store.terms.clocked:
            done = self._committed == self._terms.last_clock
        else:
            done = all(c == RETIRED for c in store.clocks)
        if not done or store.finished or store.version < 0:
            return []
        store.finished = True
        return [Finished(index)]

    def _release(self, parts: Iterable[ContributionReceived]) -> list[Action]:
        return [Release(p.handle) for p in parts if not p.empty]

    def validate(self) -> None:
        """What is kept can still be used; a finished store waits for nothing; handles are kept once."""
        handles = [h for s in self._stores.values() for g in s.gathering.values() for h in g.handles()]
        assert len(handles) == len(set(handles))
        for index, store in self._stores.items():
            assert not (store.finished and store.gathering), f"store {index} is finished but keeps contributions"
            for (replica, clock), gathering in store.gathering.items():
                assert gathering.parts, "a contribution of no parts is kept"
                assert all(p.weight == gathering.weight for p in gathering.parts.values())
                assert all(p.incarnation == gathering.incarnation for p in gathering.parts.values())
                if store.terms.decided:
                    assert clock > self._committed, f"store {index} keeps clock {clock}, which is decided"
                else:
                    assert store.clocks[replica] <= clock
                    assert not store.is_complete(gathering), "a complete contribution was not applied on arrival"
            if store.terms.clocked:
                assert len(set(store.clocks)) == 1
                assert store.terms.collective or store.clocks[0] <= self._committed + 1
