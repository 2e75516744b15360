"""Refuses what a dataflow graph cannot hold: meshes, values that are not arrays, and calls of Python where it is off.

The error names the function, the construct and the line of the user's code. The bodies of loops and branches are
checked too.
"""

from __future__ import annotations

from typing import Any

from flowml.errors import UnsupportedError
from flowml.ir import _jax, host
from flowml.ir.scopes import Stack, parse

_OUTSIDE = frozenset({"infeed", "outfeed"})


def check_argument(aval: Any, function: str, name: str) -> None:
    """Raise UnsupportedError if an argument or a closed-over value cannot be sent to a worker."""
    obstacle = _jax.obstacle(aval)
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
    line = _jax.source_line(equation)
    place = "".join(f" inside {outer}" for outer in reversed(inside)) + (f" at {line}" if line else "")
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
            f"{user} uses {op}{place}, whose side effect has no place in a dataflow graph; remove it"
        )
    obstacles = (_jax.mesh_obstacle(equation), *(_jax.obstacle(v.aval) for v in equation.outvars))
    obstacle = next((o for o in obstacles if o), "")
    if obstacle:
        raise UnsupportedError(f"{user}: what {op}{place} makes {obstacle}")
