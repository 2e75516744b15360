"""Refuses what a dataflow graph cannot hold: effects, meshes and values that are not arrays.

The error names the function, the construct and the line of the user's code. The bodies of loops and branches are
checked too.
"""

from __future__ import annotations

from typing import Any

from flowml.errors import UnsupportedError
from flowml.ir import _jax
from flowml.ir.scopes import Stack, parse

_CONSTRUCTS = {
    "debug_callback": "jax.debug.callback",
    "debug_print": "jax.debug.print",
    "io_callback": "jax.experimental.io_callback",
}
"""The public function behind each primitive whose name users do not know."""


def check_argument(aval: Any, function: str, name: str) -> None:
    """Raise UnsupportedError if an argument or a closed-over value cannot be sent to a worker."""
    obstacle = _jax.obstacle(aval)
    if obstacle:
        raise UnsupportedError(f"{function}: {name} {obstacle}")


def check_equation(equation: Any, function: str, stack: Stack, inside: tuple[str, ...] = ()) -> None:
    """Raise UnsupportedError if no worker can run an equation. `inside` are the loops and branches around it."""
    op, layer = equation.primitive.name, parse(stack).path
    for body in _jax.nested_jaxprs(equation):  # first, because the fault of a loop is in its body
        for nested in body.eqns:
            check_equation(nested, function, stack, (*inside, op))
    user = f"{function} in layer {layer!r}" if layer else function
    line = _jax.source_line(equation)
    place = "".join(f" inside {outer}" for outer in reversed(inside)) + (f" at {line}" if line else "")
    if op in _jax.UNSUPPORTED or equation.effects:
        construct = f"{op} ({_CONSTRUCTS[op]})" if op in _CONSTRUCTS else op
        raise UnsupportedError(
            f"{user} uses {construct}{place}, whose side effect has no place in a dataflow graph; remove it, or "
            "compute the value with jax.pure_callback"
        )
    if op == _jax.CALLBACK and inside:
        raise UnsupportedError(
            f"{user} calls jax.pure_callback{place}; move the callback out of the loop, branch or remat body"
        )
    obstacles = (_jax.mesh_obstacle(equation), *(_jax.obstacle(v.aval) for v in equation.outvars))
    obstacle = next((o for o in obstacles if o), "")
    if obstacle:
        raise UnsupportedError(f"{user}: what {op}{place} makes {obstacle}")
