"""Decides when the driver takes a snapshot, and gathers what the workers tell of it.

    all replicas have stopped (`Paused`) -> Export to all workers -> all machines and buffers are here -> Save -> Hold

* Replicas stop before a clock of the rhythm, or soon after `pause`, and before they retire. So a snapshot
  lies between two clocks of each replica, and one is taken at the end.
* A worker tells what it keeps when everything that replicas have sent is applied there, or waits for a later clock or
  for others. Of the latter nothing is left at the end.
* The run goes on when the host has the buffers. It writes them meanwhile.
* A run without common clocks stops where each replica happens to be, if no replica waits for another. Else one that
  has stopped would be waited for. So all stop before the same clock, and one that has no more items retires, but for
  the last one: the homes stay open for it.
* One after which a replica leaves is taken after a push, if that is soon: then none of its local steps is lost. If no
  replica waits for another, that replica stops first, after its own push, and the others when it has stopped, or when
  they have done as many steps as that could take.
* A run that loses a replica takes no more snapshots. One that begins without it does, of the others, and so does one
  that is to go on without it (`departed`).
* A late replica, or one whose worker is late, holds a snapshot up. If others could go on without it, the caller
  withdraws the snapshot after a while: those that have stopped go on, and no other is taken before each of the late
  ones is heard of. Its other stages may go on meanwhile, so of one whose worker is late that worker has to be heard of,
  or a step that counts. A snapshot that was due at a clock is then taken later. The last one waits.
* If the fit goes on after losses, or has checkpoints, snapshots are meanwhile taken of the others where that is sound
  (`silent`): for the case that the silent ones are lost. Of these the driver gets the buffers, and there are no copies.
* Each Hold has the next number. What comes because of an earlier one, or again, changes nothing.
* Work items that a replica holds and has not begun count as not granted, if there are no common clocks.
* Workers may copy what they tell to others. Where replicas wait for each other at each clock anyway, this is done as
  often as the rhythm says, and the driver then gets the buffers only if it has asked for them or they are due.
  Otherwise they are copied whenever the driver gets them. The snapshot is complete when all copies are there.
* If the driver wants buffers only to write them, it offers a folder, into which workers write theirs. The driver then
  gets the names, and the run goes on before the files are there. If it is busy with earlier folders, there is no
  snapshot, except for the last one, of which it gets the buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.actions import Release, Send
from flowml_runtime.protocol.training.clocks import after_push
from flowml_runtime.protocol.training.items import NO_HOLD
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.silent import apart, goes_without
from flowml_runtime.protocol.training.store import Handle
from flowml_runtime.protocol.training.terms import Terms

AT_END = NO_HOLD - 1
"""The hold of replicas that stop only before they retire."""


class Rhythm(msgspec.Struct, frozen=True):
    """A snapshot after every so many clocks, counted from the first of the fit, and at the end; 0: only at the end.

    A second number counts too, if it is not 0. `copied`: workers copy what they keep to others, after so many clocks
    where replicas wait for each other anyway; 0: they do not. `partial`: snapshots may be taken without silent
    replicas.
    """

    every: int = 0
    also: int = 0
    copied: int = 0
    partial: bool = False


class Offer(msgspec.Struct, frozen=True):
    """From now on workers may write into this folder what they keep, once. `busy`: there is no folder yet. Neither: the
    driver gets the buffers."""

    folder: str = ""
    token: str = ""
    busy: bool = False


class Save(msgspec.Struct, frozen=True):
    """A snapshot is complete: where the machines stand, and the buffers as (owner, names, handle). `last`: the replicas
    have no more work. `number` is that of the Hold. Without `whole` there are no handles. `copied`: other workers have
    copies. With a `folder` those without a handle are in files there. `without`: the silent replicas of which it has
    nothing. `after_push`: it was to be taken after a push, if one was soon."""

    stopped: wire.Stopped
    buffers: tuple[tuple[str, tuple[str, ...], Handle | None], ...]
    cause: int
    last: bool = False
    number: int = 0
    whole: bool = True
    copied: bool = False
    folder: str = ""
    without: tuple[int, ...] = ()
    after_push: bool = False


class Snapshots:
    """The snapshots of one run. Without a `rhythm` there are none."""

    def __init__(self, terms: Terms, places: Places, rhythm: Rhythm | None, first: int) -> None:
        self._terms = terms
        self._places, self._workers = places, places.workers
        self._live = frozenset(range(terms.replicas)).difference(places.lost)
        self._rhythm = None if terms.aligned and first > terms.last_clock else rhythm
        """None also after the last snapshot."""
        self._copies = rhythm is not None and rhythm.copied > 0
        self._waits_anyway = terms.aligned and not terms.drops and terms.speculation is None
        """Whether replicas wait for late ones at each clock, or at the next push."""
        self.hold = NO_HOLD if self._rhythm is None else self._next(first)
        """The clock before which replicas stop."""
        self._paused: dict[int, wire.Paused] = {}
        self._exported: dict[str, wire.Exported] = {}
        self._buffers: dict[tuple[str, str], tuple[tuple[str, ...], Handle | None]] = {}
        """(worker, owner) -> the names of the owner's buffers, and their handle."""
        self._copied: dict[tuple[str, str], tuple[str, ...]] = {}
        """(worker, owner) -> the names of the owner's buffers, of which the copies are there."""
        self._wanted, self._whole = False, True
        """Whether the driver has asked for buffers, and whether it gets those that workers have been asked for."""
        self.offer = Offer()
        self._folder = ""
        """Where workers write what they have been asked for."""
        self._complete: int | None = None
        """The number of the newest complete snapshot of all replicas, of which workers may have copies."""
        self._numbers = 0
        """The Holds so far, without that with which the run began."""
        self._number = 0
        """The number of the newest Hold for all replicas."""
        self.under_way = False
        """Whether workers have been asked for what they keep, and some have not answered."""
        self._stopping: dict[int, int] = {}
        """The replicas that are to stop before the others, and the numbers of their Holds."""
        self._stop_by = 0
        """The others stop too when one of them has asked for work for a later clock."""
        self._after_push = False
        """Whether the snapshot for which replicas stop is to be taken after a push."""
        self._released: set[int] = set()
        """The replicas that may retire, because they have no more items and others may wait for them."""
        self.silent: dict[int, frozenset[str]] = {}
        """The replicas that held up the snapshot that was withdrawn last, and have not been heard of since. Of one that
        had stopped, the workers that had not told what they keep."""
        self._leaves_out = rhythm is not None and rhythm.partial and goes_without(terms)
        """Whether snapshots are taken without silent replicas."""
        self._without: frozenset[int] = frozenset()
        """The replicas without which the snapshot is taken that is under way."""

    def pause(
        self, ids: dict[str, Any], newest: int, pushed_within: int = 0, leaving: Sequence[int] = ()
    ) -> list[Send]:
        """Stop soon: before the clock after the `newest` one that was granted, or at once if no replica waits for
        another. Stop after a push that is within so many clocks more (`after_push`), or have those that are `leaving`
        stop after theirs, before the others do."""
        self._wanted = True
        if self._rhythm is None or self.under_way or self.misses or (self._paused and not self._await_end):
            return []
        if self._stopping and newest <= self._stop_by:
            return []
        if not (self._terms.aligned or self._terms.paced_by_slowest):
            first = () if self._stopping or not pushed_within else sorted(self._live.intersection(leaving))
            if not first:
                return self._stop_all(ids, after_push=bool(self._stopping))
            self._stop_by = newest + 2 * pushed_within  # they may be slower than the others
            return [self._stop_first(ids, replica, pushed_within) for replica in first]
        clock = newest + 1
        if pushed_within:
            clock = after_push((store.policy.every for store in self._terms.stores), clock, pushed_within)
        if clock >= self.hold:
            return []
        self._paused = {}  # those that have no more items stop for this one too, and tell it again
        self._after_push = pushed_within > 0
        return [self._hold_all(ids, clock)]

    def _stop_first(self, ids: dict[str, Any], replica: int, within: int) -> Send:
        self._numbers += 1
        self._stopping[replica] = self._numbers
        hold = wire.Hold(**ids, clock=0, replica=replica, number=self._numbers, within=within)
        return Send(self._workers, hold)

    def _stop_all(self, ids: dict[str, Any], *, after_push: bool) -> list[Send]:
        self._stopping = {}
        if self.hold == 0:
            return []
        self._paused, self._after_push = {}, after_push  # those that have stopped tell it again
        return [self._hold_all(ids, 0)]

    @property
    def _await_end(self) -> bool:
        """Whether the replicas that stand have no more items, and others have: where each has a shard of its own."""
        return not self._terms.aligned and self.hold == AT_END and not self._released

    @property
    def misses(self) -> bool:
        """Whether no snapshot is taken, because replicas are silent."""
        return bool(self.silent) and not self._absent

    @property
    def _absent(self) -> frozenset[int]:
        """The silent replicas without which the next snapshot is taken, unless it is the last one."""
        if not self.silent or not self._leaves_out:
            return frozenset()
        absent = apart(self.silent, self._terms, self._places)
        return absent if absent < self._live else frozenset()

    @property
    def _asked(self) -> tuple[str, ...]:
        """The workers that tell what they keep."""
        absent = {worker for replica in self._without for worker in self._places.stages[replica]}
        return tuple(worker for worker in self._workers if worker not in absent)

    @property
    def active(self) -> bool:
        """Whether snapshots are still taken."""
        return self._rhythm is not None

    @property
    def heard(self) -> int:
        """The number of messages so far about a snapshot for which replicas stand that could go on without others."""
        if not self._paused or self._waits_anyway or self._rhythm is None or self._released or self._is_last:
            return 0
        return 1 + len(self._exported) + len(self._buffers) + len(self._copied)

    def withdraw(self, ids: dict[str, Any]) -> list[Send | Release]:
        """Let the replicas go on that stand for a snapshot. Nothing if none does."""
        if not self.heard:
            return []
        late = frozenset(w for w in self._asked if self.under_way and not self._has_told(w))
        stages = {r: late.intersection(self._places.stages[r]) for w in late for r, _ in self._places.stages_on(w)}
        others = self._live.difference(self._paused, self.silent)
        self.silent |= {r: frozenset[str]() for r in others} | stages
        self._paused, self._after_push, forgotten = {}, False, self._forget(ids["cause"])
        return [*forgotten, self._hold_all(ids, self._terms.last_clock + 1 if self._terms.aligned else AT_END)]

    def _has_told(self, worker: str) -> bool:
        """Whether all is here that a worker keeps."""
        told = self._exported.get(worker)
        return told is not None and all(sum(w == worker for w, _ in there) == told.buffers for there in self._awaited)

    @property
    def _awaited(self) -> list[Mapping[tuple[str, str], object]]:
        """What is here of the buffers and of the word of copies that come."""
        copies = self._copies and not self._without
        return [*([self._buffers] if self._whole else []), *([self._copied] if copies else [])]

    def _forget(self, cause: int) -> list[Release]:
        """Drop what workers have told for a snapshot."""
        told, self._buffers, self._exported, self.under_way = self._buffers, {}, {}, False
        self._copied, self._without = {}, frozenset()
        return [Release(handle, cause) for _, handle in told.values() if handle is not None]

    def hear(self, ids: dict[str, Any], peer: str, message: Any, newest: int) -> list[Send]:
        """Note which replicas run. After the last silent one, the rhythm goes on with what is due after the `newest`
        clock that was granted."""
        told = getattr(message, "replica", None)
        counts = isinstance(message, wire.Settled) and any(fate == "used" for _, fate in message.fates)
        for replica, workers in list(self.silent.items()):
            if peer in workers or (told == replica and (counts or not workers)):
                del self.silent[replica]
        if self.silent or self._paused or self._rhythm is None:
            return []
        clock = self._next(newest)
        return [self._hold_all(ids, clock)] if clock < self.hold else []

    def _hold_all(self, ids: dict[str, Any], clock: int) -> Send:
        self._numbers += 1
        self.hold, self._number = clock, self._numbers
        return Send(self._workers, wire.Hold(**ids, clock=clock, number=self._number))

    def lose(self, ids: dict[str, Any]) -> list[Send | Release]:
        """A replica is lost. The others go on."""
        held, self._rhythm, self.silent, self._stopping = self.hold != NO_HOLD, None, {}, {}
        return [*self._forget(ids["cause"]), *([self._hold_all(ids, NO_HOLD)] if held else [])]

    def leave(self, ids: dict[str, Any], places: Places) -> list[Send | Release]:
        """The run goes on at these places, without replicas that are lost. A snapshot that is being taken begins
        anew."""
        self._places, self._workers = places, places.workers
        self._live = self._live.difference(places.lost)
        self.silent = {r: workers for r, workers in self.silent.items() if r not in places.lost}
        stand, self._paused, self._stopping, self._after_push = bool(self._paused or self._stopping), {}, {}, False
        return [*self._forget(ids["cause"]), *([self._hold_all(ids, self.hold)] if stand else [])]

    def take(self, ids: dict[str, Any], peer: str, message: Any, handle: Handle | None) -> list[Send | Save | Release]:
        """Process a Paused, an Exported or Buffers. `ids` are for the messages to send."""
        if isinstance(message, wire.Paused) and self._stopping.get(message.replica) == message.number:
            del self._stopping[message.replica]
            return [] if self._stopping else [*self._stop_all(ids, after_push=True)]
        if self._rhythm is None or message.number != self._number:
            return [] if handle is None else [Release(handle, ids["cause"])]
        match message:
            case wire.Paused(replica=replica):
                if replica in self._paused or replica not in self._live or self.under_way:
                    return []  # homes that are asked already do not wait for what one has sent that stops now
                self._paused[replica] = message
                absent = frozenset[int]() if self._is_last else self._absent
                if not self._live.difference(absent) <= self._paused.keys():
                    return self._release(ids, message)
                self._stopping = {}  # all have come to the end meanwhile
                missing = self._live.difference(self._paused) | {r for r in absent if self.silent.get(r)}
                self.under_way = True
                self._without = apart(missing, self._terms, self._places) if missing else frozenset()
                return [Send(self._asked, self._export(ids))]
            case wire.Exported() if self.under_way:
                self._exported[peer] = message
            case wire.Buffers(owner=owner, names=names):
                if (peer, owner) in self._buffers or not self.under_way:
                    return [] if handle is None else [Release(handle, ids["cause"])]
                self._buffers[peer, owner] = names, handle
            case wire.Copied(worker=worker, owner=owner, names=names):
                if self.under_way:
                    self._copied[worker, owner] = names
            case _:
                raise ProtocolError(f"{type(message).__name__} does not belong to a snapshot")
        expected = sum(told.buffers for told in self._exported.values())
        if len(self._exported) < len(self._asked) or any(len(there) < expected for there in self._awaited):
            return []
        return [self._save(ids["cause"]), *self._go_on(ids)]

    def _export(self, ids: dict[str, Any]) -> wire.Export:
        """Ask for what workers keep, now that all replicas have stopped."""
        often = self._copies and self._waits_anyway and self._rhythm is not None
        due = self._rhythm is not None and any(
            n and self.hold % n == 0 for n in (self._rhythm.every, self._rhythm.also)
        )
        self._whole = not often or due or self._wanted or self._is_last or bool(self._without)
        offer = Offer() if self._without else self._take_offer()
        self._wanted, self._folder = False, offer.folder
        return wire.Export(
            **ids,
            clocks=self._clocks,
            pushed=tuple((r, *pair) for r, paused in sorted(self._there.items()) for pair in paused.pushed),
            last=self._is_last,
            number=self._number,
            whole=self._whole,
            copied=self._copies and not self._without,
            complete=self._complete,
            folder=offer.folder,
            token=offer.token,
        )

    def _take_offer(self) -> Offer:
        """Where workers are to write what they are asked for."""
        also = 0 if self._rhythm is None else self._rhythm.also
        read = also and (not self._terms.aligned or self._wanted or self._is_last or self.hold % also == 0)
        if not self._whole or read:
            return Offer()
        if self.offer.busy:
            self._whole = self._is_last
            return Offer()
        offer, self.offer = self.offer, Offer(busy=bool(self.offer.folder))
        return offer

    def _release(self, ids: dict[str, Any], paused: wire.Paused) -> list[Send | Save | Release]:
        """Let a replica that has stopped because it has no more items retire, unless it is the last."""
        last = len(self._released) == len(self._live) - 1
        if not self._terms.paced_by_slowest or paused.clock >= paused.hold or last or paused.replica in self._released:
            return []
        self._released.add(paused.replica)
        self._numbers += 1
        return [Send(self._workers, wire.Hold(**ids, clock=NO_HOLD, replica=paused.replica, number=self._numbers))]

    @property
    def _is_last(self) -> bool:
        """Whether the replicas have no more work."""
        return self.hold > self._terms.last_clock if self._terms.aligned else self.hold == AT_END

    @property
    def _clocks(self) -> tuple[int, ...]:
        """The next clock of each replica. One that takes no part holds up nothing."""
        there = self._there
        newest = max(paused.clock for paused in there.values())
        return tuple(there[r].clock if r in there else newest for r in range(self._terms.replicas))

    @property
    def _there(self) -> Mapping[int, wire.Paused]:
        """What the replicas have told that are in the snapshot."""
        return {replica: told for replica, told in self._paused.items() if replica not in self._without}

    def _save(self, cause: int) -> Save:
        told = list(self._exported.values())
        stages = sorted((s for one in told for s in one.stages), key=lambda s: (s.replica, s.stage))
        stores = sorted((s for one in told for s in one.stores), key=lambda s: s.store)
        sites = sorted((s for one in told for s in one.sites), key=lambda s: (s.group, s.site))
        waiting = sorted((w for one in told for w in one.waiting), key=lambda w: (w.store, w.clock, w.replica, w.part))
        found = self._buffers if self._whole else {at: (names, None) for at, names in self._copied.items()}
        kept = sorted(found.items(), key=lambda one: one[0][1])
        buffers = ((owner, names, handle) for (_, owner), (names, handle) in kept)
        self._complete = self._complete if self._without else self._number
        clocks = list(self._clocks)
        for replica in () if self._terms.aligned else self._without:
            clocks[replica] = max(store.clocks[replica] for store in stores)
        stopped = wire.Stopped(tuple(clocks), tuple(stages), tuple(stores), tuple(sites), tuple(waiting))
        without = tuple(sorted(self._without))
        about = self._is_last, self._number, self._whole, self._copies and not without, self._folder, without
        about = *about, self._after_push
        return Save(stopped, tuple(buffers), cause, *about)

    def _go_on(self, ids: dict[str, Any]) -> Sequence[Send]:
        clock = NO_HOLD if self._is_last else self._next(max(self._clocks))
        if self._is_last:
            self._rhythm = None
        self._paused, self._exported, self._buffers, self._copied, self.under_way = {}, {}, {}, {}, False
        self._without, self._after_push = frozenset(), False
        return [self._hold_all(ids, clock)]

    def _next(self, clock: int) -> int:
        """The hold after the snapshot before `clock`."""
        if not self._terms.aligned:
            return AT_END
        copied = self._rhythm.copied if self._rhythm and self._waits_anyway else 0
        numbers = (self._rhythm.every, self._rhythm.also, copied) if self._rhythm else ()
        return min([self._terms.last_clock + 1, *((clock // n + 1) * n for n in numbers if n)])
