"""How peers talk: ordered messages with arrays, pushed, and a call when a peer is lost.

`Endpoint` is what the runtime needs of a transport. The one in here joins peers of one process and hands arrays
over by reference; `grpc_transport` joins processes. Every endpoint delivers on threads of its own, one a sender
at a time, so that a sender never runs the receiver's code.
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
"""(peer, message, arrays). Must not wait: it holds up whatever else that peer has sent."""

OnLost = Callable[[str, str], None]
"""(peer, reason), once for each life of a peer."""

MAX_QUEUED_BYTES = 64 * 2**20
MAX_QUEUED_MESSAGES = 65536

_log = logging.getLogger("flowml")


class Sender(Protocol):
    """What steps need of an endpoint. Safe to use from any thread."""

    name: str

    def send(self, peer: str, message: wire.Wire, arrays: Arrays = (), timeout_s: float | None = None) -> None:
        """Push a message; `message.specs` describes `arrays`, which are not changed any more from here on.

        In order for each peer. Waits only while too much is on its way there, and raises TimeoutError if that takes
        longer than `timeout_s`. Raises WorkerLostError for a peer that is unknown or lost.
        """
        ...

    def way(self, peer: str) -> str:
        """How messages reach a peer: "same process", "shared memory" or "gRPC"; "" for one that cannot be reached."""
        ...

    def expect(self, peer: str) -> None:
        """Another message from `peer` is due within moments; a hint to look for it before going to sleep."""
        ...

    def reserve(self, peer: str, specs: Sequence[ArraySpec], messages: int) -> None:
        """Have the memory ready for so many messages with such arrays, where the way to `peer` needs any.

        Raises SlotError if there is none. A peer that cannot be reached is found out when something is sent.
        """
        ...


class Endpoint(Sender, Protocol):
    """One end of all the connections of a peer. Safe to use from any thread."""

    address: str
    incarnation: int

    def start(self, on_message: OnMessage, on_lost: OnLost) -> None:
        """Deliver from now on. Both are called on receiving threads."""
        ...

    def know(self, peers: Mapping[str, str]) -> None:
        """Where peers are (name -> address). A connection is opened on first use and kept."""
        ...

    def lose(self, peer: str, reason: str) -> None:
        """Take a peer for lost, whatever its connection looks like: sends fail, and `on_lost` is called."""
        ...

    def forget(self, peer: str) -> None:
        """Send nothing more to a peer after what has been; no word about it."""
        ...

    def close(self) -> None:
        """Deliver what was sent, as far as that is quick, and end everything. Idempotent."""
        ...


def new_incarnation() -> int:
    """A number for one life of a peer, later than those of its earlier lives. Microseconds of wall time."""
    return time.time_ns() // 1000


def unreachable(peer: str, reason: str) -> WorkerLostError:
    return WorkerLostError(f"cannot send to {peer}: {reason}", worker=peer)


class Budget:
    """Bytes and messages that may be on their way at once. Whoever wants more waits for others to arrive."""

    def __init__(self, max_bytes: int = MAX_QUEUED_BYTES, max_messages: int = MAX_QUEUED_MESSAGES) -> None:
        self._max_bytes = max_bytes
        self._max_messages = max_messages
        self._bytes = 0
        self._messages = 0
        self._closed = False
        self._changed = threading.Condition(threading.Lock())

    def acquire(self, nbytes: int, *, wait: bool = True, timeout_s: float | None = None) -> bool:
        """Take room, waiting for it; something larger than the whole budget goes alone. False once closed.

        Raises TimeoutError if there is no room in time.
        """
        with self._changed:
            full = wait and not self._closed and not self._fits(nbytes)
            if full and not self._changed.wait_for(lambda: self._closed or self._fits(nbytes), timeout_s):
                raise TimeoutError
            self._bytes += nbytes
            self._messages += 1
            return not self._closed

    def release(self, nbytes: int) -> None:
        with self._changed:
            self._bytes -= nbytes
            self._messages -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Let everybody who waits give up."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        return self._closed

    def _fits(self, nbytes: int) -> bool:
        return not self._messages or (self._bytes + nbytes <= self._max_bytes and self._messages < self._max_messages)


class Delivery:
    """A thread that runs what is put to it, in order, within a budget."""

    def __init__(self, name: str, max_bytes: int = MAX_QUEUED_BYTES) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...], int] | None] = queue.SimpleQueue()
        self._budget = Budget(max_bytes)
        self._thread = service.start(f"{name}-deliver", self._run, lambda _: self._budget.close())

    def put(self, call: Callable[..., None], *arguments: Any, nbytes: int = 0, timeout_s: float | None = None) -> bool:
        """Have `call(*arguments)` run. False once closed. Waits for room unless called from the thread itself.

        Raises TimeoutError if there is none in time.
        """
        wait = threading.current_thread() is not self._thread
        if not self._budget.acquire(nbytes, wait=wait, timeout_s=timeout_s):
            return False
        self._queue.put((call, arguments, nbytes))
        return True

    def close(self, timeout_s: float = 1.0) -> None:
        """Run what was put, as far as that is quick, and end the thread."""
        self._budget.close()
        self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:  # no deadline: the thread sleeps until it has work or is closed
            call, arguments, nbytes = item
            with service.going_on("a message could not be taken in"):
                call(*arguments)
            self._budget.release(nbytes)
            del item, call, arguments  # else they would keep arrays alive until the next message


class ThreadHub:
    """Joins the endpoints of one process. Peers are found by name; addresses play no part."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._endpoints: dict[str, ThreadEndpoint] = {}

    def endpoint(self, name: str) -> ThreadEndpoint:
        """A new endpoint. It takes messages in once it is started."""
        endpoint = ThreadEndpoint(self, name)
        with self._lock:
            if name in self._endpoints:
                raise ValueError(f"there is an endpoint {name!r} already")
            self._endpoints[name] = endpoint
        return endpoint

    def find(self, name: str) -> ThreadEndpoint | None:
        return self._endpoints.get(name)

    def remove(self, name: str) -> None:
        """Take an endpoint out and tell the others that it is lost."""
        with self._lock:
            if self._endpoints.pop(name, None) is None:
                return
            others = list(self._endpoints.values())
        for other in others:
            other.lose(name, "it was closed")


class ThreadEndpoint:
    """An endpoint of a `ThreadHub`. Hands over the sender's own arrays; nothing is copied or checked.

    So receivers read memory of the sender for as long as they like, and what is sent may never change. Who sends keeps
    to that: edges, contributions, publications and results are views of JAX buffers, which XLA does not overwrite while
    a view exists; chunks of sums lie in memory that is written once; what a caller hands in is copied first.
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
        """Nothing to learn: the hub knows."""

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
        """Nothing to look for: messages are put into a queue of this process."""

    def reserve(self, peer: str, specs: Sequence[ArraySpec], messages: int) -> None:
        """Nothing to have ready: arrays are handed over as they are."""

    def deliver(
        self, peer: str, message: wire.Wire, arrays: list[Any], nbytes: int, timeout_s: float | None = None
    ) -> bool:
        """For the hub's other endpoints: take a message in. False once closed; raises TimeoutError."""
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
