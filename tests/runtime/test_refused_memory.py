"""What is refused leaves nothing: a process that refuses thousands of inputs does not grow with them."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import subprocess
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import psutil
import pytest

import flowml
from flowml_runtime import wire
from flowml_runtime.transport.framing import pack
from flowml_runtime.transport.grpc_streams import METHOD, TOKEN_KEY
from flowml_runtime.transport.local_stream import name_of

TOKEN = "t" * 32
WAIT_S = 30.0
MEGABYTE = 2**20
WARM = 600
"""Inputs after which pools, arenas and caches are as large as they get."""
MORE = 1500
GROWTH_BYTES = 6 * MEGABYTE
PEERS = 300
"""More names than are remembered."""

SERVER = """
import gc, sys
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
endpoint = GrpcEndpoint("a", sys.argv[1])
endpoint.start(lambda *_: None, lambda *_: None)
print(endpoint.address, flush=True)
for _ in sys.stdin:
    gc.collect()
    print(len(gc.get_objects()), flush=True)
endpoint.close()
"""


class Server:
    """An endpoint in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout is not None
        self.address = process.stdout.readline().strip()

    def rss(self) -> int:
        return psutil.Process(self._process.pid).memory_info().rss

    def objects(self) -> int:
        """Objects that Python's collector knows."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextmanager
def server() -> Generator[Server]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, TOKEN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    with process:
        yield Server(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(WAIT_S) == 0


def hello(number: int) -> bytes:
    greeting = wire.Hello(peer=f"p{number}", incarnation=1, protocol=wire.PROTOCOL, version=flowml.__version__, to="a")
    return pack(greeting).first


def record(frame: bytes) -> bytes:
    return struct.pack("<IIQQ", len(frame), 0, 0, 0) + frame


def unix(address: str, token: str = TOKEN) -> socket.socket:
    link = socket.socket(socket.AF_UNIX)
    link.connect(name_of(address))
    link.settimeout(WAIT_S)
    link.sendall(struct.pack("<I", len(token)) + token.encode())
    return link


def refused_locally(address: str, number: int, rng: random.Random) -> None:
    bad = [
        b"",
        rng.randbytes(rng.randrange(300)),
        record(hello(number)) + record(rng.randbytes(rng.randrange(3000))),
        record(hello(number)) + struct.pack("<IIQQ", 15 * MEGABYTE, 0, 0, 0) + rng.randbytes(1000),
    ]
    with unix(address, TOKEN if number % 4 else "guess") as link, contextlib.suppress(OSError):
        link.sendall(bad[number % 4])
        link.shutdown(socket.SHUT_WR)
        while link.recv(4096):
            pass


def refused_by_grpc(address: str, number: int, rng: random.Random, channel: Any) -> None:
    bad = [
        [rng.randbytes(2**16)],
        [rng.randbytes(2000)],
        [hello(number), rng.randbytes(3000)],
        [hello(number), b"\xff" * MEGABYTE],
    ]
    metadata = ((TOKEN_KEY, TOKEN if number % 4 else "guess"),)
    call = channel.stream_unary(METHOD).future(iter(bad[number % 4]), metadata=metadata)
    with contextlib.suppress(grpc.RpcError):
        call.result(timeout=WAIT_S)


@pytest.mark.parametrize("way", ["shared memory", "grpc"])
def test_thousands_of_refused_inputs_leave_nothing(way: str, seed: int) -> None:
    rng = random.Random(seed)
    with ExitStack() as stack:
        refusing = stack.enter_context(server())
        channel = stack.enter_context(grpc.insecure_channel(refusing.address, options=[("grpc.enable_http_proxy", 0)]))

        def refuse(numbers: range) -> None:
            for number in numbers:
                if way == "grpc":
                    refused_by_grpc(refusing.address, number, rng, channel)
                else:
                    refused_locally(refusing.address, number, rng)

        refuse(range(WARM))
        objects, rss = refusing.objects(), refusing.rss()
        refuse(range(WARM, WARM + MORE))
        assert refusing.objects() - objects < PEERS  # and not one for each input
        assert refusing.rss() - rss < GROWTH_BYTES


def test_what_is_announced_takes_no_memory_before_it_comes() -> None:
    with server() as refusing, ExitStack() as stack:
        refusing.objects()
        rss = refusing.rss()
        links = [stack.enter_context(unix(refusing.address)) for _ in range(32)]
        for number, link in enumerate(links):
            link.sendall(record(hello(number)) + struct.pack("<IIQQ", 16 * MEGABYTE, 0, 0, 0) + b"x" * 1000)
        for link in links:  # each has been served as far as it goes: its token's answer is here
            assert link.recv(8)
        refusing.objects()
        assert refusing.rss() - rss < 96 * MEGABYTE
