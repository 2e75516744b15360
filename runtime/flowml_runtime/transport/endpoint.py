"""Defines the transport interface, `Endpoint`, and the endpoint between peers of one process.

An endpoint pushes ordered messages with arrays, and calls back when a peer is lost. `ThreadEndpoint` connects peers of
one process and passes arrays by reference; `grpc_endpoint` connects processes. Every endpoint delivers on its own
threads, one message of a sender at a time, so that a sender never runs the receiver's code.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from flowml.errors import WorkerLostError
from flowml.placement.links import SAME_PROCESS
from flowml.plan import ArraySpec
from flowml_runtime import service, wire
from flowml_runtime.transport.refusals import check

Arrays = Sequence[Any]
"""np.ndarray or jax.Array"""

OnMessage = Callable[[str, wire.Wire, list[Any]], None]
"""(peer, message, arrays). Must not wait, because later messages of that peer wait for it."""

OnLost = Callable[[str, str], None]
"""(peer, reason). Called once for each incarnation of a peer."""

MAX_QUEUED_BYTES = 64 * 2**20
MAX_QUEUED_MESSAGES = 65536

_log = logging.getLogger("flowml")


class Sender(Protocol):
    """The part of an endpoint that steps use. Safe to use from any thread."""

    name: str

    def send(self, peer: str, message: wire.Wire, arrays: Arrays = (), timeout_s: float | None = None) -> None:
        """Push a message; `message.specs` describes `arrays`, which the caller must not change afterwards.

        Messages to one peer keep their order. Waits only while too much is in flight to the peer, and raises
        TimeoutError after `timeout_s`. Raises WorkerLostError for a peer that is unknown or lost.
        """
        ...

    def way(self, peer: str) -> str:
        """How messages reach a peer: "same process", "shared memory" or "gRPC"; "" if the peer cannot be reached."""
        ...

    def expect(self, peer: str) -> None:
        """A hint that a message from `peer` is due very soon: its receiving thread may poll before it sleeps."""
        ...

    def reserve(self, peer: str, specs: Sequence[ArraySpec], messages: int) -> None:
        """Allocate memory for `messages` messages with such arrays, if the way to `peer` needs memory.

        Raises SlotError if there is none. A peer that cannot be reached is ignored here; the first send raises.
        """
        ...

    def waiting(self, peer: str) -> int:
        """The bytes of messages that the way to `peer` has not taken yet."""
        ...

    def settle(self, peer: str) -> None:
        """Wait until the messages that have arrived from `peer` are processed, for at most a second."""
        ...


class Endpoint(Sender, Protocol):
    """One peer's end of all its connections. Safe to use from any thread."""

    address: str
    incarnation: int

    def start(self, on_message: OnMessage, on_lost: OnLost) -> None:
        """Start delivery. Both functions are called on receiving threads."""
        ...

    def know(self, peers: Mapping[str, str]) -> None:
        """Set the addresses of peers (name -> address). A connection is opened on first use and kept."""
        ...

    def lose(self, peer: str, reason: str) -> None:
        """Count a peer as lost, whatever the state of its connection: sends fail, and `on_lost` is called."""
        ...

    def forget(self, peer: str) -> None:
        """Close the connection to a peer after the messages sent so far, without a call of `on_lost`. Messages that
        still come from it are refused."""
        ...

    def close(self) -> None:
        """Deliver sent messages for a short time, then end all connections and threads. Idempotent."""
        ...


def new_incarnation() -> int:
    """A number for one incarnation of a peer, larger than all earlier ones. Microseconds of wall time."""
    return time.time_ns() // 1000


def unreachable(peer: str, reason: str) -> WorkerLostError:
    return WorkerLostError(f"cannot send to {peer}: {reason}", worker=peer)


