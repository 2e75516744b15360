"""Typed PRNG keys: the names of their implementations, and how to recognise a key or a random operation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KEY_IMPLEMENTATIONS = {"fry": "threefry2x32", "rbg": "rbg", "urbg": "unsafe_rbg"}


def key_implementation(dtype: str) -> str:
    """The PRNG implementation of a dtype such as `key<fry>`, as `jax.random.wrap_key_data` expects it."""
    return KEY_IMPLEMENTATIONS[dtype[4:-1]]


def key_dtype(dtype: str) -> Any:
    return jax.eval_shape(lambda: jax.random.key(0, impl=key_implementation(dtype))).dtype


def is_key(aval: Any) -> bool:
    """Whether an abstract value is a PRNG key, or may be the data of a key."""
    return bool(jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)) or aval.dtype == np.uint32


def is_random(primitive: str) -> bool:
    """Whether a primitive makes keys or random bits."""
    return primitive.startswith(("random_", "threefry", "rng_"))
