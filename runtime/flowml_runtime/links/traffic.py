"""Whether traffic agrees with what is known of the links that it takes.

Every peer compares the time that its large sends take with the figure that the placement was decided by. A link that
was cut after it was measured shows in this way: several sends one after the other take a multiple of what they should.
The figure may still be right, with a receiver that was busy, so that this only asks for a new measurement.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from flowml.placement.links import Link

LARGE_BYTES = 2**20
"""Smaller sends are a matter of latency, and of whatever else the machine does."""
FACTOR = 4.0
"""How much longer than expected a send has to take."""
TIMES = 3
"""How many large sends one after the other."""


class Traffic:
    """Of the links from one peer to others. Safe to use from any thread."""

    def __init__(self, contradicted: Callable[[str, float], None]) -> None:
        """`contradicted(peer, bytes_per_s)` is told once for a figure, with the best rate that was seen meanwhile."""
        self._contradicted = contradicted
        self._lock = threading.Lock()
        self._links: dict[str, Link] = {}
        self._slow: dict[str, list[float]] = {}
        """Peer -> the rates of the latest sends, as long as all were too slow."""

    def expect(self, peer: str, link: Link) -> None:
        """What sends to a peer are compared with from now on."""
        with self._lock:
            if self._links.get(peer) != link:
                self._links[peer] = link
                self._slow.pop(peer, None)

    def sent(self, peer: str, nbytes: int, seconds: float) -> None:
        """Take in how long a send took."""
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
