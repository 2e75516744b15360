"""Divides the workers of a simulation among processes (`parallel`), and says which simulations are not divided.

Each process has neighbours, by their numbers. Where a policy has sites, none is divided, so that few messages cross.
A home to which all replicas push is mostly that of the first worker. It is not in the process of the driver, which has
the last workers: what workers send to both would make that the slower one. Shares are even by the work that is in them.
"""

from __future__ import annotations

import os
import sys
import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

from flowml.sim import Fault, Network, NetworkModel, Sites
from flowml_runtime.sim.world import Layout

DIVIDED = 4000
"""From so many workers on a simulation is divided by itself. With fewer it is over before that pays."""
MOST = 4
"""The most processes of such a simulation."""
_DRIVER, _HOMES = 0.55, 0.3
"""The work of the driver, and of homes to which all replicas push, as shares of that of all workers."""
_DRIVER_OF_SITES = 0.33
"""That of the driver where leaders of sites pass on versions and decisions, so that workers do more. It is also less
than its work because of the times when only workers have some, as when a run begins."""
_LEAST = 0.02
"""The least share of the workers for the process of the driver."""


def processes(layout: Layout) -> int:
    """How many processes a simulation has if that is not said."""
    alone = sys.platform != "linux" or threading.active_count() > 1 or len(layout.places.workers) < DIVIDED
    return 1 if alone else min(MOST, len(os.sched_getaffinity(0)))


def why_not(layout: Layout, network: NetworkModel, faults: Sequence[Fault], *, arithmetic: bool) -> str | None:
    """Why a simulation is not divided, as a clause; None if it may be."""
    if not hasattr(os, "fork"):
        return "this system has no fork()"
    if arithmetic:
        return "arithmetic is on, and JAX runs in one process"
    if faults:
        return "its faults look at all messages"
    if any(store.collective or store.shared for store in layout.terms.stores):
        return "its replicas add up over all of them, or share parameters"
    if any(layout.site_of(store, 0) for store in range(len(layout.terms.stores))):
        return "the replicas of its sites add up among themselves"
    if lookahead(network) is None:
        return "its network has lines or downlinks that several senders share, or is a model of your own"
    return None if lookahead(network) else "its network has a latency of 0"


def lookahead(network: NetworkModel) -> float | None:
    """The least latency between two workers. None if senders share more than their own uplink."""
    if type(network) is Network:
        return None if network.downlink_bytes_per_s is not None else network.latency_s
    if type(network) is not Sites or network.shared_lines or network.uplink_bytes_per_s is not None:
        return None
    inside = lookahead(network.local)
    return None if inside is None else min([inside, *(latency for latency, _ in network.regions.links.values())])


def firsts(layout: Layout, numbers: Mapping[str, int], count: int) -> list[int]:
    """The numbers of the first workers of the shares, in order; there are fewer if there are not enough workers. The
    process of the driver has the last share (`post.Here`)."""
    workers = sorted(numbers[worker] for worker in layout.places.workers)
    marks = _marks(layout, numbers) or workers[1:]
    pushed_to = [i for i, store in enumerate(layout.terms.stores) if not store.relayed]
    homes = sorted(numbers[home] for store in pushed_to for home in layout.places.homes[store])
    work = [1 / len(workers)] * len(workers)
    for home in homes:
        work[bisect_left(workers, home)] += _HOMES / len(homes)
    sums = list(accumulate(work))
    relayed = len(pushed_to) < len(layout.terms.stores)
    each = (sums[-1] + (_DRIVER_OF_SITES if relayed else _DRIVER)) / count
    found = [0]
    for share in range(1, count):
        end = min(each * share, sums[-1] - _LEAST)
        at = bisect_left(marks, workers[bisect_left(sums, end)])
        if at < len(marks) and marks[at] > found[-1]:
            found.append(marks[at])
    return found


def _marks(layout: Layout, numbers: Mapping[str, int]) -> list[int]:
    """The numbers of the first workers of sites, if each site has neighbours only."""
    sites = next((store.sites for store in layout.terms.stores if store.sites), ())
    found = [[numbers[worker] for worker in layout.places.site_workers(site)] for site in sites]
    spans = sorted((min(site), max(site)) for site in found)
    if any(end >= begin for (_, end), (begin, _) in pairwise(spans)):
        return []
    return [begin for begin, _ in spans[1:]]
