"""Traces a JAX function to a `Graph`. Nested jit and custom-derivative calls are inlined; scopes are kept.

A loop, a branch or a remat body becomes one node, which runs on one device and is compiled by XLA as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from flowml.arrays import TOKEN
from flowml.ir import _jax, host
from flowml.ir.axes import body_on_one, unbound_axis
from flowml.ir.foreign import expanded
from flowml.ir.graph import Graph, Literal, Node, Operand
from flowml.ir.host import RUN, Effects
from flowml.ir.obstacles import check_argument, check_equation
from flowml.ir.parameters import argument_parameters, closed_over_layers
from flowml.ir.scopes import Stack, parse
from flowml.plan import ArraySpec


@dataclass(frozen=True)
class Trace:
    """The graph of a function with the trees of its arguments and its result.

    `parameters` maps inputs that are parameters to their paths in their argument. `closed_over` maps constants that
    are parameters to their layers.
    """

    graph: Graph
    in_tree: Any
    out_tree: Any
    parameters: Mapping[int, str]
    closed_over: Mapping[int, str]
    left_out: tuple[str, ...] = ()
    """What was left out, as the user wrote it, and where."""


def trace(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    name: str = "function",
    effects: Effects = RUN,
) -> Trace:
    """Trace `fn`. Raises UnsupportedError if it contains something that a dataflow graph cannot hold."""
    try:
        traced = _jax.trace(fn, args, kwargs, partial(_rewritten, drop=effects.drop))
    except NameError as error:
        raise unbound_axis(error, name) or error from None
    for position, (variable, path) in enumerate(zip(traced.jaxpr.invars, traced.input_names, strict=True)):
        check_argument(variable.aval, name, f"argument {path!r}" if path else f"array {position} of the arguments")
    for variable in traced.jaxpr.constvars:
        check_argument(variable.aval, name, "an array that it closes over")
    builder = _Builder(name, effects.python)
    constants = {builder.new_value(v.aval): c for v, c in zip(traced.jaxpr.constvars, traced.constants, strict=True)}
    inputs = tuple(builder.new_value(v.aval) for v in traced.jaxpr.invars)
    environment: dict[Any, Operand] = dict(zip(traced.jaxpr.constvars, constants, strict=True))
    environment.update(zip(traced.jaxpr.invars, inputs, strict=True))
    outputs = builder.splice(traced.jaxpr, environment, ())
    outputs = [_nothing(v.aval) or o for v, o in zip(traced.jaxpr.outvars, outputs, strict=True)]
    graph = Graph(
        nodes=tuple(builder.nodes),
        values=builder.values,
        avals=builder.avals,
        inputs=inputs,
        input_names=traced.input_names,
        outputs=tuple(outputs),
        output_names=traced.output_names,
        constants={**constants, **builder.constants},
        tokens=tuple(builder.tokens),
        ordered=builder.last is not None,
    )
    parameters = argument_parameters(graph, traced.trees)
    left_out = tuple(found.construct for found in traced.left_out)
    closed_over = closed_over_layers(graph, parameters, fn)
    return Trace(graph, traced.in_tree, traced.out_tree, parameters, closed_over, left_out)


def _rewritten(closed: Any, *, drop: bool) -> tuple[Any, Sequence[host.Found]]:
    closed = expanded(closed)
    return host.without_debugging(closed) if drop else (closed, ())


@dataclass
class _Builder:
    """Collects nodes while walking jaxprs; owns the numbering of values."""

    name: str
    python: bool
    """Whether the workers run Python."""
    nodes: list[Node] = field(default_factory=list[Node])
    values: dict[int, ArraySpec] = field(default_factory=dict[int, ArraySpec])
    avals: dict[int, Any] = field(default_factory=dict[int, Any])
    constants: dict[int, Any] = field(default_factory=dict[int, Any])
    tokens: list[int] = field(default_factory=list[int])
    last: int | None = None
    """The token of the last ordered effect."""

    def new_value(self, aval: Any) -> int:
        value = len(self.values)
        self.values[value] = _jax.spec_of(aval)
        self.avals[value] = aval
        return value

    def splice(self, jaxpr: Any, environment: dict[Any, Operand], prefix: Stack, caller: Any = None) -> list[Operand]:
        """Append the nodes of `jaxpr` and return its outputs. `caller` is the nearest call of it in the user's code."""

        def read(atom: Any) -> Operand:
            return _literal(atom) if _jax.is_literal(atom) else environment[atom]

        for equation in jaxpr.eqns:
            stack = prefix + _jax.name_stack(equation)
            operands = [read(a) for a in equation.invars]
            body = _jax.called_jaxpr(equation) or body_on_one(equation)
            if body is not None:
                inner, constants = body
                inner_environment: dict[Any, Operand] = dict(zip(inner.invars, operands, strict=True))
                for variable, constant in zip(inner.constvars, constants, strict=True):
                    value = self.new_value(variable.aval)
                    self.constants[value] = constant
                    inner_environment[variable] = value
                near = equation if _jax.has_users_line(equation) else caller
                results = self.splice(inner, inner_environment, stack, near)
                environment.update(zip(equation.outvars, results, strict=True))
            else:
                self._append(host.at_users_line(equation, caller), operands, stack, environment)
        return [read(a) for a in jaxpr.outvars]

    def _append(self, equation: Any, operands: list[Operand], stack: Stack, environment: dict[Any, Operand]) -> None:
        check_equation(equation, self.name, stack, self.python)
        outputs = [self.new_value(v.aval) for v in equation.outvars]
        environment.update(zip(equation.outvars, outputs, strict=True))
        calls = list(host.calls(equation))
        if any(call.is_effect for call in calls):
            token = self.new_value(_jax.aval_of(TOKEN))
            outputs.append(token)
            self.tokens.append(token)
            if any(call.is_ordered for call in calls):
                operands = operands if self.last is None else [*operands, self.last]
                self.last = token
        node = Node(
            id=len(self.nodes),
            op=equation.primitive.name,
            inputs=tuple(operands),
            outputs=tuple(outputs),
            scope=parse(stack),
            equation=equation,
            calls_python=bool(calls),
        )
        self.nodes.append(node)


def _nothing(aval: Any) -> Literal | None:
    """The literal for a result of dtype float0, which has a shape but no values, so it is not computed or sent."""
    return _literal(_jax.float0_literal(aval)) if _jax.spec_of(aval).dtype == "float0" else None


def _literal(atom: Any) -> Literal:
    array = np.asarray(atom.val)
    key = f"{_jax.spec_of(atom.aval)}"
    return Literal(atom, atom.aval, (key, array.tobytes()))
