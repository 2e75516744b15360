"""Axes of functions that were written for several devices: `shard_map` and `pmap` over a mesh of one, and axes that
nothing binds.

A dataflow graph places whole arrays, so it has no collective operations. Over a mesh of one device, `shard_map` is
`vmap` over one row, where every collective operation is an ordinary one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from flowml.errors import UnsupportedError
from flowml.ir import _jax


def body_on_one(equation: Any) -> tuple[Any, Sequence[Any]] | None:
    """The body (jaxpr, constants) of a `shard_map` over a mesh of one device, without its axes; None for others."""
    if equation.primitive.name != "shard_map" or equation.params["mesh"].size != 1:
        return None
    body = _without_identities(equation.params["jaxpr"])
    run: Callable[..., Sequence[Any]] = jex.jaxpr_as_fun(jex.ClosedJaxpr(body, ()))
    for axis in equation.params["mesh"].axis_names:
        run = _over(axis, run)
    closed = jax.make_jaxpr(run)(*[_jax.struct(a.aval) for a in equation.invars])
    return closed.jaxpr, closed.consts


_IDENTITIES = frozenset({"psum_invariant", "pvary", "pcast"})
"""Operations that do nothing on one device, and that `vmap` does not know."""


def _without_identities(jaxpr: Any) -> Any:
    same: dict[Any, Any] = {}
    equations: list[Any] = []
    for equation in jaxpr.eqns:
        read = [a if _jax.is_literal(a) else same.get(a, a) for a in equation.invars]
        if equation.primitive.name in _IDENTITIES:
            same.update(zip(equation.outvars, read, strict=True))
        else:
            equations.append(equation.replace(invars=read))
    return jaxpr.replace(eqns=equations, outvars=[a if _jax.is_literal(a) else same.get(a, a) for a in jaxpr.outvars])


def _over(axis: str, run: Callable[..., Sequence[Any]]) -> Callable[..., Sequence[Any]]:
    mapped = jax.vmap(run, axis_name=axis, axis_size=1)
    return lambda *arrays: [row[0] for row in mapped(*[a[None] for a in arrays])]


def unbound_axis(error: NameError, function: str) -> UnsupportedError | None:
    """The error for a function that uses an axis which nothing around it binds; None for another NameError."""
    found = re.search(r"unbound axis name: (\S+?)\.?(\s|$)", str(error))
    if found is None:
        return None
    return UnsupportedError(
        f"{function} uses the axis {found[1]!r}, which nothing binds, as jax.pmap would; write "
        f"fm.dataflow(jax.vmap({function}, axis_name={found[1]!r})), whose in_axes say what each copy gets"
    )


def is_pmapped(fn: Any) -> bool:
    """Whether `jax.pmap` made a function."""
    code = getattr(fn, "__code__", None)
    return code is not None and re.search(r"[/\\]jax[/\\].*pmap\.py$", code.co_filename) is not None


def pmapped(function: str, error: Exception) -> UnsupportedError:
    reason = str(error).partition("\n")[0]
    return UnsupportedError(
        f"{function} was made by jax.pmap, which needs one device of this process for each row ({reason}); write "
        "fm.dataflow(jax.vmap(…)) with the function and the axis_name that jax.pmap has"
    )
