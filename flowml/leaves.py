"""Leaves that users give where arrays are wanted: each is an array of a dtype that JAX has, or is named in an error."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def why_no_array(value: Any, fix: str = "give a NumPy or JAX array (np.asarray of numbers)") -> str:
    """What is wrong with a value that should be an array of numbers, to follow its name: "" if nothing is.

    `fix` is what to do about a value that is no array at all.
    """
    if isinstance(value, jax.Ref):
        return "is a jax Ref, which no worker can write to; pass its value ref[...], and write back what is returned"
    if not isinstance(value, np.ndarray | np.generic | jax.Array):
        return f"is of type {type(value).__name__}, which is not an array; {fix}"
    dtype = value.dtype
    if isinstance(dtype, np.dtype) and not dtype.isnative:
        return (
            f"has dtype {dtype.str}, whose bytes are in the order of another kind of machine; give "
            f".astype({dtype.newbyteorder('=').name!r})"
        )
    if not any(jnp.issubdtype(dtype, kind) for kind in (np.number, np.bool_)):
        return f"has dtype {dtype}, which is no number; encode it as numbers, such as indices, or leave it out"
    return ""


def check_array(what: str, value: Any) -> None:
    """Raises TypeError unless `value` is an array that a program can take; `what` names it, as in "source leaf 'x'"."""
    why = why_no_array(value)
    if why:
        raise TypeError(f"{what} {why}")
