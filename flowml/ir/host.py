"""Finds the calls of Python functions in a program: `pure_callback`, `io_callback`, and what `jax.debug` offers.

All but pure callbacks are *effects*: they happen once for each call of the program, also if no output needs them.
JAX promises an order only for *ordered* effects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from flowml.arrays import ArraySpec
from flowml.ir import _jax
from flowml.ir.bodies import map_bodies

DEBUGGING = {"debug_callback": "jax.debug.callback", "debug_print": "jax.debug.print"}
PURE = "pure_callback"
CONSTRUCTS = {PURE: "jax.pure_callback", "io_callback": "jax.experimental.io_callback", **DEBUGGING}
"""The public function behind each primitive that calls Python."""

EFFECTS = frozenset({"DebugEffect", "OrderedDebugEffect", "IOEffect", "OrderedIOEffect"})
"""Types of JAX's effects that are calls of Python functions."""

AXES = "NamedAxisEffect"
"""The type of the effect of an operation over an axis that `vmap` or `shard_map` binds around it."""


@dataclass(frozen=True)
class Effects:
    """What becomes of calls of Python: whether the workers run Python, and whether `jax.debug` is left out."""

    python: bool = True
    drop: bool = False


RUN = Effects()


@dataclass(frozen=True)
class Found:
    """A call of Python: its equation, and the loops and branches around it from the outside in."""

    equation: Any
    inside: tuple[str, ...] = ()

    @property
    def construct(self) -> str:
        """What the user wrote, and where: "jax.debug.print inside scan at model.py:12 (forward)"."""
        around = "".join(f" inside {outer}" for outer in reversed(self.inside))
        line = _jax.source_line(self.equation)
        return f"{CONSTRUCTS[self.equation.primitive.name]}{around}{f' at {line}' if line else ''}"

    @property
    def is_effect(self) -> bool:
        return self.equation.primitive.name != PURE

    @property
    def is_debugging(self) -> bool:
        return self.equation.primitive.name in DEBUGGING

    @property
    def is_ordered(self) -> bool:
        return any(type(e).__name__.startswith("Ordered") for e in self.equation.effects)


def calls(equation: Any, inside: tuple[str, ...] = ()) -> Iterator[Found]:
    """The calls of Python in an equation, with its loops, branches and nested functions."""
    name = equation.primitive.name
    if name in CONSTRUCTS:
        yield Found(equation, inside)
    for body in _jax.nested_jaxprs(equation):
        for nested in body.eqns:
            yield from calls(nested, inside if name in _jax.INLINED else (*inside, name))


def has_calls(equation: Any) -> bool:
    return next(calls(equation), None) is not None


def at_users_line(equation: Any, caller: Any) -> Any:
    """The equation, whose calls of Python that a library compiles by itself have the line of the nearest equation
    around them that has one, or that of `caller`."""
    if all(_jax.has_users_line(found.equation) for found in calls(equation)):
        return equation
    near = equation if _jax.has_users_line(equation) else caller
    if near is None:
        return equation
    if equation.primitive.name in CONSTRUCTS:
        return _jax.at_line_of(equation, near)

    def lined(body: Any, _: Any) -> Any:
        return body.replace(eqns=[at_users_line(e, near) for e in body.eqns])

    return equation.replace(params=map_bodies(equation.params, lined))


@dataclass(frozen=True)
class Call:
    """A Python function of a flat list of arrays, which returns arrays as in `results`."""

    function: Callable[..., Any]
    results: tuple[ArraySpec, ...]
    ordered: bool
    pure: bool
    construct: str

    @staticmethod
    def of(found: Found) -> Call:
        equation, parameters = found.equation, found.equation.params
        function = parameters.get("callback")
        if function is None:  # a debug_print, which has what it prints among its parameters
            function = partial(equation.primitive.impl, **parameters)
        results = tuple(_jax.spec_of(v.aval) for v in equation.outvars)
        return Call(function, results, found.is_ordered, not found.is_effect, found.construct)

    def __call__(self, *arrays: Any) -> list[np.ndarray]:
        """Call the function as JAX does: with arrays on a CPU, which is the default device inside.

        Raises TypeError if it returns other arrays than it declared.
        """
        cpu = jax.local_devices(backend="cpu")[0]
        with jax.default_device(cpu):
            returned = self.function(*jax.device_put(list(arrays), cpu))
        found = [np.asarray(r) for r in jax.tree_util.tree_leaves(returned)] if self.results else []
        if [r.shape for r in found] != [s.shape for s in self.results]:
            raise TypeError(
                f"{self.construct} returned {_listed(found)}, but was declared to return {_listed(self.results)}"
            )
        return [r.astype(_jax.struct_of(s).dtype, copy=False) for r, s in zip(found, self.results, strict=True)]


def _listed(arrays: Sequence[Any]) -> str:
    return ", ".join(f"{a.dtype}[{','.join(map(str, a.shape))}]" for a in arrays) or "nothing"


def without_debugging(closed: Any) -> tuple[Any, list[Found]]:
    """A program without `jax.debug`, also in its loops and branches; and what was left out."""
    dropped: list[Found] = []
    jaxpr = _without(closed.jaxpr, (), dropped)
    return jex.ClosedJaxpr(jaxpr, closed.consts), dropped


def _without(jaxpr: Any, inside: tuple[str, ...], dropped: list[Found]) -> Any:
    equations: list[Any] = []
    for equation in jaxpr.eqns:
        found = Found(equation, inside)
        if equation.primitive.name in DEBUGGING:
            dropped.append(found)
            continue
        if any(call.is_debugging for call in calls(equation)):
            name = equation.primitive.name
            around = inside if name in _jax.INLINED else (*inside, name)
            parameters = map_bodies(equation.params, lambda body, _, around=around: _without(body, around, dropped))
            equation = equation.replace(params=parameters, effects=_left(equation.effects))
        equations.append(equation)
    return jaxpr.replace(eqns=equations, effects=_left(jaxpr.effects))


def _left(effects: Any) -> frozenset[Any]:
    return frozenset(e for e in effects if not type(e).__name__.endswith("DebugEffect"))
