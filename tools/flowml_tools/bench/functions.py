"""The functions that are measured, on our side and on the peers'."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flowml as fm

PRODUCTS = 8
"""Products in a row that make a step of a millisecond and more out of small matrices."""


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
    """float32[length] is made by one layer, and read by the next: placed apart, it crosses."""
    with fm.layer("make"):
        y = jnp.arange(length, dtype=jnp.float32) * x
    with fm.layer("take"):
        return y[_where(x)]


def kept(x: Any, length: int) -> jax.Array:
    """The same, for `make` and `take` on one device.

    Which element is read is known to `aside` alone, on another device: so they are two tasks, and the array exists
    between them. As one task, XLA would compute the element that is asked for and never write the array.
    """
    with fm.layer("aside"):
        where = _where(x)
    with fm.layer("make"):
        y = jnp.arange(length, dtype=jnp.float32) * x
    with fm.layer("take"):
        return y[where]


def _where(x: Any) -> jax.Array:
    return (x * 0 + 1).astype(jnp.int32)
