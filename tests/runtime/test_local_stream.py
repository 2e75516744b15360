"""Streams within a machine: shared memory is used again, freed with its views, outlives nobody; lies are refused."""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flowml
from flowml.plan import ArraySpec
from flowml_runtime import wire
from flowml_runtime.transport import local_stream as unix_stream
from flowml_runtime.transport.framing import pack
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from flowml_runtime.transport.slots import SlotError, SlotPool, SlotViews
from tests.conftest import wait_until

pytestmark = pytest.mark.skipif(not unix_stream.AVAILABLE, reason="memfd is Linux's")

TOKEN = "a token for tests"
WAIT_S = 10.0
MEGABYTE = 2**20


def value(arrays: list[Any], step: int = 0) -> wire.Value:
    specs = tuple(ArraySpec(a.shape, str(a.dtype)) for a in arrays)
    return wire.Value(plan_id="p", step=step, kind="edge", index=0, device="worker:0/cpu:0", specs=specs)


class Inbox:
    """An endpoint that keeps what it gets."""

    def __init__(self, name: str, **options: Any) -> None:
        self.messages: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self.lost: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self.endpoint = GrpcEndpoint(name, TOKEN, **options)
        self.endpoint.start(lambda p, m, a: self.messages.put(a), lambda *m: self.lost.put(m))


@pytest.fixture
def pair() -> Iterator[tuple[Inbox, Inbox]]:
    a, b = Inbox("a"), Inbox("b")
    a.endpoint.know({"b": b.endpoint.address})
    yield a, b
    a.endpoint.close()
    b.endpoint.close()


def memfd_bytes() -> int:
    """Bytes of this process's address space that are memfd mappings, each slot of a pair counted on both sides."""
    return sum(m.size for m in psutil.Process().memory_maps(grouped=False) if "memfd:flowml" in m.path)


