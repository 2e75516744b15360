"""Small measurements of the machine for `flowml doctor`: copying memory, and talking to another process over loopback.

The other end is a process of its own, as a worker would be (`python -m flowml_tools.measure tcp` or `grpc`): it prints
the port that it listens on, serves one client and ends with it. Rates are medians of a few repeats, in bytes/s.
"""

from __future__ import annotations

import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import grpc

SIZE = 64 * 2**20
PIECE = 4 * 2**20
REPEATS = 5
PINGS = 300
PEER_TIMEOUT_S = 30.0
METHOD = "/flowml.Measure/Echo"
ANY_SIZE = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


class Unmeasured(Exception):
    """The other process could not be started or reached."""


@dataclass(frozen=True)
class LinkSpeed:
    bytes_per_s: float
    round_trip_s: float


def memcpy() -> float:
    """Rate of copying 64 MiB, in bytes/s."""
    import numpy as np

    source = np.ones(SIZE, np.uint8)
    target = np.zeros(SIZE, np.uint8)
    return SIZE / _median(lambda: np.copyto(target, source), REPEATS)


def tcp() -> LinkSpeed:
    """One raw TCP connection to another process: the rate of 64 MiB messages, and the round trip of 1 byte."""
    with _peer("tcp") as port, socket.create_connection(("127.0.0.1", port), PEER_TIMEOUT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def send(payload: bytes) -> None:
            connection.sendall(struct.pack("!Q", len(payload)))
            connection.sendall(payload)
            if connection.recv(1) != b"k":
                raise ConnectionError("the measuring process went away")

        return _link_speed(send)


def grpc_stream() -> LinkSpeed:
    """An open bidirectional gRPC stream to another process, 64 MiB in pieces of 4 MiB."""
    with _peer("grpc") as port, grpc.insecure_channel(f"127.0.0.1:{port}", options=ANY_SIZE) as channel:
        requests: SimpleQueue[bytes | None] = SimpleQueue()
        replies: Any = channel.stream_stream(METHOD)(iter(requests.get, None), timeout=PEER_TIMEOUT_S)

        def send(payload: bytes) -> None:
            starts = range(0, len(payload), PIECE)
            for start in starts:
                requests.put(payload[start : start + PIECE])
            for _ in starts:
                next(replies)

        speed = _link_speed(send)
        requests.put(None)
        return speed


def _link_speed(send: Callable[[bytes], None]) -> LinkSpeed:
    send(b"x")  # the first message also pays for the connection
    round_trip_s = _median(lambda: send(b"x"), PINGS)
    payload = bytes(SIZE)
    return LinkSpeed(SIZE / _median(lambda: send(payload), REPEATS), round_trip_s)


def _median(work: Callable[[], object], repeats: int) -> float:
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@contextmanager
def _peer(kind: str) -> Generator[int]:
    """The port of a new process that serves one client; the process is gone on leaving."""
    command = [sys.executable, "-m", "flowml_tools.measure", kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        except (OSError, ValueError, grpc.RpcError) as error:
            raise Unmeasured(f"{kind}: {error}") from error
        finally:
            process.kill()


def _serve_tcp() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        server.settimeout(PEER_TIMEOUT_S)
        connection, _ = server.accept()
    buffer = memoryview(bytearray(SIZE))
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while header := connection.recv(8, socket.MSG_WAITALL):
            left = struct.unpack("!Q", header)[0]
            while left:
                left -= connection.recv_into(buffer[:left])
            connection.sendall(b"k")


def _serve_grpc() -> None:
    def echo(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in requests:
            yield b""

    _, service, method = METHOD.split("/")
    handlers = {method: grpc.stream_stream_rpc_method_handler(echo)}
    server = grpc.server(futures.ThreadPoolExecutor(1), options=ANY_SIZE)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    sys.stdin.read()  # ends with the process that measures, however that one ends
    server.stop(None)


if __name__ == "__main__":
    {"tcp": _serve_tcp, "grpc": _serve_grpc}[sys.argv[1]]()
