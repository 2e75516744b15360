"""Endpoints: what is sent arrives, in order and unchanged, and the end of a peer is told once."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flowml.errors import WorkerLostError
from flowml.plan import ArraySpec
from flowml_runtime import wire
from flowml_runtime.transport import framing
from flowml_runtime.transport.arrays import aligned_empty, to_wire
from flowml_runtime.transport.endpoint import Budget, Delivery, Endpoint, ThreadHub
from flowml_runtime.transport.framing import PIECE_BYTES, SMALL_BYTES, TINY_BYTES, Assembler, pack
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from tests.conftest import wait_until

WAIT_S = 10.0
QUICK_S = 3.0
"""Most of it for a machine that is busy with other things."""
TOKEN = "a token for tests"


@dataclass
class Peer:
    """An endpoint and what it was told."""

    endpoint: Endpoint
    messages: queue.SimpleQueue[tuple[str, Any, list[Any]]] = field(default_factory=queue.SimpleQueue)
    lost: queue.SimpleQueue[tuple[str, str]] = field(default_factory=queue.SimpleQueue)

    def start(self) -> Peer:
        self.endpoint.start(lambda *m: self.messages.put(m), lambda *m: self.lost.put(m))
        return self

    def received(self) -> tuple[str, Any, list[Any]]:
        return self.messages.get(timeout=WAIT_S)


Peers = Callable[..., list[Peer]]


@pytest.fixture(params=["threads", "grpc", "shared memory"])
def peers(request: pytest.FixtureRequest) -> Iterator[Peers]:
    """Makes peers that know each other."""
    with ExitStack() as stack:

        def make(*names: str, **options: Any) -> list[Peer]:
            hub = ThreadHub()
            threads, shared = request.param == "threads", request.param == "shared memory"
            made = [
                Peer(hub.endpoint(n) if threads else GrpcEndpoint(n, TOKEN, shared_memory=shared, **options))
                for n in names
            ]
            for peer in made:
                stack.callback(peer.endpoint.close)
                peer.start().endpoint.know({p.endpoint.name: p.endpoint.address for p in made if p is not peer})
            return made

        yield make


@pytest.fixture(scope="module", params=["grpc", "shared memory"])
def linked(request: pytest.FixtureRequest) -> Iterator[tuple[Peer, Peer]]:
    """Two peers for properties; each example sends one message and receives it."""
    shared = request.param == "shared memory"
    a, b = (Peer(GrpcEndpoint(n, TOKEN, shared_memory=shared)).start() for n in ("a", "b"))
    a.endpoint.know({"b": b.endpoint.address})
    yield a, b
    a.endpoint.close()
    b.endpoint.close()


def spec_of(array: Any) -> ArraySpec:
    return ArraySpec(array.shape, str(array.dtype))


def value(arrays: list[Any], step: int = 0) -> wire.Value:
    specs = tuple(spec_of(a) for a in arrays)
    return wire.Value(plan_id="p", step=step, kind="edge", index=0, device="worker:0/cpu:0", specs=specs)


def try_send(endpoint: Endpoint, peer: str, message: wire.Wire) -> None:
    """Send to a peer that will not have it. Which comes first is chance: the end of the call, or the refusal."""
    with suppress(WorkerLostError):
        endpoint.send(peer, message)


def numbers(nbytes: int) -> np.ndarray[Any, Any]:
    return np.arange(nbytes // 4, dtype=np.float32)


DTYPES = [
    np.dtype(d)
    for d in (
        *("bool", "int8", "uint16", "int32", "uint64", "float16", "float32", "float64", "complex64", "complex128"),
        *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4, ml_dtypes.uint4),
    )
]


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    """Arrays of every kind: dtypes, no elements, no dimensions, strides; JAX arrays, typed keys."""
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    kind = draw(st.sampled_from(["numpy", "strided", "transposed", "jax", "key"]))
    if kind == "key":
        return jax.random.key_data(jax.random.split(jax.random.key(draw(st.integers(0, 9))), shape))
    dtype = draw(st.sampled_from(DTYPES))
    values = np.arange(int(np.prod(shape)) * 2) % 7 - 3
    doubled = values.astype(dtype if dtype.kind != "u" else np.int64).astype(dtype).reshape(*shape, 2)
    if kind == "strided":
        return doubled[..., 1]
    plain = np.ascontiguousarray(doubled[..., 0]).reshape(shape)
    if kind == "transposed":
        return plain.T
    narrow = dtype.name not in ("uint64", "float64", "complex128")
    return jax.device_put(plain) if kind == "jax" and narrow else plain


@settings(max_examples=60)
@given(sent=st.lists(arrays(), max_size=4), large=st.booleans())
def test_arrays_of_every_kind_arrive_unchanged_and_aligned(
    linked: tuple[Peer, Peer], sent: list[Any], large: bool
) -> None:
    a, b = linked
    if large:
        sent = [*sent, numbers(SMALL_BYTES + 4)]
    a.endpoint.send("b", value(sent), sent)
    peer, message, received = b.received()
    assert (peer, message) == ("a", value(sent))
    for before, after in zip(sent, received, strict=True):
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
        assert after.tobytes() == np.asarray(before).tobytes()
        unmoved = sum(a.nbytes for a in sent if a.nbytes <= SMALL_BYTES) <= TINY_BYTES and after.nbytes <= SMALL_BYTES
        assert after.ctypes.data % (after.dtype.itemsize if unmoved else 64) == 0 or not after.size


def test_pieces_of_a_large_array_are_put_together(linked: tuple[Peer, Peer]) -> None:
    a, b = linked
    sent = [numbers(4), numbers(2 * PIECE_BYTES + 12), numbers(0), numbers(PIECE_BYTES), numbers(SMALL_BYTES)]
    a.endpoint.send("b", value(sent), sent)
    received = b.received()[2]
    assert all(np.array_equal(x, y) for x, y in zip(sent, received, strict=True))


def test_typed_keys_travel_as_their_data() -> None:
    for impl, words in (("threefry2x32", 2), ("rbg", 4), ("unsafe_rbg", 4)):
        keys = jax.random.split(jax.random.key(3, impl=impl), 2)
        spec = spec_of(keys)
        assert spec.dtype.startswith("key<")
        buffer = to_wire(keys, spec)
        assert (buffer.dtype, buffer.shape) == (np.uint32, (2, words))
        back = jax.random.wrap_key_data(buffer, impl=impl)
        assert back.dtype == keys.dtype
        assert np.array_equal(jax.random.key_data(back), jax.random.key_data(keys))
        assert to_wire(jax.random.key_data(keys), spec).tobytes() == buffer.tobytes()


def test_what_the_specs_do_not_announce_is_not_sent() -> None:
    one = numbers(8)
    with pytest.raises(ValueError, match="announces 1 arrays and has 0"):
        pack(value([one]), [])
    with pytest.raises(ValueError, match=r"float64\[2\] cannot be sent as float32\[2\]"):
        pack(value([one]), [one.astype(np.float64)])
    with pytest.raises(ValueError, match=r"cannot be sent as float32\[2\]"):
        pack(value([one]), [numbers(12)])
    with pytest.raises(ValueError, match="object"):
        to_wire(np.array([None]), ArraySpec((1,), "object"))


def test_aligned_memory_enters_jax_without_a_copy() -> None:
    buffer = aligned_empty(2**12).view(np.float32)
    buffer[:] = 1
    assert jax.device_put(buffer).unsafe_buffer_pointer() == buffer.ctypes.data


def test_messages_arrive_in_order_between_all_peers(peers: Peers) -> None:
    made = peers("a", "b", "c")
    names = [p.endpoint.name for p in made]

    def talk(peer: Peer) -> None:
        for step in range(200):
            for other in names:
                peer.endpoint.send(other, value([numbers(8)], step), [numbers(8)])

    threads = [threading.Thread(target=talk, args=(p,)) for p in made]
    for thread in threads:
        thread.start()
    for peer in made:
        steps: dict[str, list[int]] = {}
        for _ in range(3 * 200):
            sender, message, _ = peer.received()
            steps.setdefault(sender, []).append(message.step)
        assert steps == {name: list(range(200)) for name in names}
    for thread in threads:
        thread.join()


def test_a_peer_in_the_same_process_gets_the_very_same_array() -> None:
    hub = ThreadHub()
    a, b = Peer(hub.endpoint("a")).start(), Peer(hub.endpoint("b")).start()
    sent = jax.numpy.ones(3)
    for name, peer in (("b", b), ("a", a)):
        a.endpoint.send(name, value([sent]), [sent])
        assert peer.received()[2][0] is sent
    for peer in (a, b):
        peer.endpoint.close()


def test_unknown_forgotten_and_lost_peers_cannot_be_sent_to(peers: Peers) -> None:
    a, b, c = peers("a", "b", "c")
    with pytest.raises(WorkerLostError, match="cannot send to nobody") as caught:
        a.endpoint.send("nobody", wire.Leave(worker="a"))
    assert caught.value.worker == "nobody"
    a.endpoint.forget("b")
    with pytest.raises(WorkerLostError, match="cannot send to b"):
        a.endpoint.send("b", wire.Leave(worker="a"))
    a.endpoint.lose("c", "no heartbeat")
    a.endpoint.lose("c", "again")
    with pytest.raises(WorkerLostError, match="cannot send to c: no heartbeat"):
        a.endpoint.send("c", wire.Leave(worker="a"))
    assert a.lost.get(timeout=WAIT_S) == ("c", "no heartbeat")
    assert a.lost.empty()
    assert (b.endpoint.name, c.endpoint.name) == ("b", "c")


def test_a_closed_peer_is_reported_once_to_those_who_talked_to_it(peers: Peers) -> None:
    a, b = peers("a", "b")
    a.endpoint.send("b", wire.Leave(worker="a"))
    b.endpoint.send("a", wire.Leave(worker="b"))
    assert (b.received()[0], a.received()[0]) == ("a", "b")
    b.endpoint.close()
    assert a.lost.get(timeout=WAIT_S)[0] == "b"
    with pytest.raises(WorkerLostError):
        a.endpoint.send("b", wire.Leave(worker="a"))
    a.endpoint.close()
    assert a.lost.empty()
    assert b.lost.empty()


def test_what_was_sent_before_closing_arrives(peers: Peers) -> None:
    a, b = peers("a", "b")
    for step in range(50):
        a.endpoint.send("b", value([numbers(2**16)], step), [numbers(2**16)])
    a.endpoint.close()
    assert [b.received()[1].step for _ in range(50)] == list(range(50))


def test_a_peer_that_cannot_be_reached_is_lost() -> None:
    a = Peer(GrpcEndpoint("a", TOKEN)).start()
    gone = GrpcEndpoint("b", TOKEN)
    gone.close()
    a.endpoint.know({"b": gone.address})
    try_send(a.endpoint, "b", wire.Leave(worker="a"))
    peer, reason = a.lost.get(timeout=WAIT_S)
    assert peer == "b"
    assert "cannot be reached" in reason
    a.endpoint.know({"b": gone.address})  # the same life: still lost
    with pytest.raises(WorkerLostError):
        a.endpoint.send("b", wire.Leave(worker="a"))
    a.endpoint.close()


def test_a_restarted_peer_is_welcome_and_its_earlier_life_is_not() -> None:
    a, first = Peer(GrpcEndpoint("a", TOKEN)).start(), Peer(GrpcEndpoint("b", TOKEN)).start()
    stale, second = GrpcEndpoint("b", TOKEN), Peer(GrpcEndpoint("b", TOKEN)).start()
    for endpoint in (first.endpoint, stale, second.endpoint):
        endpoint.know({"a": a.endpoint.address})
    first.endpoint.send("a", wire.Leave(worker="b"))
    assert a.received()[0] == "b"
    second.endpoint.send("a", wire.Leave(worker="b", reason="second"))
    assert a.received()[1].reason == "second"
    assert a.lost.get(timeout=WAIT_S) == ("b", "a new b took its place")

    lost = Peer(stale).start().lost
    try_send(stale, "a", wire.Leave(worker="b", reason="stale"))
    assert "start it again" in lost.get(timeout=WAIT_S)[1]
    a.endpoint.know({"b": second.endpoint.address})
    a.endpoint.send("b", wire.Leave(worker="a"))
    assert second.received()[0] == "a"
    assert a.messages.empty()
    for endpoint in (a.endpoint, first.endpoint, stale, second.endpoint):
        endpoint.close()


def test_a_successor_may_have_the_address_of_a_lost_peer() -> None:
    a, first = Peer(GrpcEndpoint("a", TOKEN)).start(), Peer(GrpcEndpoint("b", TOKEN)).start()
    place = {"b": first.endpoint.address}
    a.endpoint.know(place, {"b": first.endpoint.incarnation})
    a.endpoint.send("b", wire.Leave(worker="a"))
    assert first.received()[0] == "a"
    first.endpoint.close()
    a.endpoint.lose("b", "it was killed")
    second = Peer(GrpcEndpoint("b", TOKEN, bind=place["b"])).start()
    a.endpoint.know(place, {"b": first.endpoint.incarnation})
    assert a.endpoint.has_lost("b", first.endpoint.incarnation)
    a.endpoint.know(place, {"b": second.endpoint.incarnation})
    assert not a.endpoint.has_lost("b", second.endpoint.incarnation)
    a.endpoint.send("b", wire.Leave(worker="a", reason="again"))
    assert second.received()[1].reason == "again"
    for endpoint in (a.endpoint, second.endpoint):
        endpoint.close()


def test_a_receiver_that_fails_ends_the_stream_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    a, b = Peer(GrpcEndpoint("a", TOKEN)).start(), Peer(GrpcEndpoint("b", TOKEN))

    def fail(*_: object) -> None:
        raise RuntimeError("out of tea")

    b.endpoint.start(fail, lambda *m: b.lost.put(m))
    a.endpoint.know({"b": b.endpoint.address})
    try_send(a.endpoint, "b", wire.Leave(worker="a"))
    assert a.lost.get(timeout=WAIT_S)[0] == "b"
    assert "out of tea" in b.lost.get(timeout=WAIT_S)[1]
    assert "out of tea" in caplog.text
    a.endpoint.close()
    b.endpoint.close()


def test_a_slow_receiver_holds_its_sender_back_and_its_loss_lets_go() -> None:
    a, b = Peer(GrpcEndpoint("a", TOKEN, max_queued_bytes=2**20)).start(), Peer(GrpcEndpoint("b", TOKEN))
    taken, go_on = threading.Event(), threading.Event()

    def stuck(*_: object) -> None:
        taken.set()
        go_on.wait(WAIT_S)

    b.endpoint.start(stuck, lambda *_: None)
    a.endpoint.know({"b": b.endpoint.address})
    sent, error = 0, threading.Event()
    megabyte = numbers(2**20)

    def pour() -> None:
        nonlocal sent
        try:
            while True:
                a.endpoint.send("b", value([megabyte]), [megabyte])
                sent += 1
        except WorkerLostError:
            error.set()

    threading.Thread(target=pour, daemon=True).start()
    assert taken.wait(WAIT_S)
    seen = -1
    while seen != sent:  # until nothing moves for a while: the sender is held back
        seen = sent
        threading.Event().wait(0.3)
    assert seen < 100
    a.endpoint.lose("b", "stuck")
    assert error.wait(WAIT_S)
    go_on.set()
    a.endpoint.close()
    b.endpoint.close()


@pytest.mark.parametrize("shared", [False, True], ids=["grpc", "shared memory"])
def test_what_a_receiver_does_not_take_waits(shared: bool) -> None:
    a, b = (Peer(GrpcEndpoint(name, TOKEN, shared_memory=shared)) for name in ("a", "b"))
    taken, go_on, megabyte = threading.Event(), threading.Event(), numbers(2**20)

    def stuck(*_: object) -> None:
        taken.set()
        go_on.wait(WAIT_S)

    a.start()
    b.endpoint.start(stuck, lambda *_: None)
    a.endpoint.know({"b": b.endpoint.address})
    assert a.endpoint.waiting("b") == 0
    assert a.endpoint.waiting("nobody") == 0
    for _ in range(30):
        a.endpoint.send("b", value([megabyte]), [megabyte])
    assert taken.wait(WAIT_S)
    assert a.endpoint.waiting("b") > 2**20
    go_on.set()
    wait_until(lambda: a.endpoint.waiting("b") == 0, "all is taken")
    a.endpoint.close()
    b.endpoint.close()


def test_endpoints_leave_nothing_behind(no_leaks: Any) -> None:
    with no_leaks():
        a, b = Peer(GrpcEndpoint("a", TOKEN)).start(), Peer(GrpcEndpoint("b", TOKEN)).start()
        a.endpoint.know({"b": b.endpoint.address})
        a.endpoint.send("b", wire.Leave(worker="a"))
        b.received()
        began = time.monotonic()
        for endpoint in (a.endpoint, b.endpoint, a.endpoint):
            endpoint.close()
        assert time.monotonic() - began < QUICK_S


def test_a_budget_lets_the_oversized_through_alone() -> None:
    budget = Budget(max_bytes=10)
    assert budget.acquire(100)
    done: list[bool] = []
    waiting = threading.Thread(target=lambda: done.append(budget.acquire(1)))
    waiting.start()
    budget.release(100)
    waiting.join(WAIT_S)
    assert done == [True]
    budget.close()
    assert not budget.acquire(1)


def test_a_delivery_that_fails_goes_on_with_the_next(caplog: pytest.LogCaptureFixture) -> None:
    done = threading.Event()
    delivery = Delivery("test")
    delivery.put(lambda: 1 // 0)
    delivery.put(done.set)
    assert done.wait(WAIT_S)
    delivery.close()
    assert "ZeroDivisionError" in caplog.text
    assert not delivery.put(done.set)


def test_nothing_is_kept_of_what_was_delivered(peers: Peers) -> None:
    """A worker's memory would otherwise hold the last message of every peer."""
    import weakref

    a, b = peers("a", "b")
    array = np.ones(2**18, np.float32)
    held = weakref.ref(array)
    a.endpoint.send("b", value([array]), [array])
    received = b.received()[2]
    arrived = weakref.ref(received[0])
    del array, received
    wait_until(lambda: held() is None and arrived() is None, "sent and received arrays are freed")


def test_assembling_takes_whatever_is_cut_at_frames() -> None:
    sent = [numbers(SMALL_BYTES + 8), numbers(16)]
    assembler = Assembler()
    complete = [assembler.take() for frame in pack(value(sent), sent).frames() if assembler.feed(frame)]
    assert len(complete) == 1
    assert all(np.array_equal(x, y) for x, y in zip(sent, complete[0][1], strict=True))
    assert framing.MAX_FRAME_BYTES >= PIECE_BYTES
