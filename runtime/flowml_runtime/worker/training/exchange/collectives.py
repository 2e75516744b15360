"""Adds up buckets of arrays over a group of replicas: runs the machine of `protocol.collective` over an endpoint.

    group.all_reduce(bucket, clock, arrays) -> Future of the sums, on every member
    group.on_message, group.on_lost         the owner of the endpoint calls these

Memory is never written after it was sent: a rank's own values do not change, a partial sum has its own memory, and
every element of the result is written once, when it is final. So chunks are sent as views without a copy, whether the
transport copies them (shared memory) or keeps a reference (gRPC and threads). Result memory comes from a pool and
returns there when its last view is deleted, on any thread.

float16, bfloat16 and the float8 types are added in float32. Partial sums stay float32 between ranks, and the complete
sum is rounded once. Values to which nothing has been added keep their dtype.

If this rank passes nothing on (two ranks and few bytes), the receiving thread adds, because an addition takes less time
than waking another thread. All other work runs on the group's thread, because sending can wait.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from flowml.arrays import unheard
from flowml.errors import DeadlineError, FlowmlError, UnsupportedError, WorkerLostError
from flowml.plan import ArraySpec
from flowml_runtime import service, wire
from flowml_runtime.execution.future import Future
from flowml_runtime.protocol.collective import (
    Action,
    AllReduce,
    Combine,
    Done,
    Layout,
    Received,
    Replace,
    SendChunk,
    Started,
)
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.schedules import Schedule, choose
from flowml_runtime.transport.arrays import Array, Buffer, aligned_empty
from flowml_runtime.transport.buffers import BufferPool
from flowml_runtime.transport.endpoint import Arrays

INLINE_BYTES = 256 * 2**10
"""Up to this size a receiving thread adds if it need not send, because that is faster than waking another thread."""

MAX_EARLY = 4096
"""The most messages that are kept for all-reduces that have not begun here."""

WATCHES_A_DEADLINE = 10
"""Checks per deadline. An overdue all-reduce is noticed at most a tenth of the deadline late."""

_WIDE = np.dtype(np.float32)
_JOIN_S = 5.0
_log = logging.getLogger("flowml")

Send = Callable[[str, wire.Wire, Arrays], None]
Sums = list[Buffer]
Slot = tuple[int, int]
"""(piece, chunk)"""


@dataclass(frozen=True)
class GroupId:
    """Identifies a group: plan, run and the group's number."""

    plan_id: str
    run: int
    group: int = 0


class Flight:
    """One all-reduce of a bucket on this rank. `lock` guards its machine and its values."""

    def __init__(
        self, name: str, key: Slot, source: Buffer, schedule: Schedule, rank: int, future: Future[Sums], deadline: float
    ) -> None:
        self.key = key
        self.name = name
        self.future = future
        self.deadline = deadline
        self.lock = threading.Lock()
        """Held while the machine steps and its actions read and write values, but never during a send."""
        self.layout = Layout.of(source.size, source.itemsize, schedule)
        self.machine = AllReduce(schedule, rank, self.layout.pieces, name)
        self.inline = source.nbytes <= INLINE_BYTES and not schedule.relays(rank)
        self._owned = rank if schedule.owned else None
        self._source = source
        self._wide = accumulator(source.dtype)
        self._result: Buffer | None = None
        self._partial: dict[Slot, Buffer] = {}
        self._final: set[Slot] = set()

    def result(self, pool: BufferPool) -> Buffer:
        if self._result is None:
            self._result = pool.take(self._source.nbytes).view(self._source.dtype)
            if self._owned is not None:
                first, end = self.layout.owned_by(self._owned)
                self._result[first:end] = self._source[first:end]
        return self._result

    def held(self, slot: Slot) -> Buffer:
        """This rank's current value of a chunk."""
        partial = self._partial.get(slot)
        if partial is not None:
            return partial
        first, end = self.layout.span(*slot)
        whole = self._result if slot in self._final and self._result is not None else self._source
        return whole[first:end]

    def check(self, peer: str, message: wire.Collective, arrays: Sequence[Array]) -> Buffer:
        """The array of a message for this bucket. Raises ProtocolError if the message is not expected."""
        if len(arrays) != 1 or arrays[0].ndim != 1:
            raise ProtocolError(f"{peer} sent other than a chunk for {self.name}, piece {message.piece}")
        if arrays[0].dtype not in (self._source.dtype, self._wide):
            raise ProtocolError(
                f"{peer} sent {arrays[0].dtype} for {self.name}, piece {message.piece}, take {message.take}: "
                f"it is {self._source.dtype} here"
            )
        return arrays[0]

    def carry_out(self, actions: Sequence[Action], pool: BufferPool) -> tuple[list[tuple[SendChunk, Buffer]], bool]:
        """Returns what to send now, and whether the all-reduce is complete. The caller holds the lock.

        A chunk is read at the position of its SendChunk among the actions, because a later action, or the next event
        on another thread, replaces the chunk by a sum. The value read does not change: sums have their own memory.
        """
        chunks: list[tuple[SendChunk, Buffer]] = []
        done = False
        for action in actions:
            match action:
                case SendChunk():
                    chunks.append((action, self.held((action.piece, action.chunk))))
                case Combine():
                    self.combine(action, pool)
                case Replace():
                    self.replace(action, pool)
                case Done():
                    done = True
        return chunks, done

    def combine(self, action: Combine, pool: BufferPool) -> None:
        slot = (action.piece, action.chunk)
        own = self.held(slot)
        operands = (*action.before, own, *action.after)
        self._fits(slot, own, operands)
        if action.complete:
            target = self._slice(slot, pool)
            self._partial.pop(slot, None)
            self._final.add(slot)
        else:
            target = self._partial[slot] = pool.take(own.size * self._wide.itemsize).view(self._wide)
        add(operands, target, self._wide)

    def replace(self, action: Replace, pool: BufferPool) -> None:
        slot = (action.piece, action.chunk)
        target = self._slice(slot, pool)
        self._fits(slot, target, (action.handle,))
        self._partial.pop(slot, None)
        self._final.add(slot)
        np.copyto(target, action.handle)

    def _slice(self, slot: Slot, pool: BufferPool) -> Buffer:
        first, end = self.layout.span(*slot)
        return self.result(pool)[first:end]

    def _fits(self, slot: Slot, own: Buffer, arrays: Sequence[Buffer]) -> None:
        if any(a.size != own.size for a in arrays):
            raise ProtocolError(
                f"{self.name}, piece {slot[0]}, chunk {slot[1]} has {own.size} elements here and others elsewhere"
            )


