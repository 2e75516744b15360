"""Messages from workers of one process of a simulation to those of another.

Where a receiver is in another process, its functions are replaced by those of `Away`, and the clock's by an outbox. At
the end of a window the outbox becomes bytes, and the other process puts what they hold on its own clock. There are no
arrays in them but NaN losses and first values, because only simulations without arithmetic are divided.
"""

from __future__ import annotations

import math
import pickle
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowml_runtime import wire
from flowml_runtime.protocol.training.actions import Received
from flowml_runtime.sim.heap import Act, Clock
from flowml_runtime.sim.network import DRIVER, KINDS, Put
from flowml_runtime.sim.values import NAN, NO_ARRAYS, Value

if TYPE_CHECKING:
    from flowml_runtime.sim.node import Node

_RECEIVE, _TELL, _NEWS, _EDGE, _DRIVER = range(5)
_NOBODY = -1
"""The number of a sender that is no worker: the driver."""
_BITS = 40
"""The events that a process schedules in a window have numbers of so many bits, above which is that of the window."""

Mail = tuple[float, bytes]
"""What goes from one process to another after a window, and when the first of it arrives."""
Key = tuple[tuple[int, int], int, int, int]


def to_driver(peer: str, message: wire.Wire, value: Value) -> None:
    """Stands for what takes the messages to a driver in another process."""
    raise AssertionError


class Away:
    """Stands for a worker in another process. Its functions say what an event there calls."""

    @staticmethod
    def receive(peer: str, message: Any, value: Value) -> None:
        raise AssertionError

    @staticmethod
    def tell(event: Received) -> None:
        raise AssertionError

    @staticmethod
    def receive_news(peer: str, news: Any) -> None:
        raise AssertionError

    @staticmethod
    def receive_edge(key: Key, value: Value) -> None:
        raise AssertionError


_KINDS: dict[Act, int] = {
    Away.receive: _RECEIVE,
    Away.tell: _TELL,
    Away.receive_news: _NEWS,
    Away.receive_edge: _EDGE,
    to_driver: _DRIVER,
}


class Nodes(dict[str, "Node"]):
    """The workers of this process, by name. A worker of another process is `Away`."""

    def __missing__(self, name: str) -> Node:
        return cast("Node", Away)


class _Sent(msgspec.Struct, array_like=True, gc=False):
    """A message, and the labels of the events of its arrival at `when`. `number` is that which its sender's clock gave.

    `peer` is the number of its sender, and `value` None, the number of NaNs in it, or pickled.
    """

    when: float
    number: int
    kind: int
    peer: int
    message: wire.Wire | None
    value: int | bytes | None
    labels: list[int]
    key: Key | None = None


class _Arrived(msgspec.Struct, array_like=True, gc=False):
    """The same in another process. The message to a driver stays bytes until it happens: after the last step of all
    workers there are several for each at once, and as bytes they take a quarter of the memory."""

    when: float
    number: int
    kind: int
    peer: int
    message: msgspec.Raw
    value: int | bytes | None
    labels: list[int]
    key: Key | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[_Arrived]).decode
_message = msgspec.msgpack.Decoder(wire.Wire | None).decode


class _Outbox:
    """What goes to one other process."""

    def __init__(self, numbered: Callable[[], int], numbers: Mapping[str, int]) -> None:
        """`numbered` is that of the clock of this process, and `numbers` are those of workers."""
        self._numbered = numbered
        self._numbers = numbers
        self._sent: list[_Sent] = []
        self._last: tuple[Any, ...] = ()
        self._held: list[tuple[float, int, int, tuple[Any, ...]]] = []
        """Versions on their way, until their sending begins: a newer one may replace them before."""

    def put(self, when: float, label: int, act: Act, args: tuple[Any, ...]) -> None:
        """As `Clock.put`."""
        if args is self._last and self._sent[-1].when == when:
            self._sent[-1].labels.append(label)
            return
        kind, number = _KINDS[act], self._numbered()
        if kind == _NEWS:
            self._held.append((when, number, label, args))
            return
        self._last = args
        if kind == _TELL:
            event: Received = args[0]
            message = cast("wire.Wire", event.message)
            sent = _Sent(when, number, kind, self._numbers[event.peer], message, None, [label])
        elif kind == _EDGE:
            sent = _Sent(when, number, kind, _NOBODY, None, _packed(args[1]), [label], args[0])
        else:
            peer = self._numbers.get(args[0], _NOBODY)
            sent = _Sent(when, number, kind, peer, args[1], _packed(args[2]), [label])
        self._sent.append(sent)

    def take(self, until: float) -> tuple[float, Mail | None]:
        """All that has begun before `until`, and when the first of it arrives, or of the rest begins."""
        least, rest = math.inf, list[tuple[float, int, int, tuple[Any, ...]]]()
        for when, number, label, (peer, news) in self._held:
            if news.begins >= until:
                rest.append((when, number, label, (peer, news)))
                least = min(least, news.begins)
            else:
                sender, value = self._numbers[peer], _packed(news.value)
                self._sent.append(_Sent(when, number, _RECEIVE, sender, news.message, value, [label]))
        self._held = rest
        if not self._sent:
            return least, None
        first = min(sent.when for sent in self._sent)
        mail = first, _encode(self._sent)
        self._sent, self._last = [], ()
        return min(least, first), mail


