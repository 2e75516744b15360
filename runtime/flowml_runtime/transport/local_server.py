"""Receives streams from processes of the same machine; `local_stream` describes the bytes on the socket.

A connection must send its token within `AUTHENTICATE_S`. At most `MAX_STRANGERS` connections may exist that have not
sent it yet: one more closes the oldest of them.
"""

from __future__ import annotations

import array
import contextlib
import errno
import functools
import itertools
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from flowml_runtime import service
from flowml_runtime.transport.arrays import Buffer
from flowml_runtime.transport.framing import MAX_FRAME_BYTES, FrameError, Message, unpack
from flowml_runtime.transport.local_stream import (
    AT_ONCE,
    BROKE,
    CLOSED,
    GOODBYE,
    LENGTH,
    MAX_REASON_BYTES,
    MAX_RETIRED,
    MAX_TOKEN_BYTES,
    NUMBER,
    RECORD,
    TAKEN,
    TOKEN_REFUSED,
    name_of,
    user_of,
)
from flowml_runtime.transport.security import same_token
from flowml_runtime.transport.slots import SlotError, SlotViews

LOOK_S = 1e-3
"""How long a thread polls for a message that is due before it sleeps. Waking a thread costs several times as much as a
small step, because the core has gone idle and its caches are cold."""

_BACKLOG = 128
_READ_BYTES = 2**18
_KEPT_BYTES = 4 * 2**20
"""A buffer that has grown beyond this size is freed once it is not needed."""
_RIGHTS = socket.CMSG_SPACE(8 * struct.calcsize("i"))
_TRUNCATED = int(socket.MSG_CTRUNC)
_CLOSE_ON_EXEC = int(socket.MSG_CMSG_CLOEXEC)
_IF_THERE = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)

Incoming = Iterator[tuple[Message, list[Buffer]]]


class Expectation:
    """The time until which a message is expected on one stream: its thread polls until then before it sleeps."""

    __slots__ = ("until",)

    def __init__(self) -> None:
        self.until = 0.0

    def soon(self) -> None:
        self.until = time.perf_counter() + LOOK_S

    def no_more(self) -> None:
        self.until = 0.0


Serve = Callable[[Incoming, Callable[[], object], Expectation], str]
"""Receives the messages of one stream to its end. Calling the second argument ends the stream soon. Returns why it
refuses the rest of the stream, or "" if the stream ended. For a broken connection the iterator raises OSError."""

AUTHENTICATE_S = 5.0
MAX_STRANGERS = 64


