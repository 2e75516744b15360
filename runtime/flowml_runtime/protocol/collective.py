"""Plans and steps an all-reduce: which rank sends which chunk to which rank, and in which order chunks are added.

A *schedule* lists the steps of each rank. It is one sequential program for all ranks, in rounds. In a round, a rank
does all its sends before its takes. A rank sends without waiting and takes in the order of its list, so the first
outstanding take of the program can always happen, and no schedule deadlocks. Each rank computes only its own steps,
from its rank and the shape of the whole.

A *chunk* is the unit that one index of a schedule names. A large bucket is cut into *pieces*, and each piece into the
schedule's chunks. Pieces follow the schedule independently, `window` at a time, so that one is copied while another is
added, and both stay in the caches.

There are five families:

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

Additions follow rank numbers, never arrival. Each place adds in the order of ranks, and the path of a chunk is fixed.
So a sum repeats to the bit, and every rank that gets it holds the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flowml.policy import topology
from flowml_runtime.protocol.errors import ProtocolError, ensure

PIECE_BYTES = 2**20
"""The size of a piece, which is one message. Measured from 512 KiB to 8 MiB: larger ones leave a core's own cache
between their copy and their addition, and smaller ones cost more in messages than that saves."""

WINDOW = 2
"""The number of pieces in progress: this side works on one while the other side works on the next."""

MAX_PIECES = 2**16


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


@dataclass(frozen=True, slots=True)
class Round:
    """The steps of one rank in one round: sends as (peer, chunk), then takes as (chunk, peers)."""

    sends: tuple[tuple[int, int], ...]
    takes: tuple[tuple[int, tuple[int, ...]], ...]
    add: bool
    complete: bool = True


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


@dataclass(frozen=True)
class Layout:
    """Cuts `size` elements into pieces, and each piece into chunks, of sizes as equal as possible. In a layout that is
    `owned` the chunks of all pieces with one number lie together: they are what one rank owns."""

    size: int
    pieces: int
    chunks: int
    owned: bool = False

    @staticmethod
    def of(size: int, itemsize: int, schedule: Schedule, piece_bytes: int = PIECE_BYTES) -> Layout:
        pieces = -(-size * itemsize // (schedule.chunks * piece_bytes))
        return Layout(size, min(max(pieces, 1), MAX_PIECES), schedule.chunks, schedule.owned)

    def span(self, piece: int, chunk: int) -> tuple[int, int]:
        """The elements of a chunk: (first, last + 1)."""
        if self.owned:
            first, end = self.owned_by(chunk)
            length = end - first
            return first + piece * length // self.pieces, first + (piece + 1) * length // self.pieces
        first, end = piece * self.size // self.pieces, (piece + 1) * self.size // self.pieces
        length = end - first
        return first + chunk * length // self.chunks, first + (chunk + 1) * length // self.chunks

    def owned_by(self, rank: int) -> tuple[int, int]:
        """The elements that a rank owns: (first, last + 1)."""
        return rank * self.size // self.chunks, (rank + 1) * self.size // self.chunks


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


def named(name: str, hosts: Sequence[Hashable], fanout: int = 0) -> Schedule:
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
        case _:
            raise ValueError(f"there is no schedule {name!r}")


def choose(nbytes: int, hosts: Sequence[Hashable]) -> Schedule:
    """The schedule for a bucket of `nbytes` among ranks on `hosts`, the machine of each rank."""
    return named(topology.choose(nbytes, hosts), hosts)


# Events.


@dataclass(frozen=True, slots=True)
class Started:
    """This rank's own values are available."""


@dataclass(frozen=True, slots=True)
class Received:
    """A chunk has arrived from `peer` for the take `take` of a piece; `handle` stands for its values."""

    peer: int
    piece: int
    take: int
    handle: Any


Event = Started | Received

# Actions. They must be carried out in order, and the values that a SendChunk sends must not change later.


@dataclass(frozen=True, slots=True)
class SendChunk:
    """Send the held value of a chunk: this rank's own values, or the result of the last Combine or Replace."""

    peer: int
    piece: int
    chunk: int
    take: int


@dataclass(frozen=True, slots=True)
class Combine:
    """Add `before`, the held value, and `after`, in this order, and hold the result."""

    piece: int
    chunk: int
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    complete: bool


@dataclass(frozen=True, slots=True)
class Replace:
    """Hold these values from now on."""

    piece: int
    chunk: int
    handle: Any


@dataclass(frozen=True, slots=True)
class Done:
    """Every held chunk is the complete sum."""


Action = SendChunk | Combine | Replace | Done


@dataclass(slots=True)
class _Progress:
    """The progress of one piece: the next step, and the number of takes before it."""

    step: int = 0
    taken: int = 0