def _packed(value: Value) -> int | bytes | None:
    if value is None:
        return None
    return len(value) if all(array is NAN for array in value) else pickle.dumps(tuple(value))


def _unpacked(value: int | bytes | None) -> Value:
    if isinstance(value, bytes):
        return pickle.loads(value)  # of a process that this one has forked, or was forked from
    return None if value is None else (NAN,) * value if value else NO_ARRAYS


class Here:
    """One of the processes of a simulation, `index`. The shares of the workers begin with these numbers, and the first
    process, which has the driver, has the last of them."""

    def __init__(self, clock: Clock, index: int, firsts: Sequence[int], numbers: Mapping[str, int]) -> None:
        self.clock = clock
        self.index = index
        self._firsts = firsts
        self._share = len(firsts) - 1 - index
        self._numbers = numbers
        self._outboxes = [_Outbox(clock.numbered, numbers) for _ in firsts]
        self._puts: list[Put] = [clock.put if n == index else outbox.put for n, outbox in enumerate(self._outboxes)]
        self._names: list[str] = []
        """Of the workers, by number, and at the end, which is at `_NOBODY`, of the driver."""
        self._receivers: Mapping[str, Node] = {}
        self._to_driver: Callable[..., None] = to_driver

    def join(self, numbers: Mapping[str, int], receivers: Mapping[str, Node], driver: Callable[..., None]) -> None:
        """These take what arrives."""
        self._names, self._receivers, self._to_driver = [*numbers, DRIVER], receivers, driver

    def has(self, worker: str) -> bool:
        """Whether a worker is in this process."""
        return self._process(self._numbers[worker]) == self.index

    def workers(self, count: int) -> range:
        """The numbers of the workers in this process, of `count` in all."""
        ends = [*self._firsts[1:], count]
        return range(self._firsts[self._share], ends[self._share])

    def put_for(self, number: int) -> Put:
        """What schedules an arrival at a worker, or at the driver, which is in process 0."""
        return self._puts[self._process(number)]

    def _process(self, number: int) -> int:
        return len(self._firsts) - bisect_right(self._firsts, number) if number >= 0 else 0

    def take(self) -> tuple[float, dict[int, Mail]]:
        """At the end of a window, what goes to other processes, and when the first event after it may happen."""
        least, found = self.clock.head, dict[int, Mail]()
        for process, outbox in enumerate(self._outboxes):
            first, mail = outbox.take(self.clock.until)
            least = min(least, first)
            if mail is not None:
                found[process] = mail
        return least, found

    def open(self, window: int, until: float, arrived: Sequence[bytes]) -> None:
        """Begin a window with what has arrived. Events of one time happen in the order of the windows in which they
        were scheduled, then of the shares of workers, and then as they were scheduled there."""
        count, clock = len(self._firsts), self.clock
        for data in arrived:
            found = _decode(data)
            while found:  # it is emptied on the way, as it may be large
                sent = found.pop()
                clock.put_all(sent.when, sent.number, self._events(sent))
        clock.open(until, (window * count + self._share) << _BITS)

    def _events(self, sent: _Arrived) -> list[tuple[int, Act, tuple[Any, ...]]]:
        kind, labels, names, nodes = sent.kind, sent.labels, self._names, self._receivers
        peer = names[sent.peer]
        if kind == _DRIVER:
            return [(label, self._tell_driver, (peer, sent.message, sent.value)) for label in labels]
        found = [nodes[names[label // KINDS]] for label in labels]
        message = _message(sent.message)
        if kind == _TELL:
            event = (Received(peer, cast("wire.TrainingMessage", message)),)
            return [(label, node.tell, event) for label, node in zip(labels, found, strict=True)]
        if kind == _EDGE:
            edge = sent.key, _unpacked(sent.value)
            return [(label, node.receive_edge, edge) for label, node in zip(labels, found, strict=True)]
        args = peer, message, _unpacked(sent.value)
        return [(label, node.receive, args) for label, node in zip(labels, found, strict=True)]

    def _tell_driver(self, peer: str, message: msgspec.Raw, value: int | bytes | None) -> None:
        self._to_driver(peer, _message(message), _unpacked(value))
