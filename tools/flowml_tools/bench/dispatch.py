"""Measures the time of a call: on one device against `jax.jit`, and through two workers against a simple ring."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from flowml_tools.bench.peers import framework, peer
from flowml_tools.bench.rows import BenchError, Goal, Peer, Row, Sample
from flowml_tools.bench.timing import Probe, interleave, per_call, tell

SUMMARY = "a call on one device and through two workers; against jax.jit, a ring of sockets, Ray, TensorFlow"
REPEATS = 40
CALLS = 50
"""The number of calls of microseconds in one measurement."""

STEP_CALLS = 10
RING_CALLS = 10
IN_FLIGHT = 8
ROUNDS = 4
MESSAGE = bytes(64)


def rows(repeats: int | None) -> list[Row]:
    return [*_one_device(repeats or REPEATS), *_two_workers(repeats or REPEATS)]


def _one_device(repeats: int) -> list[Row]:
    import jax
    import jax.numpy as jnp

    import flowml as fm
    from flowml_tools.bench.functions import example, increment, several_products

    def measure(cluster: fm.Cluster, fn: Callable[[jax.Array], jax.Array], x: jax.Array, calls: int) -> list[Sample]:
        ours, peers = fm.dataflow(fn, cluster=cluster), jax.jit(fn)
        probes = [
            per_call(lambda: ours(x).block_until_ready(), calls),
            per_call(lambda: peers(x).block_until_ready(), calls),
        ]
        return interleave(f"dispatch: {fn.__name__}", probes, repeats)

    tell("dispatch: one device")
    with fm.Cluster.threads(workers=1) as cluster:
        tiny = measure(cluster, increment, jnp.zeros(1), CALLS)
        step = measure(cluster, several_products, jnp.asarray(example(256)), STEP_CALLS)
    return [
        Row("one device, tiny array", "s", tiny[0], Peer("jax.jit", tiny[1]), Goal("at most", 20e-6, "difference")),
        Row("one device, 8 products 256×256", "s", step[0], Peer("jax.jit", step[1]), Goal("at most", 1.02)),
    ]


def _two_workers(repeats: int) -> list[Row]:
    import jax
    import numpy as np

    import flowml as fm
    from flowml_runtime.environment.machine import cores, share_cores
    from flowml_tools.bench.functions import two_layers

    tell("dispatch: driver -> worker:0 -> worker:1 -> driver")
    shares = share_cores(cores(), 2)
    x = np.zeros(1, np.float32)
    with ExitStack() as stack:
        cluster = stack.enter_context(fm.Cluster.local(workers=2))
        program = fm.dataflow(two_layers, cluster=cluster, placement={"first": "worker:0", "second": "worker:1"})
        ours = per_call(lambda: jax.block_until_ready(program(x)), RING_CALLS)
        ring = per_call(stack.enter_context(_ring("ring", shares)), RING_CALLS)
        tasks = per_call(stack.enter_context(_ring("task-ring", shares)), RING_CALLS)
        probes: list[Probe] = [ours, ring, tasks, lambda: _in_flight(program, x)]
        ray, ray_name = framework(stack, "ray", "Ray compiled graph", x.nbytes, shares)
        if ray:
            probes.append(lambda: float(ray.ask(str(RING_CALLS))))
        tensorflow, tensorflow_name = framework(stack, "tensorflow", "TensorFlow session", x.nbytes, shares)
        if tensorflow:
            probes.append(lambda: float(tensorflow.ask(f"step {RING_CALLS}")))
        samples = interleave("dispatch: driver -> worker:0 -> worker:1 -> driver", probes, repeats)
    name = "driver → worker → worker → driver"
    return [
        Row(name, "s", samples[0], Peer("ring of unix sockets", samples[1])),
        Row(name, "s", samples[0], Peer("the ring with jitted tasks", samples[2]), Goal("at most", 1.5)),
        Row(f"the same, {IN_FLIGHT} calls at a time", "s", samples[3], Peer("one call at a time", samples[0])),
        Row(name, "s", samples[0], Peer(ray_name, samples[4] if ray else None)),
        Row(name, "s", samples[0], Peer(tensorflow_name, samples[-1] if tensorflow else None)),
    ]


def _in_flight(program: Any, x: Any) -> float:
    """The time of a call in s with several in flight. It does not include waking threads, because none is idle."""
    start = time.perf_counter()
    for _ in range(ROUNDS):
        for future in [program.submit(x) for _ in range(IN_FLIGHT)]:
            future.result()
    return (time.perf_counter() - start) / (ROUNDS * IN_FLIGHT)


@contextmanager
def _ring(role: str, shares: Sequence[Sequence[int]]) -> Generator[Callable[[], None]]:
    """A call sends a few bytes from this process through one process in this role per share of cores, and back."""
    with ExitStack() as stack:
        links = [socket.socketpair() for _ in range(len(shares) + 1)]
        for link in links:
            for end in link:
                stack.enter_context(end)
        for i, own in enumerate(shares):
            ends = (links[i][1].fileno(), links[i + 1][0].fileno())
            stack.enter_context(peer(role, *map(str, ends), cores=own, pass_fds=ends))
        first, last = links[0][0], links[-1][1]
        for link in links:
            for end in link:
                if end not in (first, last):
                    end.close()  # so that the death of a node shows as an end of file

        def around() -> None:
            first.sendall(MESSAGE)
            if len(last.recv(len(MESSAGE), socket.MSG_WAITALL)) < len(MESSAGE):
                raise BenchError("a process of the ring has ended")

        yield around
