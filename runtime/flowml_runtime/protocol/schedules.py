"""Defines the schedules of sums over ranks: which rank sends which chunk to which rank, and what it adds.

A *schedule* lists the steps of each rank. It is one sequential program for all ranks, in rounds. In a round, a rank
does all its sends before its takes. A rank sends without waiting and takes in the order of its list, so the first
outstanding take of the program can always happen, and no schedule deadlocks. Each rank computes only its own steps,
from its rank and the shape of the whole.

There are five families, and a topology may say its own rounds (`flowml.policy.routes`):

    hierarchical  each rank of a host owns a shard. The host's other ranks send it to the owner, which adds them up.
                  Owners of a shard on different hosts reduce it around a ring. Then every owner sends its shard to the
                  other ranks. On one host this is the *direct* form, with one hop each way. With one rank per host it
                  is the *ring* (Patarasuk & Yuan, 2009), in which each rank sends 2 (N-1)/N of the bucket.
    doubling      log2 N exchanges of the whole bucket with ranks 1, 2, 4, … away. Ranks beyond the largest power of
                  two send their values before and get the sum after (Rabenseifner, 2004).
    tree          up to rank 0 and down again, with `fanout` children per rank.
    gather        every rank sends its values to rank 0, which adds them up. Only rank 0 has the sum.
    exchange      each rank owns a chunk, which the others get as it is: from its owner (*spread*), or around a ring
                  (*around*). What else a rank was given is not sent. Nothing is added, so this is an all-gather.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from flowml.policy import topology
from flowml.policy.routes import Round, Topology


@dataclass(frozen=True, slots=True)
class Send:
    """Send the held value of `chunk` for the peer's take with the number `take`."""

    peer: int
    chunk: int
    take: int


@dataclass(frozen=True, slots=True)
class Take:
    """Take `chunk` from each of `peers` (ascending). Add them to the held value in rank order, or replace it.

    `number` identifies the take on this rank, by round and chunk. `complete`: afterwards the chunk is the sum over all
    ranks.
    """

    number: int
    chunk: int
    peers: tuple[int, ...]
    add: bool
    complete: bool


Step = Send | Take


class Schedule:
    """The steps of each rank, in order. They are the same for every bucket; `Layout` maps chunks to elements.

    `rounds(rank)` has the same length for every rank. In one that is `one_way` a rank that sends gets nothing, so it
    sends all pieces without waiting for those that take them. In one that is `owned` chunk r is that of rank r, and
    complete from the start.
    """

    def __init__(
        self,
        name: str,
        chunks: int,
        ranks: int,
        rounds: Callable[[int], Iterable[Round]],
        *,
        one_way: bool = False,
        owned: bool = False,
    ) -> None:
        self.name = name
        self.one_way = one_way
        self.owned = owned
        self.chunks = chunks
        self.ranks = ranks
        self._rounds = rounds
        self._steps: dict[int, tuple[Step, ...]] = {}

    def steps(self, rank: int) -> tuple[Step, ...]:
        """The steps of one rank, computed on first use."""
        found = self._steps.get(rank)
        if found is None:
            found = self._steps[rank] = tuple(self._made(rank))
        return found

    def takes(self, rank: int) -> dict[int, Take]:
        """The takes of one rank by number, in order."""
        return {step.number: step for step in self.steps(rank) if isinstance(step, Take)}

    def relays(self, rank: int) -> bool:
        """Whether this rank sends values that depend on values it has taken."""
        kinds = [type(step) for step in self.steps(rank)]
        return Take in kinds and Send in kinds[kinds.index(Take) :]

    def _made(self, rank: int) -> Iterable[Step]:
        for number, part in enumerate(self._rounds(rank)):
            first = number * self.chunks
            for peer, chunk in part.sends:
                yield Send(peer, chunk, first + chunk)
            for chunk, peers in part.takes:
                yield Take(first + chunk, chunk, tuple(sorted(peers)), part.add, part.complete)


@lru_cache(maxsize=256)
def hierarchical(hosts: tuple[Hashable, ...], name: str = "hierarchical") -> Schedule:
    """Add up inside each host, then around the hosts, then distribute inside each host. `hosts[r]` is rank r's host.

    Each host has as many shards as the host with the fewest ranks; its other ranks own none.
    """
    members: dict[Hashable, list[int]] = {}
    places: list[int] = []
    for rank, host in enumerate(hosts):
        places.append(len(members.setdefault(host, [])))
        members[host].append(rank)
    groups = list(members.values())
    numbers = {host: number for number, host in enumerate(members)}
    around, shards = len(groups), min(map(len, groups))

    def rounds(rank: int) -> Iterable[Round]:
        here, mine = numbers[hosts[rank]], places[rank]
        ranks, owns = groups[here], mine < shards
        turns = range(
            1, len(ranks)
        )  # each rank starts with the owner after itself, so that not all start with the same owner
        given = [(ranks[shard], shard * around + k) for shard in _after(mine, turns, shards) for k in range(around)]
        others = tuple(r for r in ranks if r != rank)
        own = [mine * around + k for k in range(around)] if owns and others else []
        yield Round(tuple(given), tuple((chunk, others) for chunk in own), add=True, complete=around == 1)
        for spread in (False, True):
            for hop in range(around - 1):
                yield _hop(here, mine, hop, spread) if owns else Round((), (), add=not spread)
        back = [(ranks[(mine - turn) % len(ranks)], chunk) for turn in turns for chunk in own]
        yield Round(tuple(back), tuple((chunk, (owner,)) for owner, chunk in given), add=False)

    def _hop(here: int, mine: int, hop: int, spread: bool) -> Round:
        after, before = groups[(here + 1) % around][mine], groups[here - 1][mine]
        sent, taken = ((at - hop + spread) % around + mine * around for at in (here, here - 1))
        complete = spread or hop == around - 2
        return Round(((after, sent),), ((taken, (before,)),), add=not spread, complete=complete)

    return Schedule(name, shards * around, len(hosts), rounds)


