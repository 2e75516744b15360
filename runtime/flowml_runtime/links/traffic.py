"""Compares the time of large sends with the figures of their links.

Every peer compares its large sends with the figures that decided the placement. If a link became slower after it was
measured, several consecutive sends take a multiple of the expected time. The figure may still be right if the receiver
was busy, so this only requests a new measurement.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from flowml.placement.links import Link

LARGE_BYTES = 2**20
"""The time of smaller sends depends mostly on latency and on other load of the machine, so they are ignored."""
FACTOR = 4.0
"""A send is too slow if it takes more than this multiple of the expected time."""
TIMES = 3
"""Number of consecutive slow sends after which a figure is contradicted."""


class Traffic:
    """Compares the sends of one peer with the figures of its links. Safe to use from any thread."""

    def __init__(self, contradicted: Callable[[str, float], None]) -> None:
        """`contradicted(peer, bytes_per_s)` is called once for a figure, with the best rate of the slow sends."""
        self._contradicted = contradicted
        self._lock = threading.Lock()
        self._links: dict[str, Link] = {}
        self._slow: dict[str, list[float]] = {}
        """Peer -> the rates of its latest consecutive slow sends."""

    def expect(self, peer: str, link: Link) -> None:
        """Compare sends to a peer with this figure from now on."""
        with self._lock:
            if self._links.get(peer) != link:
                self._links[peer] = link
                self._slow.pop(peer, None)

    def sent(self, peer: str, nbytes: int, seconds: float) -> None:
        """Compare the time of one send with the figure."""
        if nbytes < LARGE_BYTES:
            return
        with self._lock:
            link = self._links.get(peer)
            if link is None:
                return
            if seconds <= FACTOR * link.seconds(nbytes):
                self._slow.pop(peer, None)
                return
            rates = self._slow.setdefault(peer, [])
            rates.append(nbytes / seconds)
            if len(rates) < TIMES:
                return
            del self._links[peer], self._slow[peer]
        self._contradicted(peer, max(rates))
