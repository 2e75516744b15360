"""Large arrays that functions close over: they stay on the devices that read them, once for all programs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
import pytest

import flowml as fm
from flowml.captured import LARGE_BYTES
from flowml.plan import Plan
from flowml_runtime import wire
from tests.network import Network

MIB = 2**20
LARGE = np.random.default_rng(0).normal(size=(256, 2048)).astype("f")  # 2 MiB
ON_ONE = {"*": "worker:1"}


def until(found: Callable[[], Any]) -> bool:
    """Whether something becomes true within a minute."""
    deadline_s = time.monotonic() + 60
    while not found() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return bool(found())


def brought(network: Network) -> list[int]:
    """The sizes of the pieces of closed-over arrays that workers get from now on."""
    sizes: list[int] = []

    def spy(worker: Any) -> Callable[[str, wire.Wire, Sequence[Any]], None]:
        def receive(peer: str, message: wire.Wire, arrays: Sequence[Any]) -> None:
            if isinstance(message, wire.BringPiece):
                sizes.extend(a.nbytes for a in arrays)
            worker.on_message(peer, message, arrays)

        return receive

    for worker in network.workers:
        network.receivers[worker.name] = spy(worker)
    return sizes


def compiled(fn: Callable[..., Any], *args: Any) -> Plan:
    return fm.compile(fn, *args, devices=["worker:0", "worker:1"], placement=ON_ONE)


def test_programs_share_an_array_that_is_sent_once_and_freed_with_the_last() -> None:
    one, same, other = jnp.asarray(LARGE), LARGE.copy(), LARGE + 1
    x, y = jnp.ones((2, 256)), jnp.ones((3, 256))
    with Network() as network:
        sizes, session = brought(network), network.session
        handles = [session.load(compiled(lambda v: v @ one, arg)) for arg in (x, y)]
        handles.append(session.load(compiled(lambda v: jnp.sin(v @ same), x)))
        assert sum(sizes) == LARGE.nbytes == session.held.on("worker:1/cpu:0")
        np.testing.assert_allclose(session.submit(handles[1], [y]).result()[0], y @ one, rtol=1e-5)
        np.testing.assert_allclose(session.submit(handles[2], [x]).result()[0], jnp.sin(x @ one), rtol=1e-5, atol=1e-5)
        handles.append(session.load(compiled(lambda v: v @ other, x)))
        assert session.held.on("worker:1/cpu:0") == 2 * LARGE.nbytes
        while handles:
            session.unload(handles.pop())
        assert until(lambda: session.held.on("worker:1/cpu:0") == 0)


def test_a_plan_names_an_array_and_does_not_hold_it(tmp_path: Path) -> None:
    plan = compiled(lambda v: v @ LARGE, jnp.ones((2, 256)))
    plan.save(tmp_path / "small.plan")
    assert (tmp_path / "small.plan").stat().st_size < 64 * 1024 < LARGE_BYTES
    read = fm.Plan.load(tmp_path / "small.plan")
    assert read == plan
    with Network() as network, pytest.raises(fm.FlowmlError, match=r"float32\[256, 2048\] that its file does not hold"):
        network.session.load(read)


@pytest.mark.parametrize("make", [fm.Cluster.threads, fm.Cluster.local])
def test_what_is_computed_with_large_arrays(make: Any) -> None:
    keys = jax.random.split(jax.random.key(0), 2**18)
    half, array = jnp.ones((2048, 512), jnp.bfloat16), LARGE.copy()

    def fn(x: jax.Array) -> Any:
        with fm.layer("a"):
            h = x @ array
        with fm.layer("b"):
            return h @ half + jax.random.uniform(keys[-1]), half, (x[:, :1] @ array[:1]).astype(float)

    x = jnp.ones((2, 256))
    want = jax.jit(fn)(x)
    with make(workers=2) as cluster:
        for placement in ({"a": "worker:0", "b": "worker:1"}, ON_ONE):
            for keep in (None, 1):
                f = fm.dataflow(fn, cluster=cluster, placement=placement, keep=keep)
                for a, b in zip(want, f(x), strict=True):
                    assert a.dtype == b.dtype
                    np.testing.assert_allclose(np.asarray(b, "f"), np.asarray(a, "f"), rtol=1e-2)
        array[:] = 0.0  # a program that is loaded again has the array of its trace, as jit's executable does
        cluster.session.max_programs = 1
        fm.dataflow(lambda x: x + 1, cluster=cluster)(x)
        np.testing.assert_allclose(np.asarray(f(x)[2], "f"), np.asarray(want[2], "f"), rtol=1e-5)


def test_memory_of_a_worker_that_has_a_large_array() -> None:
    size = 96 * MIB
    array = jnp.ones((256, size // 1024))
    with fm.Cluster.local(workers=1) as cluster:
        (process,) = [psutil.Process(pid) for pid in cluster.pids.values()]
        fm.dataflow(lambda x: (x @ jnp.ones((256, 256))).sum(), cluster=cluster)(jnp.ones((2, 256)))
        before = process.memory_info().rss

        def grown() -> int:
            return process.memory_info().rss - before

        f = fm.dataflow(lambda x: jnp.sin(array[0, 0]) + x.sum() + array[-1].max(), cluster=cluster)
        with pytest.warns(fm.FlowmlWarning, match=r"closes over 100,663,296 bytes of arrays .*float32\[256, 98304\]"):
            f(np.ones(2, "f"))
        assert size <= grown() < 2 * size  # the array, and what XLA itself takes; a second copy comes to more
        first = grown()
        with pytest.warns(fm.FlowmlWarning):
            f(np.ones(3, "f"))
        assert grown() < first + size / 2  # another shape, the same array
        both = grown()
        del f
        gc.collect()
        assert until(lambda: grown() < both - size / 2)


def test_a_fit_keeps_what_its_loss_closes_over() -> None:
    def loss(params: Any, batch: Any) -> jax.Array:
        return jnp.mean((batch @ LARGE @ params["w"]) ** 2)

    params, rows = {"w": np.full((2048, 1), 0.01, "f")}, np.ones((8, 256), "f")
    with fm.Cluster.threads(workers=2) as cluster:
        trainer = fm.Trainer(loss, optax.sgd(1e-6), cluster=cluster, replicas=2)
        result = trainer.fit(params, rows, batch_size=8, steps=1, shuffle=False)
        assert len(trainer.plan(params, rows).encode()) < LARGE_BYTES
        assert cluster.session.held.on("worker:0/cpu:0") == LARGE.nbytes == cluster.session.held.on("worker:1/cpu:0")
    assert result.history[0]["loss"] == pytest.approx(float(loss(params, rows)), rel=1e-5)
