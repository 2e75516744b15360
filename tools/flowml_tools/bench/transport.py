"""Measures the rate of a 64 MiB edge between two workers of one machine, and the time of 64 MiB through both workers.

An edge cannot be timed directly. So a program whose 64 MiB cross is timed, and the same program with the array kept on
one worker; the edge is the difference. TensorFlow is measured in the same way. Feeds and fetches are scalars.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from flowml_tools.bench import wire
from flowml_tools.bench.peers import EDGE_BYTES, framework, peer
from flowml_tools.bench.rows import BenchError, Goal, Peer, Row, Sample
from flowml_tools.bench.timing import Probe, interleave, per_call, tell

SUMMARY = "64 MiB between two workers; against memcpy, raw TCP, jax.experimental.transfer, TensorFlow, Ray"
REPEATS = 15
WARM_UP = 4
"""The first steps touch new memory, which takes longer than the copies."""

CARRIED = {"make": "worker:0", "take": "worker:1"}
KEPT = {"aside": "worker:1", "make": "worker:0", "take": "worker:0"}


def rows(repeats: int | None) -> list[Row]:
    return [*_edge(repeats or REPEATS), *_chain(repeats or REPEATS), *wire.rows(repeats)]


def _edge(repeats: int) -> list[Row]:
    import numpy as np

    import flowml as fm
    from flowml_runtime.environment.machine import cores, share_cores
    from flowml_tools.bench.functions import carried, kept

    tell("transport: starting two workers and the peers")
    shares = share_cores(cores(), 2)
    x, length = np.float32(2), EDGE_BYTES // 4
    with ExitStack() as stack:
        cluster = stack.enter_context(fm.Cluster.local(workers=2))
        crossing = fm.dataflow(carried, cluster=cluster, placement=CARRIED, static_argnums=1)
        staying = fm.dataflow(kept, cluster=cluster, placement=KEPT, static_argnums=1)
        probes = [
            per_call(lambda: float(crossing(x, length)), 1),
            per_call(lambda: float(staying(x, length)), 1),
            _memcpy(),
            _tcp(stack, shares),
        ]
        transfer, name = _transfer(stack, shares)
        if transfer:
            probes.append(transfer)
        tensorflow, tensorflow_name = framework(stack, "tensorflow", "TensorFlow session", EDGE_BYTES, shares)
        if tensorflow:
            probes.append(lambda: float(tensorflow.ask("cross 1")))
            probes.append(lambda: float(tensorflow.ask("keep 1")))
        samples = interleave("transport: 64 MiB", probes, repeats, WARM_UP)
    ours = edge(samples[0], samples[1])
    peers = [Peer("memcpy", _rate(samples[2])), Peer("one raw TCP stream", _rate(samples[3]))]
    peers.append(Peer(name, _rate(samples[4]) if transfer else None))
    peers.append(_differing(tensorflow_name, samples[-2], samples[-1]) if tensorflow else Peer(tensorflow_name))
    goals = (Goal("at least", 0.7), None, Goal("at least", 6.0), Goal("at least", 8.0))
    return [Row("64 MiB edge", "bytes/s", ours, p, goal) for p, goal in zip(peers, goals, strict=True)]


def _chain(repeats: int) -> list[Row]:
    import jax
    import numpy as np

    import flowml as fm
    from flowml_runtime.environment.machine import cores, share_cores
    from flowml_tools.bench.functions import two_layers

    tell("transport: 64 MiB driver -> worker:0 -> worker:1 -> driver")
    x = np.zeros(EDGE_BYTES // 4, np.float32)
    with ExitStack() as stack:
        cluster = stack.enter_context(fm.Cluster.local(workers=2))
        program = fm.dataflow(two_layers, cluster=cluster, placement={"first": "worker:0", "second": "worker:1"})
        probes = [per_call(lambda: jax.block_until_ready(program(x)), 1)]
        ray, name = framework(stack, "ray", "Ray compiled graph", EDGE_BYTES, share_cores(cores(), 2))
        if ray:
            probes.append(lambda: float(ray.ask("1")))
        samples = interleave("transport: 64 MiB through two workers", probes, repeats, WARM_UP)
    theirs = Peer(name, samples[1] if ray else None)
    return [Row("64 MiB driver → worker → worker → driver", "s", samples[0], theirs)]


def edge(crossing: Sample, staying: Sample) -> Sample:
    """Rates in bytes/s, from the time of each crossing step minus the median time of the steps without crossing."""
    longer = [seconds - staying.median for seconds in crossing.values]
    if min(longer) <= 0:
        raise BenchError("the edge cannot be told from noise; measure on a quieter machine, or with more --repeats")
    return _rate(Sample(tuple(longer)))


def _differing(name: str, crossing: Sample, staying: Sample) -> Peer:
    """A peer whose edge is also such a difference. If its noise is too large, only its own figure is missing."""
    try:
        return Peer(name, edge(crossing, staying))
    except BenchError as error:
        return Peer(f"{name}: {error}")


def _rate(seconds: Sample) -> Sample:
    return Sample(tuple(EDGE_BYTES / s for s in seconds.values))


def _memcpy() -> Probe:
    import numpy as np

    source, target = np.ones(EDGE_BYTES // 4, np.float32), np.zeros(EDGE_BYTES // 4, np.float32)
    return per_call(lambda: np.copyto(target, source), 1)


def _tcp(stack: ExitStack, shares: Sequence[Sequence[int]]) -> Probe:
    port = stack.enter_context(peer("tcp-target", cores=shares[1])).read()
    source = stack.enter_context(peer("tcp-source", port, cores=shares[0]))
    source.read()
    return lambda: float(source.ask("send"))


def _transfer(stack: ExitStack, shares: Sequence[Sequence[int]]) -> tuple[Probe | None, str]:
    """A probe for JAX's transfers between processes and its name, or None and the reason if they do not work."""
    name = "jax.experimental.transfer"
    try:
        source = stack.enter_context(peer("transfer-source", cores=shares[0]))
        target = stack.enter_context(peer("transfer-target", source.read(), cores=shares[1]))
        target.read()
        probe = _pulls(source.ask, target.ask)
        probe()
    except BenchError as error:
        return None, f"{name}: {error}"
    return probe, name


def _pulls(offer: Callable[[str], str], pull: Callable[[str], str]) -> Probe:
    number = 0

    def probe() -> float:
        nonlocal number
        number += 1
        offer(str(number))
        return float(pull(str(number)))

    return probe
