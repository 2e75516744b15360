"""Checks the leaves of a user's arguments: each has to be an array of a dtype that JAX supports."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

ARRAYS_ALONE = (
    "give arrays alone: with equinox `arrays, rest = eqx.partition(state, eqx.is_array)`, and "
    "`eqx.combine(arrays, rest)` for the step"
)
"""The advice for a function in a tree of arrays, as equinox modules have them."""


def why_no_array(value: Any, fix: str = "") -> str:
    """What is wrong with a value that has to be an array of numbers, as the end of a sentence; "" if it is one.

    `fix` is the advice for a value that is not an array; by default an array in its place, or a tree without functions.
    """
    if isinstance(value, jax.Ref):
        return "is a jax Ref, which no worker can write to; pass its value ref[...], and write back what is returned"
    if not isinstance(value, np.ndarray | np.generic | jax.Array):
        fix = fix or (ARRAYS_ALONE if callable(value) else "give a NumPy or JAX array (np.asarray of numbers)")
        return f"is of type {type(value).__name__}, which is not an array; {fix}"
    dtype = value.dtype
    if isinstance(dtype, np.dtype) and not dtype.isnative:
        return (
            f"has dtype {dtype.str}, which has the byte order of other machines; give "
            f".astype({dtype.newbyteorder('=').name!r})"
        )
    if not any(jnp.issubdtype(dtype, kind) for kind in (np.number, np.bool_)):
        return f"has dtype {dtype}, which is not numeric; encode it as numbers, such as indices, or leave it out"
    return ""


def has_no_values(value: Any) -> bool:
    """Whether this is an array of float0, the type of the gradient of an integer."""
    return getattr(value, "dtype", None) == jax.dtypes.float0


def check_known(what: str, value: Any, function: str) -> None:
    """Raise TypeError for a leaf without values, of which `function` needs them: a struct, or what another
    transformation traces."""
    if isinstance(value, jax.ShapeDtypeStruct):
        raise TypeError(f"{what} is a jax.ShapeDtypeStruct without values; give an array")
    if isinstance(value, Tracer):
        raise TypeError(
            f"{what} is traced by another JAX transformation, and {function}() needs its values; call {function}() "
            "outside of jit, grad and vmap"
        )


def check_array(what: str, value: Any) -> None:
    """Raise TypeError unless a program can take the array `value`. `what` names it, as in "source leaf 'x'"."""
    why = why_no_array(value)
    if why:
        raise TypeError(f"{what} {why}")
