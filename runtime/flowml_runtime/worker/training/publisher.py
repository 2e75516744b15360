"""Publishes the stores of a worker to their readers, without waiting for any reader.

A reader needs only the newest version of a store. So for each reader and store at most one version waits to be sent,
and a newer one replaces it. A version that cannot be sent at once, because it is large or because the reader has not
received earlier messages yet, is sent by a separate thread for that reader. A blocked reader blocks only its own
thread, and keeps one version of each store alive, and as much on the way as `most_ahead` says. So one that was stopped
does not have to work through all versions of that time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from flowml.arrays import ArraySpec
from flowml_runtime import wire
from flowml_runtime.execution.lane import LARGE_BYTES, Lane

Arrays = Sequence[Any]


class News(NamedTuple):
    """A version of a store, or only its new clocks.

    Where `arrays` are a difference to the version before, `whole` is what a reader needs that has not been sent that.
    """

    message: wire.Published
    arrays: Arrays
    whole: Arrays = ()


AHEAD_BYTES = 8 * 2**20
AGAIN_S = 0.001


def most_ahead(news: News) -> int:
    """A version is sent when no more bytes than these wait for its reader. Another one as large may be on the way, so
    that the way is never idle between two."""
    return max(AHEAD_BYTES, 2 * sum(s.nbytes for s in news.message.specs))


Send = Callable[[str, wire.Published, Arrays, float | None], None]
"""(reader, message, arrays, timeout in seconds). Raises TimeoutError if it cannot be sent in time."""


def merged(older: News | None, newer: News) -> News:
    """What a reader needs that has received neither: the newer, with the values of the older if it has none."""
    if older is None or not older.message.specs:
        return newer
    if not newer.message.specs:
        specs, base = older.message.specs, older.message.base
        return older._replace(message=msgspec.structs.replace(newer.message, specs=specs, base=base))
    if not 0 <= newer.message.base < newer.message.version:
        return newer
    specs = tuple(ArraySpec(a.shape, a.dtype.name) for a in newer.whole)
    return News(msgspec.structs.replace(newer.message, specs=specs, base=-1), newer.whole)


class Publisher:
    """Sends to the readers of one worker's stores. Every method may be called from any thread; none waits."""

    def __init__(
        self,
        name: str,
        send: Send,
        failed: Callable[[BaseException], None],
        ahead: Callable[[str], int] = lambda _: 0,
    ) -> None:
        """`ahead(reader)` are the bytes of messages that wait for a reader, of whatever kind."""
        self._name = name
        self._send = send
        self._failed = failed
        self._ahead = ahead
        self._lock = threading.Lock()
        self._readers: dict[str, _Reader] = {}

    def publish(self, reader: str, message: wire.Published, arrays: Arrays, whole: Arrays = ()) -> bool:
        """Send a version to a reader, or queue it. Versions of one store must come from one thread.

        Returns whether the reader gets the `whole` instead of a difference, because it waits for the version before.
        """
        return self._reader(reader).publish(News(message, arrays, whole))

    def after_all(self, then: Callable[[], None]) -> None:
        """Call `then` when everything published before has been sent, perhaps at once."""
        with self._lock:
            readers = list(self._readers.values())
        countdown = _Countdown(len(readers) + 1, then)
        for reader in readers:
            reader.after_all(countdown.one_less)
        countdown.one_less()

    def close(self) -> None:
        """Drop the queued versions, and end the threads as soon as possible."""
        with self._lock:
            readers = list(self._readers.values())
        for reader in readers:
            reader.close()

    def _reader(self, name: str) -> _Reader:
        with self._lock:
            if name not in self._readers:
                lane = f"{self._name} publish to {name}"
                self._readers[name] = _Reader(name, lane, self._send, self._failed, self._ahead)
            return self._readers[name]


class _Reader:
    def __init__(
        self, name: str, lane: str, send: Send, failed: Callable[[BaseException], None], ahead: Callable[[str], int]
    ) -> None:
        self._lane = Lane(lane)
        self._closed = threading.Event()
        self._name = name
        self._send = send
        self._failed = failed
        self._ahead = ahead
        self._lock = threading.Lock()
        self._waiting: dict[int, News] = {}
        """Store -> what the lane still has to send. The lane has one job for each."""
        self._under_way = 0
        """The number of unfinished jobs of the lane. While there are any, new versions are queued behind them."""

    def publish(self, news: News) -> bool:
        store, base, whole = news.message.store, news.message.base, False
        with self._lock:
            waits = store in self._waiting
            busy = self._under_way > 0
            if busy:
                self._waiting[store] = merged(self._waiting.get(store), news)
                whole = self._waiting[store].message.base < 0 <= base
        if waits:
            return whole
        if not busy:
            if self._send_now(news):
                return False
            with self._lock:
                self._waiting[store] = news
        self._put(lambda: self._send_waiting(store))
        return whole

    def after_all(self, then: Callable[[], None]) -> None:
        with self._lock:
            busy = self._under_way > 0
        if busy:
            self._put(then)
        else:
            then()

    def close(self) -> None:
        self._closed.set()
        self._lane.close()

    def _send_now(self, news: News) -> bool:
        message, arrays, _ = news
        if sum(s.nbytes for s in message.specs) >= LARGE_BYTES or self._ahead(self._name) > most_ahead(news):
            return False
        try:
            self._send(self._name, message, arrays, 0.0)
        except TimeoutError:
            return False
        return True

    def _send_waiting(self, store: int) -> None:
        while not self._closed.is_set():
            with self._lock:
                if self._ahead(self._name) <= most_ahead(self._waiting[store]):
                    message, arrays, _ = self._waiting.pop(store)
                    break
            self._closed.wait(AGAIN_S)
        else:
            return
        self._send(self._name, message, arrays, None)

    def _put(self, job: Callable[[], None]) -> None:
        with self._lock:
            self._under_way += 1

        def run() -> None:
            try:
                job()
            finally:
                with self._lock:
                    self._under_way -= 1

        self._lane.put(run, self._failed)


class _Countdown:
    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._left = count
        self._then = then
        self._lock = threading.Lock()

    def one_less(self) -> None:
        with self._lock:
            self._left -= 1
            over = not self._left
        if over:
            self._then()
