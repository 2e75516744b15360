"""What the replicas of a site, and the mirrors of a gossip of deltas, send each other in virtual time, as in
`worker.training.exchange.sites` and `.mirrors`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from flowml.plan import Site
from flowml.policy import Gossip, newest_changes
from flowml_runtime import wire
from flowml_runtime.protocol.training.accounts import NO_ENTRIES
from flowml_runtime.protocol.training.accumulator import Sum
from flowml_runtime.protocol.training.actions import Start
from flowml_runtime.sim.neighbours import Neighbours
from flowml_runtime.sim.program import At
from flowml_runtime.sim.values import NO_ARRAYS, Value
from flowml_runtime.worker.training.exchange.positions import split, summed
from flowml_runtime.worker.training.resident import Arrays, number, row, row_of

if TYPE_CHECKING:
    from flowml_runtime.sim.node import Node


class Member:
    """One replica of a site, for one store on one stage."""

    def __init__(self, node: Node, at: At, store: int, site: Site) -> None:
        terms = node.world.terms.stores[store]
        self.leader = site.replicas[0]
        self.leads = at[0] == self.leader
        gathers = any(r.schedule == "gather" for r in site.reductions)
        self.served = store in node.world.layout.local and (gathers or terms.sites_decide)
        self.decides = terms.sites_decide
        self.exchanges = self.leads or (terms.policy.mirrored and not self.served)
        self.weight = 1 if isinstance(terms.policy.remote, Gossip) else len(site.replicas)
        self.collective = terms.collective
        self._remote = terms.policy.remote
        self._node = node
        self._at = at
        self._store = store
        self._site = site
        self._others = [(r, node.world.places.stages[r][at[1]]) for r in site.replicas[1:]]
        self._clock = self._version = self._summed = -1
        self._value: Value = None

    def tell(self, step: Start, clock: int, value: Value, version: int = -1) -> None:
        """As the leader, tell the others a value for `clock`, without arrays if they have this version."""
        if clock <= self._clock:
            return
        node, known = self._node, version >= 0 and version == self._version
        self._clock, self._version = clock, version
        nbytes = 0 if known else node.world.sizes.stores[self._store]
        for other, worker in self._others:
            message = wire.Gossip(
                **node.ids, cause=step.cause, store=self._store, replica=other, source=self._at[0], clock=clock
            )
            node.send(worker, message, None if known else value, nbytes)
            if nbytes and worker != node.name:
                node.counts.publish(self._store, nbytes)

    def hear(self, clock: int) -> Value:
        """What the leader tells for `clock`; None if it is not here yet."""
        if clock > self._clock:
            key = (self._store, self._at[0], self.leader, clock)
            if key not in self._node.told:
                return None
            for earlier in range(self._clock + 1, clock):  # which this replica has left out
                self._node.told.pop((self._store, self._at[0], self.leader, earlier), None)
            value = self._node.told.pop(key)
            self._value = self._value if value is None else value
            self._clock = clock
        return self._value

    def pass_on(self, step: Start) -> bool:
        """After a round of gossip, tell or hear the parameters with which the next step begins. False: not here yet."""
        remote, node = self._remote, self._node
        if self.served or not isinstance(remote, Gossip):
            return True
        if not remote.due(step.clock) and step.clock != node.world.terms.last_clock:
            return True
        if self.leads:
            self.tell(step, step.clock + 1, node.world.values.params(self._at, self._store))
            return True
        value = self.hear(step.clock + 1)
        if value is not None:
            node.world.values.follow(self._at, self._store, value)
        return value is not None

    def add(self, step: Start, part: int, given: Sum[Value]) -> None:
        """Add up what the replicas of the site push. That of a replica that is alone is the sum."""
        node = self._node
        if len(self._site.replicas) == 1:
            node.told[self._store, self._at[0], summed(part), step.clock] = given.value
        else:
            node.world.collectives.push(node.name, step, self._store, part, given.weight, given.value, self._site)

    def total(self, part: int, clock: int, given_up: Callable[[int, int], bool]) -> list[Value]:
        """The sum of the gradients of the site, without arrays if it has `given_up` (store, clock); nothing if it is
        not here yet."""
        key = (self._store, self._at[0], summed(part), clock)
        if key in self._node.told:
            for earlier in range(self._summed + 1, clock):
                self._node.told.pop((*key[:3], earlier), None)
            self._summed = clock
        elif given_up(self._store, clock):
            return [NO_ARRAYS]
        return [self._node.told.pop(key)] if key in self._node.told else []


class Mirrors:
    """The exchanges of one store on one stage of a sender. For another replica of its site it only weighs the steps."""

    def __init__(self, node: Node, at: At, store: int, gossip: Gossip, senders: Sequence[int]) -> None:
        world = node.world
        terms = world.terms.stores[store]
        self._node = node
        self._at = at
        self._store = store
        self._gossip = gossip
        self._staleness = int(terms.policy.staleness)
        self._leads = at[0] in senders
        self._workers = {r: world.places.stages[r][terms.stages[0]] for r in senders}
        self._heard = dict.fromkeys((r for r in senders if r != at[0]), -1)
        self._told = -1
        """The newest clock whose changes it has sent."""

    @property
    def rests(self) -> bool:
        """Whether all has come that others have sent in the steps until now."""
        told, mine = self._node.told, (self._store, self._at[0])
        return all(c >= self._told or (*mine, s, self._told) in told for s, c in self._heard.items())

    def export(self) -> Arrays:
        """What is added of others, and what has come and is not added yet, for a snapshot between two steps."""
        told, mine = self._node.told.items(), (self._store, self._at[0])
        come = {(s, c): value for (*at, s, c), value in told if (*at,) == mine and s in self._heard}
        arrays = (
            {f"told/{s}.{c}/count": number(len(v or ())), **row(f"told/{s}.{c}", v or ())} for (s, c), v in come.items()
        )
        heard = {f"heard/{source}": number(clock) for source, clock in self._heard.items()}
        return {**heard, **{name: array for found in arrays for name, array in found.items()}}

    def restore(self, arrays: Arrays) -> None:
        """Go on where a snapshot was taken."""
        self._heard = {source: int(arrays[f"heard/{source}"]) for source in self._heard}
        for key in arrays:
            if key.endswith("/count"):
                source, clock = map(int, key.split("/")[1].split("."))
                self._node.told[self._store, self._at[0], source, clock] = row_of(arrays, f"told/{source}.{clock}")

    def begin(self, step: Start) -> None:
        """The step has its parameters."""

    def updated(self, step: Start) -> None:
        """The step has updated the own parameters."""
        world, node, last = self._node.world, self._node, self._last(step.clock)
        if not self._leads or not (last or self._gossip.due(step.clock)):
            world.values.changes(self._at, self._store, step.clock, sends=False, last=False)
            return
        self._told = step.clock
        value, nbytes = world.values.changes(self._at, self._store, step.clock, sends=True, last=last)
        nbytes = world.sizes.stores[self._store] if nbytes is None else nbytes  # at most
        ids: dict[str, Any] = {**node.ids, "cause": step.cause, "store": self._store, "source": self._at[0]}
        ahead, rest = split(world.layout.positions[self._store], value or ())
        first = sum(a.nbytes for a in ahead)
        for other in self._heard:
            to, message = self._workers[other], wire.Gossip(**ids, replica=other, clock=step.clock)
            if world.backlog.saturated(self._at[0], step.clock, node.name, to, ahead):
                node.send(to, msgspec.structs.replace(message, ahead=True), ahead, first)
                node.send(to, message, rest, nbytes - first)
            else:
                node.send(to, message, value, nbytes)
            node.counts.push(self._store, 0, nbytes, crosses=to != node.name)

    def end(self, step: Start) -> bool:
        """Add the changes of others. Returns whether all that the step waits for are here."""
        clock, last, told = step.clock, self._last(step.clock), self._node.told
        if not self._leads or not (last or self._gossip.due(clock)):
            return True
        newest = newest_changes(clock, self._staleness, self._gossip.every)
        end = min(newest, self._node.world.terms.last_clock) + 1
        first = min(self._heard.values(), default=clock) + 1
        due = [c for c in range(first, end) if self._gossip.due(c) or self._last(c)]
        keys = {(c, j): (self._store, self._at[0], j, c) for c in due for j in self._heard if c > self._heard[j]}
        until = clock if last else clock - self._staleness
        if any(key not in told for (c, _), key in keys.items() if c <= until):
            return False
        if any(key in self._node.lists for key in keys.values()):
            return False
        there = [(c, j, told.pop(key)) for (c, j), key in keys.items() if key in told]
        self._heard.update({j: c for c, j, _ in there})
        if there:
            self._node.world.values.join(self._at, self._store, [(j, value, self._last(c)) for c, j, value in there])
        return True

    def _last(self, clock: int) -> bool:
        return clock == self._node.world.terms.last_clock


def members(node: Node, at: At, own: Collection[int]) -> Mapping[int, Member]:
    """What a stage of a replica is in its sites, by store. `own` are the stores whose parameters it updates itself."""
    found: dict[int, Member] = {}
    for store, terms in enumerate(node.world.terms.stores):
        site = node.world.layout.site_of(store, at[0])
        if site and (len(site.replicas) > 1 or store in own or terms.sites_decide):
            found[store] = Member(node, at, store, site)
    return found or NO_ENTRIES


def neighbours(
    node: Node, at: At, stores: Iterable[int], within: Mapping[int, Member]
) -> Mapping[int, Neighbours | Mirrors]:
    """The rounds of gossip of a stage, for those of these stores that have any. `within` are its places in sites."""
    found: dict[int, Neighbours | Mirrors] = {}
    for store in stores:
        terms = node.world.terms.stores[store]
        if isinstance(terms.policy.remote, Gossip) and (store not in within or within[store].exchanges):
            kind = Mirrors if terms.policy.mirrored else Neighbours
            lost = node.world.places.lost
            senders = [r for r in terms.senders(node.world.terms.replicas) if r not in lost]
            found[store] = kind(node, at, store, terms.policy.remote, senders)
    return found or NO_ENTRIES
