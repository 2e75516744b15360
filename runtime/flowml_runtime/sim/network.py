"""Carries messages in virtual time over the links of a network model.

* A message without arrays takes the latency of its link and no bandwidth, because headers are small.
* A message with arrays takes latency + bytes / rate on an idle link. The link of a pair, and whatever it shares with
  other links (the uplink of a sender, the line between two sites), sends one message after the other. The downlink of a
  receiver takes in one after the other, in the order in which they begin to arrive (incast).
* Messages from one worker to another arrive in the order of sending, as on one connection.
* Messages to oneself take no time. Messages to and from the driver take latency only: the driver stands for what each
  worker has at hand, the data and the table of work items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from flowml.sim import NetworkModel
from flowml_runtime.sim.heap import Act, Clock

DRIVER = "driver"
_DOWN = "down"
"""The first word of the names of what a receiver shares, in a network model."""

KINDS = 8
"""A label is `KINDS` times the number of a worker, plus the kind of an event there."""
_DELIVER, _LAND = 0, 1


class Tamper(Protocol):
    """Changes what the network does to a message, for simulated faults."""

    def delays(self, source: str, to: str, message: object) -> tuple[float, ...]:
        """The additional delay of each copy of the message that arrives: (0.0,) is none, () loses the message."""
        ...


Put = Callable[[float, int, Act, tuple[Any, ...]], None]
"""Schedules the arrival of a message, as `Clock.put` does."""
_Way = tuple[float, Put]
"""A latency, and what schedules an arrival."""


class _Queue:
    """A shared link. It is free from `free` on."""

    __slots__ = ("free", "rate")

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.free = 0.0


class _Path:
    """The link from one worker to another. `last` is the arrival of its last message, as far as it is known."""

    __slots__ = ("down", "first", "followers", "free", "label", "last", "latency", "own_rate", "put", "rate", "up")

    def __init__(
        self, number: int, latency: float, rate: float, up: tuple[_Queue, ...], down: tuple[_Queue, ...], put: Put
    ) -> None:
        self.put = put
        self.label = number * KINDS + _DELIVER
        self.latency = latency
        self.own_rate = rate
        self.free = 0.0
        """When the link of the pair, which no other shares, is free."""
        self.up = up
        self.down = down
        self.rate = min(rate, *(q.rate for q in (*up, *down))) if up or down else rate
        self.last = 0.0
        self.first = 0.0
        """When the last message begins to arrive, if the receiver's downlink decides when it has arrived."""
        self.followers: list[tuple[float, Act, tuple[Any, ...]]] | None = None
        """The messages after one whose arrival is not known yet, because the receiver's downlink decides it."""


