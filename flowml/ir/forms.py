"""Computes the form of a traced function: its operations without names. Functions of one form are exported once.

Exporting takes tens of milliseconds and a model repeats its layers, so without this most of the planning time of a deep
model would be exports. Parts of a form are compared by value where the value is complete, else by identity. Different
functions therefore never have equal forms, but equal functions may have different ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex


def form_of(jaxpr: Any, constants: Sequence[Any]) -> Any:
    """A hashable value that is equal only for functions that do the same; None if there is none."""
    try:
        form = _form(jaxpr, constants)
        hash(form)
    except TypeError:  # a parameter has no hash, or a constant is not a plain array
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
    """A value with its type. 1, True and 1.0 are equal but compute different results, and so are 0.0 and -0.0."""
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
