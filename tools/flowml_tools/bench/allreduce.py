"""Measures an all-reduce between two pinned processes against JAX's `psum` over gloo in two others on the same cores.

A measurement is a few calls in a row after a barrier. The time of the slower rank counts. Our all-reduce takes NumPy
arrays and returns NumPy arrays that XLA can use without a copy; that of JAX takes and returns JAX arrays.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack

from flowml_tools.bench.peers import Process, peer
from flowml_tools.bench.rows import BenchError, Goal, Peer, Row
from flowml_tools.bench.timing import Probe, interleave, tell

SUMMARY = "an all-reduce of two pinned processes, 4 KiB to 64 MiB; against JAX psum over gloo"
REPEATS = 15
WARM_UP = 4
"""First calls touch fresh memory, and XLA compiles."""

SIZES: tuple[tuple[str, int, int, Goal | None], ...] = (
    ("4 KiB", 4 * 2**10, 20, Goal("at most", 1 / 10)),
    ("4 MiB", 4 * 2**20, 5, None),
    ("64 MiB", 64 * 2**20, 1, Goal("at most", 1 / 4)),
)
"""Name, bytes of float32, calls per measurement, and the goal for our time divided by gloo's."""


def rows(repeats: int | None) -> list[Row]:
    from flowml_runtime.environment.machine import cores, share_cores

    tell("allreduce: starting two processes of each kind")
    shares = share_cores(cores(), 2)
    with ExitStack() as stack:
        ours = _members(stack, shares)
        gloo, name = _gloo(stack, shares)
        found: list[Row] = []
        for size, nbytes, calls, goal in SIZES:
            pairs = [ours, gloo] if gloo else [ours]
            probes = [_together(pair, f"{nbytes} {calls}") for pair in pairs]
            samples = interleave(f"allreduce: {size}", probes, repeats or REPEATS, WARM_UP)
            beside = Peer(name, samples[1] if gloo else None)
            found.append(Row(f"float32, {size}", "s", samples[0], beside, goal))
    return found


def _members(stack: ExitStack, shares: Sequence[Sequence[int]]) -> list[Process]:
    """Two members of a `Group` that have each other's address."""
    processes = _pair(stack, "reduce", (), shares)
    addresses = [process.read() for process in processes]
    for process, other in zip(processes, reversed(addresses), strict=True):
        process.give(other)
    for process in processes:
        process.read()
    return processes


def _gloo(stack: ExitStack, shares: Sequence[Sequence[int]]) -> tuple[list[Process] | None, str]:
    """Two processes of one JAX mesh and their name, or None and the reason if they do not work."""
    name = "JAX psum over gloo"
    try:
        processes = _pair(stack, "psum", (f"127.0.0.1:{_free_port()}",), shares)
        for process in processes:
            process.read()
    except BenchError as error:
        return None, f"{name}: {error}"
    return processes, name


def _pair(stack: ExitStack, role: str, arguments: Sequence[str], shares: Sequence[Sequence[int]]) -> list[Process]:
    """Two processes in one role, with a socket between them for barriers."""
    ends = socket.socketpair()
    with ends[0], ends[1]:
        return [
            stack.enter_context(
                peer(role, str(rank), str(end.fileno()), *arguments, cores=own, pass_fds=(end.fileno(),))
            )
            for rank, (end, own) in enumerate(zip(ends, shares, strict=True))
        ]


def _together(processes: Sequence[Process], order: str) -> Probe:
    """A probe for the seconds of one call that both processes make at the same time."""

    def probe() -> float:
        for process in processes:
            process.give(order)
        return max(float(process.read()) for process in processes)

    return probe


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
