"""Sends streams between processes of one machine: a Unix socket for messages, shared memory for large arrays.

`UnixStream` is the same half-connection as `grpc_streams.Stream`, without gRPC. Messages go one way. The sending thread
writes its message itself while the socket has room, so a small message costs two system calls. The receiver answers
with the numbers of shared memory slots that it no longer uses (see `slots`), and at the end with the reason.

    client    u32 length | token | records, each:
              u32 frame bytes | u32 slots given up | u64 slot (0: none) | u64 1 if the slot is new
              | u64 each given-up slot | frame
              a new slot is sent with its descriptor; a frame of 0 bytes ends the stream
    server    u64 2^63: the token is right and the connection is accepted
              u64 slot: it is no longer used; u64 slot + 2^63: its message was received
              at the end u64 -1 | u32 length | reason

The receiver confirms each message in a slot, and a sender with too many unconfirmed bytes waits. Without this limit the
sender to a stuck receiver would fill the machine's memory.

Socket names are in Linux's abstract namespace and contain the peer's TCP address. Only processes on the peer's machine
and in its network namespace find the name. Both sides require that the other runs as the same user, and the server
requires the token first. Peers that identify by certificates (TLS) do not use these streams.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from flowml.errors import ClusterError
from flowml.plan import ArraySpec
from flowml_runtime import service
from flowml_runtime.transport.arrays import as_bytes
from flowml_runtime.transport.endpoint import Budget
from flowml_runtime.transport.framing import Outgoing, padded, shared_bytes
from flowml_runtime.transport.slots import SlotError, SlotPool

AVAILABLE = hasattr(os, "memfd_create") and hasattr(socket, "SO_PEERCRED")
"""Whether this system has the needed calls. Linux has them."""

CONNECT_S = 5.0
"""Deadline of a connect. It takes long only if the peer is stuck and its backlog is full."""

TAKE_S = 30.0
"""How long a peer may take to accept a connection: as long as the cluster waits for a starved worker. A peer that
cannot accept any, for lack of descriptors or threads, then counts as lost. Otherwise a step would wait for ever."""

ANSWER_MS = 50
"""Several threads may wait for one answer, and one of them reads it. The others check again after this time."""

MAX_TOKEN_BYTES = 4096
MAX_RETIRED = 4096
MAX_REASON_BYTES = 1024
TOKEN_REFUSED = "it refuses the token; use the one that its cluster was started with"
BROKE = "its connection broke"
CLOSED = "it closed the connection"

LENGTH = struct.Struct("<I")
RECORD = struct.Struct("<IIQQ")
NUMBER = struct.Struct("<Q")
TAKEN = 2**63
GOODBYE = 2**64 - 1
_SOCKET_BYTES = 2**20
AT_ONCE = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
"""Computed once: adding two flags takes a microsecond, and longer with cold caches."""


def connect(address: str, token: str, first: Outgoing, max_bytes: int, *, checked: bool = False) -> UnixStream | None:
    """A stream to the peer at `address` (host:port), or None if it is not on this machine or of another user.

    Raises OSError if this process has no more descriptors.
    """
    if not AVAILABLE:
        return None
    link = socket.socket(socket.AF_UNIX)
    try:
        link.settimeout(CONNECT_S)
        link.connect(name_of(address))
        ours = user_of(link) == os.getuid()
    except OSError:
        ours = False
    if not ours:
        link.close()
        return None
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
    return UnixStream(link, token, first, max_bytes, checked=checked)


class UnixStream:
    """The outgoing half of a connection, like `grpc_streams.Stream`. `put` is safe from any thread."""

    def __init__(
        self, link: socket.socket, token: str, first: Outgoing, max_bytes: int, *, checked: bool = False
    ) -> None:
        """Messages carry checksums if `checked`."""
        self._link = link
        self._numbers = itertools.count() if checked else None
        self._budget = Budget(max_bytes)
        """Budget of the messages that wait to be written."""
        self._max_bytes = max_bytes
        self._untaken: dict[int, int] = {}
        """Slots whose message the receiver has not confirmed yet, and their bytes: at most `max_bytes` in all."""
        self._lock = threading.Lock()
        """Held while a record is made and written or queued, so that records keep the order of `put`."""
        self._slots = SlotPool()
        self._waiting: deque[_Chunk] = deque()
        """Chunks for which the socket has no room yet; a thread writes them. Usually empty."""
        self._ending = False
        self._ended = threading.Event()
        self._answers = bytearray()
        self._accepted = False
        """Whether the receiver has answered anything. Any thread may be the one that reads it."""
        self.reason = ""
        """Why the stream ended. It is set before `put` returns False."""
        secret = token.encode()
        self._budget.acquire(0)
        self._write(_Chunk(LENGTH.pack(len(secret)) + secret, (), 0))
        self.put(first)

    def reserve(self, specs: Sequence[ArraySpec]) -> None:
        """Allocate shared memory for a message of such arrays ahead of time. Raises SlotError if there is none."""
        room = shared_bytes(tuple(specs))
        with self._lock:
            if room and not self._ending:
                self._slots.reserve(room)

    def start(self, on_end: Callable[[Any, str], None]) -> None:
        """`on_end(self, reason)` is called once, however the stream ends, on a separate thread."""

        def failed(reason: str) -> None:
            self.reason = self.reason or reason
            self.abort()
            on_end(self, self.reason)
            self._ended.set()

        try:
            service.start("flowml-watch", lambda: self._watch(on_end), failed)
        except ClusterError as error:
            failed(str(error))

    def put(self, message: Outgoing, timeout_s: float | None = None) -> bool:
        """Send a message, after waiting for room if too much is in flight. False if the stream has ended.

        Raises SlotError if there is no shared memory for it, TimeoutError if there is no room in time.
        """
        if not message.large and self._put_now(message):
            return True
        if not self._budget.acquire(len(message.first), timeout_s=timeout_s):
            return False
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            while True:
                with self._lock:
                    if self._ending:
                        break
                    if not message.large or self._fits(message.nbytes):
                        return self._write(self._record(message))
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError
                self._await_answers()
        except BaseException:
            self._budget.release(len(message.first))
            raise
        self._budget.release(len(message.first))
        return False

    def _put_now(self, message: Outgoing) -> bool:
        """Send a message without shared memory, if no other message waits (the common case). False if not sent."""
        with self._lock:
            if self._ending or self._waiting or self._budget.closed:
                return False
            data = self._encoded(message, 0, 0)
            try:
                sent = self._link.send(data, AT_ONCE)
            except BlockingIOError:
                sent = 0
            except OSError:
                return False
            if sent < len(data):
                self._budget.acquire(len(message.first), wait=False)
                self._wait_with(_Chunk(data, (), len(message.first), sent))
            return True

    @property
    def waiting(self) -> int:
        """The bytes that are not written yet, or not taken by the receiver."""
        with self._lock:
            if self._ending:
                return 0
            with contextlib.suppress(SlotError):
                self._take_answers()
            return self._budget.taken + sum(self._untaken.values())

    def finish(self) -> None:
        """End the stream once all messages have been sent."""
        self._budget.close()
        with self._lock:
            if not self._ending:
                self._ending = True
                self._budget.acquire(0, wait=False)
                self._write(_Chunk(RECORD.pack(0, 0, 0, 0), (), 0))

    def abort(self) -> None:
        """End the stream now."""
        self._budget.close()
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)

    def wait(self, timeout_s: float) -> bool:
        """True if the stream has ended and released its resources."""
        return self._ended.wait(timeout_s)

    def _record(self, message: Outgoing) -> _Chunk:
        """The bytes of a message. Its large arrays are copied into a slot."""
        number = new = 0
        descriptors: tuple[int, ...] = ()
        if message.large:
            room = sum(padded(a.nbytes) for a in message.large)
            slot, fd = self._slots.take(room)
            self._untaken[slot.number] = room
            descriptors = (fd,) if fd >= 0 else ()
            number, new, at = slot.number, len(descriptors), 0
            for large in message.large:
                slot.data[at : at + large.nbytes] = as_bytes(large)
                at += padded(large.nbytes)
        data = self._encoded(message, number, new)
        return _Chunk(data, descriptors, len(message.first))

    def _encoded(self, message: Outgoing, number: int, new: int) -> bytes:
        frame = message.first if self._numbers is None else message.sealed(next(self._numbers))
        retired = self._slots.retired(MAX_RETIRED)
        return b"".join([RECORD.pack(len(frame), len(retired), number, new), *map(NUMBER.pack, retired), frame])

    def _write(self, chunk: _Chunk) -> bool:
        """Write as much as the socket takes, and leave the rest to the writer. False if the connection has ended."""
        if not self._waiting:
            try:
                if chunk.send(self._link, AT_ONCE):
                    self._budget.release(chunk.nbytes)
                    return True
            except BlockingIOError:
                pass
            except OSError:
                chunk.close()
                self._budget.release(chunk.nbytes)
                return False
        self._wait_with(chunk)
        return True

    def _wait_with(self, chunk: _Chunk) -> None:
        """Leave a chunk to the writer. The lock is held."""
        self._waiting.append(chunk)
        if len(self._waiting) > 1:
            return  # there is a writer

        def failed(reason: str) -> None:
            self.reason = self.reason or reason
            self._drop_waiting()
            self.abort()

        try:
            service.start("flowml-write", self._write_waiting, failed)
        except ClusterError as error:
            self._waiting.clear()
            chunk.close()
            self._budget.release(chunk.nbytes)
            self.reason = self.reason or str(error)
            self.abort()

    def _write_waiting(self) -> None:
        """Write waiting chunks as the socket takes them, until none waits."""
        with self._lock:
            chunk = self._waiting[0]
        while True:
            try:
                while not chunk.send(self._link, socket.MSG_NOSIGNAL):
                    pass
            except OSError:
                self._drop_waiting()
                return
            self._budget.release(chunk.nbytes)
            with self._lock:
                self._waiting.popleft()
                if not self._waiting:
                    return
                chunk = self._waiting[0]

    def _drop_waiting(self) -> None:
        with self._lock:
            left = list(self._waiting)
            self._waiting.clear()
        for chunk in left:
            chunk.close()
            self._budget.release(chunk.nbytes)

    def _fits(self, nbytes: int) -> bool:
        """Whether this many bytes may be sent now. A message larger than `max_bytes` is sent alone."""
        self._take_answers()
        return not self._untaken or sum(self._untaken.values()) + nbytes <= self._max_bytes

    def _await_answers(self) -> None:
        """Wait until the receiver answers, or `ANSWER_MS` have passed, since another thread may read the answer."""
        poll = select.poll()
        poll.register(self._link, select.POLLIN | select.POLLRDHUP)
        poll.poll(ANSWER_MS)

    def _take_answers(self) -> None:
        """Read which messages were received and which slots are free again, without waiting."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while data := self._link.recv(2**16, socket.MSG_DONTWAIT):
                self._answers += data
                self._accepted = True
        whole = len(self._answers) // NUMBER.size * NUMBER.size
        taken = 0
        for (number,) in NUMBER.iter_unpack(bytes(self._answers[:whole])):
            if number == GOODBYE:
                break
            if number & TAKEN:
                self._untaken.pop(number ^ TAKEN, None)
            else:
                self._slots.give_back(number)
            taken += NUMBER.size
        del self._answers[:taken]

    def _watch(self, on_end: Callable[[Any, str], None]) -> None:
        """Wait for the end of the stream. Returned slots wake no thread: they are read when a slot is needed."""
        poll = select.poll()
        poll.register(self._link, select.POLLIN | select.POLLRDHUP)
        if not poll.poll(TAKE_S * 1000) and not self._accepted:
            self.reason = f"it did not accept the connection within {TAKE_S:g} s"
            self.abort()
        poll.modify(self._link, select.POLLRDHUP)
        poll.poll()  # no deadline: the kernel tells of the end of the other side
        with self._lock:
            self._ending = True
            with contextlib.suppress(SlotError):
                self._take_answers()
                self._take_answers()  # a reset, from a peer that left data unread, is reported before its answers
            self.reason = self.reason or _reason(bytes(self._answers)) or BROKE
        self._budget.close()
        try:
            on_end(self, self.reason)
        finally:
            with contextlib.suppress(OSError):
                self._link.shutdown(socket.SHUT_RDWR)
            with self._lock:
                self._link.close()
                self._slots.close()
            self._ended.set()


class _Chunk:
    """Bytes to be written, with descriptors that are sent with the first of them."""

    def __init__(self, data: bytes, descriptors: Sequence[int], nbytes: int, sent: int = 0) -> None:
        self._left = memoryview(data)[sent:]
        self._descriptors = descriptors
        self.nbytes = nbytes

    def send(self, link: socket.socket, flags: int) -> bool:
        """Write as much as one call takes. True if nothing is left."""
        rights = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self._descriptors))] if self._descriptors else []
        )
        sent = link.sendmsg([self._left], rights, flags)
        self.close()
        self._left = self._left[sent:]
        return not self._left

    def close(self) -> None:
        for fd in self._descriptors:
            os.close(fd)
        self._descriptors = ()


def name_of(address: str) -> bytes:
    return f"\0flowml/{address}".encode()


def user_of(link: socket.socket) -> int:
    """The user id of the process at the other end."""
    _, user, _ = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return user


def _reason(answers: bytes) -> str:
    """The reason in the server's last answer; "" if it holds none."""
    head = NUMBER.size + LENGTH.size
    if len(answers) < head or answers[: NUMBER.size] != NUMBER.pack(GOODBYE):
        return ""
    return answers[head:].decode("utf-8", "replace")[:MAX_REASON_BYTES]
