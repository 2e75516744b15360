"""Measures memory copies and links between processes for `flowml doctor`.

The other end of a link is a separate process, like a worker (`python -m flowml_tools.measure tcp` or `link`). It prints
the address on which it listens, serves one client, and ends with it. Rates are in bytes/s.
"""

from __future__ import annotations

import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from flowml.placement.links import GRPC, SHARED_MEMORY

if TYPE_CHECKING:
    from flowml_runtime import wire
    from flowml_runtime.links.prober import Prober
    from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint

SIZE = 64 * 2**20
REPEATS = 5
PINGS = 300
PEER_TIMEOUT_S = 30.0


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
    with _peer("tcp") as peer, socket.create_connection(("127.0.0.1", int(peer.read())), PEER_TIMEOUT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def send(payload: bytes) -> None:
            connection.sendall(struct.pack("!Q", len(payload)))
            connection.sendall(payload)
            if connection.recv(1) != b"k":  # no deadline: create_connection set one
                raise ConnectionError("the measuring process went away")

        return _link_speed(send)


def worker_link(way: str) -> LinkSpeed:
    """The link to another process by the transport `way` of workers. It is stored, and later clusters use it."""
    from flowml.errors import FlowmlError
    from flowml_runtime.links.cache import RememberedLinks
    from flowml_runtime.links.table import HERE
    from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
    from flowml_runtime.transport.security import new_token

    token = new_token()
    with (
        _peer("link") as peer,
        _prober(GrpcEndpoint("doctor", token, shared_memory=way == SHARED_MEMORY)) as (prober, end),
    ):
        peer.write(f"{token}\n{end.address}\n")
        end.know({"peer": peer.read()})
        try:
            found = prober.measure("peer")
        except FlowmlError as error:
            raise Unmeasured(str(error)) from error
    if found.way != way:
        raise Unmeasured(f"the other process is reached by {found.way} and not by {way}")
    RememberedLinks().remember(HERE, HERE, found)
    return LinkSpeed(found.bytes_per_s, 2 * found.latency_s)


LINKS: Mapping[str, Callable[[], LinkSpeed]] = {
    "loopback TCP": tcp,
    SHARED_MEMORY: partial(worker_link, SHARED_MEMORY),
    GRPC: partial(worker_link, GRPC),
}


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


@dataclass(frozen=True)
class _Peer:
    """Line-by-line communication with the other process."""

    process: subprocess.Popen[str]

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def write(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()


@contextmanager
def _peer(kind: str) -> Generator[_Peer]:
    """A new process that serves one client. It ends with the block. Its failures raise Unmeasured."""
    command = [sys.executable, "-m", "flowml_tools.measure", kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield _Peer(process)
        except (OSError, ValueError) as error:
            raise Unmeasured(f"{kind}: {error}") from error
        finally:
            process.kill()


@contextmanager
def _prober(endpoint: GrpcEndpoint) -> Generator[tuple[Prober, GrpcEndpoint]]:
    """A prober and its endpoint, for one end of a link. Both are closed at the end of the block."""
    from flowml_runtime import wire
    from flowml_runtime.links.prober import Prober

    def on_message(peer: str, message: wire.Wire, arrays: list[Any]) -> None:
        if isinstance(message, wire.Probe | wire.Probed):
            prober.on_message(peer, message)

    with ExitStack() as stack:
        stack.callback(endpoint.close)
        prober = Prober(endpoint)
        stack.callback(prober.close)
        endpoint.start(on_message, lambda peer, reason: None)
        yield prober, endpoint


def _serve_tcp() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        server.settimeout(PEER_TIMEOUT_S)
        connection, _ = server.accept()  # no deadline: the server socket has one
    buffer = memoryview(bytearray(SIZE))
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while header := connection.recv(8, socket.MSG_WAITALL):
            left = struct.unpack("!Q", header)[0]
            while left:
                left -= connection.recv_into(buffer[:left])
            connection.sendall(b"k")


def _serve_link() -> None:
    from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint

    token, address = (sys.stdin.readline().strip() for _ in range(2))
    with _prober(GrpcEndpoint("peer", token)) as (_, endpoint):
        endpoint.know({"doctor": address})
        print(endpoint.address, flush=True)
        sys.stdin.read()  # stdin closes when the measuring process ends, even if it is killed


if __name__ == "__main__":
    {"tcp": _serve_tcp, "link": _serve_link}[sys.argv[1]]()
