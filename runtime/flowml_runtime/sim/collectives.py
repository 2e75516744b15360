"""Adds up gradients over replicas in virtual time, as `worker.training.reductions` does between real workers.

Chunks of a sum travel as the schedule's own machine (`protocol.collective`) says. For many workers, and without
arithmetic, that is too many messages: then every worker has the sum at the time that the schedule takes on idle links
after the last one has brought its part.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from flowml.arrays import dtype_of
from flowml.plan import Part, Site
from flowml.policy.filters import Talk, is_exchanged, slot_bytes, sum_sizes
from flowml.policy.topology import sent_bytes
from flowml.sim import NetworkModel
from flowml_runtime import wire
from flowml_runtime.protocol import collective, schedules
from flowml_runtime.protocol.training.actions import Start
from flowml_runtime.sim.network import KINDS
from flowml_runtime.sim.values import Chunk, Flight, Value
from flowml_runtime.worker.training.exchange.reductions import summed

if TYPE_CHECKING:
    from flowml_runtime.sim.world import World

MOST_MESSAGES = 4096
"""The most messages of one sum that are simulated one by one."""

_SUMMED = 3

Key = tuple[int, int, int, int, int]
"""(store, part, clock, the leader of the site, or -1 for a sum that homes apply, the number of the sum)

