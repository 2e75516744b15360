"""Refuses what a dataflow graph cannot hold: meshes, values that are not arrays, and calls of Python where it is off.

The error names the function, the construct and the line of the user's code. The bodies of loops and branches are
checked too.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flowml.arrays import KEY_WORDS
from flowml.errors import UnsupportedError
from flowml.ir import _jax, host
from flowml.ir.keys import KEY_IMPLEMENTATIONS
from flowml.ir.scopes import Stack, parse

_OUTSIDE = frozenset({"infeed", "outfeed"})


def check_argument(aval: Any, function: str, name: str) -> None:
    """Raise UnsupportedError if an argument or a closed-over value cannot be sent to a worker."""
    obstacle = _obstacle(aval)
    if obstacle:
        raise UnsupportedError(f"{function}: {name} {obstacle}")


def check_equation(equation: Any, function: str, stack: Stack, python: bool, inside: tuple[str, ...] = ()) -> None:
    """Raise UnsupportedError if no worker can run an equation. `inside` are the loops and branches around it.

    `python` says whether workers run Python.
    """
    op, layer = equation.primitive.name, parse(stack).path
    for body in _jax.nested_jaxprs(equation):  # first, because the fault of a loop is in its body
        for nested in body.eqns:
            check_equation(nested, function, stack, python, (*inside, op))
    user = f"{function} in layer {layer!r}" if layer else function
    if op in host.CONSTRUCTS and not python:
        construct = host.Found(equation, inside).construct
        drop = ', or leave out what jax.debug does with effects="drop"' if op in host.DEBUGGING else ""
        raise UnsupportedError(
            f"{user} uses {construct}, which calls Python, and the workers of this cluster do not run Python; start "
            f"the cluster with allow_python=True{drop}"
        )
    effects = {type(e).__name__ for e in equation.effects} - host.EFFECTS - {host.AXES}
    if op in _OUTSIDE or effects:
        raise UnsupportedError(
            f"{user} uses {op}{_place(equation, inside)}, whose side effect has no place in a dataflow graph; remove it"
        )
    obstacles = (_mesh_obstacle(equation), *(_obstacle(v.aval) for v in equation.outvars))
    obstacle = next((o for o in obstacles if o), "")
    if obstacle:
        raise UnsupportedError(f"{user}: what {op}{_place(equation, inside)} makes {obstacle}")


def _place(equation: Any, inside: tuple[str, ...]) -> str:
    line = _jax.source_line(equation)
    return "".join(f" inside {outer}" for outer in reversed(inside)) + (f" at {line}" if line else "")


def _obstacle(aval: Any) -> str:
    """Why a value cannot be part of a dataflow graph, and the fix; "" if it can."""
    if hasattr(aval, "inner_aval"):
        return (
            "is a jax Ref, which no worker can write to; make the Ref inside the function, or pass its value ref[...], "
            "and write back what is returned"
        )
    if not hasattr(aval, "shape") or not hasattr(aval, "dtype"):
        return f"is of type {type(aval).__name__}, which is not an array; keep it out of the dataflow function"
    if jnp.issubdtype(aval.dtype, jax.dtypes.extended) and str(aval.dtype)[4:-1] not in KEY_WORDS:
        known = ", ".join(KEY_IMPLEMENTATIONS.values())
        return f"is of dtype {aval.dtype}, which workers do not know; use keys of JAX's own kinds ({known})"
    if str(aval.dtype).startswith("float6_"):
        return f"is of dtype {aval.dtype}, which XLA cannot hold; use float8_e4m3fn"
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    return _over_a_mesh(mesh) if getattr(mesh, "explicit_axes", ()) else ""  # else not part of the type


def _mesh_obstacle(equation: Any) -> str:
    """Like `_obstacle`, for the meshes in the parameters of an equation, such as a constraint or `shard_map`."""
    parameters = (p for value in equation.params.values() for p in (value, getattr(value, "mesh", None)))
    return next((found for found in map(_over_a_mesh, parameters) if found), "")


def _over_a_mesh(mesh: Any) -> str:
    if not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh) or mesh.empty or mesh.size == 1:
        return ""
    return (
        f"is laid out over a mesh of {mesh.size} devices, and a dataflow function places whole arrays; leave the mesh "
        "for this call, and pass arrays of one device"
    )
