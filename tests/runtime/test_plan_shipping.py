"""What of a plan reaches which worker: constants and executables where they are used, in pieces of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flowml as fm
from flowml import compiler
from flowml.errors import WorkerError, WorkerLostError
from flowml.plan import Plan
from flowml_runtime import wire
from flowml_runtime.driver import holdings, loading
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.worker.arriving import Arriving
from tests.network import Network

MIB = 2**20
X = jnp.ones((2, 256))


def with_constant(mib: int) -> Callable[[Any], Any]:
    """A function whose first layer multiplies by a constant of so many MiB."""
    w = np.random.default_rng(0).normal(size=(256, mib * 1024)).astype(np.float32)

    def net(x: Any) -> Any:
        with fm.device("worker:0"):
            h = (x @ w)[:, :4]
        with fm.device("worker:1"):
            return jnp.tanh(h)

    return net


def spied(network: Network) -> dict[str, list[tuple[wire.Wire, int]]]:
    """What each worker is sent to load, and how many bytes with it."""
    seen: dict[str, list[tuple[wire.Wire, int]]] = {w.name: [] for w in network.workers}

    def spy(worker: Any) -> Callable[[str, wire.Wire, Sequence[Any]], None]:
        def receive(peer: str, message: wire.Wire, arrays: Sequence[Any]) -> None:
            if isinstance(message, wire.LoadPlan | wire.BringPiece):
                seen[worker.name].append((message, sum(a.nbytes for a in arrays)))
            worker.on_message(peer, message, arrays)

        return receive

    for worker in network.workers:
        network.receivers[worker.name] = spy(worker)
    return seen


def compiled(fn: Callable[..., Any], *args: Any) -> Plan:
    return fm.compile(fn, *args, devices=["worker:0", "worker:1"])


def test_a_large_constant_goes_in_pieces_to_the_worker_that_uses_it_and_to_no_other() -> None:
    net = with_constant(20)
    with Network() as network:
        seen = spied(network)
        handle = network.session.load(compiled(net, X))
        (result,) = network.session.submit(handle, [X]).result()
    np.testing.assert_allclose(result, jax.jit(net)(X), rtol=1e-5)
    assert sum(n for _, n in seen["worker:0"]) > 20 * MIB
    assert sum(n for _, n in seen["worker:1"]) < MIB
    assert max(n for messages in seen.values() for _, n in messages) <= loading.PIECE_BYTES


@pytest.mark.parametrize("make", ["threads", "local"])
def test_whatever_travels_in_pieces_computes_what_jit_computes(make: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PART_BYTES", 0)
    monkeypatch.setattr(loading, "PIECE_BYTES", 1000)
    monkeypatch.setattr(holdings, "PIECE_BYTES", 1000)
    monkeypatch.setattr(compiler, "LARGE_BYTES", 0)
    keys = jax.random.split(jax.random.key(3), 5)
    half = jnp.arange(2000, dtype=jnp.bfloat16)

    def net(x: Any) -> Any:
        with fm.device("worker:0"):
            h = x @ jnp.asarray(np.arange(512, dtype=np.float32).reshape(256, 2)) + half.sum()
        with fm.device("worker:1"):
            return h + jax.random.normal(keys[2], h.shape), half * 2

    with getattr(fm.Cluster, make)(workers=2):
        for got, expected in zip(fm.dataflow(net)(X), jax.jit(net)(X), strict=True):
            assert got.dtype == expected.dtype
            np.testing.assert_allclose(np.float32(got), np.float32(expected), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:net closes over")
def test_memory_of_a_worker_does_not_grow_with_the_constants_of_others() -> None:
    mib = 96
    with closing(fm.Cluster.local(workers=3)) as cluster:

        def used() -> list[float]:
            return [psutil.Process(p).memory_info().rss / MIB for p in cluster.pids.values()]

        def everywhere(x: Any) -> Any:
            for worker in cluster.pids:
                with fm.device(worker):
                    x = jnp.tanh(x @ jnp.ones((256, 256)))
            return x

        fm.dataflow(everywhere, cluster=cluster)(X)  # XLA itself takes its memory with the first program
        before = used()
        program = fm.dataflow(with_constant(mib), cluster=cluster)
        program(X)
        grown = [now - then for now, then in zip(used(), before, strict=True)]
    assert grown[1] < 40
    assert grown[2] < 40
    assert mib <= grown[0] < 2 * mib + 80  # the array, and what XLA makes of it; never copies of the plan


def test_a_piece_out_of_order_fails_the_load_and_no_other() -> None:
    with Network() as network:
        forward = network.workers[0].on_message

        def lossy(peer: str, message: wire.Wire, arrays: Sequence[Any]) -> None:
            if not (isinstance(message, wire.BringPiece) and message.start == holdings.PIECE_BYTES):
                forward(peer, message, arrays)

        network.receivers["worker:0"] = lossy
        with pytest.raises(WorkerError, match=r"worker:0 cannot load plan 'net': .*before an array that its function"):
            network.session.load(compiled(with_constant(20), X))
        network.receivers["worker:0"] = forward
        assert network.session.load(compiled(lambda x: x + 1, X)) is not None


def test_a_worker_lost_amid_the_pieces_is_named() -> None:
    with Network() as network:
        forward = network.workers[0].on_message

        def die(peer: str, message: wire.Wire, arrays: Sequence[Any]) -> None:
            forward(peer, message, arrays)
            if isinstance(message, wire.BringPiece) and message.start == holdings.PIECE_BYTES:
                del network.receivers["worker:0"]

        network.receivers["worker:0"] = die
        with pytest.raises(
            WorkerLostError, match=r"worker:0 was lost before it had plan 'net'.*start the worker again"
        ):
            network.session.load(compiled(with_constant(20), X))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(1, 20))
def test_pieces_of_any_size_make_up_the_parts(sizes: list[int], piece: int) -> None:
    rng = np.random.default_rng(sum(sizes))
    parts = {"" if n == 0 else f"constant {n}": rng.integers(0, 255, s, np.uint8) for n, s in enumerate(sizes)}
    starts = [(key, start) for key, data in parts.items() for start in range(0, data.nbytes, piece)]
    arriving = Arriving()
    for number, (key, start) in enumerate(starts, 1):
        data, last = parts[key], number == len(starts)
        message = wire.LoadPlan(plan_id="p", part=key, start=start, nbytes=data.nbytes, last=last)
        if start:
            with pytest.raises(ProtocolError):
                arriving.take(wire.LoadPlan(plan_id="p", part=key, start=start - 1, nbytes=data.nbytes), data[:1])
        assert arriving.take(message, data[start : start + piece]) == last
    plan, others = arriving.taken()
    assert {"": plan, **others}.keys() == parts.keys()
    for key, data in {"": plan, **others}.items():
        np.testing.assert_array_equal(data, parts[key])