class AllReduce:
    """One rank's part of one all-reduce. Errors call it `bucket`. Not thread-safe.

    Chunks may arrive before their turn. Another rank can be at most `window` pieces ahead of the pieces that this one
    has begun, because it needs this rank's chunks for the pieces between; in a schedule that is one-way it may have
    sent all.
    """

    def __init__(self, schedule: Schedule, rank: int, pieces: int, bucket: str, window: int = WINDOW) -> None:
        self._schedule = schedule
        self._steps = schedule.steps(rank)
        self._takes = schedule.takes(rank)
        self._order = tuple(self._takes.values())
        self._positions = {number: position for position, number in enumerate(self._takes)}
        self._rank = rank
        self._pieces = pieces
        self._bucket = bucket
        self._window = window
        self._ahead = pieces if schedule.one_way else window
        """How many pieces another rank can be ahead."""
        self._started = False
        self._opened = 0
        self._finished = 0
        self._under_way: dict[int, _Progress] = {}
        self._early: dict[tuple[int, int], dict[int, Any]] = {}
        """(piece, take) -> peer -> the handle of a chunk that waits for its turn."""

    @property
    def done(self) -> bool:
        return self._finished == self._pieces

    def step(self, event: Event) -> list[Action]:
        """Process one event. Raises ProtocolError, naming peer, bucket and step, if it breaks the protocol."""
        if isinstance(event, Received):
            self._accept(event)
            return self._advance(event.piece)
        if self._started:
            raise ProtocolError(f"{self._bucket} was started twice on rank {self._rank}")
        self._started = True
        return self._open()

    def waits_for(self) -> tuple[int, ...]:
        """The ranks that this one waits for now."""
        missing: set[int] = set()
        for piece, progress in self._under_way.items():
            take = self._order[progress.taken]
            missing |= set(take.peers) - set(self._early.get((piece, take.number), ()))
        return tuple(sorted(missing))

    def validate(self) -> None:
        """Check that pieces are opened in order and as the window allows, and that a piece stops only to wait."""
        ensure(0 <= self._finished <= self._opened <= self._pieces, "more pieces are opened or finished than there are")
        ensure(self._opened <= self._finished + self._window, "more pieces are under way than the window has room for")
        ensure(len(self._under_way) == self._opened - self._finished, "a piece is lost")
        ensure(self._started or not self._opened, "a piece is under way before the start")
        for piece, progress in self._under_way.items():
            take = self._steps[progress.step]
            ensure(piece < self._opened, f"piece {piece} is under way and not opened")
            ensure(take is self._order[progress.taken], f"piece {piece} stopped without need")
            if isinstance(take, Take):
                there = len(self._early.get((piece, take.number), ()))
                ensure(there < len(take.peers), f"take {take.number} of piece {piece} could happen and did not")
        for (piece, number), handles in self._early.items():
            ensure(handles and handles.keys() <= set(self._takes[number].peers), "a chunk is kept that is not taken")
            ensure(piece < self._opened + self._ahead, f"a chunk of piece {piece} is kept too far ahead")
            over = piece < self._opened and self._positions[number] < self._under_way[piece].taken
            ensure(not over, f"a chunk of piece {piece} is kept beyond its turn")
        ensure(not self.done or not (self._early or self._under_way), "something is left when all is done")

    def _accept(self, event: Received) -> None:
        where = f"{self._bucket}, piece {event.piece}, take {event.take} of rank {self._rank}"
        if not (0 <= event.piece < self._pieces and event.take in self._takes):
            raise ProtocolError(
                f"rank {event.peer} sent for {where}: {self._schedule.name!r} has {self._pieces} pieces and "
                f"{len(self._takes)} takes here; do all ranks reduce the same bucket?"
            )
        if event.peer not in self._takes[event.take].peers:
            raise ProtocolError(f"rank {event.peer} sent for {where}, which takes nothing from it")
        if event.piece >= self._opened + self._ahead:
            raise ProtocolError(f"rank {event.peer} sent for {where}, which is too far ahead of piece {self._opened}")
        progress = self._under_way.get(event.piece)
        over = event.piece < self._opened and (progress is None or self._positions[event.take] < progress.taken)
        waiting = self._early.setdefault((event.piece, event.take), {}) if not over else {}
        if over or event.peer in waiting:
            raise ProtocolError(f"rank {event.peer} sent twice for {where}")
        waiting[event.peer] = event.handle

    def _open(self) -> list[Action]:
        """Begin as many pieces as the window allows."""
        actions: list[Action] = []
        while self._opened < min(self._pieces, self._finished + self._window):
            piece = self._opened
            self._opened += 1
            self._under_way[piece] = _Progress()
            actions += self._run(piece)
        if self.done:
            actions.append(Done())
        return actions

    def _advance(self, piece: int) -> list[Action]:
        if piece not in self._under_way:
            return []
        actions = self._run(piece)
        return actions if piece in self._under_way else actions + self._open()

    def _run(self, piece: int) -> list[Action]:
        """Do the steps of a piece until a take has to wait."""
        actions: list[Action] = []
        progress = self._under_way[piece]
        while progress.step < len(self._steps):
            step = self._steps[progress.step]
            if isinstance(step, Send):
                actions.append(SendChunk(step.peer, piece, step.chunk, step.take))
            else:
                waiting = self._early.get((piece, step.number), {})
                if len(waiting) < len(step.peers):
                    return actions
                self._early.pop((piece, step.number))
                progress.taken += 1
                actions.append(self._taken(piece, step, waiting))
            progress.step += 1
        del self._under_way[piece]
        self._finished += 1
        return actions

    def _taken(self, piece: int, take: Take, handles: dict[int, Any]) -> Action:
        if not take.add:
            return Replace(piece, take.chunk, handles[take.peers[0]])
        before = tuple(handles[p] for p in take.peers if p < self._rank)
        after = tuple(handles[p] for p in take.peers if p > self._rank)
        return Combine(piece, take.chunk, before, after, take.complete)
