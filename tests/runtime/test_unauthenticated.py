"""Those who show no token: they are few, they are gone soon, and they hold up nobody who has it."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import grpc
import pytest

import flowml as fm
from flowml_runtime import wire
from flowml_runtime.transport import grpc_streams, local_server
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from flowml_runtime.transport.grpc_streams import METHOD, TOKEN_KEY
from flowml_runtime.transport.local_stream import name_of
from tests.conftest import wait_until

TOKEN = "t" * 32
WAIT_S = 30.0
SHORT_S = 0.5
FEW = 200
"""Descriptors of the process under attack."""
MANY = 400
"""Connections: more than it has descriptors."""

LAUNCHED = """
import resource, sys, threading
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))
from flowml_runtime.launch.launched import LaunchedCluster
cluster = LaunchedCluster(workers=1)
print(cluster.address, cluster.token, cluster.pids["worker:0"], flush=True)
sys.stdin.readline()
cluster.close()
"""


@contextmanager
def launched() -> Generator[tuple[str, str, int]]:
    """Address, token and worker's process of a cluster whose coordinator has few descriptors."""
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHED, str(FEW)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        address, token, pid = process.stdout.readline().split()
        yield address, token, int(pid)
    finally:
        with contextlib.suppress(OSError):
            process.stdin.write("\n")
            process.stdin.close()
        process.stdout.close()
        assert process.wait(WAIT_S) == 0


def tcp(address: str) -> socket.socket:
    host, port = address.split(":")
    return socket.create_connection((host, int(port)), timeout=WAIT_S)


def unix(address: str) -> socket.socket:
    link = socket.socket(socket.AF_UNIX)
    link.connect(name_of(address))  # waits while there are too many to be taken
    link.settimeout(WAIT_S)
    return link


def closed(links: Sequence[socket.socket]) -> int:
    """How many the other end has closed."""
    return sum(bool(_ended(link)) for link in links)


def _ended(link: socket.socket) -> bool:
    link.setblocking(False)
    try:
        while link.recv(4096):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@pytest.mark.parametrize(("dial", "transport"), [(tcp, "grpc"), (unix, "auto")], ids=["tcp", "unix"])
def test_a_flood_of_silent_connections_ends_nothing(dial: Callable[[str], socket.socket], transport: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4 * MANY)), hard))
    with launched() as (address, token, pid), ExitStack() as stack:
        flood = [stack.enter_context(dial(address)) for _ in range(MANY)]
        with fm.Cluster.connect(address, token, transport=transport, timeout_s=WAIT_S) as cluster:
            assert fm.dataflow(lambda x: x + 1, cluster=cluster)(41) == 42
            wait_until(lambda: closed(flood) == MANY, "all that showed no token are closed", WAIT_S)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: cluster.devices == (), "the killed worker is off the list", WAIT_S)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[GrpcEndpoint]:
    """One that waits half a second for a token."""
    monkeypatch.setattr(grpc_streams, "AUTHENTICATE_S", SHORT_S)
    monkeypatch.setattr(local_server, "AUTHENTICATE_S", SHORT_S)
    endpoint = GrpcEndpoint("a", TOKEN)
    endpoint.start(lambda *m: pytest.fail(f"taken in: {m}"), lambda *_: None)
    yield endpoint
    endpoint.close()


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0" + b"\0\0\0\4\1\0\0\0\0"
HALF_HEADERS = b"\0\0\x64\1\0\0\0\0\1\x83"
"""Of a hundred bytes, one."""
HEADERS_THAT_GO_ON = b"\0\0\1\1\0\0\0\0\1\x83"


@pytest.mark.parametrize(
    ("dial", "said", "then"),
    [
        (tcp, b"", b""),
        (tcp, b"", PREFACE),
        (tcp, PREFACE, b""),
        (tcp, PREFACE + SETTINGS, b""),
        (tcp, PREFACE + SETTINGS + HALF_HEADERS, b""),
        (tcp, PREFACE + SETTINGS + HALF_HEADERS, b"\x83" * 99),
        (tcp, PREFACE + SETTINGS + HEADERS_THAT_GO_ON, b""),
        (tcp, b"\xff\xff\xff\xff" * 100, b""),
        (tcp, b"\x16\x03\x01\x02\x00\x01", b""),
        (unix, b"", b""),
        (unix, b"", struct.pack("<I", 32) + TOKEN.encode()),
        (unix, struct.pack("<I", 32), TOKEN.encode()),
        (unix, struct.pack("<I", 32) + TOKEN[:31].encode(), b""),
        (unix, struct.pack("<I", 2**32 - 1), b""),
        (unix, struct.pack("<I", 2**20) + b"t" * 2**20, b""),
    ],
)
def test_whoever_takes_too_long_is_closed(
    endpoint: GrpcEndpoint, dial: Callable[[str], socket.socket], said: bytes, then: bytes
) -> None:
    """`then` comes byte by byte, each too late for all of them to be in time."""
    began = time.monotonic()
    with dial(endpoint.address) as link, contextlib.suppress(OSError):
        link.sendall(said)
        for at in range(len(then)):
            if select.select([link], [], [], SHORT_S / 10)[0] and _ended(link):
                break
            link.setblocking(True)
            link.sendall(then[at : at + 1])
        link.settimeout(WAIT_S)
        while link.recv(4096):
            pass
    assert time.monotonic() - began < SHORT_S * 8


