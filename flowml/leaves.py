"""Leaves that users give where arrays are wanted: each is an array of a dtype that JAX has, or is named in an error."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_array(what: str, value: Any) -> None:
    """Raises TypeError unless `value` is an array that a program can take; `what` names it, as in "source leaf 'x'"."""
    if not isinstance(value, np.ndarray | np.generic | jax.Array):
        raise TypeError(
            f"{what} is of type {type(value).__name__}, which is no array; give a NumPy or JAX array (np.asarray of "
            "numbers)"
        )
    dtype = value.dtype
    if isinstance(dtype, np.dtype) and not dtype.isnative:
        raise TypeError(
            f"{what} has dtype {dtype.str}, whose bytes are in the order of another kind of machine; give "
            f".astype({dtype.newbyteorder('=').name!r})"
        )
    if not any(jnp.issubdtype(dtype, kind) for kind in (np.number, np.bool_)):
        raise TypeError(
            f"{what} has dtype {dtype}, which is no number; encode it as numbers, such as indices, or leave it out"
        )
