"""Groups over real endpoints: the sums, their bits, what becomes of a bucket whose peer is lost or late, and memory."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from flowml.errors import DeadlineError, FlowmlError, UnsupportedError, WorkerLostError
from flowml.plan import ArraySpec
from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.schedules import direct, doubling, hierarchical, ring, tree
from flowml_runtime.transport.buffers import BufferPool
from flowml_runtime.transport.endpoint import Endpoint, ThreadHub
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from flowml_runtime.worker.training.exchange.collectives import Group, GroupId, add

WAIT_S = 20.0
TOKEN = "a token for tests"

Groups = Callable[..., list["Member"]]


class Member:
    """A group over an endpoint of its own. With `delays` every message waits a little before it is taken in."""

    def __init__(self, endpoint: Endpoint, members: Sequence[str], delays: random.Random | None, options: Any) -> None:
        self.endpoint = endpoint
        self.group = Group(GroupId("plan", 0), endpoint.name, members, endpoint.send, **options)
        self._delays = delays
        self._idle = threading.Event()
        endpoint.start(self._receive, self.group.on_lost)

    def _receive(self, peer: str, message: Any, arrays: list[Any]) -> None:
        if self._delays is not None:
            self._idle.wait(self._delays.uniform(0, 2e-3))
        self.group.on_message(peer, message, arrays)

    def close(self) -> None:
        self.group.close()
        self.endpoint.close()


@pytest.fixture(params=["threads", "grpc", "shared memory"])
def groups(request: pytest.FixtureRequest) -> Iterator[Groups]:
    """Makes members of one group that know each other."""
    with ExitStack() as stack:

        def make(count: int, delays: random.Random | None = None, **options: Any) -> list[Member]:
            hub, shared = ThreadHub(), request.param == "shared memory"
            names = [f"worker:{n}" for n in range(count)]
            endpoints: list[Endpoint] = [
                hub.endpoint(n) if request.param == "threads" else GrpcEndpoint(n, TOKEN, shared_memory=shared)
                for n in names
            ]
            made = [Member(e, names, delays, options) for e in endpoints]
            for member in made:
                stack.callback(member.close)
                member.endpoint.know({e.name: e.address for e in endpoints if e is not member.endpoint})
            return made

        yield make


def reduce(members: Sequence[Member], values: Sequence[Sequence[Any]], bucket: int = 0, clock: int = 0) -> Any:
    futures = [m.group.all_reduce(bucket, clock, v) for m, v in zip(members, values, strict=True)]
    return [f.result(WAIT_S) for f in futures]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("size", [0, 5, 1000, 700_001])
def test_every_member_has_the_sum(groups: Groups, ranks: int, size: int) -> None:
    members = groups(ranks)
    values = [np.arange(size, dtype=np.float32) * (r + 1) for r in range(ranks)]
    total = sum(values[1:], values[0])
    for [result] in reduce(members, [[v] for v in values]):
        np.testing.assert_array_equal(result, total)
    for rank, value in enumerate(values):
        np.testing.assert_array_equal(value, np.arange(size, dtype=np.float32) * (rank + 1))  # what was given stays


@pytest.mark.parametrize(
    "dtype", ["int32", "uint8", "float16", "bfloat16", "float32", "float64", "complex64", "float8_e4m3fn"]
)
@pytest.mark.parametrize("pick", [lambda *_: ring(3), lambda *_: doubling(3), lambda *_: tree(3, 1)])
def test_narrow_floats_are_added_in_float32_and_rounded_once(dtype: str, pick: Any, rng: np.random.Generator) -> None:
    hub, names = ThreadHub(), ["a", "b", "c"]
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    values = [(rng.normal(size=300) * 9).astype(kind) for _ in names]
    with ExitStack() as stack:
        members = [Member(hub.endpoint(n), names, None, {"pick": pick}) for n in names]
        for member in members:
            stack.callback(member.close)
        results = reduce(members, [[v] for v in values])
    wide = np.float32 if kind.itemsize < 4 and kind.kind not in "iu" else kind
    exact = values[0].astype(wide) + values[1].astype(wide) + values[2].astype(wide)
    for [result] in results:
        assert result.dtype == kind
        assert result.tobytes() == results[0][0].tobytes()
        if kind.kind in "iu":
            np.testing.assert_array_equal(result, exact)
        else:
            error = float(ml_dtypes.finfo(kind).eps)
            np.testing.assert_allclose(result.astype(np.complex128), exact, rtol=error, atol=1e-5)


@pytest.mark.parametrize("pick", [lambda *_: direct(3), lambda *_: doubling(3), lambda *_: hierarchical((0, 1, 1))])
def test_a_sum_repeats_to_the_bit_whatever_is_late(groups: Groups, pick: Any, rng: np.random.Generator) -> None:
    members = groups(3, random.Random(7), pick=pick)
    values = [[(rng.normal(size=1001) * 10.0 ** rng.integers(-6, 6, 1001)).astype(np.float32)] for _ in range(3)]
    bits = {result.tobytes() for clock in range(20) for [result] in reduce(members, values, clock=clock)}
    assert len(bits) == 1


def test_several_buckets_of_several_arrays_are_under_way_at_once(groups: Groups) -> None:
    members = groups(2)
    values = [
        [[jax.numpy.full((3, 4), r + b, "float32"), np.full(300_000, r * b, np.float32)] for r in range(2)]
        for b in range(5)
    ]
    order = [(b, m) for b in range(5) for m in (0, 1)]
    random.Random(3).shuffle(order)
    futures = {(b, m): members[m].group.all_reduce(b, 0, values[b][m]) for b, m in order}
    for (b, _), future in futures.items():
        small, large = future.result(WAIT_S)
        assert small.shape == (3, 4) and (small == 2 * b + 1).all()
        assert (large == b).all()


def test_a_ring_sends_its_share_and_no_more(groups: Groups) -> None:
    members = groups(3, pick=lambda *_: ring(3))
    reduce(members, [[np.ones(3000, np.float32)] for _ in members])
    assert [m.group.sent_bytes for m in members] == [2 * 2 * 12000 // 3] * 3


def test_a_lost_member_fails_what_needs_it_and_what_comes_after(groups: Groups) -> None:
    members = groups(3)
    large, small = np.ones(2**20, np.float32), np.ones(8, np.float32)
    futures = [m.group.all_reduce(b, 4, [x]) for m in members[:2] for b, x in ((0, large), (1, small))]
    members[2].close()
    for m in members[:2]:
        m.endpoint.lose("worker:2", "its connection broke")
    for number, future in enumerate(futures):
        with pytest.raises(WorkerLostError, match=f"worker:2 was lost, and bucket {number % 2} at clock 4") as caught:
            future.result(WAIT_S)
        assert caught.value.worker == "worker:2"
    with pytest.raises(WorkerLostError, match="worker:2 was lost, and bucket 0 at clock 5"):
        members[0].group.all_reduce(0, 5, [small]).result(WAIT_S)


OTHER_PROCESS = """
import sys
import numpy as np
from flowml_runtime.worker.training.exchange.collectives import Group, GroupId
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint

