"""The programs of the peers in other frameworks. Their environment has no flowml or JAX, so this file is run by path.

`peers.foreign` starts it under `unshare`, as the first process of separate process, network and mount namespaces. Both
frameworks listen on every address of a machine and leave files, semaphores and processes behind. Here the only address
is loopback, files and semaphores are in a private file system in memory, and everything ends with this process. Orders
arrive on stdin, one per line, and are answered with the seconds of one call. The process ends when stdin closes.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

SHARED_MEMORY = "/dev/shm"
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
PORTS = (2222, 2223)
"""These ports are free, because no other process is in the network namespace."""

ROOM_BYTES = 2**20
"""Room for the parts of a message other than its array."""


def main() -> None:
    role, own, *arguments = sys.argv[1:]
    os.sched_setaffinity(0, _cores(own))
    if role == "tensorflow-server":  # a child process: its parent has set everything up
        _tensorflow_server(*arguments)
        return
    if os.getpid() != 1:
        sys.exit("this is for `flowml bench` to start, in namespaces of its own")
    _settle()
    _keep_answers_apart()
    try:
        ROLES[role](*arguments)
    except BaseException:
        traceback.print_exc()
    os._exit(0)  # the kernel ends the other processes; an orderly end of Ray takes half a minute


def _settle() -> None:
    """Bring loopback up, and redirect all writes away from the machine's files."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", SHARED_MEMORY], check=True)
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", IFF_UP))
    os.environ |= {"HOME": SHARED_MEMORY, "TMPDIR": SHARED_MEMORY}
    os.environ.pop("PYTHONPATH", None)  # -I ignores it in this process, but the workers that Ray starts would use it


def _cores(listed: str) -> list[int]:
    return [int(core) for core in listed.split(",")]


def _keep_answers_apart() -> None:
    """Send the output of libraries to stderr, because stdout may hold only answers."""
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def _orders() -> Iterator[str]:
    return (line.strip() for line in sys.stdin)


def _say(text: object) -> None:
    print(text, flush=True)


def _per_call(work: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


def _ray(nbytes: str, first: str, second: str) -> None:
    """A compiled graph driver -> actor -> actor -> driver with an array of `nbytes`. An order is a number of calls."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_enable_metrics_collection": "0"}
    import ray  # pyright: ignore[reportMissingImports]
    from ray.dag import InputNode  # pyright: ignore[reportMissingImports]

    class Stage:
        def __init__(self, own: list[int]) -> None:
            for thread in os.listdir("/proc/self/task"):  # the compiled graph runs on a thread that exists already
                os.sched_setaffinity(int(thread), own)

        def step(self, x: Any) -> Any:
            return x + 1

    x = np.zeros(int(nbytes) // 4, np.float32)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=16 * (x.nbytes + 16 * ROOM_BYTES),
        _node_ip_address="127.0.0.1",
        _temp_dir=f"{SHARED_MEMORY}/ray",
    )
    actor: Any = ray.remote(Stage)
    a, b = actor.remote(_cores(first)), actor.remote(_cores(second))
    with InputNode() as given:
        chain = b.step.bind(a.step.bind(given))
    graph = chain.experimental_compile(_buffer_size_bytes=x.nbytes + ROOM_BYTES)

    def call() -> None:
        ray.get(graph.execute(x))  # the result is dropped at once, which frees its buffer for the next call

    call()
    _say("ready")
    for calls in map(int, _orders()):
        _say(_per_call(call, calls))


def _tensorflow_server(number: str) -> None:
    tf = _import_tensorflow()
    tf.distribute.Server(_cluster(tf), "worker", int(number)).join()


def _tensorflow(nbytes: str, first: str, second: str) -> None:
    """A session with two servers. An order is the name of a step and a number of calls.

    step: a small array goes to the first server, to the second, back to the first, and is fetched. cross: the first
    server makes an array of `nbytes` and the second reads it. keep: the first server makes the array and reads it.
    """
    servers: list[subprocess.Popen[bytes]] = []
    for number, own in enumerate((first, second)):
        command = [sys.executable, "-I", __file__, "tensorflow-server", own, str(number)]
        servers.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
    steps = _tensorflow_steps(int(nbytes) // 4)
    for step in steps.values():
        step()
    _say("ready")
    for order in _orders():
        name, calls = order.split()
        _say(_per_call(steps[name], int(calls)))


def _tensorflow_steps(length: int) -> dict[str, Callable[[], object]]:
    tf = _import_tensorflow()
    v1 = tf.compat.v1
    on = [f"/job:worker/task:{number}/cpu:0" for number in range(len(PORTS))]
    graph = tf.Graph()
    with graph.as_default():
        x, value = v1.placeholder(tf.float32, [1]), v1.placeholder(tf.float32, [])
        with tf.device(on[0]):
            there = x + 1
            made = tf.fill([length], value)  # from a fed value, because a constant would be made only once
            kept = made[length // 2]
        with tf.device(on[1]):
            second = there * 2
            crossed = made[length // 2]
        with tf.device(on[0]):
            back = second + 1
    session = v1.Session(f"grpc://127.0.0.1:{PORTS[0]}", graph=graph)
    step = session.make_callable(back, [x])  # does less work per call than `session.run`
    cross, keep = session.make_callable(crossed, [value]), session.make_callable(kept, [value])
    small, scalar = np.zeros(1, np.float32), np.float32(2)
    return {"step": lambda: step(small), "cross": lambda: cross(scalar), "keep": lambda: keep(scalar)}


def _import_tensorflow() -> Any:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow  # pyright: ignore[reportMissingImports]

    return tensorflow


def _cluster(tf: Any) -> Any:
    return tf.train.ClusterSpec({"worker": [f"127.0.0.1:{port}" for port in PORTS]})


ROLES: dict[str, Callable[..., None]] = {"ray": _ray, "tensorflow": _tensorflow}

if __name__ == "__main__":
    main()
