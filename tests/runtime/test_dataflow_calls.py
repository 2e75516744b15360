"""`dataflow`: called and decorated like jit, one compile a signature, clear errors before anything is sent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowml as fm
from flowml.placement.links import Links
from flowml_runtime import wire
from tests.network import Network

X = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)


@pytest.fixture(params=["fed", "local"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Any]:
    with Network(local=request.param == "local") as network:
        yield FakeCluster(network)


class FakeCluster:
    """What `dataflow` needs of a cluster, without processes."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.devices = network.devices
        self.session = network.session

    def links_for(self, placement: Any) -> Links:
        return Links()

    @property
    def loads(self) -> int:
        return sum(isinstance(message, wire.LoadPlan) for _, message in self.network.driver.sent)


def layers(params: dict[str, Any], x: Any, *, scale: Any = 1.0) -> dict[str, Any]:
    with fm.layer("first"):
        h = jnp.tanh(x @ params["a"])
    with fm.layer("second"):
        return {"y": h @ params["b"] * scale, "norm": jnp.sum(h**2)}


PARAMS = {"a": np.ones((3, 5), np.float32) / 7, "b": np.ones((5, 2), np.float32) / 3}


@pytest.mark.parametrize("placement", ["auto", {"first": "worker:0", "second": "worker:1"}])
def test_a_call_equals_jit_with_its_structure(cluster: FakeCluster, placement: Any) -> None:
    f = fm.dataflow(layers, cluster=cluster, placement=placement)
    expected = jax.jit(layers)(PARAMS, X, scale=2)
    for result in (f(PARAMS, X, scale=2), f.submit(PARAMS, X, scale=2).result(timeout=60)):
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            assert isinstance(result[name], jax.Array)
            assert (result[name].dtype, result[name].weak_type) == (value.dtype, value.weak_type)
            np.testing.assert_allclose(result[name], value, rtol=1e-6)


def test_it_decorates_with_and_without_arguments(cluster: FakeCluster) -> None:
    @fm.dataflow(cluster=cluster, static_argnums=1)
    def power(x: Any, n: int) -> Any:
        """x to the n."""
        return x**n

    bare = fm.dataflow(power._fn, cluster=cluster, static_argnums=(-1,))
    assert (power.__name__, power.__doc__) == ("power", "x to the n.")
    np.testing.assert_array_equal(power(X, 3), X**3)
    np.testing.assert_array_equal(bare(X, 2), X**2)


def test_one_compile_a_signature(cluster: FakeCluster) -> None:
    traced: list[str] = []

    @fm.dataflow(cluster=cluster, static_argnums=1)
    def f(x: Any, n: int) -> Any:
        traced.append(str(jnp.shape(x)))
        return x * n

    for x in (X, X + 1, np.asarray(X), np.asarray(X, np.float64)):  # float64 is float32 without x64
        f(x, 2)
        f.submit(x, 2).result(timeout=60)
    assert (len(traced), cluster.loads) == (1, 1)
    for other in (X[0], X.astype(jnp.int32), 1.0):
        f(other, 2)
    f(X, 3)
    assert (len(traced), cluster.loads) == (5, 5)


@pytest.mark.parametrize("value", [3, 2.5, True, 1j, np.float32(2), np.int64(7), np.arange(3), jnp.asarray(1.0)])
def test_numbers_are_arguments_as_for_jit(cluster: FakeCluster, value: Any) -> None:
    def f(x: Any) -> Any:
        return x + x, x

    expected = jax.jit(f)(value)
    for got, want in zip(fm.dataflow(f, cluster=cluster)(value), expected, strict=True):
        assert (got.dtype, got.weak_type, got.shape) == (want.dtype, want.weak_type, want.shape)
        np.testing.assert_array_equal(got, want)


def test_a_plan_needs_no_arrays_and_sends_nothing(cluster: FakeCluster) -> None:
    f = fm.dataflow(lambda x: jnp.sin(x).sum(), cluster=cluster)
    plan = f.plan(jax.ShapeDtypeStruct((2, 3), jnp.float32))
    assert isinstance(plan, fm.Plan)
    assert cluster.network.driver.sent == []
    f(X)
    assert f.plan(X) is plan


def test_a_worker_that_comes_back_is_used_again() -> None:
    with Network() as network:
        cluster = FakeCluster(network)
        f = fm.dataflow(layers, cluster=cluster, placement={"first": "worker:0", "second": "worker:1"})
        expected = f(PARAMS, X)
        network.lose("worker:1")
        with pytest.raises(fm.WorkerLostError, match="worker:1"):
            f(PARAMS, X)
        network.start(1)
        np.testing.assert_array_equal(f(PARAMS, X)["y"], expected["y"])


def test_under_another_transformation_it_is_inlined(cluster: FakeCluster) -> None:
    f = fm.dataflow(lambda x: jnp.sin(x) * 2, cluster=cluster)
    np.testing.assert_allclose(jax.grad(lambda x: f(x).sum())(X), 2 * jnp.cos(X), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(f)(X), jnp.sin(X) * 2, rtol=1e-6)
    with pytest.raises(TypeError, match=r"submit\(\) cannot be traced"):
        jax.jit(f.submit)(X)
    assert cluster.loads == 0


@pytest.mark.parametrize(
    ("args", "kwargs", "where"),
    [
        (("text",), {}, r"args\[0\] is of type str, which is not an array; .*static_argnums"),
        ((X, {"deep": [X, object()]}), {}, r"args\[1\]\['deep'\]\[1\] is of type object, which is not an array"),
        ((X,), {"scale": np.array(["a"])}, r"keyword \['scale'\] has dtype <U1, which is not numeric"),
        ((X, [np.zeros(2, object)]), {}, r"args\[1\]\[0\] has dtype object, which is not numeric"),
        (
            (X, {"w": np.zeros(2, ">f4")}),
            {},
            r"args\[1\]\['w'\] has dtype >f4, which has the byte order.*float32",
        ),
        ((jax.eval_shape(jnp.sin, X),), {}, r"args\[0\] is a jax.ShapeDtypeStruct without values; pass an array, or"),
        (({"w": [X, jax.eval_shape(jnp.sin, X)]},), {}, r"args\[0\]\['w'\]\[1\] is a jax.ShapeDtypeStruct without"),
        ((jax.new_ref(X),), {}, r"args\[0\] is a jax Ref, which no worker can write to; pass its value"),
    ],
)
def test_what_is_no_array_is_named(cluster: FakeCluster, args: Any, kwargs: Any, where: str) -> None:
    with pytest.raises(TypeError, match=f"layers: {where}"):
        fm.dataflow(layers, cluster=cluster)(*args, **kwargs)
    with pytest.raises(TypeError, match=f"layers: {where}"):
        fm.dataflow(layers, cluster=cluster).submit(*args, **kwargs)
    assert cluster.loads == 0


def test_other_bad_calls_say_what_to_do(cluster: FakeCluster) -> None:
    f = fm.dataflow(lambda x, how: x, cluster=cluster, static_argnums=1)
    with pytest.raises(ValueError, match="static argument 1 is of type list, which cannot be hashed"):
        f(X, [1])
    with pytest.raises(TypeError, match=r"dataflow\(\) takes a function, got int"):
        fm.dataflow(3)  # type: ignore[call-overload]


def test_without_a_cluster_it_says_how_to_get_one() -> None:
    with pytest.raises(fm.ClusterError, match=r"there is no cluster; .*fm.Cluster.local"):
        fm.dataflow(lambda x: x)(X)