def test_one_slot_serves_message_after_message(pair: tuple[Inbox, Inbox]) -> None:
    a, b = pair
    descriptors, others = psutil.Process().num_fds(), memfd_bytes()  # of clusters that tests share
    for step in range(300):
        sent = np.full(MEGABYTE // 4, step, np.float32)
        a.endpoint.send("b", value([sent]), [sent])
        (received,) = b.messages.get(timeout=WAIT_S)
        assert received[0] == received[-1] == step
        del received
    assert memfd_bytes() - others <= 3 * 2 * MEGABYTE  # one slot, two at times, mapped on both sides
    assert psutil.Process().num_fds() <= descriptors + 4


def test_a_slot_in_use_is_not_written_again(pair: tuple[Inbox, Inbox]) -> None:
    a, b = pair
    kept: list[Any] = []
    for step in range(20):
        sent = np.full(MEGABYTE // 4, step, np.float32)
        a.endpoint.send("b", value([sent]), [sent])
        (received,) = b.messages.get(timeout=WAIT_S)
        kept.append(jax.numpy.asarray(received) if step % 2 else received[3:7])  # XLA, or a view, keeps it
        del received
    assert [float(x[0]) for x in kept] == list(range(20))


def test_received_memory_enters_jax_without_a_copy_and_cannot_be_written(pair: tuple[Inbox, Inbox]) -> None:
    a, b = pair
    sent = np.arange(MEGABYTE // 4, dtype=np.float32)
    a.endpoint.send("b", value([sent]), [sent])
    (received,) = b.messages.get(timeout=WAIT_S)
    assert jax.device_put(received).unsafe_buffer_pointer() == received.ctypes.data
    with pytest.raises(ValueError, match="read-only"):
        received[0] = 1


def test_slots_nobody_needs_are_given_up_on_both_sides() -> None:
    released: list[int] = []
    pool, views = SlotPool(max_idle_bytes=8 * mmap.PAGESIZE), SlotViews(released.append)
    for pages in (1, 5, 20):
        slot, fd = pool.take(pages * mmap.PAGESIZE)
        views.map(slot.number, fd)
        slot.data[:] = pages
        seen = views.lease(slot.number)
        assert seen.tobytes() == slot.data.tobytes()
        del seen
        assert released == [slot.number]
        pool.give_back(released.pop())
    told = [*pool.retired(1), *pool.retired(5)]
    assert (told, pool.retired(5)) == ([1, 2], ())
    for number in told:
        views.unmap(number)
    assert pool.nbytes == 20 * mmap.PAGESIZE
    again, fd = pool.take(15 * mmap.PAGESIZE)
    assert (again.nbytes, fd) == (20 * mmap.PAGESIZE, -1)


def test_what_is_no_memory_for_us_is_refused(tmp_path: Path) -> None:
    views = SlotViews(lambda _: None)
    unsealed = os.memfd_create("shrinks", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, mmap.PAGESIZE)
    plain = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    for fd in (unsealed, plain):
        with pytest.raises(SlotError):
            views.map(1, fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    for call in (views.lease, views.unmap, SlotPool().give_back):
        with pytest.raises(SlotError):
            call(1)
    with pytest.raises(SlotError, match="no shared memory for"):
        SlotPool().take(2**44)


def dial(inbox: Inbox, token: str = TOKEN) -> socket.socket:
    """A raw connection that has said its token."""
    link = socket.socket(socket.AF_UNIX)
    link.settimeout(WAIT_S)
    link.connect(f"\0flowml/{inbox.endpoint.address}".encode())
    link.sendall(struct.pack("<I", len(token)) + token.encode())
    return link


def record(frame: bytes, slot: int = 0, new: int = 0) -> bytes:
    return struct.pack("<IIQQ", len(frame), 0, slot, new) + frame


HELLO = record(
    pack(wire.Hello(peer="x", incarnation=1, protocol=wire.PROTOCOL, version=flowml.__version__, to="a")).first
)


def goodbye(link: socket.socket) -> str:
    """What the server says at the end, "" if it just hangs up."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while data := link.recv(4096):
            said += data
    link.close()
    numbers = [said[i : i + 8] for i in range(0, len(said), 8)]
    return said[8 * numbers.index(b"\xff" * 8) + 12 :].decode() if b"\xff" * 8 in numbers else ""


def test_the_token_comes_first() -> None:
    inbox = Inbox("a")
    assert "refuses the token" in goodbye(dial(inbox, "guess"))
    link = socket.socket(socket.AF_UNIX)
    link.connect(f"\0flowml/{inbox.endpoint.address}".encode())
    link.sendall(struct.pack("<I", 2**31))
    assert "refuses the token" in goodbye(link)
    assert inbox.messages.empty()
    inbox.endpoint.close()


def test_a_message_beyond_its_slot_and_a_slot_that_never_came_end_the_stream() -> None:
    inbox = Inbox("a")
    big = np.zeros(MEGABYTE, np.uint8)
    first = pack(value([big]), [big]).first
    fd = SlotPool().take(mmap.PAGESIZE)[1]
    for sent, said in (
        (record(first), "not within its shared memory"),
        (record(first, 1), "unknown"),
        (record(first, 1, 1), "does not bring it"),
        (struct.pack("<IIQQ", 2**31, 0, 0, 0), "announces"),
    ):
        link = dial(inbox)
        link.sendall(HELLO.replace(b"\xa1x", b"\xa1" + said[:1].encode()) + sent)
        assert said in goodbye(link)
    link = dial(inbox)
    link.sendall(HELLO)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    link.sendmsg([record(first, 1, 1)], rights)
    assert "not within its shared memory" in goodbye(link)
    os.close(fd)
    assert inbox.messages.empty()
    inbox.endpoint.close()


@settings(max_examples=150)
@given(data=st.binary(max_size=200), after_hello=st.booleans())
def test_no_bytes_hang_or_crash_the_server(data: bytes, after_hello: bool, server: Inbox) -> None:
    link = dial(server)
    with contextlib.suppress(BrokenPipeError):
        link.sendall((HELLO if after_hello else b"") + data)
        link.shutdown(socket.SHUT_WR)
    goodbye(link)
    assert server.messages.empty()


@pytest.fixture(scope="module")
def server() -> Iterator[Inbox]:
    inbox = Inbox("server")
    yield inbox
    inbox.endpoint.close()


SENDER = """
import sys
import numpy as np
from flowml.plan import ArraySpec
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from flowml_runtime.wire import Value
address, token = sys.stdin.readline().split("|")
endpoint = GrpcEndpoint("sender", token.strip())
endpoint.start(lambda *_: None, lambda *_: None)
endpoint.know({"a": address})
array = np.ones(4 * 2**20, np.uint8)
spec = (ArraySpec(array.shape, "uint8"),)
while True:
    endpoint.send("a", Value(plan_id="p", step=0, kind="edge", index=0, device="d", specs=spec), [array])
"""


def test_a_sender_killed_in_the_middle_leaves_whole_arrays_and_nothing_else(no_leaks: Any) -> None:
    before = memfd_bytes()
    with no_leaks():
        inbox = Inbox("a")
        paths = [p for p in sys.path if p]
        child = subprocess.Popen(
            [sys.executable, "-c", SENDER], stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ":".join(paths)}
        )
        assert child.stdin is not None
        child.stdin.write(f"{inbox.endpoint.address}|{TOKEN}\n".encode())
        child.stdin.flush()
        arrived = [inbox.messages.get(timeout=6 * WAIT_S)[0] for _ in range(10)]
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdin.close()
        assert inbox.lost.get(timeout=WAIT_S) == ("sender", "its connection broke")
        while not inbox.messages.empty():
            arrived.append(inbox.messages.get()[0])
        assert all(int(a.sum(dtype=np.int64)) == 4 * 2**20 for a in arrived)  # memory outlives who made it
        arrived.clear()
        wait_until(lambda: memfd_bytes() <= before, "shared memory of the dead sender is unmapped")
        inbox.endpoint.close()


def test_many_threads_send_through_a_narrow_stream_in_order() -> None:
    """The budget makes senders wait, and the socket fills up: nothing is lost, torn or reordered."""
    a, b = Inbox("a", max_queued_bytes=2**18), Inbox("b")
    a.endpoint.know({"b": b.endpoint.address})

    def pour(who: int) -> None:
        for step in range(60):
            array = np.full((50 + 40_000 * (step % 3 == 0),), who * 1000 + step, np.int64)
            a.endpoint.send("b", value([array]), [array])

    threads = [threading.Thread(target=pour, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    seen: dict[int, list[int]] = {}
    for _ in range(240):
        (array,) = b.messages.get(timeout=WAIT_S)
        assert array.min() == array.max()
        seen.setdefault(int(array[0]) // 1000, []).append(int(array[0]) % 1000)
        del array
    for thread in threads:
        thread.join()
    assert seen == {n: list(range(60)) for n in range(4)}
    a.endpoint.close()
    b.endpoint.close()


def test_sealed_messages_arrive_and_a_changed_byte_in_shared_memory_is_refused() -> None:
    a, b = Inbox("a", checksum=True), Inbox("b")
    a.endpoint.know({"b": b.endpoint.address})
    for step, nbytes in enumerate((12, 4 * MEGABYTE, 0, MEGABYTE)):
        sent = np.arange(nbytes // 4, dtype=np.float32)
        a.endpoint.send("b", value([sent], step), [sent])
        assert np.array_equal(b.messages.get(timeout=WAIT_S)[0], sent)
    a.endpoint.close()

    big = np.ones(MEGABYTE, np.uint8)
    for number, changed in ((1, 1), (2, 0)):  # a byte that changed; a message that was lost
        link = dial(b)
        hello = pack(
            wire.Hello(peer=f"x{number}", incarnation=1, protocol=wire.PROTOCOL, version=flowml.__version__, to="a")
        )
        link.sendall(record(hello.sealed(0)))
        slot, fd = SlotPool().take(MEGABYTE)
        slot.data[:] = 1
        slot.data[MEGABYTE // 2] ^= changed
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        link.sendmsg([record(pack(value([big]), [big]).sealed(number), 1, 1)], rights)
        os.close(fd)
        assert "checksum of frame 1 is wrong, of Value (edge 0" in goodbye(link)
    assert b.messages.empty()
    b.endpoint.close()


def test_a_name_that_somebody_has_leaves_grpc(caplog: pytest.LogCaptureFixture) -> None:
    first = GrpcEndpoint("first", TOKEN)
    address = first.address
    first.close()
    with socket.socket(socket.AF_UNIX) as squatter:
        squatter.bind(unix_stream.name_of(address))
        with caplog.at_level("WARNING", "flowml"):
            b = Inbox("b", bind=address)
        a = Inbox("a")
        try:
            a.endpoint.know({"b": b.endpoint.address})
            assert a.endpoint.way("b") == "gRPC"  # nobody listens under the name
            a.endpoint.send("b", value([]))
            assert b.messages.get(timeout=WAIT_S) == []
        finally:
            a.endpoint.close()
            b.endpoint.close()
    assert "they come by gRPC" in caplog.text


def test_reserved_slots_are_used_and_their_descriptors_never_lost() -> None:
    before = psutil.Process().num_fds()
    pool = SlotPool(max_idle_bytes=6 * mmap.PAGESIZE)
    for pages in (2, 2, 4):  # the last would be too much
        pool.reserve(pages * mmap.PAGESIZE)
    assert pool.nbytes == 4 * mmap.PAGESIZE
    first, fd = pool.take(2 * mmap.PAGESIZE)
    assert fd >= 0
    os.close(fd)
    pool.give_back(first.number)
    again, fd = pool.take(2 * mmap.PAGESIZE)
    large, other = pool.take(5 * mmap.PAGESIZE)
    assert (again.number, fd) == (first.number, -1), "the receiver has it"
    os.close(other)
    pool.give_back(large.number)  # now too much is idle: the reserved one goes, and was never told of
    assert pool.retired(9) == ()
    pool.reserve(mmap.PAGESIZE)
    pool.close()
    del first, again, large  # a mapping has a descriptor too
    assert psutil.Process().num_fds() == before


@pytest.mark.parametrize("accepted", [True, False])
def test_whoever_reads_the_first_answer_tells_the_watch(accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Senders read answers too. One of them took the only one, and the watch ended a connection that was in use."""
    monkeypatch.setattr(unix_stream, "TAKE_S", 0.2)
    ours, theirs = socket.socketpair()
    with theirs:
        stream = unix_stream.UnixStream(ours, TOKEN, pack(value([])), MEGABYTE)
        if accepted:
            theirs.sendall(struct.pack("<Q", unix_stream.TAKEN))
        assert stream.waiting == 0, "a sender reads what there is"
        ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        stream.start(lambda _, reason: ended.put(reason))
        if accepted:
            assert not stream.wait(1.0)
            assert stream.put(pack(value([])))
            stream.abort()
        assert ended.get(timeout=WAIT_S) == (
            unix_stream.BROKE if accepted else "it did not accept the connection within 0.2 s"
        )
        assert stream.wait(WAIT_S)


def test_a_message_that_is_expected_is_looked_for_and_then_no_more(pair: tuple[Inbox, Inbox]) -> None:
    a, b = pair
    for n in range(20):  # some find b looking, some asleep
        sent = [np.full(3, n)]
        a.endpoint.send("b", value(sent), sent)
        assert b.messages.get(timeout=WAIT_S)[0][0] == n
        b.endpoint.expect("a")
    b.endpoint.expect("a")
    process = psutil.Process()
    before = process.cpu_times()
    assert threading.Event().wait(0.5) is False
    spent = process.cpu_times()
    assert spent.user + spent.system - before.user - before.system < 0.25, "it still looks"
