"""The form of a traced function: what it does, without names. Functions of one form need to be exported only once.

Exporting takes JAX tens of milliseconds and a model repeats its layers, so that this is most of what planning one
with many layers takes. Forms are compared by value where that says all, else by identity, so that two that differ are
never taken for one; some that do the same are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex


def form_of(jaxpr: Any, constants: Sequence[Any]) -> Any:
    """Something that is hashable and equal for functions that do the same; None where that cannot be told."""
    try:
        form = _form(jaxpr, constants)
        hash(form)
    except TypeError:  # of a parameter without a hash, or a constant that is no plain array
        return None
    return form


def _form(jaxpr: Any, constants: Sequence[Any]) -> Any:
    numbers: dict[Any, int] = {}

    def write(variable: Any) -> Any:
        numbers[variable] = len(numbers)
        return variable.aval

    def read(atom: Any) -> Any:
        return (atom.aval, _value(np.asarray(atom.val))) if isinstance(atom, jex.Literal) else numbers[atom]

    held = tuple((write(v), _value(c)) for v, c in zip(jaxpr.constvars, constants, strict=True))
    taken = tuple(map(write, jaxpr.invars))
    steps: list[Any] = []
    for equation in jaxpr.eqns:
        operands = tuple(map(read, equation.invars))
        results = tuple(map(write, equation.outvars))
        steps.append((equation.primitive, _value(equation.params), operands, results, repr(equation.ctx)))
    return held, taken, tuple(steps), tuple(map(read, jaxpr.outvars))


def _value(value: Any) -> Any:
    """By value, with its type: 1, True and 1.0 are equal and do not do the same, and nor do 0.0 and -0.0."""
    match value:
        case jex.ClosedJaxpr():
            return _form(value.jaxpr, value.consts)
        case jex.Jaxpr():
            return _form(value, [])
        case dict():
            return tuple((k, _value(v)) for k, v in sorted(value.items()))
        case list() | tuple():
            return type(value), tuple(map(_value, value))
        case np.ndarray() | np.generic() | jax.Array():
            array = np.asarray(value)
            return array.dtype, array.shape, array.tobytes()
        case float() | complex():
            return type(value), repr(value)
        case _:
            return type(value), value