class UnixServer:
    """Receives streams at the socket name derived from a TCP address. Connections wait until `start`."""

    def __init__(self, address: str, token: str, serve: Serve) -> None:
        """Raises OSError if that name is in use."""
        self._token = token
        self._serve = serve
        self._lock = threading.Lock()
        self._links: set[socket.socket] = set()
        self._strangers: dict[socket.socket, None] = {}
        """Links that have not sent the token yet, the oldest first."""
        self._closed = False
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._listener.bind(name_of(address))
        except OSError:
            self._listener.close()
            raise
        self._listener.settimeout(None)
        self._listener.listen(_BACKLOG)

    def start(self) -> None:
        service.start("flowml-accept", self._accept, lambda _: self._listener.close())  # peers then come by gRPC

    def stop(self) -> None:
        """End every stream and free the name."""
        with self._lock:
            self._closed = True
            links = list(self._links)
        for link in (self._listener, *links):
            _shut(link, socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                link, _ = self._listener.accept()  # no deadline: close() shuts the listener down
            except OSError as error:
                if self._listener.fileno() < 0 or error.errno == errno.EINVAL:  # closed, or shut down
                    return
                time.sleep(service.SHORTAGE_S)  # connecting peers wait meanwhile
                continue
            with service.going_on("a connection could not be accepted"):
                self._admit(link)

    def _admit(self, link: socket.socket) -> None:
        try:
            link.settimeout(None)
            with self._lock:
                if self._closed or user_of(link) != os.getuid():
                    link.close()
                    return
                self._links.add(link)
                if len(self._strangers) >= MAX_STRANGERS:
                    _shut(next(iter(self._strangers)), socket.SHUT_RDWR)
                self._strangers[link] = None
            service.start("flowml-receive", lambda: self._run(link), lambda _: None)  # its connection has ended
        except BaseException:
            self._let_go(link)
            raise

    def _run(self, link: socket.socket) -> None:
        """Serve one stream: check the token, receive the messages, and send the reason of its end."""
        expectation = Expectation()
        reader = _Reader(link, expectation)
        try:
            reason = self._check(link, reader)
            if not reason:
                link.sendall(NUMBER.pack(TAKEN), socket.MSG_NOSIGNAL)
                hang_up = functools.partial(_shut, link, socket.SHUT_RD)
                reason = self._serve(_messages(link, reader), hang_up, expectation) or CLOSED
            with contextlib.suppress(OSError):
                text = reason.encode("utf-8", "replace")[:MAX_REASON_BYTES]
                link.sendall(NUMBER.pack(GOODBYE) + LENGTH.pack(len(text)) + text, socket.MSG_NOSIGNAL)
        except (OSError, FrameError):
            pass  # the connection broke or sent nothing valid: there is no answer
        finally:
            reader.close()
            self._let_go(link)

    def _let_go(self, link: socket.socket) -> None:
        with self._lock:
            self._links.discard(link)
            self._strangers.pop(link, None)
        _shut(link, socket.SHUT_RDWR)
        link.close()

    def _check(self, link: socket.socket, reader: _Reader) -> str:
        """Why the token is refused, or "". Raises OSError if no token comes in time."""
        reader.deadline = time.monotonic() + AUTHENTICATE_S
        (length,) = LENGTH.unpack(reader.read(LENGTH.size))
        if length > MAX_TOKEN_BYTES:
            return TOKEN_REFUSED
        given = bytes(reader.read(length)).decode("utf-8", "replace")
        with self._lock:
            self._strangers.pop(link, None)
        reader.deadline = None
        link.settimeout(None)
        return "" if same_token(given, self._token) else TOKEN_REFUSED


def _shut(link: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        link.shutdown(how)


def _messages(link: socket.socket, reader: _Reader) -> Incoming:
    """The messages of a stream. Raises FrameError for invalid data, ConnectionError if the connection breaks."""
    unsent: deque[int] = deque()

    def answer(number: int) -> None:
        """Runs on any thread that frees a view, at any point of its code: it takes no lock and does not wait."""
        try:
            link.send(NUMBER.pack(number), AT_ONCE)
        except BlockingIOError:
            unsent.append(number)
        except OSError:
            pass  # the sender has ended, and its slots with it

    views = SlotViews(answer)
    for position in itertools.count():
        nbytes, given_up, number, new = RECORD.unpack(reader.read(RECORD.size))
        if nbytes > MAX_FRAME_BYTES or given_up > MAX_RETIRED:
            raise FrameError(f"a record announces {nbytes} bytes and {given_up} slots given up")
        if not nbytes:
            return
        try:
            if given_up:
                for (retired,) in NUMBER.iter_unpack(bytes(reader.read(given_up * NUMBER.size))):
                    views.unmap(retired)
            frame = reader.read(nbytes)
            if new:
                views.map(number, reader.descriptor())
            room = views.lease(number) if number else None
        except SlotError as error:
            raise FrameError(str(error)) from None
        yield unpack(frame, room, position)
        room = None
        if number:
            answer(number | TAKEN)
        for _ in range(len(unsent)):
            answer(unsent.popleft())


class _Reader:
    """Reads a socket in large pieces, and keeps the descriptors that are received with them."""

    def __init__(self, link: socket.socket, expectation: Expectation) -> None:
        self._link = link
        self._expectation = expectation
        self._buffer = bytearray(_READ_BYTES)
        self._start = self._end = 0
        self._descriptors: deque[int] = deque()
        self.deadline: float | None = None
        """Time until which all reads must be complete."""

    def read(self, nbytes: int) -> memoryview:
        """The next bytes, valid until the next call. Raises ConnectionError if the stream ends before them."""
        if self._end - self._start < nbytes:
            self._make_room(nbytes)
            while self._end - self._start < nbytes:
                if self._end == len(self._buffer):
                    self._grow(nbytes)
                self._receive()
        self._start += nbytes
        return memoryview(self._buffer)[self._start - nbytes : self._start]

    def descriptor(self) -> int:
        """The next descriptor. Raises FrameError if there is none."""
        if not self._descriptors:
            raise FrameError("a record announces a new slot and does not bring it")
        return self._descriptors.popleft()

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def _make_room(self, nbytes: int) -> None:
        """Move unread bytes to the front. Views of earlier reads may exist, so another size needs a new buffer."""
        unread = self._buffer[self._start : self._end]
        if len(self._buffer) > _KEPT_BYTES and max(nbytes, len(unread)) <= _READ_BYTES:
            self._buffer = bytearray(_READ_BYTES)
        self._buffer[: len(unread)] = unread
        self._start, self._end = 0, len(unread)

    def _grow(self, nbytes: int) -> None:
        """Enlarge the full buffer. It grows with the received bytes only, because announced bytes may never come."""
        larger = bytearray(min(2 * len(self._buffer), nbytes + _READ_BYTES))
        larger[: self._end] = self._buffer[: self._end]
        self._buffer = larger

    def _receive(self) -> None:
        if self.deadline is not None:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._link.settimeout(left)
        view = memoryview(self._buffer)[self._end :]
        got, rights, flags, _ = self._look(view) or self._link.recvmsg_into([view], _RIGHTS, _CLOSE_ON_EXEC)
        for level, kind, data in rights:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(data) // struct.calcsize("i") * struct.calcsize("i")
                self._descriptors.extend(array.array("i", data[:whole]))
        if not got:
            raise ConnectionError(BROKE)
        if flags & _TRUNCATED:
            raise FrameError("some received descriptors are missing: this process has reached its limit (ulimit -n)")
        self._end += got

    def _look(self, view: memoryview) -> Any:
        """The result of `recvmsg_into` if expected data comes in time, else None. Yields the core to other threads."""
        while time.perf_counter() < self._expectation.until:
            try:
                return self._link.recvmsg_into([view], _RIGHTS, _IF_THERE)
            except BlockingIOError:
                os.sched_yield()
        return None
