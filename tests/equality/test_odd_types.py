"""Corners of JAX's types and modes: each works as under jit, or is refused in one sentence that says where and why."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer

import flowml as fm


@pytest.fixture(scope="module", params=["threads", "processes"])
def cluster(request: pytest.FixtureRequest) -> Iterator[fm.Cluster]:
    make = fm.Cluster.threads if request.param == "threads" else fm.Cluster.local
    with make(workers=2) as cluster:
        yield cluster


def turns(graph: Any, devices: Any) -> Any:
    return {n.id: devices[i % len(devices)] for i, n in enumerate(graph.nodes)}


def agrees(fn: Any, *args: Any, cluster: fm.Cluster, placement: Any = turns) -> None:
    """A program gives what jit gives: structure, kinds and values."""
    want, got = jax.jit(fn)(*args), fm.dataflow(fn, cluster=cluster, placement=placement)(*args)
    assert jax.tree_util.tree_structure(got) == jax.tree_util.tree_structure(want)
    for a, b in zip(jax.tree_util.tree_leaves(want), jax.tree_util.tree_leaves(got), strict=True):
        assert (b.shape, b.dtype, isinstance(b, jax.Array)) == (a.shape, a.dtype, isinstance(a, jax.Array))
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(np.asarray(b, np.float64), np.asarray(a, np.float64), rtol=1e-5)


def refused(fn: Any, *args: Any, match: str, cluster: fm.Cluster) -> None:
    with pytest.raises(fm.UnsupportedError, match=match) as caught:
        fm.dataflow(fn, cluster=cluster)(*args)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def orthogonal(a: jax.Array, c: jax.Array) -> jax.Array:
    from jax._src.lax import linalg  # pyright: ignore

    reflectors, taus = linalg.geqrf(a)
    return linalg.ormqr(reflectors, taus, c, left=True, transpose=False)


def test_custom_calls_of_jax_that_no_version_promises_run(cluster: fm.Cluster) -> None:
    a, c = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), "float32"), jnp.ones((4, 2))
    agrees(orthogonal, a, c, cluster=cluster)


def test_a_custom_call_of_the_users_is_refused_with_its_line(cluster: fm.Cluster) -> None:
    def fn(x: jax.Array) -> jax.Array:
        with fm.layer("head"):
            return jax.ffi.ffi_call("mine", jax.ShapeDtypeStruct(x.shape, x.dtype))(jnp.sin(x))

    refused(
        fn,
        jnp.ones(3),
        match=r"ffi_call in layer 'head' at .*test_odd_types\.py:\d+ \(.*custom call of 'mine'",
        cluster=cluster,
    )


@pytest.mark.parametrize(
    "name", ["int2", "uint2", "int4", "uint4", "float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e8m0fnu"]
)
def test_small_types_travel(name: str, cluster: fm.Cluster) -> None:
    agrees(lambda x: (x.astype(name), x.astype(name).astype("float32") * 2), jnp.ones(3), cluster=cluster)
    agrees(lambda x: x.astype("float32") * 2, jnp.ones(3, name), cluster=cluster)


def integer_gradient(x: jax.Array, n: Any) -> Any:
    return jax.vjp(lambda x, n: x * n, x, n)[1](x)


def test_float0(cluster: fm.Cluster) -> None:
    nothing = np.zeros(3, jax.dtypes.float0)
    agrees(integer_gradient, jnp.ones(3), 2, cluster=cluster)
    agrees(lambda x, n: (integer_gradient(x, n)[1], n), jnp.ones(3), jnp.arange(3), cluster=cluster)
    agrees(lambda x, t: (x + 1, t), jnp.ones(3), nothing, cluster=cluster)
    agrees(lambda t: {"only": t}, nothing, cluster=cluster)
    assert fm.dataflow(lambda x, t: (x, t), cluster=cluster).submit(1.0, nothing).result()[1].dtype == nothing.dtype


def test_keys_of_a_kind_of_the_users_are_refused(cluster: fm.Cluster) -> None:
    from jax.extend import random as extended

    def pair(s: jax.Array) -> jax.Array:
        return jnp.stack([s.astype("uint32"), s.astype("uint32")])

    mine = extended.define_prng_impl(
        key_shape=(2,),
        seed=pair,
        split=lambda k, shape: jnp.broadcast_to(k, (*shape, 2)),
        random_bits=lambda k, width, shape: jnp.full(shape, k[0], jnp.dtype(f"uint{width}")),
        fold_in=lambda k, data: k + jnp.uint32(data),
        name="mine",
        tag="mine",
    )
    key = jax.random.key(7, impl=mine)
    for fn, args in ((lambda k: jax.random.bits(k, (2,)), (key,)), (lambda: jax.random.bits(key, (2,)), ())):
        refused(fn, *args, match=r"is of dtype key<mine>, which workers do not know", cluster=cluster)
    refused(
        lambda s: jax.random.key(s, impl=mine), 3, match=r"what .* at .*test_odd_types\.py.*key<mine>", cluster=cluster
    )


def test_tokens_are_refused_and_references_run(cluster: fm.Cluster) -> None:
    refused(
        lambda x: (x, jax.lax.create_token(x)), jnp.ones(2), match=r"test_odd_types\.py:\d+.*Token", cluster=cluster
    )
    agrees(lambda: jax.new_ref(jnp.ones(2))[...], cluster=cluster)
    reference = jax.new_ref(jnp.ones(2))
    refused(
        lambda x: x + reference[...],
        jnp.ones(2),
        match="is a jax Ref, which no worker can write to; make the Ref inside|side effect",
        cluster=cluster,
    )


def test_a_tracer_that_leaked_is_the_error_of_jit(cluster: fm.Cluster) -> None:
    kept: list[Any] = []
    jax.jit(kept.append)(1.0)
    with pytest.raises(jax.errors.UnexpectedTracerError):
        fm.dataflow(lambda x: x + kept[0], cluster=cluster)(1.0)


def test_what_is_being_traced_may_be_closed_over(cluster: fm.Cluster) -> None:
    def outer(y: jax.Array) -> jax.Array:
        return fm.dataflow(lambda x: x * y, cluster=cluster)(2.0)

    assert float(jax.jit(outer)(3.0)) == 6.0
    assert float(jax.grad(outer)(3.0)) == 2.0
    np.testing.assert_array_equal(jax.vmap(outer)(jnp.arange(3.0)), [0.0, 2.0, 4.0])


def test_jit_that_is_off_runs_the_function_as_it_is(cluster: fm.Cluster) -> None:
    seen: list[Any] = []

    def fn(x: Any) -> Any:
        if not isinstance(x, Tracer):
            seen.append(x)
        return jnp.sin(x) * 2, 1.0

    f, x = fm.dataflow(fn, cluster=cluster), jnp.ones(3)
    before = f(x)
    with jax.disable_jit():
        sine, one = f(x)
        late = f.submit(x).result()
        assert type(one) is float and type(late[1]) is float
    assert len(seen) == 2 and all(given is x for given in seen)
    np.testing.assert_allclose(sine, before[0])
    np.testing.assert_allclose(late[0], before[0])
    np.testing.assert_allclose(f(x)[0], before[0])


def test_dead_code_in_nested_programs_is_not_run(cluster: fm.Cluster) -> None:
    @jax.custom_vjp
    def f(x: jax.Array) -> jax.Array:
        return x

    # A rule that disagrees with its function on purpose shows which of the two runs.
    f.defvjp(lambda x: (x * x, 2 * x), lambda r, g: (g * r,), optimize_remat=True)
    agrees(lambda x: jax.vjp(f, x)[0], jnp.linspace(0.0, 5.0, 4), cluster=cluster)

    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: ((c[0] + 1, jnp.sin(c[1] @ c[1].T)), None), (x, jnp.ones((8, 8))), None, 3)[0][
            0
        ]

    plan = fm.compile(loop, jnp.ones(2), devices=["worker:0"])
    assert sum(p.flops for p in plan.partitions) < 1000  # the products are gone


MANY = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, jax.numpy as jnp, numpy as np
import flowml as fm

explicit = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
auto = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
over = jax.NamedSharding(auto, jax.P("x"))

def refused(fn, *args):
    try:
        fm.dataflow(fn)(*args)
    except fm.UnsupportedError as error:
        assert "over a mesh of 4 devices" in str(error) and len(str(error)) < 400, error
    else:
        raise AssertionError("not refused")

with fm.Cluster.threads(workers=2):
    with jax.set_mesh(explicit):
        refused(lambda k: jax.random.normal(k, (4,), out_sharding=jax.P("x")) * 2, jax.random.key(0))
        refused(lambda x: x * 2, jax.device_put(jnp.arange(4.0), jax.NamedSharding(explicit, jax.P("x"))))
    refused(lambda x: jax.lax.with_sharding_constraint(x, over) * 2, jnp.ones(4))
    refused(lambda x: jax.lax.fori_loop(0, 2, lambda _, v: jax.lax.with_sharding_constraint(v, over), x), jnp.ones(4))
    each = jax.shard_map(lambda v: v * 2, mesh=auto, in_specs=jax.P("x"), out_specs=jax.P("x"))
    refused(each, jnp.ones(4))
    # Arrays that lie on several devices without a mesh in their type are taken whole, and results go anywhere.
    spread = jax.device_put(jnp.arange(4.0), over)
    elsewhere = jax.device_put(jnp.ones(4), jax.devices()[1])
    for fn in (lambda x: x * 2, lambda x: (x, x * 2)[1], lambda x: jax.random.wrap_key_data(x.astype("uint32")[:2])):
        for x in (jnp.arange(4.0), spread):
            for placement in ("auto", {"*": "worker:0"}, {"*": "worker:1"}):
                y = fm.dataflow(fn, placement=placement)(x)
                assert not y._committed, (placement, y)
    np.testing.assert_array_equal(fm.dataflow(lambda x: x * 2)(spread) + elsewhere, jnp.arange(4.0) * 2 + 1)
    with jax.default_device(jax.devices()[2]):
        z = fm.dataflow(lambda x: x * 3)(jnp.ones(4))
    np.testing.assert_array_equal(z + elsewhere, np.full(4, 4.0))
print("fine")
"""


def test_meshes_are_refused_and_results_go_anywhere() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MANY]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0 and ran.stdout.strip() == "fine", ran.stderr[-3000:]
