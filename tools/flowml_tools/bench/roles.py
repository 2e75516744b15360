"""The programs of peer processes: `python -m flowml_tools.bench.roles ROLE CORES …`, which `peers.peer` starts.

Each is the simplest program for its task. Orders arrive on stdin and answers go to stdout, one line each. A role ends
when stdin or the sockets that it was given are closed.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from flowml_tools.bench import allreduce_roles, training_roles, wire_roles
from flowml_tools.bench.orders import keep_answers_apart, orders, say
from flowml_tools.bench.peers import EDGE_BYTES

ACCEPT_TIMEOUT_S = 30.0


def main() -> None:
    role, own, *arguments = sys.argv[1:]
    os.sched_setaffinity(0, [int(core) for core in own.split(",")])
    keep_answers_apart()
    ROLES[role](*arguments)


def _ring(incoming: str, outgoing: str) -> None:
    """Forward everything: one node of a ring of inherited sockets."""
    receive, send = socket.socket(fileno=int(incoming)), socket.socket(fileno=int(outgoing))
    with receive, send:
        while data := receive.recv(65536):
            send.sendall(data)


def _task_ring(incoming: str, outgoing: str) -> None:
    """The same with a jitted task of one element in between, which is the least that a worker in Python has to do."""
    import jax
    import numpy as np

    from flowml_tools.bench.functions import increment

    task = jax.jit(increment)
    receive, send = socket.socket(fileno=int(incoming)), socket.socket(fileno=int(outgoing))
    with receive, send:
        while data := receive.recv(65536):
            send.sendall(np.asarray(task(np.frombuffer(data, np.float32))).data)


def _tcp_target() -> None:
    buffer = memoryview(bytearray(EDGE_BYTES))
    with socket.create_server(("127.0.0.1", 0)) as server:
        say(server.getsockname()[1])
        server.settimeout(ACCEPT_TIMEOUT_S)
        connection, _ = server.accept()
    connection.settimeout(None)
    with connection:
        while True:
            left = EDGE_BYTES
            while left:
                received = connection.recv_into(buffer[:left])
                if not received:
                    return
                left -= received
            connection.sendall(b"k")


def _tcp_source(port: str) -> None:
    payload = bytearray(b"x") * EDGE_BYTES
    with socket.create_connection(("127.0.0.1", int(port)), ACCEPT_TIMEOUT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        say("ready")
        for _ in orders():
            start = time.perf_counter()
            connection.sendall(payload)
            if connection.recv(1) != b"k":
                raise ConnectionError("the receiver went away")
            say(time.perf_counter() - start)


def _transfer_server() -> Any:
    import jax
    from jax.experimental import transfer

    return transfer.start_transfer_server(jax.devices()[0].client, "127.0.0.1:0", ["127.0.0.1:0"])


def _transfer_source() -> None:
    """Offer the array under each requested number. Offering copies nothing and is not timed."""
    import jax
    import numpy as np

    array = jax.device_put(np.ones(EDGE_BYTES // 4, np.float32)).block_until_ready()
    server = _transfer_server()
    say(server.address())
    for number in orders():
        server.await_pull(int(number), [array])
        say("offered")


def _transfer_target(address: str) -> None:
    import jax
    import numpy as np

    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = [jax.ShapeDtypeStruct((EDGE_BYTES // 4,), np.float32, sharding=sharding)]
    server = _transfer_server()
    connection = server.connect(address)
    say("ready")
    for number in orders():
        start = time.perf_counter()
        [array] = connection.pull(int(number), wanted)
        array.block_until_ready()
        say(time.perf_counter() - start)


def _bare() -> None:
    """A process that imports JAX and, on an order, runs one jitted step."""
    import jax

    from flowml_tools.bench.functions import example, several_products

    jax.devices()
    say("imported")
    for _ in orders():
        jax.jit(several_products)(example(256)).block_until_ready()
        say("stepped")


ROLES: dict[str, Callable[..., None]] = {
    "ring": _ring,
    "task-ring": _task_ring,
    "tcp-target": _tcp_target,
    "tcp-source": _tcp_source,
    "transfer-source": _transfer_source,
    "transfer-target": _transfer_target,
    "bare": _bare,
    "grpc-target": wire_roles.target,
    "grpc-source": wire_roles.source,
    "bare-grpc-target": wire_roles.bare_target,
    "bare-grpc-source": wire_roles.bare_source,
    "reduce": allreduce_roles.reduce,
    "psum": allreduce_roles.psum,
    "train": training_roles.train,
    "stage": training_roles.stage,
}

if __name__ == "__main__":
    main()