class Wires:
    """All messages under way."""

    def __init__(
        self,
        clock: Clock,
        model: NetworkModel,
        numbers: Mapping[str, int],
        tamper: Tamper | None = None,
        put_for: Callable[[int], Put] | None = None,
    ) -> None:
        """`numbers` are those of the workers, by name. `put_for` says by the number of a receiver what schedules an
        arrival there, where the clock does not (`parallel`)."""
        put = clock.put
        self._put_for: Callable[[int], Put] = put_for or (lambda number: put)
        self._clock = clock
        self._model = model
        self._numbers = numbers
        self._tamper = tamper
        self._paths: dict[tuple[str, str], _Path] = {}
        self._to_driver: list[_Way | None] = [None] * len(numbers)
        """That of messages from each worker to the driver, by the number of the worker."""
        self._from_driver: list[_Way | None] = [None] * len(numbers)
        self._ways: dict[_Way, _Way] = {}
        """The different ones. There are few, and each is kept once."""
        self._queues: dict[tuple[str | int, ...], _Queue] = {}

    def send(self, source: str, to: str, nbytes: int, act: Act, *args: Any) -> float:
        """Call `act(*args)` when a message arrives. Returns the time at which its sender begins to send it.

        The second of `args` is the message.
        """
        path = self._paths.get((source, to)) or self._path(source, to)
        if self._tamper is None or source == to:
            return self._send(path, nbytes, 0.0, act, args)
        begins = self._clock.now
        for delay in self._tamper.delays(source, to, args[1]):
            begins = self._send(path, nbytes, delay, act, args)
        return begins

    def waiting(self, source: str, to: str) -> int:
        """The bytes that wait for a link, or are on it."""
        path = self._paths.get((source, to)) or self._path(source, to)
        free = max(path.free, *(q.free for q in path.up)) if path.up else path.free
        seconds = free - self._clock.now
        return int(seconds * path.rate) if seconds > 0 and path.rate < math.inf else 0

    def exchange(self, source: str, to: str, act: Act, args: tuple[Any, ...]) -> None:
        """As `send`, to or from the driver. Such a message takes the latency only, so that none overtakes another, and
        nothing has to be known of the messages before."""
        if self._tamper is not None:
            self.send(source, to, 0, act, *args)
            return
        if source == DRIVER:
            number = worker = self._numbers[to]
            known = self._from_driver
        else:
            number, worker, known = -1, self._numbers[source], self._to_driver
        found = known[worker]
        if found is None:
            way = self._model.link(self._number(source), number).latency_s, self._put_for(number)
            found = known[worker] = self._ways.setdefault(way, way)
        latency, put = found
        put(self._clock.now + latency, number * KINDS + _DELIVER, act, args)

    def broadcast(
        self, source: str, receivers: Iterable[tuple[str, Act]], args: tuple[Any, ...], nbytes: int = 0
    ) -> int:
        """Send one message to several workers, as `send` does to one after the other, as long as it begins at once and
        shares nothing with others. Returns how many it was sent to; `send` it to the rest."""
        paths, sent, now = self._paths, 0, self._clock.now
        for to, act in receivers if self._tamper is None else ():
            path = paths.get((source, to)) or self._path(source, to)
            if path.followers is not None:
                break
            arrives = now + path.latency
            if nbytes:
                if path.free > now or path.up or path.down:
                    break
                path.free = now + nbytes / path.own_rate
                arrives += nbytes / path.rate
            if arrives < path.last:
                arrives = path.last
            path.last = arrives
            path.put(arrives, path.label, act, args)
            sent += 1
        return sent

    def _number(self, name: str) -> int:
        """That of a worker, or -1 of the driver."""
        return self._numbers.get(name, -1)

    def _path(self, source: str, to: str) -> _Path:
        a, b = self._number(source), self._number(to)
        link = self._model.link(a, b)
        rate = link.bytes_per_s
        up: tuple[_Queue, ...] = ()
        down: tuple[_Queue, ...] = ()
        if DRIVER in (source, to):
            rate = math.inf
        elif a != b:
            for shared in self._model.shared(a, b):
                queue = self._queues.setdefault(shared.name, _Queue(shared.bytes_per_s))
                if shared.name[0] == _DOWN:
                    down = (*down, queue)
                else:
                    up = (*up, queue)
        path = self._paths[source, to] = _Path(b, link.latency_s if a != b else 0.0, rate, up, down, self._put_for(b))
        return path

    def _send(self, path: _Path, nbytes: int, delay: float, act: Act, args: tuple[Any, ...]) -> float:
        begins = self._clock.now
        if nbytes:
            if path.free > begins:
                begins = path.free
            for queue in path.up:
                if queue.free > begins:
                    begins = queue.free
            path.free = begins + nbytes / path.own_rate
            for queue in path.up:
                queue.free = begins + nbytes / queue.rate
            if path.down:
                self._begin_to_arrive(path, begins + path.latency + delay, nbytes, act, args)
                return begins
            arrives = begins + path.latency + delay + nbytes / path.rate
        else:
            arrives = begins + path.latency + delay
        if path.followers is not None:
            path.followers.append((arrives, act, args))
            return begins
        if arrives < path.last:
            arrives = path.last
        path.last = arrives
        path.put(arrives, path.label, act, args)
        return begins

    def _begin_to_arrive(self, path: _Path, when: float, nbytes: int, act: Act, args: tuple[Any, ...]) -> None:
        followers: list[tuple[float, Act, tuple[Any, ...]]] = []
        path.followers = followers
        path.first = max(when, path.first)
        label = path.label - _DELIVER + _LAND
        self._clock.at(path.first, label, self._land, path, nbytes, followers, act, args)

    def _land(
        self,
        path: _Path,
        nbytes: int,
        followers: list[tuple[float, Act, tuple[Any, ...]]],
        act: Act,
        args: tuple[Any, ...],
    ) -> None:
        """The first byte of a message has arrived."""
        begins = max(self._clock.now, *(q.free for q in path.down))
        for queue in path.down:
            queue.free = begins + nbytes / queue.rate
        self._deliver(path, begins + nbytes / path.rate, act, args)
        for when, then, given in followers:
            self._deliver(path, when, then, given)
        if path.followers is followers:
            path.followers = None

    def _deliver(self, path: _Path, when: float, act: Act, args: tuple[Any, ...]) -> None:
        if when < path.last:
            when = path.last
        path.last = when
        self._clock.put(when, path.label, act, args)
