"""The programs of the peer processes of `allreduce`; `roles` starts them.

An order gives the bytes and the number of calls. The answer is the seconds of one call. `meeting` is an inherited
socket to the other process, for the barrier.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from flowml_tools.bench.orders import orders, say

TOKEN = "two processes of one benchmark"
ANSWER_S = 30.0


def reduce(rank: str, meeting: str) -> None:
    """A member of a `Group` over shared memory, like in a worker."""
    import sys
    from itertools import count

    from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
    from flowml_runtime.worker.process import SWITCH_INTERVAL_S
    from flowml_runtime.worker.training.exchange.collectives import Group, GroupId

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    members = ["worker:0", "worker:1"]
    me, other = members[int(rank)], members[1 - int(rank)]
    endpoint = GrpcEndpoint(me, TOKEN)
    group = Group(GroupId("bench", 0), me, members, endpoint.send)
    endpoint.start(group.on_message, group.on_lost)  # pyright: ignore[reportArgumentType]: only chunks are sent here
    say(endpoint.address)
    endpoint.know({other: next(orders())})
    say("ready")
    clocks = count()

    def call(x: np.ndarray) -> Callable[[], np.ndarray]:
        return lambda: group.all_reduce(0, next(clocks), [x]).result(ANSWER_S)[0]

    _answer(int(rank), meeting, call)
    group.close()
    endpoint.close()


def psum(rank: str, meeting: str, coordinator: str) -> None:
    """A process of a JAX mesh of two."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, 2, int(rank))
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("rank",))
    own, all_ranks = PartitionSpec("rank"), PartitionSpec()
    total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "rank"), mesh=mesh, in_specs=own, out_specs=all_ranks))
    say("ready")

    def call(x: np.ndarray) -> Callable[[], Any]:
        array = jax.make_array_from_process_local_data(NamedSharding(mesh, own), x)
        return lambda: total(array).block_until_ready()

    _answer(int(rank), meeting, call)


def _answer(rank: int, meeting: str, make: Callable[[np.ndarray], Callable[[], Any]]) -> None:
    calls: dict[str, Callable[[], Any]] = {}
    with socket.socket(fileno=int(meeting)) as other:
        for order in orders():
            nbytes, count = order.split()
            if nbytes not in calls:
                calls = {nbytes: make(np.full(int(nbytes) // 4, rank + 1, np.float32))}
            call, result = calls[nbytes], None
            other.sendall(b"b")
            other.recv(1)
            start = time.perf_counter()
            for _ in range(int(count)):
                result = call()
            seconds = (time.perf_counter() - start) / int(count)
            found = np.asarray(result)
            assert found[0] == found[-1] == 3, "not the sum"
            say(seconds)
