"""Replaces primitives that a library has defined in Python by the operations of their implementation.

JAX compiles such a primitive by tracing its implementation when it lowers the program. A call of Python inside, such as
the check of a linear solver, then has no equation, so it cannot be sent to a worker. equinox, lineax, optimistix and
diffrax define primitives in this way.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.extend import core as jex
from jax.extend.core.primitives import closed_call_p

from flowml.ir import _jax
from flowml.ir.bodies import map_bodies


def expanded(closed: Any) -> Any:
    """The program without primitives of libraries, also in its loops, branches and calls.

    One whose implementation cannot be traced stays.
    """
    if not _has_foreign(closed.jaxpr):
        return closed
    return jex.ClosedJaxpr(_without_foreign(closed.jaxpr, tuple(closed.consts)), closed.consts)


def _has_foreign(jaxpr: Any) -> bool:
    return any(
        _is_foreign(e.primitive) or any(_has_foreign(body) for body in _jax.nested_jaxprs(e)) for e in jaxpr.eqns
    )


@functools.lru_cache(maxsize=4096)
def _is_foreign(primitive: Any) -> bool:
    """Whether a primitive has an implementation of its own that is not JAX's."""
    implementation = primitive.impl
    while isinstance(implementation, functools.partial):
        implementation = implementation.func
    module = getattr(implementation, "__module__", None) or "jax"
    return module.partition(".")[0] not in ("jax", "jaxlib")


def _without_foreign(jaxpr: Any, constants: tuple[Any, ...]) -> Any:
    known = dict(zip(jaxpr.constvars, constants, strict=False))
    return jaxpr.replace(eqns=[_expanded(e, known) for e in jaxpr.eqns])


def _expanded(equation: Any, known: dict[Any, Any]) -> Any:
    if _is_foreign(equation.primitive):
        values = [_value(atom, known) for atom in equation.invars]
        body = _implementation(equation, values)
        if body is not None:
            given = [atom for atom, value in zip(equation.invars, values, strict=True) if value is None]
            effects = equation.effects | body.effects
            return equation.replace(
                primitive=closed_call_p, invars=given, params={"call_jaxpr": expanded(body)}, effects=effects
            )
    if any(map(_has_foreign, _jax.nested_jaxprs(equation))):
        return equation.replace(params=map_bodies(equation.params, _without_foreign))
    return equation


def _value(atom: Any, known: dict[Any, Any]) -> Any:
    """The value of a literal or a constant, which an implementation may need as a number; else None."""
    return _jax.literal_value(atom) if _jax.is_literal(atom) else known.get(atom)


def _implementation(equation: Any, values: list[Any]) -> Any | None:
    """The implementation as a program of the inputs without a value. None if it cannot be traced."""
    structs = [_jax.struct(a.aval) for a, value in zip(equation.invars, values, strict=True) if value is None]

    def run(*arrays: Any) -> Any:
        rest = iter(arrays)
        results = equation.primitive.impl(*(next(rest) if v is None else v for v in values), **equation.params)
        return list(results) if equation.primitive.multiple_results else [results]

    try:
        body = jax.make_jaxpr(run)(*structs)
    except Exception:  # code of a library: the error of what stays names its primitive and line
        return None
    made, wanted = (
        [(a.shape, a.dtype) for a in avals] for avals in (body.out_avals, [v.aval for v in equation.outvars])
    )
    return body if made == wanted else None
