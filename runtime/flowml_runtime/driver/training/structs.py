"""Checks the pytrees that a caller gives to a fit, and reads their shapes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowml.ir._jax import path_name
from flowml.leaves import check_known, why_no_array

_NOT_TRAINED = "keep what is not trained out of the tree (in equinox: eqx.partition(model, eqx.is_inexact_array))"


def structs(tree: Any, kind: str) -> Any:
    """Shapes and dtypes as JAX sees the leaves. Raises TypeError for a leaf that is no array."""

    def struct(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        try:
            if isinstance(leaf, jax.Ref | str | type | np.dtype):  # result_type takes the last three for dtypes
                raise TypeError
            if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "mM":  # result_type takes dates too
                raise TypeError
            dtype = jax.dtypes.canonicalize_dtype(jax.dtypes.result_type(leaf), allow_extended_dtype=True)
        except (TypeError, OverflowError):
            raise TypeError(f"{kind} {path_name(path)!r} {why_no_array(leaf, _NOT_TRAINED)}") from None
        return jax.ShapeDtypeStruct(jnp.shape(leaf), dtype)

    return jax.tree_util.tree_map_with_path(struct, tree)


def structs_of(params: Any, state: Any) -> tuple[Any, Any]:
    """The shapes of parameters and of the model's state."""
    return structs(params, "parameter"), structs(state, "state leaf")


def check_values(tree: Any, kind: str, function: str = "fit") -> None:
    """Raise TypeError for a leaf without values: a struct, or a value that another transformation traces."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        check_known(f"{kind} {path_name(path)!r}", leaf, function)


def check_state(state: Any) -> None:
    """Raise TypeError for a leaf of the model's state that is no array of numbers, or has no values."""
    check_values(state, "state leaf")
    structs(state, "state leaf")
