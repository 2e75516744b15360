"""Traces a JAX function to a `Graph`. Nested jit and custom-derivative calls are inlined; scopes are kept.

A loop, a branch or a remat body becomes one node, which runs on one device and is compiled by XLA as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flowml.ir import _jax
from flowml.ir.graph import Graph, Literal, Node, Operand
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


def trace(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    name: str = "function",
) -> Trace:
    """Trace `fn`. Raises UnsupportedError if it contains something that a dataflow graph cannot hold."""
    traced = _jax.trace(fn, args, kwargs)
    for position, (variable, path) in enumerate(zip(traced.jaxpr.invars, traced.input_names, strict=True)):
        check_argument(variable.aval, name, f"argument {path!r}" if path else f"array {position} of the arguments")
    for variable in traced.jaxpr.constvars:
        check_argument(variable.aval, name, "an array that it closes over")
    builder = _Builder(name)
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
    )
    parameters = argument_parameters(graph, traced.trees)
    return Trace(graph, traced.in_tree, traced.out_tree, parameters, closed_over_layers(graph, parameters, fn))


@dataclass
class _Builder:
    """Collects nodes while walking jaxprs; owns the numbering of values."""

    name: str
    nodes: list[Node] = field(default_factory=list[Node])
    values: dict[int, ArraySpec] = field(default_factory=dict[int, ArraySpec])
    avals: dict[int, Any] = field(default_factory=dict[int, Any])
    constants: dict[int, Any] = field(default_factory=dict[int, Any])

    def new_value(self, aval: Any) -> int:
        value = len(self.values)
        self.values[value] = _jax.spec_of(aval)
        self.avals[value] = aval
        return value

    def splice(self, jaxpr: Any, environment: dict[Any, Operand], prefix: Stack) -> list[Operand]:
        """Append the nodes of `jaxpr` and return its outputs."""

        def read(atom: Any) -> Operand:
            return _literal(atom) if _jax.is_literal(atom) else environment[atom]

        for equation in jaxpr.eqns:
            stack = prefix + _jax.name_stack(equation)
            operands = [read(a) for a in equation.invars]
            body = _jax.called_jaxpr(equation)
            if body is not None:
                inner, constants = body
                inner_environment: dict[Any, Operand] = dict(zip(inner.invars, operands, strict=True))
                for variable, constant in zip(inner.constvars, constants, strict=True):
                    value = self.new_value(variable.aval)
                    self.constants[value] = constant
                    inner_environment[variable] = value
                results = self.splice(inner, inner_environment, stack)
                environment.update(zip(equation.outvars, results, strict=True))
            else:
                self._append(equation, operands, stack, environment)
        return [read(a) for a in jaxpr.outvars]

    def _append(self, equation: Any, operands: list[Operand], stack: Stack, environment: dict[Any, Operand]) -> None:
        check_equation(equation, self.name, stack)
        outputs = tuple(self.new_value(v.aval) for v in equation.outvars)
        environment.update(zip(equation.outvars, outputs, strict=True))
        node = Node(
            id=len(self.nodes),
            op=equation.primitive.name,
            inputs=tuple(operands),
            outputs=outputs,
            scope=parse(stack),
            equation=equation,
        )
        self.nodes.append(node)


def _nothing(aval: Any) -> Literal | None:
    """The literal for a result of dtype float0, which has a shape but no values, so it is not computed or sent."""
    return _literal(_jax.float0_literal(aval)) if _jax.spec_of(aval).dtype == "float0" else None


def _literal(atom: Any) -> Literal:
    array = np.asarray(atom.val)
    key = f"{_jax.spec_of(atom.aval)}"
    return Literal(atom, atom.aval, (key, array.tobytes()))