class Budget:
    """Limits the bytes and messages in flight. A sender without room waits until earlier messages have arrived."""

    def __init__(self, max_bytes: int = MAX_QUEUED_BYTES, max_messages: int = MAX_QUEUED_MESSAGES) -> None:
        self._max_bytes = max_bytes
        self._max_messages = max_messages
        self._bytes = 0
        self._messages = 0
        self._closed = False
        self._changed = threading.Condition(threading.Lock())

    def acquire(self, nbytes: int, *, wait: bool = True, timeout_s: float | None = None) -> bool:
        """Wait for room and take it; a message larger than the whole budget goes alone. False once closed.

        Raises TimeoutError if there is no room in time.
        """
        with self._changed:
            full = wait and not self._closed and not self._fits(nbytes)
            if full and not self._changed.wait_for(lambda: self._closed or self._fits(nbytes), timeout_s):
                raise TimeoutError
            self._bytes += nbytes
            self._messages += 1
            return not self._closed

    @property
    def taken(self) -> int:
        """The bytes in flight."""
        return self._bytes

    def release(self, nbytes: int) -> None:
        with self._changed:
            self._bytes -= nbytes
            self._messages -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """End all waits for room."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        return self._closed

    def _fits(self, nbytes: int) -> bool:
        return not self._messages or (self._bytes + nbytes <= self._max_bytes and self._messages < self._max_messages)


class Delivery:
    """A thread that runs the calls put to it in order, within a budget."""

    def __init__(self, name: str, max_bytes: int = MAX_QUEUED_BYTES) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...], int] | None] = queue.SimpleQueue()
        self._budget = Budget(max_bytes)
        self._thread = service.start(f"{name}-deliver", self._run, lambda _: self._budget.close())

    def put(self, call: Callable[..., None], *arguments: Any, nbytes: int = 0, timeout_s: float | None = None) -> bool:
        """Queue `call(*arguments)`. False once closed. Waits for room unless called from the thread itself.

        Raises TimeoutError if there is no room in time.
        """
        wait = threading.current_thread() is not self._thread
        if not self._budget.acquire(nbytes, wait=wait, timeout_s=timeout_s):
            return False
        self._queue.put((call, arguments, nbytes))
        return True

    def close(self, timeout_s: float = 1.0) -> None:
        """Run queued calls for at most `timeout_s`, and end the thread."""
        self._budget.close()
        self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:  # no deadline: the thread sleeps until it has work or is closed
            call, arguments, nbytes = item
            with service.going_on("a message could not be processed"):
                call(*arguments)
            self._budget.release(nbytes)
            del item, call, arguments  # else they would keep arrays alive until the next message


class ThreadHub:
    """Connects the endpoints of one process. Peers are found by name; addresses are not used."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._endpoints: dict[str, ThreadEndpoint] = {}

    def endpoint(self, name: str) -> ThreadEndpoint:
        """A new endpoint. It receives messages once it is started. The others may send to it, even if they have lost an
        earlier one of this name."""
        endpoint = ThreadEndpoint(self, name)
        with self._lock:
            if name in self._endpoints:
                raise ValueError(f"there is an endpoint {name!r} already")
            for other in self._endpoints.values():
                other.find_again(name)
            self._endpoints[name] = endpoint
        return endpoint

    def find(self, name: str) -> ThreadEndpoint | None:
        return self._endpoints.get(name)

    def remove(self, name: str) -> None:
        """Remove an endpoint and tell the others that it is lost."""
        with self._lock:
            if self._endpoints.pop(name, None) is None:
                return
            others = list(self._endpoints.values())
        for other in others:
            other.lose(name, "it was closed")


class ThreadEndpoint:
    """An endpoint of a `ThreadHub`. It passes the sender's own arrays, without a copy or a check.

    Receivers may read the sender's memory at any later time, so sent arrays must never change. Senders ensure this:
    edges, contributions, publications and results are views of JAX buffers, which XLA does not overwrite while a view
    exists; chunks of sums lie in memory that is written once; a caller's arrays are copied first.
    """

    def __init__(self, hub: ThreadHub, name: str) -> None:
        self.name = name
        self.address = f"thread:{name}"
        self.incarnation = new_incarnation()
        self._hub = hub
        self._lock = threading.Lock()
        self._lost: dict[str, str] = {}
        self._delivery = Delivery(name)
        self._started = threading.Event()
        self._on_message: OnMessage = lambda *_: None
        self._on_lost: OnLost = lambda *_: None

    def start(self, on_message: OnMessage, on_lost: OnLost) -> None:
        self._on_message, self._on_lost = on_message, on_lost
        self._started.set()

    def know(self, peers: Mapping[str, str]) -> None:
        """Does nothing: the hub knows all peers."""

    def send(self, peer: str, message: wire.Wire, arrays: Arrays = (), timeout_s: float | None = None) -> None:
        target = self._hub.find(peer)
        if target is None or peer in self._lost:
            raise unreachable(peer, self._lost.get(peer, "there is no such peer"))
        check(message)
        nbytes = sum(a.nbytes for a in arrays)
        if not target.deliver(self.name, message, list(arrays), nbytes, timeout_s):
            raise unreachable(peer, "it was closed")

    def way(self, peer: str) -> str:
        return "" if self._hub.find(peer) is None or peer in self._lost else SAME_PROCESS

    def expect(self, peer: str) -> None:
        """Does nothing: messages are put into a queue of this process."""

    def reserve(self, peer: str, specs: Sequence[ArraySpec], messages: int) -> None:
        """Does nothing: arrays are passed by reference."""

    def waiting(self, peer: str) -> int:
        """None: arrays are passed by reference."""
        return 0

    def settle(self, peer: str) -> None:
        """Nothing to wait for: one thread delivers the messages of all peers in the order in which they were sent."""

    def deliver(
        self, peer: str, message: wire.Wire, arrays: list[Any], nbytes: int, timeout_s: float | None = None
    ) -> bool:
        """For the hub's other endpoints: queue a message. False once closed; raises TimeoutError."""
        return self._delivery.put(self._receive, peer, message, arrays, nbytes=nbytes, timeout_s=timeout_s)

    def lose(self, peer: str, reason: str) -> None:
        with self._lock:
            if peer in self._lost:
                return
            self._lost[peer] = reason
        self._delivery.put(self._report, peer, reason)

    def forget(self, peer: str) -> None:
        with self._lock:
            self._lost.setdefault(peer, "it was forgotten")

    def find_again(self, peer: str) -> None:
        """For the hub: there is a new endpoint of this name."""
        with self._lock:
            self._lost.pop(peer, None)

    def close(self) -> None:
        self._hub.remove(self.name)
        self._started.set()
        self._delivery.close()

    def _receive(self, peer: str, message: wire.Wire, arrays: list[Any]) -> None:
        self._started.wait()  # no deadline: start() or close() follows at once
        self._on_message(peer, message, arrays)

    def _report(self, peer: str, reason: str) -> None:
        self._started.wait()  # no deadline: start() or close() follows at once
        self._on_lost(peer, reason)
