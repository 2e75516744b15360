"""Collects the figures of a cluster's links.

All pairs of peers on one machine have equal links, and so have all pairs from one machine to another. A figure
therefore belongs to (host, host, way), and one pair measures it for the others. It comes from a stored measurement,
else from a new one, else it is assumed. Pairs are measured one after another, so that they do not disturb each other.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from itertools import product

from flowml.callers import warn
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
"""How long measuring may take in all. Links not measured by then stay assumed until `measure` is called."""

HERE = "localhost"
"""The host name for the driver's own machine, so that its stored figures do not depend on its address."""

_Key = tuple[str, str, str]
"""(host, host, way)"""


def links_mode(asked: str | None) -> str:
    """How a cluster gets its figures: as asked, else from $FLOWML_LINKS, else "measure". Raises ClusterError."""
    name, mode = ("links", asked) if asked is not None else (MODE_VARIABLE, os.environ.get(MODE_VARIABLE) or "measure")
    if mode not in MODES:
        raise ClusterError(f"{name}={mode!r} is not a mode; use {', '.join(map(repr, MODES))}")
    return mode


class LinkTable:
    """The links of one driver. `members` returns the present ones. Without `shared_memory` processes use gRPC only."""

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
        """The figure of each key that was looked up; None if none is stored."""
        self._tried: set[_Key] = set()
        self._contradictions: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._stale: set[_Key] = set()
        """Keys whose figure traffic contradicts. Their stored figures are not used until they are measured again."""
        self.traffic = Traffic(lambda peer, _: self.contradicted(DRIVER, peer))
        """Compares this process's own sends with the figures."""

    def known(self) -> Links:
        """The present figures, without measuring: measured or stored ones, else the assumption for the way."""
        with self._lock:
            return self._links()

    def settled(self) -> Links:
        """The figures for a placement: like `known`, after measuring once the links without a figure."""
        with self._lock:
            self._drop_contradicted()
            if self._mode == "measure":
                unknown = {k: p for k, p in self._pairs().items() if self._figure(k) is None and k not in self._tried}
                self._measure(unknown)
            return self._links()

    def measure(self) -> Links:
        """Measure every link now, even if its figure is known, and store the figures. Warns of those that failed."""
        with self._lock:
            failed = self._measure(self._pairs())
            links = self._links()
        if failed:
            text = "; ".join(f"{a} -> {b}: {reason}" for (a, b), reason in failed.items())
            warn(f"some links were not measured and keep their values: {text}")
        return links

    def contradicted(self, source: str, destination: str) -> None:
        """Traffic between two peers is far slower than the figure, which is not used until it is measured again.

        Returns at once, even while links are measured.
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
        """Peer -> its host. Workers come first, so that they measure, since edges connect workers."""
        own = split_address(self._endpoint.address)[0]
        found = {m.worker: split_address(m.address)[0] for m in self._members() if m.devices}
        return {**{w: HERE if host == own else host for w, host in found.items()}, DRIVER: HERE}

    def _key(self, hosts: dict[str, str], a: str, b: str) -> _Key:
        return hosts[a], hosts[b], SAME_PROCESS if a == b else self._way(hosts, a, b)

    def _way(self, hosts: dict[str, str], a: str, b: str) -> str:
        """The way between two peers. Between two workers it is inferred; a measurement returns the real way."""
        if DRIVER in (a, b):
            return self._endpoint.way(b if a == DRIVER else a)
        if hosts[a] != hosts[b]:
            return GRPC
        if hosts[a] == HERE:  # workers here reach each other in the way in which we reach them
            ways = {self._endpoint.way(a), self._endpoint.way(b)}
            return SHARED_MEMORY if ways == {SHARED_MEMORY} else GRPC
        return SHARED_MEMORY if self._shared_memory else GRPC

    def _pairs(self) -> dict[_Key, tuple[str, str]]:
        """The first pair of each key, which measures for all pairs of the key."""
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

    def _measure(self, pairs: dict[_Key, tuple[str, str]]) -> dict[tuple[str, str], str]:
        """Measure and store the figures of these links. Returns the pairs that failed, with the reasons."""
        failed: dict[tuple[str, str], str] = {}
        deadline = time.monotonic() + ALL_S
        for key, (a, b) in pairs.items():
            if time.monotonic() > deadline:
                failed[a, b] = f"the links before it took {ALL_S:g} s"
                continue
            self._tried.add(key)
            try:
                link = self._prober.measure(b) if a == DRIVER else self._prober.ask(a, self._name(b))
            except FlowmlError as error:  # the link stays assumed; a lost worker is reported by its plans
                failed[a, b] = str(error)
                continue
            self._figures[key] = link
            self._stale.discard(key)
            self._remembered.remember(key[0], key[1], link)
        return failed

    def _name(self, peer: str) -> str:
        return self._endpoint.name if peer == DRIVER else peer