token, first = sys.argv[1:]
endpoint = GrpcEndpoint("worker:1", token)
endpoint.know({"worker:0": first})
group = Group(GroupId("plan", 0), "worker:1", ["worker:0", "worker:1"], endpoint.send)
endpoint.start(group.on_message, group.on_lost)
print(endpoint.address, flush=True)
sys.stdin.readline()
for clock, size in enumerate((10, 3_000_000)):
    group.all_reduce(0, clock, [np.arange(size, dtype=np.float32)]).result(30)
sys.stdin.readline()
"""


def test_another_process_adds_along_until_it_is_killed() -> None:
    endpoint = GrpcEndpoint("worker:0", TOKEN)
    command = [sys.executable, "-c", OTHER_PROCESS, TOKEN, endpoint.address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        member = Member(endpoint, ["worker:0", "worker:1"], None, {})
        try:
            endpoint.know({"worker:1": other.stdout.readline().strip()})
            other.stdin.write("go\n")
            other.stdin.flush()
            for clock, size in enumerate((10, 3_000_000)):
                x = np.arange(size, dtype=np.float32)
                [total] = member.group.all_reduce(0, clock, [x]).result(WAIT_S)
                np.testing.assert_array_equal(total, x + x)
            future = member.group.all_reduce(0, 2, [np.ones(8)])
            other.kill()
            with pytest.raises(WorkerLostError, match="worker:1 was lost, and bucket 0 at clock 2"):
                future.result(WAIT_S)
        finally:
            other.kill()
            member.close()


def test_a_late_member_is_named_and_the_next_clock_can_still_be_added_up(groups: Groups) -> None:
    members = groups(2, deadline_s=0.3)
    with pytest.raises(DeadlineError, match=r"bucket 3 at clock 0 was not added up within 0.3 s.*waits for worker:1"):
        members[0].group.all_reduce(3, 0, [np.ones(4, np.float32)]).result(WAIT_S)
    for member in members:
        member.group._deadline_s = WAIT_S  # pyright: ignore[reportPrivateUsage]
    x = np.ones(4, np.float32)
    assert (reduce(members, [[x], [x]], bucket=4)[0][0] == 2).all()


def test_members_that_reduce_different_things_are_told(groups: Groups) -> None:
    members = groups(2)
    futures = [m.group.all_reduce(0, 0, [np.ones(n, np.float32)]) for m, n in zip(members, (10, 12), strict=True)]
    for future in futures:
        with pytest.raises(ProtocolError, match=r"bucket 0 at clock 0, piece 0, chunk 0 has 1[02] elements here"):
            future.result(WAIT_S)
    with pytest.raises(ProtocolError):
        members[0].group.all_reduce(1, 0, [np.ones(1)])


def chunk(**other: Any) -> wire.Collective:
    values: dict[str, Any] = {"bucket": 0, "clock": 0, "piece": 0, "take": 1, **other}
    return wire.Collective(plan_id="plan", run=0, group=0, specs=(ArraySpec((4,), "float32"),), **values)


@pytest.fixture
def alone() -> Iterator[Group]:
    """A group of two whose other member is played by the test."""
    group = Group(GroupId("plan", 0), "a", ["a", "b"], lambda *_: None, deadline_s=60.0)
    yield group
    group.close()


@pytest.mark.parametrize(
    ("peer", "message", "array", "text"),
    [
        ("c", chunk(), np.ones(4, np.float32), "c sent for bucket 0 at clock 0"),
        ("b", chunk(piece=1), np.ones(4, np.float32), "rank 1 sent for bucket 0 at clock 0, piece 1, take 1"),
        ("b", chunk(take=0), np.ones(4, np.float32), "rank 1 sent for bucket 0 at clock 0, piece 0, take 0"),
        ("b", chunk(), np.ones(4, np.int32), "b sent int32 for bucket 0 at clock 0, piece 0, take 1"),
        ("b", chunk(), np.ones((2, 2), np.float32), "b sent other than a chunk for bucket 0"),
    ],
)
@pytest.mark.parametrize("early", [False, True])
def test_a_wrong_chunk_ends_the_group_with_its_sender(
    alone: Group, peer: str, message: wire.Collective, array: Any, text: str, early: bool
) -> None:
    if early:
        alone.on_message(peer, message, [array])
    future = alone.all_reduce(0, 0, [np.ones(4, np.float32)])
    if not early:
        alone.on_message(peer, message, [array])
    with pytest.raises(ProtocolError, match=text):
        future.result(WAIT_S)


def test_a_peer_can_be_one_clock_ahead_and_not_two(alone: Group) -> None:
    alone.on_message("b", chunk(clock=1), [np.ones(4, np.float32)])
    alone.on_message("b", chunk(clock=2), [np.ones(4, np.float32)])
    with pytest.raises(ProtocolError, match="b is too far ahead: bucket 0 at clock 2"):
        alone.all_reduce(0, 1, [np.ones(4, np.float32)])


def test_what_cannot_be_added_or_begun_is_refused(alone: Group) -> None:
    with pytest.raises(UnsupportedError, match="arrays of bool cannot be added up"):
        alone.all_reduce(0, 0, [np.ones(3, np.bool_)])
    with pytest.raises(UnsupportedError, match="all of one dtype"):
        alone.all_reduce(0, 0, [np.ones(3, np.float32), np.ones(3, np.float16)])
    alone.all_reduce(0, 5, [np.ones(3)])
    for clock in (5, 6):
        with pytest.raises(ProtocolError, match=f"bucket 0 at clock {clock} cannot begin"):
            alone.all_reduce(0, clock, [np.ones(3)])


def test_closing_ends_what_is_under_way_and_lets_its_memory_go(alone: Group) -> None:
    x = np.ones(100_000)
    future = alone.all_reduce(0, 0, [x])
    y = np.ones(4, np.float32)
    alone.on_message("b", chunk(clock=1), [y])
    held = [weakref.ref(x), weakref.ref(y)]
    alone.close()
    with pytest.raises(FlowmlError, match="closed"):
        future.result(WAIT_S)
    del x, y
    gc.collect()
    assert [ref() for ref in held] == [None, None]


def test_result_memory_is_used_again_once_no_view_of_it_is_left() -> None:
    pool = BufferPool(max_idle_bytes=2**20)
    first = pool.take(2**20)
    view = first.view(np.float32)[3:5].reshape(2, 1)
    address = first.ctypes.data
    assert address % 64 == 0
    del first
    other = pool.take(2**20)
    assert other.ctypes.data != address, "a view still needs it"
    del view
    assert pool.take(2**20).ctypes.data == address


def test_adding_keeps_the_order_it_is_given() -> None:
    a, b, c = (np.array([v], np.float32) for v in (1e8, -1e8, 1.0))
    out = np.zeros(1, np.float32)
    add([a, b, c], out, out.dtype)
    assert out[0] == 1.0
    add([b, c, a], out, out.dtype)
    assert out[0] == 0.0
