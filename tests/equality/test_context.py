"""What JAX's context means for a program: debug flags, values that are offloaded, small and unknown types."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name

import flowml as fm
from flowml.ir._jax import trace_context


@pytest.fixture(scope="module", params=["threads", "processes"])
def cluster(request: pytest.FixtureRequest) -> Iterator[fm.Cluster]:
    make = fm.Cluster.threads if request.param == "threads" else fm.Cluster.local
    with make(workers=2) as cluster:
        yield cluster


def turns(graph: Any, devices: Any) -> Any:
    return {n.id: devices[i % len(devices)] for i, n in enumerate(graph.nodes)}


def state(name: str) -> Callable[[Any], AbstractContextManager[Any]]:
    from jax._src import config  # pyright: ignore

    return config.config_states[name]


NOT_FINITE = {"jax_debug_nans": ("NaN", jnp.log), "jax_debug_infs": ("infinity", lambda x: x / 0.0)}  # pyright: ignore


@pytest.mark.parametrize("name", NOT_FINITE)
@pytest.mark.parametrize("keep", [None, 0])
def test_debug_flags_hold_on_the_workers(name: str, keep: Any, cluster: fm.Cluster) -> None:
    what, make = NOT_FINITE[name]
    kind = fm.NonFiniteError if keep is None else fm.FlowmlError  # a handle says which of its call's errors it is

    def fn(x: jax.Array) -> jax.Array:
        with fm.layer("first"):
            y = x - 2.0
        with fm.layer("second"):
            return make(y)

    places = {"first": "worker:0", "second": "worker:1"}
    f, x = fm.dataflow(fn, cluster=cluster, placement=places, keep=keep), jnp.ones(3)
    assert not np.isfinite(np.asarray(f(x))).any()
    with state(name)(True):
        with pytest.raises(FloatingPointError):
            jax.jit(fn)(x)
        for _ in range(2):
            with pytest.raises(kind, match=rf"second' has {what} in 3 of 3 places, and {name} is on"):
                np.asarray(f(x))
        with pytest.raises(kind):
            np.asarray(f.submit(x).result())
        assert np.isfinite(np.asarray(f(x + 4) if name == "jax_debug_nans" else fm.dataflow(jnp.sin)(x))).all()
    assert not np.isfinite(np.asarray(f(x))).any()


@pytest.mark.parametrize("placement", [turns, {"*": "worker:1"}, "auto"])
def test_a_masked_nan_is_none(placement: Any, cluster: fm.Cluster) -> None:
    fn: Callable[[Any], Any] = lambda x: jnp.where(x > 0, jnp.log(x), 0.0) + 1  # noqa: E731
    with jax.debug_nans(True):
        f, x = fm.dataflow(fn, cluster=cluster, placement=placement), jnp.linspace(-1.0, 1.0, 4)
        for _ in range(2):
            np.testing.assert_allclose(f(x), jax.jit(fn)(x), rtol=1e-6)


def test_debug_flags_hold_in_a_fit(cluster: fm.Cluster) -> None:
    def loss(params: Any, batch: Any) -> jax.Array:
        return jnp.mean(jnp.sqrt(batch @ params["w"]))

    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, on_nonfinite="apply")
    params, rows = {"w": -jnp.ones((3, 2))}, np.ones((4, 3), "f")
    assert np.isnan(trainer.fit(params, rows, batch_size=4, steps=1).history[0]["loss"])
    with jax.debug_nans(True), pytest.raises(fm.NonFiniteError, match=r"has NaN .*jax_debug_nans is on"):
        trainer.fit(params, rows, batch_size=4, steps=1)


def test_leaks_are_looked_for_in_every_call_under_the_flag(cluster: fm.Cluster) -> None:
    class Box:
        kept: Any = None

    def fn(x: Any) -> Any:
        Box.kept = x
        return x + 1

    f = fm.dataflow(fn, cluster=cluster)
    f(1.0)
    with jax.checking_leaks(), pytest.raises(Exception, match="Leaked trace"):
        f(1.0)


def test_a_version_without_the_private_key_uses_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src import config  # pyright: ignore

    monkeypatch.delattr(config, "trace_context")
    before = trace_context()
    with jax.numpy_rank_promotion("raise"):
        assert trace_context() != before
    assert trace_context() == before


OFFLOAD = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=["s"],
    names_which_can_be_offloaded=["h"],
    offload_src="device",
    offload_dst="pinned_host",
)


def test_offloaded_values_cross_the_cut(cluster: fm.Cluster) -> None:
    def block(w: jax.Array, x: jax.Array) -> jax.Array:
        for i in range(3):
            with fm.layer(f"layer{i}"):
                x = checkpoint_name(jnp.sin(checkpoint_name(x @ w, "h")), "s")
        return x.sum()

    each = jax.grad(lambda w, x: sum(jax.checkpoint(block, policy=OFFLOAD)(w, x * i) for i in (1, 2)))
    w, x = jnp.eye(3) * 0.3, jnp.ones((2, 3))
    f = fm.dataflow(each, cluster=cluster, placement=turns)
    assert len(f.plan(w, x).messages) > 3
    np.testing.assert_allclose(f(w, x), jax.jit(each)(w, x), rtol=1e-6)
    host = fm.dataflow(lambda x: jax.device_put(x * 2, jax.memory.Space.Host), cluster=cluster)
    np.testing.assert_array_equal(host(x), x * 2)


@pytest.mark.parametrize("name", ["int4", "uint4", "float4_e2m1fn"])
def test_arrays_of_four_bits_stay_and_are_closed_over(name: str, cluster: fm.Cluster) -> None:
    x = jnp.asarray(np.arange(4).astype(getattr(ml_dtypes, name)))

    def fn(y: jax.Array) -> Any:
        return y.reshape(2, 2).T.reshape(4), y.astype("float32") + x[::-1].astype("float32"), x

    want = jax.jit(fn)(jax.jit(fn)(x)[0])
    for device in cluster.devices:
        f = fm.dataflow(fn, cluster=cluster, placement=turns, keep=0)
        got = f(f(fm.put(x, cluster, device))[0])
        assert got[0].dtype == want[0].dtype
        for a, b in zip(want, got, strict=True):
            np.testing.assert_array_equal(np.asarray(b).astype("f"), np.asarray(a).astype("f"))


def test_types_that_xla_cannot_hold_are_refused(cluster: fm.Cluster) -> None:
    small = np.ones(3, ml_dtypes.float6_e2m3fn)
    for fn, argument in ((lambda x: x.astype("f"), small), (lambda x: x.astype(small.dtype).astype("f"), np.ones(3))):
        with pytest.raises(fm.UnsupportedError, match="of dtype float6_e2m3fn, which XLA cannot hold"):
            fm.dataflow(fn, cluster=cluster)(argument)
