"""A figure that traffic contradicts is measured again."""

from __future__ import annotations

import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowml as fm
from flowml.placement.links import GRPC, Link
from flowml.plan import ArraySpec
from flowml_runtime import wire
from flowml_runtime.links.cache import RememberedLinks
from flowml_runtime.links.table import HERE
from flowml_runtime.links.traffic import FACTOR, LARGE_BYTES, TIMES, Traffic
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from tests.conftest import wait_until
from tests.proxy import Proxy

LINK = Link(0.0, 1e9, GRPC, measured=True)
SIZE = 4 * LARGE_BYTES
SLOW_S = 1.01 * FACTOR * LINK.seconds(SIZE)


@pytest.fixture
def told() -> list[tuple[str, float]]:
    return []


@pytest.fixture
def traffic(told: list[tuple[str, float]]) -> Traffic:
    found = Traffic(lambda peer, rate: told.append((peer, rate)))
    found.expect("b", LINK)
    return found


def test_several_slow_sends_contradict_a_figure_once(traffic: Traffic, told: list[tuple[str, float]]) -> None:
    for n in range(TIMES + 5):
        assert told == [] or n >= TIMES
        traffic.sent("b", SIZE, SLOW_S * (1 + n))
    assert told == [("b", pytest.approx(SIZE / SLOW_S))]
    traffic.expect("b", Link(0.0, SIZE / SLOW_S, GRPC, measured=True))  # measured again
    for _ in range(TIMES):
        traffic.sent("b", SIZE, SLOW_S)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("peer", "nbytes", "seconds"), [("b", SIZE, SLOW_S / 1.1), ("b", LARGE_BYTES - 1, 10.0), ("c", SIZE, 10.0)]
)
def test_what_is_as_fast_as_it_should_be_small_or_unknown_contradicts_nothing(
    traffic: Traffic, told: list[tuple[str, float]], peer: str, nbytes: int, seconds: float
) -> None:
    for _ in range(2 * TIMES):
        traffic.sent(peer, nbytes, seconds)
    assert told == []


def test_slow_sends_with_a_fast_one_between_them_contradict_nothing(
    traffic: Traffic, told: list[tuple[str, float]]
) -> None:
    for n in range(4 * TIMES):
        traffic.sent("b", SIZE, SLOW_S if n % TIMES else 0.001)
    assert told == []


def test_a_link_that_is_cut_to_50_megabits_is_found_out_by_its_traffic(told: list[tuple[str, float]]) -> None:
    arrived = threading.Semaphore(0)
    a, b = (GrpcEndpoint(n, "token", shared_memory=False, max_queued_bytes=4 * LARGE_BYTES) for n in "ab")
    traffic = Traffic(lambda peer, rate: told.append((peer, rate)))
    a.on_sent = traffic.sent
    payload = np.ones(2 * LARGE_BYTES, np.uint8)
    probe = wire.Probe(number=1, specs=(ArraySpec(payload.shape, "uint8"),))
    with Proxy(b.address) as proxy:
        try:
            b.start(lambda *_: arrived.release(), lambda *_: None)
            a.start(lambda *_: None, lambda *_: None)
            a.know({"b": proxy.address})
            # A busy machine lets a megabyte through in less than four seconds, but perhaps not as a fast link does.
            for limit, figure, expected in ((None, 1e6, 0), (50e6 / 8, 125e6, 1)):
                traffic.expect("b", Link(1e-3, figure, GRPC, measured=True))
                proxy.bytes_per_s = limit
                sent = 0
                # buffers on the way take the first ones
                while sent < TIMES + 3 or (len(told) < expected and sent < 50):
                    a.send("b", probe, [payload])
                    sent += 1
                for _ in range(sent):
                    assert arrived.acquire(timeout=60)
                assert len(told) == expected
        finally:
            a.close()
            b.close()
    assert told[0][1] < 125e6 / FACTOR


@pytest.fixture
def remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RememberedLinks:
    """The file of a program that measured links a thousand times as fast as they are now."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = RememberedLinks()
    found.remember(HERE, HERE, Link(1e-9, 1e13, GRPC, measured=True))
    return found


def test_a_remembered_figure_is_measured_again_once_traffic_contradicts_it(remembered: RememberedLinks) -> None:
    weight = jnp.ones((1024, 1024))

    def fn(x: jax.Array) -> jax.Array:
        with fm.layer("a"):
            h = jnp.tanh(x @ weight)
        with fm.layer("b"):
            return jnp.sum(h @ h)

    x = jnp.ones((1024, 1024))
    with fm.Cluster.local(workers=2, transport="grpc", links="measure") as cluster:
        assert cluster.links_for("auto").between("worker:0", "worker:1").bytes_per_s == 1e13
        f = fm.dataflow(fn, cluster=cluster, placement={"a": "worker:0", "b": "worker:1"})
        for _ in range(TIMES + 1):
            f(x)
        wait_until(lambda: not cluster.links.between("worker:0", "worker:1").measured, "the figure is dropped")
        found = cluster.links_for("auto").between("worker:0", "worker:1")
    assert found.measured and found.bytes_per_s < 1e12
    kept = remembered.find(HERE, HERE, GRPC)
    assert kept is not None and kept.bytes_per_s == found.bytes_per_s
