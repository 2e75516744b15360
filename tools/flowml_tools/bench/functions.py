"""The functions that are measured, in flowml and in the peers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flowml as fm

PRODUCTS = 8
"""The number of consecutive products, so that a step on small matrices takes more than a millisecond."""


def example(size: int) -> np.ndarray:
    """A square matrix whose powers neither grow nor vanish: a permutation."""
    return np.roll(np.eye(size, dtype=np.float32), 1, axis=0)


def increment(x: Any) -> jax.Array:
    return x + 1


def several_products(x: Any) -> jax.Array:
    y = x
    for _ in range(PRODUCTS):
        y = y @ x
    return y


def two_layers(x: Any) -> jax.Array:
    with fm.layer("first"):
        y = x + 1
    with fm.layer("second"):
        return y * 2


def carried(x: Any, length: int) -> jax.Array:
    """One layer makes float32[length] and the next reads it. On different devices, the array crosses between them."""
    with fm.layer("make"):
        y = _made(x, length)
    with fm.layer("take"):
        return y[_where(x)]


def kept(x: Any, length: int) -> jax.Array:
    """The same, with `make` and `take` on one device.

    The index of the element is computed by `aside` on another device, so `make` and `take` are two tasks and the array
    exists between them. In one task, XLA would compute only the requested element and never write the array. The
    barrier in `make` keeps it a task of its own: what XLA fuses with its reader is moved to the reader's task.
    """
    with fm.layer("aside"):
        where = _where(x)
    with fm.layer("make"):
        y = _made(x, length)
    with fm.layer("take"):
        return y[where]


def _made(x: Any, length: int) -> jax.Array:
    return jax.lax.optimization_barrier(jnp.arange(length, dtype=jnp.float32) * x)


def _where(x: Any) -> jax.Array:
    return (x * 0 + 1).astype(jnp.int32)
