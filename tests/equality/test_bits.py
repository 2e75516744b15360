"""When a program of one task gives the bits of jit: the claims of the guide, one test each."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowml as fm
from flowml.lowering.lower import COMPILED_IN_BYTES

A = jnp.linspace(0.1, 30.0, 1000)
KEY = jax.random.key(3)
WEIGHTS = np.linspace(-1.0, 1.0, 64, dtype=np.float32).reshape(8, 8)


def folded(x: jax.Array) -> Any:
    return x * jnp.sin(A) ** 3 + jax.scipy.special.gammaln(A), x / A


def drawn(x: jax.Array) -> Any:
    return x * jax.random.normal(KEY, x.shape), KEY


def looped(x: jax.Array) -> Any:
    return jax.lax.fori_loop(0, 3, lambda _, v: jnp.tanh(v @ WEIGHTS) / WEIGHTS[0], x[:8])


def bits(tree: Any) -> list[bytes]:
    leaves = jax.tree_util.tree_leaves(tree)
    keys = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    return [np.asarray(jax.random.key_data(x) if k else x).tobytes() for x, k in zip(leaves, keys, strict=True)]


@pytest.mark.parametrize("fn", [folded, drawn, looped])
@pytest.mark.parametrize("wide", [False, True])
def test_closed_over_arrays_are_compiled_in(fn: Any, wide: bool) -> None:
    with fm.Cluster.threads(workers=1) as cluster, jax.enable_x64(wide):
        x = jnp.linspace(0.0, 1.0, 1000)
        f = fm.dataflow(fn, cluster=cluster)
        plan = f.plan(x)
        assert len(plan.tasks) == 1 and not plan.programs[0].constants
        assert bits(f(x)) == bits(jax.jit(fn)(x))


def test_many_closed_over_arrays_are_sent_once() -> None:
    large = jnp.ones(COMPILED_IN_BYTES // 4 + 1)
    with fm.Cluster.threads(workers=1) as cluster:
        f = fm.dataflow(lambda x: x + large.sum(), cluster=cluster)
        (executable,) = f.plan(1.0).executables.values()
        assert len(executable) < 2**16 and f.plan(1.0).programs[0].constants
        assert float(f(1.0)) == large.size + 1


def test_layers_of_other_closed_over_arrays_share_an_executable() -> None:
    weights = [jnp.full((8, 8), i / 10) for i in range(4)]

    def fn(x: jax.Array) -> jax.Array:
        for i, w in enumerate(weights):
            with fm.layer(f"layer{i}"):
                x = jnp.tanh(x @ w)
        return x

    placement = {f"layer{i}": f"worker:{i % 2}" for i in range(4)}
    plan = fm.compile(fn, jnp.ones((2, 8)), devices=["worker:0", "worker:1"], placement=placement)
    assert len(plan.tasks) == 4 and len(plan.executables) == 1


def test_a_single_worker_process_has_the_callers_cores_and_so_its_bits() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    x, y = jax.random.normal(keys[0], (128, 784)), jax.random.normal(keys[1], (128, 784))
    params = {"a": jax.random.normal(keys[2], (784, 500)) / 28, "b": jax.random.normal(keys[3], (500, 784)) / 22}

    def loss(p: Any, x: Any, y: Any) -> jax.Array:
        return jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] - y) ** 2)

    gradient = jax.grad(loss)
    with fm.Cluster.local(workers=1) as cluster:
        f = fm.dataflow(gradient, cluster=cluster)
        assert bits(f(params, x, y)) == bits(jax.jit(gradient)(params, x, y))
