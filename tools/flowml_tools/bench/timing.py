"""How measurements are made: warmed up, in turn with the peer's, and many calls a measurement where a call is short.

Both sides alternate one by one, so that a machine that drifts (other tenants, heat) drifts for both. The order turns
around every round (ours, peer, peer, ours, …): whatever comes first is measured up to 5 % slower, even jit beside jit.
A *probe* makes one measurement; how, is its own affair: many of them run in other processes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from flowml_runtime.execution.streams import on_terminal
from flowml_tools.bench.rows import Sample

Probe = Callable[[], float]
PROGRESS_EVERY_S = 1.0


def per_call(work: Callable[[], object], calls: int) -> Probe:
    """A probe for the time of one call in s, as the mean of `calls` in a row: a clock is too coarse for one."""

    def probe() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - start) / calls

    return probe


def interleave(what: str, probes: Sequence[Probe], repeats: int, warm_up: int = 2) -> list[Sample]:
    """One sample a probe, of `repeats` rounds through all of them after `warm_up` rounds that do not count."""
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
    """Progress, for a person who waits; a terminal shows only the latest."""
    if on_terminal():
        print(f"\r\033[K{progress}", end="", file=sys.stderr, flush=True)
    else:
        print(progress, file=sys.stderr, flush=True)


def hush() -> None:
    """Take the progress off the terminal, before a result is printed."""
    if on_terminal():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
