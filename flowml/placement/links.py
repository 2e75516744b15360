"""Estimates the time of a transfer between two devices, for each pair.

A transfer takes the latency of its link plus its bytes at the link's rate. This is the postal model (Bar-Noy and
Kipnis, 1992), which is accurate enough to choose between placements. Compiling without a cluster uses the same default
for every pair. A cluster knows the transport of each pair of workers and gives its measurements.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from types import MappingProxyType

from flowml.plan import Message, PlanLink, StoreSpec

SAME_PROCESS = "same process"
SHARED_MEMORY = "shared memory"
GRPC = "gRPC"


@dataclass(frozen=True)
class Link:
    """A link: latency in seconds, rate in bytes/s (infinite: by reference), transport, and whether it was measured."""

    latency_s: float = 4e-4
    bytes_per_s: float = 1e9
    way: str = ""
    measured: bool = False

    def seconds(self, nbytes: float) -> float:
        return self.latency_s + nbytes / self.bytes_per_s


ASSUMED: Mapping[str, Link] = MappingProxyType(
    {
        "": Link(),
        SAME_PROCESS: Link(5e-5, float("inf"), SAME_PROCESS),
        SHARED_MEMORY: Link(1e-4, 4e9, SHARED_MEMORY),
        GRPC: Link(4e-4, 1e9, GRPC),
    }
)
"""The assumed link of each transport until it is measured. The values are typical of ordinary machines."""


@dataclass(frozen=True)
class Links:
    """The link of every ordered pair of devices. `pairs` is keyed by names of workers (or "driver") or of devices.

    `apart` says that each worker is known to be a machine of its own.
    """

    default: Link = ASSUMED[""]
    pairs: Mapping[tuple[str, str], Link] = field(default_factory=dict[tuple[str, str], Link])
    apart: bool = False

    def between(self, source: str, destination: str) -> Link:
        """The link from device to device: their own, else that of their workers, else the default."""
        found = self.pairs.get((source, destination))
        if found is None:
            found = self.pairs.get((source.partition("/")[0], destination.partition("/")[0]))
        return self.default if found is None else found


def machines(links: Links, workers: Sequence[str]) -> tuple[int, ...]:
    """The number of each worker's machine, which is that of the first worker that it reaches through memory.

    Workers without known links share one machine. Workers that use gRPC count as separate machines even on one
    machine, because their links cost as much.
    """
    if links.apart:
        return tuple(range(len(workers)))
    return tuple(next(i for i, a in enumerate(workers) if a == b or links.between(a, b).way != GRPC) for b in workers)


_MOST_PAIRS = 64
"""Homes that add up gradients, above which only the links from each to the next are listed."""


def links_used(links: Links, messages: Iterable[Message], stores: Iterable[StoreSpec] = ()) -> tuple[PlanLink, ...]:
    """The links that the plan lists: one for each pair of devices used by a message, push, sum or publication."""
    edges = [(m.source, m.destination) for m in messages]
    for store in stores:
        for home in dict.fromkeys(store.copies):
            edges += [edge for reader in store.read_from((home,)) for edge in ((reader, home), (home, reader))]
        edges += _summing(tuple(dict.fromkeys(store.homes)))
    used = [(a, b, links.between(a, b)) for a, b in dict.fromkeys(edges) if a != b]
    return tuple(PlanLink(a, b, link.latency_s, link.bytes_per_s, link.way, link.measured) for a, b, link in used)


def _summing(homes: Sequence[str]) -> Iterable[tuple[str, str]]:
    """The pairs of homes whose links count where they add up gradients."""
    if len(homes) <= _MOST_PAIRS:
        return permutations(homes, 2)
    return zip(homes, (*homes[1:], homes[0]), strict=True)