def test_the_oldest_stranger_makes_room_for_the_next(
    monkeypatch: pytest.MonkeyPatch, no_leaks: Callable[[], AbstractContextManager[None]]
) -> None:
    monkeypatch.setattr(local_server, "MAX_STRANGERS", 3)
    with no_leaks(), ExitStack() as stack:
        endpoint = GrpcEndpoint("a", TOKEN)
        stack.callback(endpoint.close)
        arrived = threading.Event()
        endpoint.start(lambda *_: arrived.set(), lambda *_: None)
        links = [stack.enter_context(unix(endpoint.address)) for _ in range(3)]
        assert closed(links) == 0
        links.append(stack.enter_context(unix(endpoint.address)))
        wait_until(lambda: closed(links) == 1, "one has made room")
        assert _ended(links[0])
        friend = GrpcEndpoint("b", TOKEN)
        stack.callback(friend.close)
        friend.start(lambda *_: None, lambda *_: None)
        friend.know({"a": endpoint.address})
        friend.send("a", wire.Leave(worker="b"))
        assert arrived.wait(WAIT_S)


@pytest.mark.parametrize("nbytes", [4097, 2**20])
def test_a_huge_token_is_refused(endpoint: GrpcEndpoint, nbytes: int) -> None:
    token = "t" * nbytes
    with grpc.insecure_channel(endpoint.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.stream_unary(METHOD).future(iter([b""]), metadata=((TOKEN_KEY, token),))
        with pytest.raises(grpc.RpcError):
            call.result(timeout=WAIT_S)
    with unix(endpoint.address) as link, contextlib.suppress(OSError):
        link.sendall(struct.pack("<I", nbytes) + token.encode())
        said = b""
        while data := link.recv(4096):
            said += data
        assert b"refuses the token" in said


def test_a_server_without_threads_says_so_and_serves_on(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = GrpcEndpoint("a", TOKEN)
    arrived: list[Any] = []
    endpoint.start(lambda *m: arrived.append(m), lambda *_: None)
    start = threading.Thread.start

    def exhausted(self: threading.Thread) -> None:
        if self.name == "flowml-receive":
            raise RuntimeError("can't start new thread")
        start(self)

    def attempt() -> grpc.StatusCode:
        with grpc.insecure_channel(endpoint.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            call = channel.stream_unary(METHOD).future(iter([b""]), metadata=((TOKEN_KEY, TOKEN),))
            with contextlib.suppress(grpc.RpcError):
                call.result(timeout=WAIT_S)
            return call.code()

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", exhausted)
        assert attempt() is grpc.StatusCode.UNKNOWN
    assert attempt() is grpc.StatusCode.INVALID_ARGUMENT  # which is what an empty frame is
    assert not arrived
    endpoint.close()


IDLE = """
import socket, sys, threading
socket.setdefaulttimeout(0.3)
import jax.numpy as jnp
import numpy as np
import optax
import flowml as fm

def net(x):
    with fm.layer("a"):
        h = jnp.sin(x)
    with fm.layer("b"):
        return jnp.cos(h)

with fm.Cluster.local(workers=2, transport=sys.argv[1]) as cluster:
    f = fm.dataflow(net, placement={"a": "worker:0", "b": "worker:1"})
    threading.Event().wait(1.0)
    f(jnp.ones(2))
    threading.Event().wait(1.0)
    f(jnp.ones(2))
    trainer = fm.Trainer(lambda p, b: jnp.mean((b["x"] @ p["w"]) ** 2), optax.sgd(1e-4), replicas=2,
                         delays={"worker:0": 0.4})
    done = trainer.fit({"w": np.ones((5, 5), "f")}, {"x": np.ones((8, 5), "f")}, batch_size=8, steps=2)
    print(len(done.history), len(cluster.devices))
"""


@pytest.mark.parametrize("transport", ["auto", "grpc"])
def test_the_programs_default_timeout_of_sockets_ends_nothing(transport: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", IDLE, transport],
        capture_output=True,
        text=True,
        timeout=2 * WAIT_S,
        check=False,
        env=environment,
    )
    assert done.stdout == "2 2\n", done.stderr


SHORTAGE = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
import flowml as fm
from flowml_runtime.launch.launched import LaunchedCluster
cluster = LaunchedCluster(workers=1, transport=sys.argv[1])
with fm.Cluster.connect(cluster.address, cluster.token, transport=sys.argv[1]) as joined:
    assert fm.dataflow(lambda x: x + 1, cluster=joined)(0) == 1  # the worker has joined in full
print(cluster.address, cluster.token, flush=True)
sys.stdin.readline()
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
print("none left", flush=True)
sys.stdin.readline()
for fd in held:
    os.close(fd)
sys.stdin.readline()
cluster.close()
"""


@pytest.mark.parametrize("transport", ["auto", "grpc"])
def test_descriptors_that_run_out_for_a_moment_end_no_coordinator(transport: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SHORTAGE, transport],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def go_on() -> None:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

        address, token = process.stdout.readline().split()
        go_on()
        assert process.stdout.readline() == "none left\n"
        outcomes: list[object] = []

        def join() -> None:
            try:
                with fm.Cluster.connect(address, token, transport=transport, timeout_s=SHORT_S * 4) as cluster:
                    outcomes.append(cluster.devices)
            except fm.FlowmlError as error:
                outcomes.append(error)

        joining = threading.Thread(target=join)
        joining.start()
        joining.join(WAIT_S)
        assert outcomes  # whichever: in time
        go_on()
        with fm.Cluster.connect(address, token, transport=transport, timeout_s=WAIT_S) as cluster:
            assert [d.name for d in cluster.devices] == ["worker:0/cpu:0"]
            assert fm.dataflow(lambda x: x + 1, cluster=cluster)(41) == 42
        go_on()
        assert process.wait(WAIT_S) == 0
