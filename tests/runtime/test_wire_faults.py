"""Faults of a gRPC connection, as they happen on a network: told by name, and nothing partial is handed on."""

from __future__ import annotations

import gc
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

import jax
import msgspec
import numpy as np
import psutil
import pytest

from flowml.devices import as_devices
from flowml.errors import DeadlineError, WorkerLostError
from flowml.plan import ArraySpec
from flowml_runtime import wire
from flowml_runtime.driver.session import Session
from flowml_runtime.transport.framing import Outgoing, pack
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint, is_checked
from flowml_runtime.worker.worker import Worker
from tests.conftest import wait_until
from tests.plans import W0, W1, chain
from tests.proxy import Fault, Proxy

TOKEN = "a token for tests"
WAIT_S = 10.0
QUICK_S = 5.0
"""How soon a fault is to be told, most of it for a machine that is busy with other things."""
STARTS_S = 60.0
LARGE = 64 * 2**20
MIDDLE = 20 * 2**20
NoLeaks = Callable[[], AbstractContextManager[None]]


class Inbox:
    """An endpoint that speaks gRPC only and keeps what it gets."""

    def __init__(self, name: str, **options: Any) -> None:
        self.messages: queue.SimpleQueue[tuple[wire.Value, list[Any]]] = queue.SimpleQueue()
        self.lost: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self.endpoint = GrpcEndpoint(name, TOKEN, shared_memory=False, **options)
        self.endpoint.start(lambda p, m, a: self.messages.put((m, a)), lambda *m: self.lost.put(m))


def value(array: Any, step: int = 7) -> wire.Value:
    specs = (ArraySpec(array.shape, str(array.dtype)),)
    return wire.Value(plan_id="p", step=step, kind="edge", index=3, device="worker:1/cpu:0", specs=specs)


@contextmanager
def faulty(fault: Fault, at: int, near: bytes = b"", **options: Any) -> Iterator[tuple[Inbox, Inbox, Proxy]]:
    """a, whose way to b is through a proxy; b; the proxy."""
    with ExitStack() as stack:
        a, b = Inbox("a", **options), Inbox("b")
        for inbox in (a, b):
            stack.callback(inbox.endpoint.close)
        proxy = stack.enter_context(Proxy(b.endpoint.address, fault, at, near=near))
        a.endpoint.know({"b": proxy.address})
        yield a, b, proxy


@pytest.fixture
def nothing_stays(no_leaks: NoLeaks) -> Iterator[None]:
    """Threads, ports and descriptors are as before, soon after the test."""
    jax.local_devices()  # XLA's own threads and files are no leak
    process = psutil.Process()
    descriptors = process.num_fds() + 8  # gRPC keeps a few for its pollers
    with no_leaks():
        yield
    wait_until(lambda: process.num_fds() <= descriptors, "descriptors are closed")


@pytest.fixture
def no_memory_stays(nothing_stays: None) -> Iterator[None]:
    """And neither does memory for a message that never arrived."""
    process = psutil.Process()
    most = process.memory_info().rss + LARGE * 3 // 4
    yield
    gc.collect()
    wait_until(lambda: process.memory_info().rss < most, "memory of what never arrived is freed")


