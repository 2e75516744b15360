"""Corners of JAX's types and modes: each works as under jit, or is refused in one sentence that says where and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
        assert (b.shape, b.dtype, type(b)) == (a.shape, a.dtype, type(a))
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


@pytest.mark.parametrize("name", ["int4", "uint4", "float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e8m0fnu"])
def test_small_types_travel(name: str, cluster: fm.Cluster) -> None:
    agrees(lambda x: (x.astype(name), x.astype(name).astype("float32") * 2), jnp.ones(3), cluster=cluster)


@pytest.mark.parametrize("name", ["int2", "uint2"])
def test_types_that_cannot_be_exported_are_refused(name: str, cluster: fm.Cluster) -> None:
    refused(lambda x: x.astype(name), jnp.ones(3), match=rf"test_odd_types\.py:\d+.*{name}", cluster=cluster)
    refused(lambda x: x.astype("float32"), jnp.ones(3, name), match=name, cluster=cluster)
    agrees(lambda x: x.astype(name).astype("float32"), jnp.ones(3), cluster=cluster, placement={"*": "worker:0"})
