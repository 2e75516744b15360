"""The values with which a fit begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowml.callers import warn
from flowml.errors import named
from flowml.ir._jax import array_of, array_type, path_name
from flowml.training.adapted import has_inside
from flowml.training.local import Restarting
from flowml.training.private import PrivateOptimizer
from flowml_runtime.driver.training.fills import filled
from flowml_runtime.driver.training.outcome import OnNonFinite
from flowml_runtime.driver.training.structs import check_values, structs


class OptimizerState(NamedTuple):
    """The optimizer state of a fit with layers that have an outer optimizer: the Trainer's, and each outer one's."""

    own: Any
    outer: tuple[Any, ...]


def first_state(optimizer: Any, outer: Sequence[Any], params: Any, opt_state: Any) -> Any:
    """The initial optimizer state, with that of the outer optimizers if there are any. Raises ValueError if
    `opt_state` belongs to another optimizer or model."""

    def init(params: Any) -> Any:
        own = optimizer.init(params)
        return OptimizerState(own, tuple(o.init(params) for o in outer)) if outer else own

    if opt_state is None:
        found = filled(init, params)
        return jax.tree_util.tree_map(jnp.asarray, init(params)) if found is None else found
    expected = jax.eval_shape(init, params)
    check_values(opt_state, "opt_state leaf")
    given = structs(opt_state, "opt_state leaf")
    got, want = jax.tree_util.tree_structure(given), jax.tree_util.tree_structure(expected)
    if got != want:
        raise ValueError(f"opt_state belongs to another optimizer: {_first_difference(given, expected)}")
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, e), g in zip(leaves, jax.tree_util.tree_leaves(given), strict=True):
        if (g.shape, g.dtype) != (e.shape, e.dtype):
            raise ValueError(
                f"opt_state belongs to other parameters: {path_name(path)!r} is {g.dtype}{list(g.shape)}, "
                f"not {e.dtype}{list(e.shape)}"
            )
    if isinstance(opt_state, OptimizerState):
        begun = [
            o.init(params) if isinstance(o, Restarting) else s for o, s in zip(outer, opt_state.outer, strict=True)
        ]
        opt_state = OptimizerState(opt_state.own, tuple(begun))
    return jax.tree_util.tree_map(own_array, opt_state)


def _first_difference(given: Any, expected: Any) -> str:
    """The first leaf that one of two trees of other structures has and the other has not, in words."""
    (got, want) = ([path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)] for tree in (given, expected))
    for has, lacks, one, other in ((want, got, "it lacks", "has"), (got, want, "it has", "lacks")):
        known = set(lacks)
        missing = next((name for name in has if name not in known), None)
        if missing is not None:
            return f"{one} the leaf {missing!r}, which the state of this one {other}"
    kinds = type(given).__name__, type(expected).__name__
    return f"it has the same leaves in other containers, the outermost {kinds[0]} where this one has {kinds[1]}"


def by_optimizer(optimizer: Any, outer: Sequence[Any], state: Any) -> list[tuple[Any, Any]]:
    """Each optimizer of a fit with its state."""
    states = (state.own, *state.outer) if isinstance(state, OptimizerState) else (state,)
    return list(zip((optimizer, *outer), states, strict=True))


def nonfinite_watchers(state: Any) -> list[str]:
    """The transformations of optax in an optimizer, by its state, that act on gradients that are not finite."""
    import optax

    found: dict[str, None] = {}

    def look(node: Any) -> bool:
        if isinstance(node, optax.ApplyIfFiniteState):
            found["apply_if_finite"] = None
        if isinstance(node, optax.ZeroNansState):
            found["zero_nans"] = None
        if isinstance(node, optax.MultiStepsState) and "num_not_finite" in _keys(node.skip_state):
            found["skip_not_finite"] = None
        return False

    jax.tree_util.tree_leaves(state, is_leaf=look)
    return list(found)


def _keys(node: Any) -> Any:
    return node if isinstance(node, dict) else ()


def warn_of_watchers(state: Any, on_nonfinite: str) -> None:
    """Warn of transformations that never get what they act on, because such gradients are refused."""
    if on_nonfinite == "refuse" and (watchers := nonfinite_watchers(state)):
        warn(
            f"the optimizer acts on gradients that are not finite ({named(watchers)}), and it gets none of them with "
            "on_nonfinite='refuse', the default, which leaves them out before; give Trainer(on_nonfinite='apply') so "
            "that the optimizer decides, as in a plain loop"
        )


def nonfinite_of(optimizer: Any, asked: OnNonFinite) -> OnNonFinite:
    """What a fit does with gradients that are not finite. The noise of a private optimizer is for the whole batch of a
    step, and would be too little for what is left without a replica, so such a fit leaves none out."""
    return "raise" if asked == "refuse" and has_inside(optimizer, PrivateOptimizer) else asked


def own_array(leaf: Any) -> jax.Array:
    """A JAX array that shares no memory with a NumPy array, because the caller may change that one later."""
    if not isinstance(leaf, np.ndarray):
        return jnp.asarray(leaf)
    if leaf.dtype == jax.dtypes.float0 or jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        return jnp.array(leaf)
    kind = array_type(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weak=False)
    return array_of(leaf, kind, copy=True)  # without a compiler