@pytest.mark.usefixtures("no_memory_stays")
@pytest.mark.parametrize("fault", ["cut", "reset"])
def test_a_connection_that_is_cut_in_the_middle_of_a_message_is_told_on_both_sides(fault: Fault) -> None:
    array = np.ones(LARGE // 4, np.float32)
    with faulty(fault, MIDDLE) as (a, b, proxy):
        a.endpoint.send("b", value(array), [array])
        assert proxy.reached.wait(WAIT_S)
        assert b.lost.get(timeout=QUICK_S) == ("a", "its connection broke")
        assert a.lost.get(timeout=QUICK_S)[0] == "b"
        with pytest.raises(WorkerLostError, match="cannot send to b: its connection broke") as caught:
            a.endpoint.send("b", value(array), [array])
        assert caught.value.worker == "b"
        assert b.messages.empty()
        del array


@pytest.mark.usefixtures("no_memory_stays")
def test_a_flipped_bit_is_refused_and_both_sides_name_the_edge() -> None:
    array = np.ones(LARGE // 4, np.float32)
    with faulty("flip", MIDDLE, array[:8].tobytes(), checksum=True) as (a, b, _):
        a.endpoint.send("b", value(array), [array])
        for inbox, peer in ((b, "a"), (a, "b")):
            lost, reason = inbox.lost.get(timeout=QUICK_S)
            assert lost == peer
            assert "checksum of frame" in reason
            assert "Value (edge 3 for worker:1/cpu:0, step 7)" in reason
        assert b.messages.empty()
        del array


def test_bytes_in_another_order_are_refused() -> None:
    array = np.arange(LARGE // 4, dtype=np.float32)
    with faulty("swap", MIDDLE, array[MIDDLE // 4 : MIDDLE // 4 + 8].tobytes(), checksum=True) as (a, b, _):
        a.endpoint.send("b", value(array), [array])
        for inbox in (b, a):
            assert "checksum of frame" in inbox.lost.get(timeout=QUICK_S)[1]
        assert b.messages.empty()


def test_what_is_late_arrives_whole_and_in_order() -> None:
    """Each piece that is relayed is held up for another while, in both directions."""
    rng, array = random.Random(3), np.arange(100_000, dtype=np.float32)
    with ExitStack() as stack:
        a, b = Inbox("a", checksum=True), Inbox("b")
        for inbox in (a, b):
            stack.callback(inbox.endpoint.close)
        proxy = stack.enter_context(Proxy(b.endpoint.address, delay=lambda: rng.expovariate(200)))
        a.endpoint.know({"b": proxy.address})
        for step in range(20):
            a.endpoint.send("b", value(array, step), [array])
        received = [b.messages.get(timeout=WAIT_S) for _ in range(20)]
        assert [message.step for message, _ in received] == list(range(20))
        assert all(np.array_equal(arrays[0], array) for _, arrays in received)
        assert a.lost.empty() and b.lost.empty()


@pytest.mark.parametrize("seed", range(12))
def test_wherever_a_bit_is_flipped_nothing_that_arrives_is_changed(seed: int) -> None:
    """Also in names, numbers and lengths of messages, and in what gRPC adds. A connection may break or wait then, and
    heartbeats end it; a changed message never arrives."""
    rng = random.Random(seed)
    array = np.asarray([rng.random() for _ in range(300)])
    with faulty("flip", rng.randrange(2_000, 60_000), checksum=True) as (a, b, proxy):
        step = 0
        with suppress(WorkerLostError):
            while not proxy.reached.is_set():
                a.endpoint.send("b", value(array, step), [array])
                step += 1
            for _ in range(20):
                a.endpoint.send("b", value(array, step), [array])
                step += 1
        with suppress(queue.Empty):
            b.lost.get(timeout=0.3)
        received = [b.messages.get() for _ in range(b.messages.qsize())]
        assert [m for m, _ in received] == [value(array, n) for n in range(len(received))]
        assert all(np.array_equal(arrays[0], array) for _, arrays in received)


def test_without_a_checksum_a_flipped_bit_goes_unnoticed() -> None:
    """So the test above flips a bit of the array, and not one that gRPC itself would miss."""
    array = np.zeros(LARGE // 4, np.uint32)
    with faulty("flip", MIDDLE, array[:8].tobytes(), checksum=False) as (a, b, _):
        a.endpoint.send("b", value(array), [array])
        _, (received,) = b.messages.get(timeout=WAIT_S)
        assert np.count_nonzero(received) == 1
        assert b.lost.empty()


def test_with_a_checksum_what_is_sound_arrives_and_small_flips_are_refused() -> None:
    array = np.arange(5000, dtype=np.float32)
    with faulty("flip", 30 * array.nbytes, array[2500:2508].tobytes(), checksum=True) as (a, b, proxy):
        step = 0
        with suppress(WorkerLostError):
            while not proxy.reached.is_set():
                a.endpoint.send("b", value(array, step), [array])
                step += 1
        lost, reason = b.lost.get(timeout=QUICK_S)
        assert lost == "a"
        assert "checksum" in reason
        received = [b.messages.get() for _ in range(b.messages.qsize())]
        assert [m.step for m, _ in received] == list(range(len(received)))
        assert all(np.array_equal(arrays[0], array) for _, arrays in received)


def spec_of(*shape: int) -> dict[str, object]:
    return {"shape": shape, "dtype": "float32"}


@pytest.mark.usefixtures("no_memory_stays")
@pytest.mark.parametrize("shape", [(2**62, 2**62), (2**40,), (2**35,), (-4, -4)])
def test_a_size_that_overflows_is_refused_before_memory_is_taken(shape: tuple[int, ...]) -> None:
    fields = msgspec.to_builtins(value(np.zeros(4, np.float32))) | {"specs": [spec_of(*shape)]}
    header = msgspec.msgpack.encode(fields)
    hostile = Outgoing(len(header).to_bytes(4, "little") + header, (), 0)
    with faulty("none", 0) as (a, b, _):
        array = np.zeros(4, np.float32)
        a.endpoint.send("b", value(array), [array])
        assert b.messages.get(timeout=WAIT_S)[0].step == 7
        assert a.endpoint._stream("b").put(hostile)  # pyright: ignore[reportPrivateUsage]
        lost, reason = a.lost.get(timeout=QUICK_S)
        assert lost == "b"
        assert "no message of this version" in reason
        assert b.lost.get(timeout=QUICK_S) == ("a", reason)
        assert b.messages.empty()


def test_a_sender_to_a_stalled_peer_is_let_go_when_the_peer_counts_as_lost() -> None:
    array = np.ones(LARGE // 4, np.float32)
    told: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    with faulty("stall", MIDDLE) as (a, b, proxy):

        def pour() -> None:
            try:
                while True:
                    a.endpoint.send("b", value(array), [array])
            except WorkerLostError as error:
                told.put(error)

        threading.Thread(target=pour, daemon=True).start()
        assert proxy.reached.wait(WAIT_S)
        began = time.monotonic()
        a.endpoint.lose("b", "no heartbeat for 5 s")
        error = told.get(timeout=QUICK_S)
        assert time.monotonic() - began < QUICK_S
        assert isinstance(error, WorkerLostError)
        assert (error.worker, str(error)) == ("b", "cannot send to b: no heartbeat for 5 s")
        assert a.lost.get(timeout=QUICK_S) == ("b", "no heartbeat for 5 s")
        proxy.resume()
        assert b.lost.get(timeout=WAIT_S)[0] == "a"
        assert b.messages.empty()


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("fault", ["stall", "cut", "flip"])
def test_a_step_whose_edge_is_hit_fails_with_one_error_that_names_it(fault: Fault) -> None:
    spec, deadline_s = ArraySpec((2**20,), "float32"), 2.0
    x = np.ones(2**20, np.float32)
    with ExitStack() as stack:
        endpoints = {
            n: GrpcEndpoint(n, TOKEN, shared_memory=False, checksum=True) for n in ("driver", "worker:0", "worker:1")
        }
        for endpoint in endpoints.values():
            stack.callback(endpoint.close)
        patience_s = deadline_s if fault == "stall" else STARTS_S  # a broken connection is not waited for
        session = Session(endpoints["driver"], as_devices(["worker:0", "worker:1"]), deadline_s=patience_s)
        stack.callback(session.close)
        endpoints["driver"].start(session.on_message, session.on_lost)
        for name, device in (("worker:0", W0), ("worker:1", W1)):
            worker = Worker(name, {device: jax.local_devices()[0]}, endpoints[name])
            stack.callback(worker.close)
            endpoints[name].start(worker.on_message, worker.on_lost)
        addresses = {name: endpoint.address for name, endpoint in endpoints.items()}
        proxy = stack.enter_context(Proxy(addresses["worker:1"], fault, 5 * 2**20, near=(x[:8] + 1).tobytes()))
        endpoints["driver"].know(addresses)
        endpoints["worker:1"].know(addresses)
        endpoints["worker:0"].know({**addresses, "worker:1": proxy.address})
        handle = session.load(chain(spec=spec))
        np.testing.assert_array_equal(session.submit(handle, [x]).result(timeout=STARTS_S)[0], (x + 1) * 2)
        began = time.monotonic()
        error = session.submit(handle, [x]).exception(timeout=STARTS_S)
        assert time.monotonic() - began < deadline_s + QUICK_S
        if fault == "stall":
            assert isinstance(error, DeadlineError)
            assert f"waited {deadline_s:g} s for worker:0/cpu:0 -> worker:1/cpu:0" in str(error)
        else:
            assert isinstance(error, WorkerLostError)
            assert "worker:" in str(error)
        proxy.resume()


SENDER = """
import sys
import numpy as np
from flowml.plan import ArraySpec
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint, is_checked
from flowml_runtime.wire import Value
address, token = sys.stdin.readline().split("|")
endpoint = GrpcEndpoint("sender", token.strip(), shared_memory=False)
endpoint.start(lambda *_: None, lambda *_: None)
endpoint.know({"b": address})
array = np.ones(16 * 2**20, np.float32)
spec = (ArraySpec(array.shape, "float32"),)
while True:
    endpoint.send("b", Value(plan_id="p", step=0, kind="edge", index=0, device="d", specs=spec), [array])
"""


@pytest.mark.usefixtures("no_memory_stays")
def test_a_sender_killed_in_the_middle_of_a_message_leaves_whole_arrays_and_nothing_else() -> None:
    environment = {**os.environ, "PYTHONPATH": ":".join(p for p in sys.path if p)}
    b = Inbox("b")
    with Proxy(b.endpoint.address, "stall", LARGE + MIDDLE) as proxy:
        child = subprocess.Popen([sys.executable, "-c", SENDER], stdin=subprocess.PIPE, env=environment)
        assert child.stdin is not None
        child.stdin.write(f"{proxy.address}|{TOKEN}\n".encode())
        child.stdin.flush()
        assert proxy.reached.wait(STARTS_S)  # the first message is through, and a part of the second
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdin.close()
        began = time.monotonic()
        proxy.resume()
        assert b.lost.get(timeout=QUICK_S) == ("sender", "its connection broke")
        assert time.monotonic() - began < QUICK_S
        _, (array,) = b.messages.get(timeout=WAIT_S)
        assert float(array.sum(dtype=np.float64)) == 16 * 2**20
        assert b.messages.empty()
        del array
    b.endpoint.close()


def test_a_frame_that_says_it_is_sealed_and_is_not_is_refused() -> None:
    array = np.zeros(4, np.float32)
    true = pack(value(array), [array])
    lying = Outgoing(true.first[:3] + bytes([true.first[3] | 0x80]) + true.first[4:], (), 0)
    with faulty("none", 0) as (a, b, _):
        a.endpoint.send("b", value(array), [array])
        b.messages.get(timeout=WAIT_S)
        assert a.endpoint._stream("b").put(lying)  # pyright: ignore[reportPrivateUsage]
        assert "checksum of frame 2" in a.lost.get(timeout=QUICK_S)[1]
        assert b.messages.empty()


def test_checksums_are_on_beyond_this_machine_unless_said_otherwise() -> None:
    near, far = (
        ("127.0.0.1:7070", "[::1]:7070", "localhost:7070"),
        ("192.0.2.7:7070", "[2001:db8::1]:7070", "node7:7070"),
    )
    assert [is_checked(a, None) for a in (*near, *far)] == [False] * 3 + [True] * 3
    assert all(is_checked(a, True) and not is_checked(a, False) for a in (*near, *far))
