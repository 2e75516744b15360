"""Connects processes: servers for incoming streams, and one persistent outgoing stream to each peer.

Between machines the streams are gRPC streams. A peer on this machine is found by a socket name derived from its address
and is reached through a Unix socket and shared memory, unless peers identify by TLS.

A peer is lost when its stream to us or our stream to it ends, or when `lose` is called. The loss is reported once for
each incarnation of the peer. Afterwards sends to the peer fail and its streams are refused, until it is known at
another address. Both sides check every message against the specs in its header, and an invalid message ends its stream.
The incoming stream of a lost peer is ended too, so both peers count each other as lost; what has arrived on it is taken
in before the loss is reported.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc

import flowml
from flowml.errors import WorkerLostError
from flowml.placement.links import GRPC, SAME_PROCESS, SHARED_MEMORY
from flowml.plan import ArraySpec
from flowml_runtime import service, wire
from flowml_runtime.transport import local_stream as unix_stream
from flowml_runtime.transport.arrays import Buffer
from flowml_runtime.transport.arrivals import Arrivals
from flowml_runtime.transport.buffers import NEVER_KEPT_BYTES, BufferPool, keep_freed_memory
from flowml_runtime.transport.counted_out import counts_as_lost, why_not_taken, why_refused
from flowml_runtime.transport.endpoint import (
    MAX_QUEUED_BYTES,
    Arrays,
    Budget,
    Delivery,
    OnLost,
    OnMessage,
    new_incarnation,
    unreachable,
)
from flowml_runtime.transport.framing import Assembler, FrameError, Outgoing, pack
from flowml_runtime.transport.grpc_streams import Stream, server_apart
from flowml_runtime.transport.local_server import Expectation, Incoming, UnixServer
from flowml_runtime.transport.local_stream import UnixStream
from flowml_runtime.transport.refusals import Refusal
from flowml_runtime.transport.security import TLS, check_exposure, is_loopback, split_address

CLOSE_S = 1.0
"""How long `close` waits for peers to receive sent messages."""

SHORTAGE_S = 5.0
"""How long a connection is retried while this process lacks descriptors for it. After that the peer is lost."""

INTRODUCED_S = 5.0
"""How long an answer to a peer waits until the coordinator has said where that peer is."""

MAX_STRANGERS = 256
"""The most lost peers without a known address that are remembered, so that the same incarnation is refused again."""

_log = logging.getLogger("flowml")

AnyStream = Stream | UnixStream


def _nothing() -> None: ...


@dataclass
class _Peer:
    """One incarnation of a peer. `incarnation` is 0 until its Hello; `lost` is the reason of its loss, or ""."""

    name: str
    address: str = ""
    incarnation: int = 0
    earliest: int = 0
    """Earlier incarnations are refused: they were lost before this endpoint knew of the peer."""
    lost: str = ""
    stream: AnyStream | None = None
    expectation: Expectation | None = None
    """The expectation of the thread that receives from this peer through a Unix socket."""
    arrivals: Arrivals | None = None
    """The incoming stream."""
    hang_up: Callable[[], object] = _nothing
    """Ends the incoming stream of this peer."""
    connecting: threading.Lock = field(default_factory=threading.Lock)
    """Held while a connection is made, which may take long."""


class _Refused(Exception):
    """A stream is refused; the text is the reason."""


class GrpcEndpoint:
    """An `Endpoint` between processes. `name` may be changed while only the coordinator is known."""

    def __init__(
        self,
        name: str,
        token: str,
        *,
        bind: str = "127.0.0.1:0",
        tls: TLS | None = None,
        shared_memory: bool = True,
        checksum: bool | None = None,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        apart_from: str = "",
    ) -> None:
        """Bind the port: if the system chooses one, not that of the address `apart_from`, which is another's. Without
        `shared_memory`, peers of this machine are reached by gRPC too.

        `checksum` adds checksums to all sent messages (True), to none (False), or to those that leave this machine
        (None). A received message is checked if it carries a checksum.

        Raises ClusterError if the port cannot be bound, or not safely.
        """
        check_exposure(bind, tls, token, "listen on")
        self.name = name
        self.incarnation = new_incarnation()
        self._token = token
        self._tls = tls
        self._checksum = checksum
        self._max_queued_bytes = max_queued_bytes
        self._pool = BufferPool(NEVER_KEPT_BYTES)
        self._expected: Expectation | None = None
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        """Notified when peers have become known or lost."""
        self._reporting = threading.RLock()
        """Held while a loss is reported, so that a peer's next incarnation waits until the report is complete."""
        self._peers: dict[str, _Peer] = {}
        self._closed = False
        self._on_message: OnMessage = lambda *_: None
        self._on_lost: OnLost = lambda *_: None
        self.on_sent: Callable[[str, int, float], None] = lambda *_: None
        """Called with (peer, bytes, seconds) for every message that a gRPC connection has accepted."""
        self._server = server_apart(bind, tls, token, self._receive, apart_from)
        self._delivery = Delivery(name, max_queued_bytes)
        self.address = f"{bind.rpartition(':')[0]}:{self._server.port}"
        self._shared_memory = shared_memory and tls is None and unix_stream.AVAILABLE
        self._local = self._listen_locally() if self._shared_memory else None

    def _listen_locally(self) -> UnixServer | None:
        """None if our socket name is taken already: then peers of this machine use gRPC like all others."""
        try:
            return UnixServer(self.address, self._token, self._serve_local)
        except OSError as error:
            _log.warning("no shared memory for messages to %s: %s; they come by gRPC", self.address, error.strerror)
            return None

    def start(self, on_message: OnMessage, on_lost: OnLost) -> None:
        self._on_message, self._on_lost = on_message, on_lost
        self._server.start()
        if self._local is not None:
            self._local.start()

    def know(self, peers: Mapping[str, str], incarnations: Mapping[str, int] | None = None) -> None:
        """Earlier incarnations than the given ones are refused. The successor of a lost one may be at its address.

        Raises ClusterError for an address beyond this machine without TLS.
        """
        for name, address in peers.items():
            check_exposure(address, self._tls, self._token, "connect to")
            stale: AnyStream | None = None
            life = (incarnations or {}).get(name, 0)
            with self._lock:
                peer = self._peers.setdefault(name, _Peer(name))
                if not peer.address and not peer.lost:
                    peer.address = address
                elif peer.address != address or (peer.lost and max(peer.incarnation, peer.earliest) < life):
                    stale = peer.stream
                    self._peers[name] = _Peer(name, address)
                self._peers[name].earliest = life
                self._changed.notify_all()
            if stale is not None:
                stale.abort()

    def rename(self, peer: str, name: str) -> None:
        """Rename `peer` to `name`. It replaces any other peer of that name."""
        with self._lock:
            renamed = self._peers.pop(peer, None)
            if renamed is None:
                return
            replaced = self._peers.pop(name, None)
            renamed.name = name
            self._peers[name] = renamed
            if replaced is not None:
                replaced.lost = f"a new {name} took its place"
                self._changed.notify_all()
        if replaced is not None and replaced.stream is not None:
            replaced.stream.abort()

    def send(self, peer: str, message: wire.Wire, arrays: Arrays = (), timeout_s: float | None = None) -> None:
        if peer == self.name:
            nbytes = sum(s.nbytes for s in message.specs)
            if not self._delivery.put(
                self._on_message, peer, message, list(arrays), nbytes=nbytes, timeout_s=timeout_s
            ):
                raise unreachable(peer, "it was closed")
            return
        packed = pack(message, arrays)
        stream = self._stream(peer)
        if not stream.put(packed, timeout_s):
            known = self._peers.get(peer)
            raise unreachable(peer, (known and known.lost) or stream.reason or "the connection was ended")

    def way(self, peer: str) -> str:
        if peer == self.name:
            return SAME_PROCESS
        try:
            return SHARED_MEMORY if isinstance(self._stream(peer), UnixStream) else GRPC
        except WorkerLostError:
            return ""

    def expect(self, peer: str) -> None:
        known = self._peers.get(peer)
        if known is None or known.expectation is None:
            return
        if self._expected is not known.expectation:  # several polling threads would compete for the core
            if self._expected is not None:
                self._expected.no_more()
            self._expected = known.expectation
        known.expectation.soon()

    def reserve(self, peer: str, specs: Sequence[ArraySpec], messages: int) -> None:
        if peer == self.name:
            return
        with suppress(WorkerLostError):
            stream = self._stream(peer)
            if isinstance(stream, UnixStream):
                for _ in range(messages):
                    stream.reserve(specs)

    def waiting(self, peer: str) -> int:
        known = self._peers.get(peer)
        return 0 if known is None or known.stream is None else known.stream.waiting

    def lose(self, peer: str, reason: str) -> None:
        with self._lock:
            known = self._peers.get(peer)
        if known is not None:
            self._lose(known, reason)

    def has_lost(self, peer: str, incarnation: int) -> bool:
        """Whether nothing can be sent any more to this incarnation of a peer that is known."""
        with self._lock:
            known = self._peers.get(peer)
            return known is not None and (bool(known.lost) or known.incarnation > incarnation)

    def why_refused(self, peer: str) -> str:
        """Why a peer that is lost here counts this end as lost, or "" if it does not, or is not there."""
        with self._lock:
            known = self._peers.get(peer)
        if self._closed or known is None or not known.lost or not known.address:
            return ""
        try:
            return why_refused(self._dial(known, self._hello(peer)), self.name)
        except OSError:
            return ""

    def settle(self, peer: str) -> None:
        known = self._peers.get(peer)
        if known is not None and known.arrivals is not None:
            known.arrivals.settle()

    def forget(self, peer: str) -> None:
        with self._lock:
            known = self._peers.pop(peer, None)
            if known is not None:  # its later messages are not taken for those of another that gets its name
                known.lost = known.lost or "it was forgotten"
                self._changed.notify_all()
        if known is not None and known.stream is not None:
            known.stream.finish()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            streams = [p.stream for p in self._peers.values() if p.stream is not None]
        for stream in streams:
            stream.finish()
        deadline = time.monotonic() + CLOSE_S
        for stream in streams:
            if not stream.wait(max(0.0, deadline - time.monotonic())):
                stream.abort()
        if self._local is not None:
            self._local.stop()
        self._server.stop()
        self._delivery.close()

    def _stream(self, name: str) -> AnyStream:
        known = self._peers.get(name)
        if known is not None and known.stream is not None:  # the common case, without a lock
            return known.stream
        with self._lock:
            peer = self._peers.get(name)
        if peer is None:
            raise unreachable(name, "it has not joined, or has left")
        with peer.connecting:
            if peer.stream is not None:
                return peer.stream
            self._check_reachable(peer)
            stream = self._connect(peer)
            with self._lock:
                lost = self._closed or bool(peer.lost)
                peer.stream = None if lost else stream
        stream.start(lambda ended, reason: self._on_end(peer, ended, reason))
        if lost:
            stream.abort()
            self._check_reachable(peer)
        return stream

    def _check_reachable(self, peer: _Peer) -> None:
        if self._closed:
            raise unreachable(peer.name, "this end is closed")
        if peer.incarnation and not peer.address:  # it came before the coordinator's word of it
            with self._changed:
                self._changed.wait_for(lambda: peer.address or peer.lost or self._closed, INTRODUCED_S)
        if peer.lost:
            raise unreachable(peer.name, peer.lost)
        if not peer.address:
            raise unreachable(peer.name, "it has not joined, or has left")

    def _hello(self, to: str) -> Outgoing:
        own, life = self.name, self.incarnation
        return pack(wire.Hello(peer=own, incarnation=life, protocol=wire.PROTOCOL, version=flowml.__version__, to=to))

    def _connect(self, peer: _Peer) -> AnyStream:
        """Make a new connection. A shortage of resources may be over soon, so it is retried for `SHORTAGE_S`."""
        hello = self._hello(peer.name)
        deadline = time.monotonic() + SHORTAGE_S
        while True:
            try:
                return self._dial(peer, hello)
            except OSError as error:
                if error.errno not in service.SHORTAGES or time.monotonic() > deadline or self._closed:
                    reason = f"no connection to it can be made from here: {error.strerror}"
                    self._lose(peer, reason)
                    raise unreachable(peer.name, reason) from None
            time.sleep(service.SHORTAGE_S)

    def _on_end(self, peer: _Peer, stream: AnyStream, reason: str) -> None:
        if peer.stream is stream:
            self._lose(peer, reason)

    def _lose(self, peer: _Peer, reason: str) -> None:
        """Count this incarnation of a peer as lost, unless it is lost, replaced or forgotten already."""
        with self._lock:
            if self._closed or peer.lost or self._peers.get(peer.name) is not peer:
                return
            if peer.arrivals is not None:
                peer.arrivals.begin_drain()
            peer.lost = reason
            self._changed.notify_all()
            stream, peer.stream = peer.stream, None
        if stream is not None:
            stream.abort()  # first, so that a waiting sender does not delay the report
        with self._reporting:
            if peer.arrivals is not None:
                peer.arrivals.drain()
            peer.hang_up()
            self._on_lost(peer.name, reason)

    def _dial(self, peer: _Peer, hello: Outgoing) -> AnyStream:
        address = peer.address
        local: UnixStream | None = None
        if self._shared_memory:
            checked = self._checksum is True
            local = unix_stream.connect(address, self._token, hello, self._max_queued_bytes, checked=checked)
        if local is not None:
            return local
        checked = is_checked(address, self._checksum)
        budget = Budget(self._max_queued_bytes)

        def on_sent(nbytes: int, seconds: float) -> None:
            self.on_sent(peer.name, nbytes, seconds)

        return Stream(address, self._tls, self._token, hello, budget, checked=checked, on_sent=on_sent)

    def _receive(self, frames: Iterator[bytes], context: Any) -> bytes:
        """Serve one incoming gRPC stream to its end."""
        refusal, fault = self._serve(_assembled(frames, Assembler(self._allocate), context.is_active), context.cancel)
        if refusal:
            context.abort(grpc.StatusCode.INTERNAL if fault else grpc.StatusCode.INVALID_ARGUMENT, refusal[:1024])
        return b""

    def _allocate(self, nbytes: int) -> Buffer:
        """Memory for a large array that is received in pieces."""
        keep_freed_memory()
        return self._pool.take(nbytes)

    def _serve_local(self, incoming: Incoming, hang_up: Callable[[], object], expectation: Expectation) -> str:
        refusal, fault = self._serve(incoming, hang_up, expectation)
        return "its connection broke" if fault else refusal

    def _serve(
        self, incoming: Incoming, hang_up: Callable[[], object], expectation: Expectation | None = None
    ) -> tuple[str, bool]:
        """Receive one stream to its end. Returns why it is refused ("" if it ended), and whether we are at fault."""
        peer: _Peer | None = None
        arrivals = Arrivals()
        refusal, reason, fault = "", "it closed the connection", False
        try:
            for message, arrays in incoming:
                if isinstance(message, Refusal):
                    self._refuse(peer, message)
                elif peer is None:
                    peer = self._greet(message)
                    peer.arrivals, peer.expectation, peer.hang_up = arrivals, expectation, hang_up
                elif peer.lost and not arrivals.admits(sum(a.nbytes for a in arrays)):
                    raise _Refused(counts_as_lost(peer.name, peer.lost))
                else:
                    arrivals.busy = True
                    self._on_message(peer.name, message, arrays)
                    arrivals.busy = False
                    arrivals.taken += 1
                del message, arrays  # else they would stay alive until the next message
        except (FrameError, _Refused) as error:
            refusal = reason = str(error)
        except (grpc.RpcError, OSError):
            reason = "its connection broke"
        except BaseException as error:  # a callback of a user may call sys.exit()
            _log.exception("a message from %s could not be processed", peer.name if peer else "an unknown peer")
            refusal = reason = f"a message from it failed here: {service.named(error)}"
            fault = True
        arrivals.end()
        if peer is not None:
            if peer.hang_up is hang_up:
                peer.hang_up = _nothing  # the incoming stream has ended
            if peer.lost and not refusal:
                refusal = counts_as_lost(peer.name, peer.lost)
            self._lose(peer, reason)
        return refusal, fault

    def _refuse(self, peer: _Peer | None, refusal: Refusal) -> None:
        """Fail the work of a message and keep its connection. Raises _Refused if the peer is unknown or lost."""
        answer = refusal.answer(self.name)
        if peer is None or peer.lost:
            raise _Refused(answer.error)
        _log.warning("from %s: %s", peer.name, answer.error)
        self._delivery.put(self._answer, peer.name, answer)  # sending may wait, and this thread must not

    def _answer(self, peer: str, answer: wire.Wire) -> None:
        with suppress(WorkerLostError):
            self.send(peer, answer)

    def _greet(self, hello: wire.Wire) -> _Peer:
        """The peer that a stream's first message names. Raises _Refused."""
        if not isinstance(hello, wire.Hello):
            raise _Refused(f"a stream begins with Hello, not with {type(hello).__name__}")
        if reason := why_not_taken(hello, self.name):
            raise _Refused(reason)
        with self._lock:
            peer = self._peers.setdefault(hello.peer, _Peer(hello.peer))
            earliest = max(peer.incarnation, peer.earliest)
            if hello.incarnation < earliest or (hello.incarnation == peer.incarnation and peer.lost):
                raise _Refused(counts_as_lost(hello.peer, peer.lost * (hello.incarnation == peer.incarnation)))
            if peer.incarnation in (0, hello.incarnation) and not peer.lost:
                peer.incarnation = hello.incarnation
                self._forget_strangers()
                return peer
        self._lose(peer, f"a new {hello.peer} took its place")
        with self._reporting, self._lock:
            current = self._peers.get(hello.peer)
            if current is None or current is peer:  # the coordinator sends its address later
                current = self._peers[hello.peer] = _Peer(hello.peer)
            current.incarnation = hello.incarnation
            self._forget_strangers()
            return current

    def _forget_strangers(self) -> None:
        """Keep at most `MAX_STRANGERS` lost peers without a known address. The lock is held."""
        strangers = [p.name for p in self._peers.values() if p.lost and not p.address]
        for name in strangers[: max(0, len(strangers) - MAX_STRANGERS)]:
            del self._peers[name]


def _assembled(frames: Iterator[bytes], assembler: Assembler, is_active: Callable[[], bool]) -> Incoming:
    for frame in frames:
        if assembler.feed(frame):
            yield assembler.take()
    if assembler.is_partial or not is_active():
        raise ConnectionError  # for gRPC's iterator a broken connection ends like a closed one


def is_checked(address: str, checksum: bool | None) -> bool:
    """Whether messages to `address` carry checksums."""
    return not is_loopback(split_address(address)[0]) if checksum is None else checksum