Filters may need several sums for one push."""


class Machine:
    """A flight without values."""

    def __init__(self, schedule: schedules.Schedule, rank: int, nbytes: int, name: str) -> None:
        self._layout = collective.Layout.of(nbytes, 1, schedule)
        self._machine = collective.AllReduce(schedule, rank, self._layout.pieces, name)

    @property
    def done(self) -> bool:
        return self._machine.done

    def started(self) -> list[Chunk]:
        return self._chunks(self._machine.step(collective.Started()))

    def received(self, peer: int, chunk: Chunk) -> list[Chunk]:
        action = chunk.action
        return self._chunks(self._machine.step(collective.Received(peer, action.piece, action.take, None)))

    def total(self) -> Value:
        return None

    def _chunks(self, actions: Sequence[collective.Action]) -> list[Chunk]:
        found: list[Chunk] = []
        for action in actions:
            if isinstance(action, collective.SendChunk):
                first, end = self._layout.span(action.piece, action.chunk)
                found.append(Chunk(action.peer, action, None, end - first))
        return found


@dataclass
class _Sum:
    """One all-reduce. `given` are the pushes of each worker's replicas that have arrived, and `talks` what filters make
    of them. `sizes` are the bytes that a rank adds in this sum and in those after it."""

    workers: tuple[str, ...]
    schedule: schedules.Schedule
    sizes: tuple[int, ...]
    weight: int = 0
    """What each push weighs."""
    given: dict[str, dict[int, Value]] = field(default_factory=dict[str, dict[int, Value]])
    talks: dict[str, dict[int, Talk]] = field(default_factory=dict[str, dict[int, Talk]])
    causes: dict[str, int] = field(default_factory=dict[str, int])
    flights: dict[str, Flight] = field(default_factory=dict[str, Flight])
    early: dict[str, list[tuple[int, Chunk]]] = field(default_factory=dict[str, list[tuple[int, Chunk]]])
    there: int = 0
    """The number of workers whose replicas have all pushed."""
    finished: set[str] = field(default_factory=set[str])

    @property
    def nbytes(self) -> int:
        return self.sizes[0]

    def values(self) -> list[Value]:
        """What all replicas add: the workers in the order of ranks, and the replicas of each in order.

        A rank that only sends is done before others have pushed.
        """
        return [value for worker in self.workers for value in self.values_of(worker)]

    def values_of(self, worker: str) -> list[Value]:
        talks, given = self.talks.get(worker, {}), self.given.get(worker, {})
        return [talks[r].sent if r in talks else given[r] for r in sorted(given)]


class Collectives:
    """The sums of one run. A worker that has begun another run takes no part in them any more."""

    def __init__(self, world: World, parts: Sequence[Sequence[Part]]) -> None:
        self.run = world.run
        self._world = world
        self._parts = parts
        self._sums: dict[Key, _Sum] = {}
        self._queued: dict[tuple[str, int, int], deque[tuple[Key, _Sum]]] = {}
        """(worker, store, part) -> the filtered sum that is under way, and those whose replicas have pushed since."""
        self._sizes: dict[tuple[int, int], tuple[int, ...]] = {}
        """(store, part) -> what filters make a rank add in each sum."""
        self._replicas: dict[tuple[int, str], int] = {}
        """(stage, worker) -> the number of replicas whose stage runs there."""
        for stages in world.places.stages:
            for stage, worker in enumerate(stages):
                self._replicas[stage, worker] = self._replicas.get((stage, worker), 0) + 1

    def push(
        self,
        worker: str,
        start: Start | wire.Gossip,
        store: int,
        part: int,
        weight: int,
        value: Value,
        site: Site | None = None,
    ) -> None:
        """A replica on `worker` has pushed its part, for the homes or for the sum of its `site`. The last one there
        starts the sum on this worker."""
        key = (store, part, start.clock, site.replicas[0] if site else -1, 0)
        sum_ = self._sums.get(key) or self._open(key, site)
        mine = sum_.given.setdefault(worker, {})
        mine[start.replica] = value
        decided = (
            site is None and self._world.terms.stores[store].sites_decide
        )  # then each site has a weight of its own
        sum_.weight, sum_.causes[worker] = weight + sum_.weight * decided, start.cause
        if site is None:
            self._world.nodes[worker].counts.push(store, part, self._world.sizes.parts[store][part], crosses=False)
        if len(mine) < self._senders(key, site, worker):
            return
        if not self._filtered(key):
            self._add(key, sum_, worker)
            return
        queued = self._queued.setdefault((worker, store, part), deque())
        queued.append((key, sum_))
        if len(queued) == 1:
            self._begin(key, sum_, worker)

    def _filtered(self, key: Key) -> bool:
        return key[3] < 0 and bool(self._world.terms.stores[key[0]].policy.summed_filters)

    def _begin(self, key: Key, sum_: _Sum, worker: str) -> None:
        """Filter what the replicas on a worker have pushed, once the push before is over, and start the first sum."""
        store, part, clock = key[:3]
        stage, talks = self._parts[store][part].stage, sum_.talks.setdefault(worker, {})
        for replica, value in sum_.given[worker].items():
            talk = self._world.values.talk((replica, stage), store, part, clock, value)
            if talk is not None:
                talks[replica] = talk
        self._add(key, sum_, worker)

    def _add(self, key: Key, sum_: _Sum, worker: str) -> None:
        """Start a sum on a worker."""
        sum_.there += 1
        if len(sum_.workers) == 1 or self._is_simple(sum_):
            if sum_.there == len(sum_.workers):
                self._in_closed_form(key, sum_)
            return
        rank, values = sum_.workers.index(worker), sum_.values_of(worker)
        flight = self._world.values.flight(sum_.schedule, rank, values)
        if flight is None:
            name = f"part {key[1]} of store {key[0]} at clock {key[2]}"
            flight = Machine(sum_.schedule, rank, sum_.nbytes, name)
        sum_.flights[worker] = flight
        self._send(key, sum_, worker, flight.started())
        for peer, chunk in sum_.early.pop(worker, ()):
            self._take(key, sum_, worker, peer, chunk)
        self._look(key, sum_, worker)

    def _open(self, key: Key, site: Site | None) -> _Sum:
        store, part = key[:2]
        reduction = self._parts[store][part].reduction if site is None else site.reductions[part]
        assert reduction is not None
        schedule = schedules.named(reduction.schedule, reduction.hosts, reduction.fanout, reduction.route)
        found = self._sums[key] = _Sum(reduction.workers, schedule, self._sizes_of(key))
        return found

    def _sizes_of(self, key: Key) -> tuple[int, ...]:
        store, number, leader = key[0], key[1], key[3]
        part, terms = self._parts[store][number], self._world.terms.stores[store]
        if leader >= 0:
            return (part.nbytes,)
        if (store, number) not in self._sizes:
            chain = terms.policy.summed_filters
            counted = dtype_of(part.payload[0].dtype).itemsize if terms.sites_decide else 0  # a number of gradients
            if is_exchanged(chain) and part.reduction is not None:
                workers = part.reduction.workers
                slots = max(self._senders(key, None, worker) for worker in workers) * len(workers)
                self._sizes[store, number] = (slots * (slot_bytes(chain, part.payload, part.filtered) + counted),)
            else:
                first, *after = sum_sizes(chain, part.payload, part.filtered)
                self._sizes[store, number] = first + counted, *after
        return self._sizes[store, number]

    def _senders(self, key: Key, site: Site | None, worker: str) -> int:
        """The number of replicas on a worker that push for a sum."""
        store, stage = key[0], self._parts[key[0]][key[1]].stage
        sites = self._world.terms.stores[store].sites
        if site is None and not sites:
            return self._replicas[stage, worker]
        replicas = site.replicas if site else tuple(found[0] for found in sites)
        return sum(self._world.places.stages[r][stage] == worker for r in replicas)

    def _is_simple(self, sum_: _Sum) -> bool:
        ranks, chunks = len(sum_.workers), sum_.schedule.chunks
        messages = ranks * (
            2 * ranks if sum_.schedule.name in ("ring", "direct", "spread", "around") else 2 * math.log2(ranks) + chunks
        )
        return not self._world.values.computes and messages > MOST_MESSAGES

    def _in_closed_form(self, key: Key, sum_: _Sum) -> None:
        world, ranks = self._world, len(sum_.workers)
        crossing = 0
        if ranks > 1:
            crossing = round(sent_bytes(sum_.schedule.name, sum_.nbytes, ranks))
        seconds = idle_seconds(sum_.schedule, [world.nodes[w].number for w in sum_.workers], sum_.nbytes, world.network)
        total = world.values.total(sum_.values())
        del self._sums[key]
        for worker in sum_.workers:
            world.nodes[worker].counts.crossing(key[0], crossing)
            label = world.nodes[worker].number * KINDS + _SUMMED
            world.clock.after(seconds, label, self._give, key, sum_, worker, total)

    def _send(self, key: Key, sum_: _Sum, worker: str, chunks: Sequence[Chunk]) -> None:
        rank = sum_.workers.index(worker)
        for chunk in chunks:
            to = sum_.workers[chunk.peer]
            self._world.nodes[worker].counts.crossing(key[0], chunk.nbytes)
            self._world.wires.send(worker, to, chunk.nbytes, self._receive, key, chunk, sum_, to, rank)

    def _receive(self, key: Key, chunk: Chunk, sum_: _Sum, worker: str, peer: int) -> None:
        if not self._takes_part(worker):
            return
        if worker not in sum_.flights:
            sum_.early.setdefault(worker, []).append((peer, chunk))
            return
        self._take(key, sum_, worker, peer, chunk)
        self._look(key, sum_, worker)

    def _takes_part(self, worker: str) -> bool:
        """Whether a worker lives and is in this run, or has still to begin it."""
        node = self._world.nodes[worker]
        return node.lives and (node.world is self._world or node.start.run < self._world.run)

    def _take(self, key: Key, sum_: _Sum, worker: str, peer: int, chunk: Chunk) -> None:
        self._send(key, sum_, worker, sum_.flights[worker].received(peer, chunk))

    def _look(self, key: Key, sum_: _Sum, worker: str) -> None:
        """Give the homes of a worker the sum, if it is complete there."""
        flight = sum_.flights[worker]
        if not flight.done or worker in sum_.finished:
            return
        sum_.finished.add(worker)
        if len(sum_.finished) == len(sum_.workers):
            del self._sums[key]
        total = flight.total()
        self._give(key, sum_, worker, self._world.values.total(sum_.values()) if total is None else total)

    def _give(self, key: Key, sum_: _Sum, worker: str, total: Value) -> None:
        store, part, clock, leader, _ = key
        world = self._world
        if not self._takes_part(worker):
            return
        node = world.nodes[worker]
        talks = [talk for _, talk in sorted(sum_.talks.get(worker, {}).items())]
        for talk in talks:
            talk.take(total)
        if len(sum_.sizes) > 1:
            self._go_on(key, sum_, worker)
            return
        if leader >= 0:
            for replica in sum_.given[worker]:
                node.told[store, replica, summed(part), clock] = total
            world.clock.after(0.0, node.number * KINDS + _SUMMED, node.walk)  # not within the step that pushes
            return
        own, decided = sum_.given[worker], world.terms.stores[store].sites_decide
        total = talks[0].total() if talks else total
        if decided:  # the sum ends with the number of gradients in it
            total = total[:-1]
        message: Any = wire.Contribution(
            **node.ids,
            cause=sum_.causes[worker],
            store=store,
            part=part,
            replica=next(r for r, stages in enumerate(world.places.stages) if stages),
            incarnation=0,
            clock=clock,
            base_version=0,  # a sum is never stale
            weight=sum_.weight * (1 if decided else world.terms.replicas - len(world.places.lost)),
            of_site=decided,
        )
        message, value = world.checked_sum(node, message, total, own)
        if not message.weight:
            message, value = msgspec.structs.replace(message, empty=True), None
        for talk in () if message.empty else talks:
            talk.commit()
        at, home = world.terms.stores[store].stages[part], world.terms.stores[store].stages[0]
        senders = (world.places.stages[r] for r in world.terms.stores[store].senders(world.terms.replicas))
        homes = dict.fromkeys(stages[home] for stages in senders if stages and stages[at] == worker)
        for to in homes:
            world.send(worker, to, message, value)
        if self._filtered(key):
            queued = self._queued[worker, store, part]
            queued.popleft()
            if queued:
                self._begin(*queued[0], worker)

    def _go_on(self, key: Key, sum_: _Sum, worker: str) -> None:
        """Start the sum that filters need after this one."""
        after = *key[:4], key[4] + 1
        if after not in self._sums:
            self._sums[after] = _Sum(
                sum_.workers,
                sum_.schedule,
                sum_.sizes[1:],
                weight=sum_.weight,
                given=sum_.given,
                talks=sum_.talks,
                causes=sum_.causes,
            )
        self._add(after, self._sums[after], worker)


def idle_seconds(schedule: schedules.Schedule, ranks: Sequence[int], nbytes: int, network: NetworkModel) -> float:
    """How long a sum takes on idle links after the last rank has begun, for workers with these numbers.

    All rounds take as long as one over the slowest link from a rank to the next.
    """
    count = len(ranks)
    if count == 1:
        return 0.0
    pairs = list(zip(ranks, (*ranks[1:], ranks[0]), strict=True))
    latency = max(network.link(a, b).latency_s for a, b in pairs)
    rate = min(network.link(a, b).bytes_per_s for a, b in pairs)
    shared = min((s.bytes_per_s for a, b in pairs for s in network.shared(a, b)), default=math.inf)

    def rounds(number: int, each: float, at_once: int = 1) -> float:
        """`number` rounds, in each of which a rank sends `each` bytes to every one of `at_once` others."""
        return number * (latency + max(each / rate, at_once * each / shared))

    match schedule.name:
        case "doubling":
            extra = 2 if count & (count - 1) else 0
            return rounds(count.bit_length() - 1 + extra, nbytes)
        case "direct":
            return rounds(2, nbytes / count, count - 1)
        case "gather":
            return rounds(1, nbytes, count - 1)
        case "spread":
            return rounds(1, nbytes / count, count - 1)
        case "around":
            return rounds(count - 1, nbytes / count)
        case "tree":
            fanout = max(len(step.peers) for step in schedule.steps(0) if isinstance(step, schedules.Take))
            depth = math.ceil(math.log(count * (fanout - 1) + 1, fanout)) - 1 if fanout > 1 else count - 1
            return rounds(2 * depth, nbytes, fanout)
        case _:
            return rounds(2 * (count - 1), nbytes / count)
