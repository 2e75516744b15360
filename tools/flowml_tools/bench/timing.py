"""Makes measurements: warmed up, alternating with the peer, and with many calls per measurement if a call is short.

Both sides alternate, so that slow changes of the machine (other tenants, heat) affect both. The order is reversed every
round (ours, peer, peer, ours, …), because the first in a round is measured up to 5 % slower, even jit beside jit.
A *probe* makes one measurement in any way it chooses; many of them measure in other processes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from flowml_runtime.environment.streams import on_terminal
from flowml_tools.bench.rows import Sample

Probe = Callable[[], float]
PROGRESS_EVERY_S = 1.0


def per_call(work: Callable[[], object], calls: int) -> Probe:
    """A probe for the time of one call in s: the mean of `calls` in a row, because clocks are too coarse for one."""

    def probe() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - start) / calls

    return probe


def interleave(what: str, probes: Sequence[Probe], repeats: int, warm_up: int = 2) -> list[Sample]:
    """One sample per probe: `repeats` rounds through all probes, after `warm_up` rounds that do not count."""
    taken: list[list[float]] = [[] for _ in probes]
    turns = list(zip(probes, taken, strict=True))
    said = time.monotonic()
    for number in range(warm_up + repeats):
        for probe, values in turns if number % 2 == 0 else reversed(turns):
            values.append(probe())
        if time.monotonic() - said > PROGRESS_EVERY_S:
            said = time.monotonic()
            tell(f"{what}: {max(0, number + 1 - warm_up)} of {repeats}")
    return [Sample(tuple(values[warm_up:])) for values in taken]


def tell(progress: str) -> None:
    """Show progress on stderr. A terminal shows only the latest line."""
    if on_terminal():
        print(f"\r\033[K{progress}", end="", file=sys.stderr, flush=True)
    else:
        print(progress, file=sys.stderr, flush=True)


def hush() -> None:
    """Erase the progress from the terminal before a result is printed."""
    if on_terminal():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