def _after(mine: int, turns: range, shards: int) -> Iterable[int]:
    """The shards that other ranks of a host own, in the order in which the rank at `mine` sends them."""
    size = len(turns) + 1
    return (shard for turn in turns if (shard := (mine + turn) % size) < shards)


def ring(ranks: int) -> Schedule:
    return hierarchical(tuple(range(ranks)), "ring")


def direct(ranks: int) -> Schedule:
    return hierarchical((0,) * ranks, "direct")


@lru_cache(maxsize=256)
def doubling(ranks: int) -> Schedule:
    """Recursive doubling for any number of ranks."""
    power = 1 << (ranks.bit_length() - 1)

    def rounds(rank: int) -> Iterable[Round]:
        extra = rank >= power
        partner = (rank - power,) if extra else (rank + power,) if rank + power < ranks else ()
        sends, takes = tuple((p, 0) for p in partner), tuple((0, (p,)) for p in partner)
        yield Round(sends if extra else (), () if extra else takes, add=True, complete=False)
        distance = 1
        while distance < power:
            peer = rank ^ distance
            exchange = Round(((peer, 0),), ((0, (peer,)),), add=True, complete=2 * distance == power)
            yield Round((), (), add=True) if extra else exchange
            distance *= 2
        yield Round(() if extra else sends, takes if extra else (), add=False)

    return Schedule("doubling", 1, ranks, rounds)


@lru_cache(maxsize=256)
def tree(ranks: int, fanout: int) -> Schedule:
    """Up a heap-shaped tree to rank 0, where each parent adds all its children at once, and down again."""
    if fanout < 1:
        raise ValueError(f"a tree with fanout {fanout} has no children; give at least 1")

    def depth(rank: int) -> int:
        levels = 0
        while rank:
            rank, levels = (rank - 1) // fanout, levels + 1
        return levels

    deepest = depth(ranks - 1)

    def rounds(rank: int) -> Iterable[Round]:
        mine, parent = depth(rank), (rank - 1) // fanout
        children = tuple(range(rank * fanout + 1, min(rank * fanout + fanout, ranks - 1) + 1))
        for level in range(deepest, 0, -1):
            sends = ((parent, 0),) if mine == level else ()
            takes = ((0, children),) if children and mine == level - 1 else ()
            yield Round(sends, takes, add=True, complete=level == 1)
        for level in range(1, deepest + 1):
            sends = tuple((child, 0) for child in children) if mine == level - 1 else ()
            yield Round(sends, ((0, (parent,)),) if mine == level else (), add=False)

    return Schedule("tree", 1, ranks, rounds)


@lru_cache(maxsize=256)
def gather(ranks: int) -> Schedule:
    """Rank 0 gets the sum, and no other rank."""

    def rounds(rank: int) -> Iterable[Round]:
        others = tuple(range(1, ranks))
        yield Round(((0, 0),) if rank else (), ((0, others),) if others and not rank else (), add=True)

    return Schedule("gather", 1, ranks, rounds, one_way=True)


@lru_cache(maxsize=256)
def spread(ranks: int) -> Schedule:
    """Each rank sends its chunk to all others."""

    def rounds(rank: int) -> Iterable[Round]:
        others = [(rank + turn) % ranks for turn in range(1, ranks)]
        yield Round(tuple((peer, rank) for peer in others), tuple((peer, (peer,)) for peer in others), add=False)

    return Schedule("spread", ranks, ranks, rounds, owned=True)


@lru_cache(maxsize=256)
def around(ranks: int) -> Schedule:
    """Each rank sends the next one its chunk, and then those that it gets."""

    def rounds(rank: int) -> Iterable[Round]:
        after, before = (rank + 1) % ranks, (rank - 1) % ranks
        for hop in range(ranks - 1):
            sent, taken = (rank - hop) % ranks, (before - hop) % ranks
            yield Round(((after, sent),), ((taken, (before,)),), add=False)

    return Schedule("around", ranks, ranks, rounds, owned=True)


@lru_cache(maxsize=256)
def routed(route: Topology, ranks: int) -> Schedule:
    """The rounds that a topology says itself."""
    rounds = (lambda rank: route.rounds(rank, ranks)) if ranks > 1 else lambda _: ()
    return Schedule(topology.OWN, route.chunks(ranks), ranks, rounds)


def named(name: str, hosts: Sequence[Hashable], fanout: int = 0, route: Topology | None = None) -> Schedule:
    """The schedule with that name for ranks on `hosts`, the machine of each rank. Raises ValueError if unknown."""
    match name:
        case "doubling":
            return doubling(len(hosts))
        case "direct":
            return direct(len(hosts))
        case "ring":
            return ring(len(hosts))
        case "tree":
            return tree(len(hosts), fanout)
        case "gather":
            return gather(len(hosts))
        case "spread":
            return spread(len(hosts))
        case "around":
            return around(len(hosts))
        case "hierarchical":
            return hierarchical(tuple(hosts))
        case topology.OWN if route is not None:
            return routed(route, len(hosts))
        case _:
            raise ValueError(f"there is no schedule {name!r}")


def choose(nbytes: int, hosts: Sequence[Hashable]) -> Schedule:
    """The schedule for a bucket of `nbytes` among ranks on `hosts`, the machine of each rank."""
    return named(topology.choose(nbytes, hosts), hosts)
