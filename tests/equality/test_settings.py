"""JAX's settings decide what a function means: a program is compiled for those in force at the call, as jit is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.ir._jax import SETTINGS, trace_context

Context = Callable[[], AbstractContextManager[Any]]


def uniform(x: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.key(3), x.shape) + x


def raw_key(x: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.PRNGKey(3), x.shape) + x


def gumbel(x: jax.Array) -> jax.Array:
    return jax.random.gumbel(jax.random.key(3), x.shape) + x


def ranks(x: jax.Array) -> jax.Array:
    return x + x[None]


def kinds(x: jax.Array) -> jax.Array:
    return x + jnp.ones(4, jnp.bfloat16)


def product(x: jax.Array) -> jax.Array:
    return x[:, None] * x[None, :] @ x[:, None]


def wide(x: jax.Array) -> jax.Array:
    return jnp.arange(4) + jnp.sum(x).astype(float) / 3


def softmax(x: jax.Array) -> jax.Array:
    return jax.grad(lambda v: jax.nn.softmax(v)[0])(x)


def outside(x: jax.Array) -> jax.Array:
    return x + x[9]


def log(x: jax.Array) -> jax.Array:
    return jnp.log(x)


SETTINGS_THAT_MATTER: dict[str, tuple[Callable[[jax.Array], jax.Array], Context]] = {
    "jax_default_prng_impl": (uniform, lambda: jax.default_prng_impl("rbg")),
    "jax_default_prng_impl, raw keys": (raw_key, lambda: jax.default_prng_impl("rbg")),
    "jax_threefry_partitionable": (uniform, lambda: jax.threefry_partitionable(False)),
    "jax_random_seed_offset": (uniform, lambda: state("jax_random_seed_offset")(7)),
    "jax_high_dynamic_range_gumbel": (gumbel, lambda: state("jax_high_dynamic_range_gumbel")(True)),
    "jax_numpy_rank_promotion": (ranks, lambda: jax.numpy_rank_promotion("raise")),
    "jax_numpy_dtype_promotion": (kinds, lambda: jax.numpy_dtype_promotion("strict")),
    "jax_default_matmul_precision": (product, lambda: jax.default_matmul_precision("highest")),
    "jax_enable_x64": (wide, lambda: jax.enable_x64(True)),
    "jax_softmax_custom_jvp": (softmax, lambda: state("jax_softmax_custom_jvp")(True)),
    "jax_check_static_indices": (outside, lambda: state("jax_check_static_indices")(True)),
    "jax_legacy_prng_key": (raw_key, lambda: state("jax_legacy_prng_key")("error")),
    "jax_debug_nans": (log, lambda: jax.debug_nans(True)),
    "jax_debug_infs": (log, lambda: jax.debug_infs(True)),
    "jax_enable_custom_prng": (raw_key, lambda: state("jax_enable_custom_prng")(True)),
}


def state(name: str) -> Callable[[Any], AbstractContextManager[Any]]:
    from jax._src import config  # pyright: ignore

    return config.config_states[name]


@pytest.fixture(scope="module", params=["threads", "processes"])
def cluster(request: pytest.FixtureRequest) -> Iterator[fm.Cluster]:
    make = fm.Cluster.threads if request.param == "threads" else fm.Cluster.local
    with make(workers=2) as cluster:
        yield cluster


def found(call: Callable[..., Any], *args: Any) -> Any:
    """What a call gives, errors included, as something that can be compared."""
    try:
        return [(str(y.dtype), np.asarray(y).tolist()) for y in jax.tree_util.tree_leaves(call(*args))]
    except Exception as error:
        return type(error)


def halves(graph: Any, devices: Any) -> Any:
    return {n.id: devices[i * len(devices) // len(graph.nodes)] for i, n in enumerate(graph.nodes)}


def alternating(graph: Any, devices: Any) -> Any:
    return {n.id: devices[i % len(devices)] for i, n in enumerate(graph.nodes)}


@pytest.mark.parametrize("name", SETTINGS_THAT_MATTER)
def test_a_setting_holds_for_the_calls_made_under_it(name: str, cluster: fm.Cluster) -> None:
    fn, setting = SETTINGS_THAT_MATTER[name]

    def own(x: jax.Array) -> jax.Array:  # whose traces JAX does not know yet
        return fn(x)

    f, x = fm.dataflow(own, cluster=cluster, placement=halves), jnp.linspace(0.5, 1.0, 4)
    before = found(f, x)
    assert before == found(jax.jit(fn), x)
    with setting():
        expected = found(jax.jit(own), x)
        assert found(f, x) == expected
        assert found(f, x) == expected  # the quick way, where nothing is looked up
        assert found(lambda x: f.submit(x).result(), x) == expected
        if not isinstance(expected, type):
            specs = f.plan(x).outputs
            assert [o.spec.dtype for o in specs] == [dtype for dtype, _ in expected]
    assert found(f, x) == before


def test_every_setting_that_travels_is_tested() -> None:
    assert set(SETTINGS) <= {name.partition(",")[0] for name in SETTINGS_THAT_MATTER}


def test_whatever_jax_looks_at_is_in_the_key() -> None:
    """Contexts that JAX's own caches tell apart, a user's own among them."""
    mine = jax.make_user_context(None)
    contexts = [mine(1), jax.disable_jit(), jax.default_matmul_precision("high"), jax.enable_x64(True)]
    seen = {trace_context()}
    for context in contexts:
        with context:
            seen.add(trace_context())
    assert len(seen) == len(contexts) + 1


def test_settings_belong_to_the_thread_that_calls(cluster: fm.Cluster) -> None:
    f, x = fm.dataflow(wide, cluster=cluster, placement=halves), jnp.ones(4)

    def under(bits: bool) -> Any:
        with jax.enable_x64(bits):
            return [found(f, x) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(under, [True, False] * 4))
    with jax.enable_x64(True):
        expected = found(jax.jit(wide), x)
    assert results == [[expected] * 5, [found(jax.jit(wide), x)] * 5] * 4
    assert not jax.config.jax_enable_x64  # pyright: ignore


def inner(n: Any) -> Any:
    with jax.enable_x64(True):
        return 2 + n, n.astype("int64") * 3


def mixed(x: Any) -> Any:
    with jax.enable_x64(True):
        y = jnp.sin(x.astype("float64")) * 2.0
        y = jax.lax.scan(lambda c, a: (c + a / 3.0, c), y[0], y)[0]
    return x * 2.0, (y * 1.5).astype("float32")


@pytest.mark.parametrize("placement", [halves, alternating, {"*": "worker:1"}])
def test_64_bits_inside_a_function(placement: Any, cluster: fm.Cluster) -> None:
    n, x = 2**31 - 1, jnp.linspace(0.0, 1.0, 3)
    for fn, arg in ((inner, n), (mixed, x)):
        f = fm.dataflow(fn, cluster=cluster, placement=placement)
        assert found(f, arg) == found(jax.jit(fn), arg)


@pytest.mark.parametrize("large", [3, 2**16])
def test_64_bits_around_a_call(large: int, cluster: fm.Cluster) -> None:
    x = np.linspace(0.0, 1.0, large)
    fn: Callable[[Any], Any] = lambda x: (jnp.sin(x) / 3, x, jnp.sum(x), jnp.arange(2) + 2**40)  # noqa: E731
    f = fm.dataflow(fn, cluster=cluster, placement=alternating)
    with jax.enable_x64(True):
        array = jnp.asarray(x)
        future = f.submit(x)
        for given in (x, array):
            want, got = jax.jit(fn)(given), f(given)
            assert [y.dtype for y in got] == [y.dtype for y in want] == ["float64"] * 3 + ["int64"]
            for a, b in zip(want, got, strict=True):
                np.testing.assert_allclose(b, a, rtol=1e-15)
    late = future.result()  # taken where 64 bits are off
    assert [str(y.dtype) for y in late] == ["float64"] * 3 + ["int64"]
    assert found(f, array) == found(jax.jit(fn), array)  # of 64 bits, where they are off


def test_64_bits_switched_on_for_good_after_the_cluster_is_up(cluster: fm.Cluster) -> None:
    fn: Callable[[Any], Any] = lambda x: jnp.sin(x / 3) + jnp.arange(3)  # noqa: E731
    f, x = fm.dataflow(fn, cluster=cluster, placement=alternating), np.arange(3.0)
    assert f(x).dtype == "float32"
    jax.config.update("jax_enable_x64", True)
    try:
        got, want = f(x), jax.jit(fn)(x)
    finally:
        jax.config.update("jax_enable_x64", False)
    assert got.dtype == want.dtype == "float64"
    np.testing.assert_allclose(got, want, rtol=1e-15)
    assert f(x).dtype == "float32"


def test_equal_operations_under_other_settings_stay_apart(cluster: fm.Cluster) -> None:
    def fn(x: jax.Array) -> Any:
        with jax.threefry_partitionable(False):
            a = uniform(x)
        return a, uniform(x)

    f, x = fm.dataflow(fn, cluster=cluster), jnp.ones(4)
    assert found(f, x) == found(jax.jit(fn), x)


def test_a_worker_takes_only_settings_that_travel() -> None:
    plan = fm.compile(lambda x: x + 1, jnp.ones(2), devices=["worker:0"])
    with fm.Cluster.threads(workers=1) as cluster:
        for setting in (("jax_compilation_cache_dir", "/tmp/elsewhere"), ("jax_numpy_rank_promotion", "sideways")):
            with pytest.raises(fm.FlowmlError, match=f"cannot load plan.*{setting[0]}"):
                cluster.session.load(msgspec.structs.replace(plan, settings=(setting,)))


def test_64_bits_of_a_plan_without_a_cluster() -> None:
    with jax.enable_x64(True):
        plan = fm.compile(lambda x: x + 1, jax.ShapeDtypeStruct((2,), "float64"), devices=["worker:0"])
    assert plan.outputs[0].spec.dtype == "float64"
    assert dict(plan.settings)["jax_enable_x64"] is True


def loss(params: Any, batch: Any) -> jax.Array:
    noise = jax.random.uniform(jax.random.key(0), (2,))
    return jnp.mean((batch["x"].astype(float) @ params["w"] - noise) ** 2)


@pytest.mark.parametrize("setting", ["jax_threefry_partitionable", "jax_enable_x64", "jax_random_seed_offset"])
def test_a_trainer_is_used_again_under_another_setting(setting: str, cluster: fm.Cluster) -> None:
    params, source = {"w": np.zeros((3, 2), np.float32)}, {"x": np.full((8, 3), 1 / 3, np.float32)}

    def fit(trainer: fm.Trainer) -> float:
        return trainer.fit(params, source, batch_size=8, steps=1).history[0]["loss"]

    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster)
    before = fit(trainer)
    with SETTINGS_THAT_MATTER[setting][1]():
        expected = float(loss(params, source))
        assert fit(trainer) == pytest.approx(expected, rel=1e-12 if setting == "jax_enable_x64" else 1e-6)
        assert trainer.plan(params, source).settings == trainer.plan(params, source).settings
    assert expected != before
    assert fit(trainer) == before


def test_training_in_64_bits(cluster: fm.Cluster) -> None:
    rows = np.random.default_rng(0).normal(size=(16, 3))
    with jax.enable_x64(True):
        trainer = fm.Trainer(
            lambda p, b: jnp.mean((b @ p["w"]) ** 2), optax.adam(0.1), cluster=cluster, replicas=2, microbatches=2
        )
        result = trainer.fit({"w": np.ones((3, 2))}, rows, batch_size=16, steps=3, shuffle=False)
        optimizer, params = optax.adam(0.1), {"w": jnp.ones((3, 2))}
        opt_state = optimizer.init(params)
        for _ in range(3):
            gradient = jax.grad(lambda p: jnp.mean((rows @ p["w"]) ** 2))(params)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
    assert result.params["w"].dtype == "float64"
    np.testing.assert_allclose(result.params["w"], params["w"], rtol=1e-9)


def test_callbacks_compute_under_the_settings_of_their_plan() -> None:
    def host(x: Any) -> Any:
        return np.asarray(jnp.asarray(x) / 3)

    def fn(x: Any) -> Any:
        return jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    x = np.ones(2)
    for make in (fm.Cluster.threads, partial(fm.Cluster.local, allow_python=True)):
        with make(workers=1) as cluster, jax.enable_x64(True):
            f = fm.dataflow(fn, cluster=cluster)
            assert found(f, x) == [("float64", [1 / 3, 1 / 3])]
