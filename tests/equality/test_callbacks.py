"""Python callbacks give what they give under jit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flowml as fm
from tests.training.reference import assert_same


def double(x: np.ndarray) -> np.ndarray:
    return x * 2


def test_one_function_serves_callbacks_of_several_shapes_and_dtypes(threads_cluster: fm.Cluster) -> None:
    def doubled(leaf: Any) -> Any:
        return jax.pure_callback(double, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), leaf)

    def step(tree: Any) -> Any:
        return jax.tree.map(doubled, tree)

    tree = {"a": jnp.ones((3, 2)), "b": jnp.ones(2), "c": jnp.arange(2), "d": jnp.ones(2, jnp.bfloat16)}
    assert_same(fm.dataflow(step, cluster=threads_cluster, placement=fm.Pipeline(1))(tree), jax.jit(step)(tree))
