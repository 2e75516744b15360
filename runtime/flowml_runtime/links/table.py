"""The links of a cluster: which pairs of its peers share a figure, and where that figure comes from.

All pairs on one machine talk alike, and so do all from one machine to another: a figure belongs to (host, host, way),
and one pair measures it for the rest. It comes from an earlier measurement, else from one now, else it is assumed.
Measuring goes pair by pair, so that none disturbs another.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from itertools import product

from flowml.errors import ClusterError, FlowmlError
from flowml.placement.links import ASSUMED, GRPC, SAME_PROCESS, SHARED_MEMORY, Link, Links
from flowml.plan import DRIVER
from flowml_runtime import wire
from flowml_runtime.links.cache import RememberedLinks
from flowml_runtime.links.prober import Prober
from flowml_runtime.links.traffic import Traffic
from flowml_runtime.transport.endpoint import Endpoint
from flowml_runtime.transport.security import split_address

MODES = ("measure", "remembered", "assume")
MODE_VARIABLE = "FLOWML_LINKS"

ALL_S = 10.0
"""How long measuring may take in all. Links that are not measured by then stay assumed until they are asked for."""

HERE = "localhost"
"""Stands for the driver's own machine, so that its figures are found again whatever address it has."""

_Key = tuple[str, str, str]
"""(host, host, way)"""


def links_mode(asked: str | None) -> str:
    """How a cluster comes by its links: as asked, else as $FLOWML_LINKS says, else "measure". Raises ClusterError."""
    name, mode = ("links", asked) if asked is not None else (MODE_VARIABLE, os.environ.get(MODE_VARIABLE) or "measure")
    if mode not in MODES:
        raise ClusterError(f"{name}={mode!r} is none; use {', '.join(map(repr, MODES))}")
    return mode


class LinkTable:
    """Of one driver. `members` are those there now; without `shared_memory` no two processes share any."""

    def __init__(
        self,
        endpoint: Endpoint,
        prober: Prober,
        members: Callable[[], tuple[wire.Member, ...]],
        *,
        mode: str = "measure",
        shared_memory: bool = True,
    ) -> None:
        self._endpoint = endpoint
        self._prober = prober
        self._members = members
        self._mode = mode
        self._shared_memory = shared_memory
        self._remembered = RememberedLinks()
        self._lock = threading.Lock()
        self._figures: dict[_Key, Link | None] = {}
        """What each key came to: None where nothing is remembered. Keys that were never looked up are not in it."""
        self._tried: set[_Key] = set()
        self._contradictions: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._stale: set[_Key] = set()
        """Keys whose figure traffic contradicts: what is remembered of them does not count until they are measured."""
        self.traffic = Traffic(lambda peer, _: self.contradicted(DRIVER, peer))
        """Of this process's own sends."""

    def known(self) -> Links:
        """What is known now, without measuring: what was measured or is remembered, else what is assumed of the way."""
        with self._lock:
            return self._links()

    def settled(self) -> Links:
        """What a placement is decided by: as `known`, and measured before, once, where nothing is known."""
        with self._lock:
            self._drop_contradicted()
            if self._mode == "measure":
                unknown = {k: p for k, p in self._pairs().items() if self._figure(k) is None and k not in self._tried}
                self._measure(unknown)
            return self._links()

    def measure(self) -> Links:
        """Measure every link now, whatever is known, and remember it."""
        with self._lock:
            self._measure(self._pairs())
            return self._links()

    def contradicted(self, source: str, destination: str) -> None:
        """Traffic from one peer to another is far slower than the figure: it does not count until it is measured again.

        Returns at once, also while links are being measured.
        """
        self._contradictions.put((source, destination))

    def _drop_contradicted(self) -> None:
        hosts = self._hosts()
        while not self._contradictions.empty():
            # no deadline: the thread sleeps until it has work or is closed
            source, destination = self._contradictions.get()
            if source in hosts and destination in hosts:
                key = self._key(hosts, source, destination)
                for both in (key, (key[1], key[0], key[2])):
                    self._stale.add(both)
                    self._figures.pop(both, None)
                    self._tried.discard(both)

    def _links(self) -> Links:
        self._drop_contradicted()
        hosts = self._hosts()
        pairs: dict[tuple[str, str], Link] = {}
        for a, b in product(hosts, hosts):
            key = self._key(hosts, a, b)
            there = self._figure(key) or self._figure((key[1], key[0], key[2]))
            pairs[a, b] = there or ASSUMED[key[2]]
            if a == DRIVER and there is not None:
                self.traffic.expect(b, there)
        return Links(pairs=pairs)

    def _hosts(self) -> dict[str, str]:
        """Peer -> its host; workers come first, since what they measure is what their edges will see."""
        own = split_address(self._endpoint.address)[0]
        found = {m.worker: split_address(m.address)[0] for m in self._members() if m.devices}
        return {**{w: HERE if host == own else host for w, host in found.items()}, DRIVER: HERE}

    def _key(self, hosts: dict[str, str], a: str, b: str) -> _Key:
        return hosts[a], hosts[b], SAME_PROCESS if a == b else self._way(hosts, a, b)

    def _way(self, hosts: dict[str, str], a: str, b: str) -> str:
        """By which two peers talk. Of two others than us it is inferred; measuring them says how it is."""
        if DRIVER in (a, b):
            return self._endpoint.way(b if a == DRIVER else a)
        if hosts[a] != hosts[b]:
            return GRPC
        if hosts[a] == HERE:  # they are reached by the way by which they reach each other
            ways = {self._endpoint.way(a), self._endpoint.way(b)}
            return SHARED_MEMORY if ways == {SHARED_MEMORY} else GRPC
        return SHARED_MEMORY if self._shared_memory else GRPC

    def _pairs(self) -> dict[_Key, tuple[str, str]]:
        """The first pair of each key, which measures for all of them."""
        hosts = self._hosts()
        found: dict[_Key, tuple[str, str]] = {}
        for a, b in product(hosts, hosts):
            if a != b:
                found.setdefault(self._key(hosts, a, b), (a, b))
        return {key: pair for key, pair in found.items() if key[2]}

    def _figure(self, key: _Key) -> Link | None:
        if key[2] == SAME_PROCESS or self._mode == "assume":
            return self._figures.get(key)
        if key not in self._figures:
            self._figures[key] = None if key in self._stale else self._remembered.find(*key)
        return self._figures[key]

    def _measure(self, pairs: dict[_Key, tuple[str, str]]) -> None:
        for key, link in self._measured(pairs):
            self._figures[key] = link
            self._stale.discard(key)
            self._remembered.remember(key[0], key[1], link)

    def _measured(self, pairs: dict[_Key, tuple[str, str]]) -> Iterator[tuple[_Key, Link]]:
        deadline = time.monotonic() + ALL_S
        for key, (a, b) in pairs.items():
            if time.monotonic() > deadline:
                return
            self._tried.add(key)
            try:
                if a == DRIVER:
                    yield key, self._prober.measure(b)
                else:
                    yield key, self._prober.ask(a, self._endpoint.name if b == DRIVER else b)
            except FlowmlError:
                continue  # it stays assumed; if a worker was lost, its plans say so
