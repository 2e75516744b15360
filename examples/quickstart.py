"""Runs one function on two workers, compares the result with jax.jit, and prints the plan."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import flowml as fm


def mlp(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    with fm.layer("hidden"):
        x = jnp.tanh(x @ params["hidden"])
    with fm.layer("output"):
        return x @ params["output"]


if __name__ == "__main__":
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"hidden": jax.random.normal(keys[0], (64, 256)), "output": jax.random.normal(keys[1], (256, 10))}
    x = jax.random.normal(keys[2], (32, 64))
    with fm.Cluster.local(workers=2):
        f = fm.dataflow(mlp, placement={"hidden": "worker:0", "output": "worker:1"})
        difference = jnp.abs(f(params, x) - jax.jit(mlp)(params, x)).max()
        print(f"largest difference to jax.jit: {difference:.1e}\n")
        print(f.plan(params, x).explain())
