"""Measures 64 MiB between two processes over gRPC, as between machines, with and without checksums, for `transport`.

Each side runs on one core, like the raw TCP stream of the comparison. This measures the work per byte, which also
limits a fast network. A message is timed until its answer has arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from flowml_tools.bench.peers import EDGE_BYTES, peer
from flowml_tools.bench.rows import Goal, Peer, Row, Sample
from flowml_tools.bench.timing import Probe, interleave, tell

REPEATS = 31
WARM_UP = 4
"""The first messages touch new memory, which takes longer than the copies."""


def rows(repeats: int | None) -> list[Row]:
    from flowml_runtime.environment.machine import cores, share_cores

    tell("transport: starting pairs of processes")
    shares = share_cores(cores(), 2)
    with ExitStack() as stack:
        probes = [
            _grpc(stack, shares, checksum=False),
            _grpc(stack, shares, checksum=True),
            _plain(stack, shares, "tcp"),
            _plain(stack, shares, "bare-grpc"),
        ]
        samples = interleave("transport: 64 MiB over gRPC", probes, repeats or REPEATS, WARM_UP)
    ours, checked, tcp, bare = map(_rate, samples)
    theirs = Peer("one raw TCP stream", tcp)
    return [
        Row("64 MiB over gRPC", "bytes/s", ours, theirs, Goal("at least", 0.9)),
        Row("64 MiB over gRPC, checksums", "bytes/s", checked, theirs),
        Row("64 MiB over gRPC", "bytes/s", ours, Peer("gRPC alone, 1 MiB pieces", bare)),
    ]


def _rate(seconds: Sample) -> Sample:
    return Sample(tuple(EDGE_BYTES / s for s in seconds.values))


def _grpc(stack: ExitStack, shares: Sequence[Sequence[int]], *, checksum: bool) -> Probe:
    flag = str(int(checksum))
    target = stack.enter_context(peer("grpc-target", flag, cores=shares[1], grace_s=1.0))
    source = stack.enter_context(peer("grpc-source", flag, target.read(), cores=shares[0], grace_s=1.0))
    target.ask(source.read())
    return lambda: float(source.ask("send"))


def _plain(stack: ExitStack, shares: Sequence[Sequence[int]], name: str) -> Probe:
    port = stack.enter_context(peer(f"{name}-target", cores=shares[1])).read()
    source = stack.enter_context(peer(f"{name}-source", port, cores=shares[0]))
    source.read()
    return lambda: float(source.ask("send"))
