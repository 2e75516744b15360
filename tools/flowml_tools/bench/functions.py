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
        return y[0] + y[-1]


def kept(x: Any, length: int) -> jax.Array:
    """The same, for `make` and `take` on one device.

    A scalar of `aside`, on another device and done long before, parts them into two tasks: as one, XLA would not write
    the array at all, and there were nothing to compare with.
    """
    with fm.layer("aside"):
        hint = x * 0
    with fm.layer("make"):
        y = jnp.arange(length, dtype=jnp.float32) * x
    with fm.layer("take"):
        return y[0] + y[-1] + hint
