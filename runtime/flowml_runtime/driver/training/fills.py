"""Makes the first state of an optimizer without a compiler, if it is only filled with numbers or taken from parameters.

Run as it is, `optimizer.init` has XLA compile a program for each shape of zeros. That takes longer than tracing the
whole function, which shows what each array of the state is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowml.ir import _jax


def filled(init: Callable[[Any], Any], params: Any) -> Any | None:
    """What `init` returns for a pytree of arrays, as arrays; None if it computes anything, or looks at values."""
    try:
        closed, described = jax.make_jaxpr(init, return_shape=True)(params)
    except Exception:  # it is the user's function, and runs as it is then
        return None
    found = _values(closed.jaxpr, closed.consts, jax.tree_util.tree_leaves(params))
    if found is None:
        return None
    with _jax.explicit_transfers():
        arrays = [_array(value, atom.aval) for value, atom in zip(found, closed.jaxpr.outvars, strict=True)]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(described), arrays)


def _values(jaxpr: Any, constants: Sequence[Any], given: Sequence[Any]) -> list[Any] | None:
    """The results of a program: arrays that it was given, or NumPy ones; None if it does more than fill."""
    known: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *given), strict=True))

    def read(atom: Any) -> Any:
        return _jax.literal_value(atom) if _jax.is_literal(atom) else known[atom]

    for equation in jaxpr.eqns:
        results = _results(equation, [read(a) for a in equation.invars])
        if results is None:
            return None
        known.update(zip(equation.outvars, results, strict=True))
    return [read(a) for a in jaxpr.outvars]


def _results(equation: Any, operands: list[Any]) -> list[Any] | None:
    called = _jax.called_jaxpr(equation)
    if called is not None:
        return _values(*called, operands)
    if equation.primitive.name == "copy":
        return operands
    number, kind = operands[0] if operands else None, equation.outvars[0].aval if equation.outvars else None
    if not isinstance(number, np.ndarray) or number.ndim or kind is None:
        return None
    if equation.primitive.name == "broadcast_in_dim" and len(operands) == 1:
        return [np.broadcast_to(number, kind.shape)]
    if equation.primitive.name == "convert_element_type":
        made = number.astype(kind.dtype)
        return [made] if made.astype(number.dtype) == number else None
    return None


def _array(value: Any, aval: Any) -> jax.Array:
    if not isinstance(value, np.ndarray):
        return jnp.asarray(value)
    return _jax.array_of(np.ascontiguousarray(value).reshape(aval.shape), aval, copy=True)
