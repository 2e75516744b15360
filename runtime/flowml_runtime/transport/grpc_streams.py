"""Implements the persistent gRPC stream to a peer, which is fed from a queue, and the server for such streams.

gRPC transports raw bytes only: one method, "push", from client to server, without generated code. A stream exists as
long as the two peers know each other. Its end tells each peer that the other has ended.

A connection without a call is closed after `AUTHENTICATE_S`, and a call without the token at once. A server uses at
most half of the process's descriptors for connections, so that it keeps working under a flood of connections.
"""

from __future__ import annotations

import itertools
import queue
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

import grpc

from flowml.errors import ClusterError
from flowml_runtime import service
from flowml_runtime.transport.buffers import keep_freed_memory
from flowml_runtime.transport.diagnosis import diagnose
from flowml_runtime.transport.endpoint import Budget
from flowml_runtime.transport.framing import MAX_FRAME_BYTES, Outgoing
from flowml_runtime.transport.security import TLS, is_loopback, same_token, split_address

METHOD = "/flowml.Endpoint/push"
TOKEN_KEY = "flowml-token"
MAX_STREAMS = 4096
MAX_METADATA_BYTES = 2**14
"""Limit for the metadata of a call, including the token. gRPC refuses more before it is processed."""

AUTHENTICATE_S = 5.0
"""How long a connection may take until its call with the token, and how long it may be without a call."""

_UNREACHED = re.compile("failed to connect|connections to all backends failing", re.IGNORECASE)
"""gRPC's messages for a connection that was never made. They depend on the state of its load balancer."""

_CLOSED = re.compile("socket closed|reset by peer|broken pipe", re.IGNORECASE)
TURNED_AWAY = "it closed the connection at once: it may have too many at the moment"

OnSent = Callable[[int, float], None]
"""Called with (bytes of a message, seconds until the connection accepted it)."""

Receive = Callable[[Iterator[bytes], Any], bytes]
"""(frames, grpc.ServicerContext) -> b"". Runs on a separate thread until the stream ends."""

_OPTIONS = (
    ("grpc.so_reuseport", 0),  # else a second server could take the same port and half of its connections
    ("grpc.enable_http_proxy", 0),  # addresses are the cluster's own: the user's web proxy is not used
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: received data cannot expand
)

# Between machines, pings detect a peer that vanished silently. On one machine the kernel reports the end of a process,
# and pings would only break the connection of a process that its user has suspended.
_KEEPALIVE = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


def _options(host: str) -> tuple[tuple[str, int], ...]:
    return _OPTIONS if is_loopback(host) else _OPTIONS + _KEEPALIVE


def _limits() -> tuple[tuple[str, int], ...]:
    """A server's limits in number and time for clients that have not sent the token."""
    milliseconds = int(AUTHENTICATE_S * 1000)
    return (
        ("grpc.server_handshake_timeout_ms", milliseconds),
        ("grpc.max_connection_idle_ms", milliseconds),  # without a call; our own connections always have one
        ("grpc.max_allowed_incoming_connections", max_connections()),
    )


def max_connections() -> int:
    """The most connections of one server: outgoing connections need as many descriptors again."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_STREAMS if soft == resource.RLIM_INFINITY else max(1, min(soft // 2, MAX_STREAMS))


class Stream:
    """The outgoing half of a connection. `put` is safe from any thread; gRPC's own thread reads the queue."""

    def __init__(
        self,
        address: str,
        tls: TLS | None,
        token: str,
        first: Outgoing,
        budget: Budget,
        *,
        checked: bool = False,
        on_sent: OnSent | None = None,
    ) -> None:
        """Messages carry checksums if `checked`. `on_sent` is called for every message that gRPC has accepted."""
        self._on_sent = on_sent
        keep_freed_memory()
        self._numbers = itertools.count() if checked else None
        self._queue: queue.SimpleQueue[Outgoing | None] = queue.SimpleQueue()
        self._budget = budget
        self._token = token
        self._ended = threading.Event()
        self.reason = ""
        """Why the stream ended. It is set before `put` returns False."""
        self._why = lambda call: _why(call, address, tls)
        self._channel = _channel(address, tls)
        self._call: Any = None
        self._budget.acquire(first.nbytes)
        self._queue.put(first)

    def start(self, on_end: Callable[[Stream, str], None]) -> None:
        """Connect. `on_end(self, reason)` is called once, however the stream ends, on a separate thread."""
        push = self._channel.stream_unary(METHOD)
        self._call = push.future(self._frames(), metadata=((TOKEN_KEY, self._token),))

        def ended(call: Any) -> None:
            self.reason = self._why(call)
            self.finish()
            try:
                on_end(self, self.reason)  # first: the report must not wait for gRPC's cleanup
            finally:
                self._channel.close()
                self._ended.set()

        def failed(reason: str) -> None:
            self.reason = self.reason or reason
            self.finish()
            on_end(self, self.reason)
            self._ended.set()

        def hand_over(call: Any) -> None:  # closing the channel waits for the thread that calls this
            try:
                service.start("flowml-ended", lambda: ended(call), failed)
            except ClusterError as error:
                failed(str(error))

        self._call.add_done_callback(hand_over)

    def put(self, message: Outgoing, timeout_s: float | None = None) -> bool:
        """Queue a message, waiting while the queue is full. False if the stream has ended. Raises TimeoutError."""
        if not self._budget.acquire(message.nbytes, timeout_s=timeout_s):
            return False
        self._queue.put(message)
        return True

    @property
    def waiting(self) -> int:
        """The bytes that gRPC has not taken yet."""
        return self._budget.taken

    def finish(self) -> None:
        """End the stream once all queued messages have been sent."""
        self._budget.close()
        self._queue.put(None)

    def abort(self) -> None:
        """End the stream now."""
        self.finish()
        if self._call is not None:
            self._call.cancel()

    def wait(self, timeout_s: float) -> bool:
        """True if the stream has ended and released its resources."""
        return self._ended.wait(timeout_s)

    def _frames(self) -> Iterator[bytes]:
        # no deadline: the thread sleeps until it has work or is closed
        while (message := self._queue.get()) is not None:
            began = time.perf_counter()
            yield from message.frames(self._numbers)
            self._budget.release(message.nbytes)
            if self._on_sent is not None:
                self._on_sent(message.nbytes, time.perf_counter() - began)
            del message  # else it would keep its arrays alive until the next one