@lru_cache(maxsize=1024)
def _spec(dtype: np.dtype[Any], size: int) -> ArraySpec:
    return ArraySpec((size,), dtype.name)  # NumPy takes microseconds to name a dtype


@lru_cache(maxsize=64)
def accumulator(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which arrays of `dtype` are added. Raises UnsupportedError if they cannot be added."""
    if dtype.kind in "iuc" or (dtype.kind == "f" and dtype.itemsize >= _WIDE.itemsize):
        return dtype
    if dtype.kind == "f" or dtype.name.startswith(("bfloat", "float")):
        return _WIDE
    raise UnsupportedError(f"arrays of {dtype} cannot be added up among replicas; convert them to a number type")


def add(operands: Sequence[Buffer], target: Buffer, wide: np.dtype[Any]) -> None:
    """Write the sum of `operands`, added in this order in `wide`, to `target`."""
    first, second, *others = operands
    with unheard():
        if target.dtype == wide and all(o.dtype == wide for o in operands):
            total = np.add(first, second, out=target)
        else:
            total = np.add(first.astype(wide, copy=False), second.astype(wide, copy=False))
        for other in others:
            np.add(total, other.astype(wide, copy=False), out=total)
    if total is not target:
        target[...] = total  # the only rounding


class Group:
    """Members that reduce buckets together. Every method may be called from any thread.

    All members call `all_reduce` with the same buckets, clocks, shapes and dtypes. A bucket's clocks ascend, and it has
    one all-reduce at a time; different buckets run concurrently.
    """

    def __init__(
        self,
        identity: GroupId,
        me: str,
        members: Sequence[str],
        send: Send,
        *,
        hosts: Sequence[Hashable] = (),
        pick: Callable[[int, Sequence[Hashable]], Schedule] = choose,
        deadline_s: float = wire.DEADLINE_S,
        ahead: int = 1,
    ) -> None:
        """`members` are in the order of their ranks. `hosts` names each member's machine; the default is one.

        A member may begin `ahead` all-reduces of a bucket before this one does. One whose next all-reduce needs this
        member is one ahead at most; one that only sends may be further.
        """
        self.rank = list(members).index(me)
        self._sent: Counter[int] = Counter()
        """Bytes of arrays sent to other members, by bucket."""
        self._identity = identity
        self._members = tuple(members)
        self._ranks = {name: rank for rank, name in enumerate(members)}
        self._hosts = tuple(hosts) or (0,) * len(self._members)
        self._send = send
        self._pick = pick
        self._deadline_s = deadline_s
        self._ahead = ahead
        self._lock = threading.Lock()
        self._flights: dict[Slot, Flight] = {}
        self._latest: dict[int, int] = {}
        """Bucket -> the clock of its newest all-reduce that has begun here."""
        self._early: dict[Slot, list[tuple[str, wire.Collective, Sequence[Array]]]] = {}
        """(bucket, clock) -> the messages for an all-reduce that has not begun here."""
        self._lost: dict[str, str] = {}
        self._broken: FlowmlError | None = None
        self._pool = BufferPool()
        self._inbox: queue.SimpleQueue[tuple[Flight, Started | Received] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._threads = [
            service.start(
                f"{me} group {identity.group} {what}", target, lambda reason: self._break(FlowmlError(reason))
            )
            for target, what in ((self._work, "add"), (self._watch, "watch"))
        ]

    @property
    def size(self) -> int:
        """The number of members."""
        return len(self._members)

    @property
    def sent_bytes(self) -> int:
        with self._lock:
            return sum(self._sent.values())

    def take_sent_bytes(self, bucket: int) -> int:
        """The bytes sent for a bucket since the last call. None of its all-reduces may be running."""
        with self._lock:
            return self._sent.pop(bucket, 0)

    def all_reduce(
        self, bucket: int, clock: int, arrays: Sequence[Array], schedule: Schedule | None = None
    ) -> Future[Sums]:
        """The sums over all members, in arrays like the given ones, which must not change any more.

        `schedule` must be the same on all members; by default `pick` chooses it.
        Several arrays must have one dtype and are concatenated; a single array is not copied. The future raises
        WorkerLostError or DeadlineError, naming the bucket and the missing member. Raises UnsupportedError for a dtype
        that cannot be added, ProtocolError for a bucket that has a running all-reduce.
        """
        source = flat(arrays)
        shapes = [np.shape(a) for a in arrays]
        accumulator(source.dtype)
        name = f"bucket {bucket} at clock {clock}"
        future: Future[Sums] = Future(f"the all-reduce of {name}", lambda total: parts_of(total, shapes))
        schedule = schedule or self._pick(source.nbytes, self._hosts)
        if not source.size or schedule.ranks == 1:
            future.complete(source)
            return future
        deadline = time.monotonic() + self._deadline_s
        flight = Flight(name, (bucket, clock), source, schedule, self.rank, future, deadline)
        early = self._register(flight)
        self._start(flight)
        try:
            for peer, message, received in early:
                self._hand(flight, peer, message, received)
        except ProtocolError as error:
            self._break(error)
        return future

    def on_message(self, peer: str, message: wire.Collective, arrays: Sequence[Array]) -> None:
        """Process a chunk. Does not wait; adds at most `INLINE_BYTES` on this thread."""
        try:
            with self._lock:
                flight = self._flights.get((message.bucket, message.clock))
                if flight is None:
                    self._keep(peer, message, arrays)
                    return
            self._hand(flight, peer, message, arrays)
        except ProtocolError as error:
            self._break(error)

    def on_lost(self, peer: str, reason: str) -> None:
        """A member is lost: all running all-reduces fail, because some member waits for it, and none can begin."""
        if peer not in self._ranks:
            return
        with self._lock:
            self._lost.setdefault(peer, reason)
            self._early.clear()
            flights = list(self._flights.values())
        for flight in flights:
            self._fail(flight, self._lost_error(peer, flight.name))

    def close(self) -> None:
        """Fail all running all-reduces and end the threads. Idempotent."""
        self._break(FlowmlError("the group of replicas was closed"))
        self._closed.set()
        self._inbox.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_JOIN_S)

    def _register(self, flight: Flight) -> list[tuple[str, wire.Collective, Sequence[Array]]]:
        """Let the flight receive messages. Returns the messages that arrived before."""
        bucket, clock = flight.key
        with self._lock:
            if self._broken:
                raise self._broken
            for peer in self._lost:
                raise self._lost_error(peer, flight.name)
            if clock <= self._latest.get(bucket, -1) or any(b == bucket for b, _ in self._flights):
                raise ProtocolError(f"{flight.name} cannot begin: one of that bucket is under way, or was later")
            self._latest[bucket] = clock
            self._flights[flight.key] = flight
            return self._early.pop(flight.key, [])

    def _keep(self, peer: str, message: wire.Collective, arrays: Sequence[Array]) -> None:
        """Keep a message of a later all-reduce. A peer is at most `ahead` of them ahead."""
        if self._broken or message.clock <= self._latest.get(message.bucket, -1):
            return  # it belongs to an all-reduce that was given up
        key = message.bucket, message.clock
        clocks = {clock for bucket, clock in (*self._early, key) if bucket == message.bucket}
        if sum(map(len, self._early.values())) >= MAX_EARLY or len(clocks) > self._ahead:
            raise ProtocolError(f"{peer} is too far ahead: bucket {message.bucket} at clock {message.clock} from it")
        self._early.setdefault(key, []).append((peer, message, arrays))

    def _start(self, flight: Flight) -> None:
        if flight.inline:
            self._step(flight, Started())
        else:
            self._inbox.put((flight, Started()))

    def _hand(self, flight: Flight, peer: str, message: wire.Collective, arrays: Sequence[Array]) -> None:
        rank = self._ranks.get(peer)
        if rank is None or (message.bucket, message.clock) != flight.key:
            raise ProtocolError(f"{peer} sent for bucket {message.bucket} at clock {message.clock}, not {flight.name}")
        values = flight.check(peer, message, arrays)
        event = Received(rank, message.piece, message.take, values)
        if flight.inline:
            self._step(flight, event)
        else:
            self._inbox.put((flight, event))

    def _work(self) -> None:
        while (entry := self._inbox.get()) is not None:  # no deadline: the thread sleeps until it has work or is closed
            self._step(*entry)
            del entry  # otherwise it would keep an array alive until the next entry

    def _watch(self) -> None:
        """Fail overdue all-reduces. This has its own thread because the other one may itself wait in a send."""
        while not self._closed.wait(min(self._deadline_s / WATCHES_A_DEADLINE, 1.0)):
            now = time.monotonic()
            with self._lock:
                overdue = [f for f in self._flights.values() if f.deadline <= now]
            for flight in overdue:
                with flight.lock:
                    missing = [self._members[r] for r in flight.machine.waits_for()]
                self._fail(flight, self._deadline_error(flight.name, missing))

    def _step(self, flight: Flight, event: Started | Received) -> None:
        """Process an event. The lock is held while values are read or written, and released before sending."""
        try:
            with flight.lock:
                if flight.future.done():
                    return
                chunks, done = flight.carry_out(flight.machine.step(event), self._pool)
            for action, values in chunks:
                self._send_chunk(flight, action, values)
            if done:
                self._drop(flight)
                flight.future.complete(flight.result(self._pool))
        except ProtocolError as error:
            self._break(error)
        except WorkerLostError as error:
            self._fail(flight, self._lost_error(error.worker or "a member", flight.name, str(error)))
        except Exception as error:
            _log.exception("%s could not be added up", flight.name)
            self._fail(flight, FlowmlError(f"{flight.name} could not be added up: {type(error).__name__}: {error}"))

    def _send_chunk(self, flight: Flight, action: SendChunk, values: Buffer) -> None:
        bucket, clock = flight.key
        message = wire.Collective(
            plan_id=self._identity.plan_id,
            run=self._identity.run,
            group=self._identity.group,
            bucket=bucket,
            clock=clock,
            piece=action.piece,
            take=action.take,
            specs=(_spec(values.dtype, values.size),),
        )
        with self._lock:
            self._sent[bucket] += values.nbytes
        self._send(self._members[action.peer], message, (values,))

    def _drop(self, flight: Flight) -> None:
        with self._lock:
            self._flights.pop(flight.key, None)

    def _fail(self, flight: Flight, error: FlowmlError) -> None:
        """End a flight with an error. Its partial sums are dropped."""
        self._drop(flight)
        flight.future.complete(None, error)

    def _break(self, error: FlowmlError) -> None:
        """Fail the whole group, because members that disagree on what they reduce cannot continue."""
        with self._lock:
            self._broken = self._broken or error
            flights = list(self._flights.values())
            self._early.clear()
        for flight in flights:
            self._fail(flight, error)

    def _lost_error(self, peer: str, bucket: str, reason: str = "") -> WorkerLostError:
        reason = reason or self._lost.get(peer, "it is gone")
        return WorkerLostError(f"{peer} was lost, and {bucket} needs its part: {reason}", worker=peer, node=bucket)

    def _deadline_error(self, bucket: str, missing: Sequence[str]) -> DeadlineError:
        who = ", ".join(missing) or "a member that takes nothing in"
        return DeadlineError(
            f"{bucket} was not added up within {self._deadline_s:g} s: {self._members[self.rank]} waits for {who}; "
            "see why it is late, or allow a longer deadline",
            worker=missing[0] if missing else None,
            node=bucket,
        )


def flat(arrays: Sequence[Array]) -> Buffer:
    """The arrays concatenated to one row. A single array becomes a view."""
    flat = [np.asarray(a).reshape(-1) for a in arrays]
    if len({a.dtype for a in flat}) != 1:
        raise UnsupportedError("a bucket holds one or more arrays, all of one dtype; make a bucket for each dtype")
    if len(flat) == 1:
        return flat[0]
    row = aligned_empty(sum(a.nbytes for a in flat)).view(flat[0].dtype)
    return np.concatenate(flat, out=row)


def parts_of(total: Buffer, shapes: Sequence[tuple[int, ...]]) -> Sums:
    """The arrays in a concatenated row, as views."""
    parts: Sums = []
    at = 0
    for shape in shapes:
        size = math.prod(shape)
        parts.append(total[at : at + size].reshape(shape))
        at += size
    return parts
