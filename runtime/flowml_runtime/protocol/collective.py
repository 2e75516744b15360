"""Steps an all-reduce: which rank sends which chunk to which rank, and in which order chunks are added.

A *chunk* is the unit that one index of a schedule names. A large bucket is cut into *pieces*, and each piece into the
schedule's chunks. Pieces follow the schedule independently, `window` at a time, so that one is copied while another is
added, and both stay in the caches.

Additions follow rank numbers, never arrival. Each place adds in the order of ranks, and the path of a chunk is fixed.
So a sum repeats to the bit, and every rank that gets it holds the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowml_runtime.protocol.errors import ProtocolError, ensure
from flowml_runtime.protocol.schedules import Schedule, Send, Take

PIECE_BYTES = 2**20
"""The size of a piece, which is one message. Measured from 512 KiB to 8 MiB: larger ones leave a core's own cache
between their copy and their addition, and smaller ones cost more in messages than that saves."""

WINDOW = 2
"""The number of pieces in progress: this side works on one while the other side works on the next."""

MAX_PIECES = 2**16


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