def _channel(address: str, tls: TLS | None) -> Any:
    options = _options(split_address(address)[0])
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    cert, key, ca = tls.read()
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert), options=options)


def _why(call: Any, address: str, tls: TLS | None) -> str:
    """A readable reason for the end of a call."""
    code, details = call.code(), call.details() or ""
    if code is grpc.StatusCode.OK:
        return "it closed the connection"
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return "it refuses the token; use the one that its cluster was started with"
    if code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT):
        return details
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return f"it has no room for another connection: {details}"
    if code is grpc.StatusCode.UNKNOWN:
        return "it cannot accept another connection; its log says why"
    if code is grpc.StatusCode.CANCELLED:
        return "the connection was ended"
    if _UNREACHED.search(details):
        said = details.rsplit(": ", 1)[-1]
        cause = "" if "refused" in said else diagnose(address, tls)
        return f"it cannot be reached: {cause or (TURNED_AWAY if _CLOSED.search(said) else said)}"
    return "its connection broke"


class StreamServer:
    """Receives streams. The constructor binds the port; `start` begins to serve it."""

    def __init__(self, bind: str, tls: TLS | None, token: str, receive: Receive) -> None:
        """Raises ClusterError if the address cannot be bound or the TLS files cannot be used."""
        host, _ = split_address(bind)
        handler = grpc.stream_unary_rpc_method_handler(receive)
        self._started = False
        self._threads = _ThreadEach()
        self._server = grpc.server(
            self._threads,  # pyright: ignore[reportArgumentType]
            handlers=[_Push(handler)],
            interceptors=[_TokenCheck(token, self._threads)],
            options=(*_options(host), *_limits()),
            maximum_concurrent_rpcs=MAX_STREAMS,
        )
        try:
            self.port = self._bind(bind, tls)
        except RuntimeError:
            raise ClusterError(f"cannot listen on {bind}: it is in use, or no address of this machine") from None

    def start(self) -> None:
        self._started = True
        self._server.start()

    def stop(self) -> None:
        """Break every stream and free the port."""
        if not self._started:
            self._server.start()  # a server that never ran would keep its port
        self._server.stop(None).wait(2.0)
        self._threads.shutdown()

    def _bind(self, bind: str, tls: TLS | None) -> int:
        if tls is None:
            return self._server.add_insecure_port(bind)
        cert, key, ca = tls.read()
        credentials = grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True)
        return self._server.add_secure_port(bind, credentials)


def server_apart(bind: str, tls: TLS | None, token: str, receive: Receive, apart_from: str) -> StreamServer:
    """A server at `bind`. If the system chooses the port, it is another than that of the address `apart_from`."""
    server = StreamServer(bind, tls, token, receive)
    if split_address(bind)[1] or not apart_from or server.port != split_address(apart_from)[1]:
        return server
    try:
        return StreamServer(bind, tls, token, receive)  # while the first has that port
    finally:
        server.stop()


class _Push(grpc.GenericRpcHandler):
    def __init__(self, handler: Any) -> None:
        self._handler = handler

    def service(self, handler_call_details: Any) -> Any:
        return self._handler if handler_call_details.method == METHOD else None


class _TokenCheck(grpc.ServerInterceptor):
    """Refuses a call without the token before its body is read, and any call for which no thread can be started."""

    def __init__(self, token: str, threads: _ThreadEach) -> None:
        self._token = token
        self._threads = threads

        def refuse(frames: Iterator[bytes], context: Any) -> bytes:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "missing or wrong token")
            return b""

        self._refuse = grpc.stream_unary_rpc_method_handler(refuse)

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        self._threads.prepare()  # an exception here becomes the answer to the call
        given = dict(handler_call_details.invocation_metadata).get(TOKEN_KEY, "")
        if isinstance(given, str) and same_token(given, self._token):
            return continuation(handler_call_details)
        return self._refuse


class _ThreadEach(Executor):
    """Runs each stream on a daemon thread: a pool's threads would keep the process alive until all streams end."""

    def __init__(self) -> None:
        self._spare: queue.SimpleQueue[Callable[[], None]] | None = None
        """Queue of the thread that waits for the next stream. Only gRPC's serving thread uses it until that ends."""

    def prepare(self) -> queue.SimpleQueue[Callable[[], None]]:
        """Start a thread for the next stream: a stream without one would never be answered. Raises ClusterError."""
        if self._spare is None:
            work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

            def run() -> None:
                stream = work.get()  # no deadline: the thread sleeps until it has work or is closed
                stream()

            service.start("flowml-receive", run, lambda _: None)  # the stream's future holds its error
            self._spare = work
        return self._spare

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        work, self._spare = self.prepare(), None
        work.put(run)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if self._spare is not None:
            self._spare.put(lambda: None)
