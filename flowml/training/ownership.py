"""Says where each value of an optimizer's update is computed, if the update is divided over several homes.

A gradient, a parameter and the state that belongs to it have one *owner*, and so has what is computed from them.
A few values have none: those that depend on no owner are *free*, such as a step count, and those that join small values
of several owners are *common*, such as the norm of all gradients. Every home that needs such a value computes it
itself, from what the owners send of it. What an operation joins that is large must stay together.

The *level* of a value counts the exchanges between owners that must happen before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from flowml.arrays import ArraySpec
from flowml.disjoint import DisjointSets
from flowml.ir import _jax
from flowml.ir.graph import Graph, Literal, Node
from flowml.ir.simplify import drop_dead
from flowml.ir.trace import trace

FREE, COMMON = -1, -2
"""Instead of an owner, which is a number of at least 0."""

SMALL_BYTES = 1024
"""An array of at most so many bytes may be sent to all homes."""

MOST_LEVELS = 4
"""The most exchanges for one update. What would need more stays together."""


@dataclass(frozen=True)
class Ownership:
    """The owner and the level of each value, and those owners that an operation joins too closely."""

    owner: Mapping[int, int]
    level: Mapping[int, int]
    joined: tuple[tuple[Node, frozenset[int]], ...]

    @property
    def levels(self) -> int:
        return max(self.level.values(), default=0)


def small(spec: ArraySpec) -> bool:
    return spec.nbytes <= SMALL_BYTES


def ownership(graph: Graph, inputs: Mapping[int, int], states: Sequence[tuple[int, Any]]) -> Ownership:
    """The ownership of an update. `inputs` are the owners of gradients and parameters.

    `states` has the input of each leaf of the state, and the output that becomes its next value. A leaf is owned by
    who makes its next value.
    """
    known = dict(inputs)
    while True:
        owner, joined = _propagated(graph, known)
        changed = False
        for value, output in states:
            before = known.get(value, FREE)
            after = FREE if isinstance(output, Literal) else owner.get(output, FREE)
            if after not in (FREE, before):
                known[value] = after if before == FREE else COMMON
                changed = before != COMMON or changed
        if not changed:
            return Ownership(owner, _levels(graph, owner), tuple(joined))


def _propagated(graph: Graph, known: Mapping[int, int]) -> tuple[dict[int, int], list[tuple[Node, frozenset[int]]]]:
    owner, joined = dict(known), list[tuple[Node, frozenset[int]]]()
    for node in graph.nodes:
        found, together = _owner_of(graph, node, owner)
        if together:
            joined.append((node, together))
        if found != FREE:
            owner.update(dict.fromkeys(node.outputs, found))
    return owner, joined


def _owner_of(graph: Graph, node: Node, owner: Mapping[int, int]) -> tuple[int, frozenset[int]]:
    """The owner of what a node makes, and the owners that must not be apart because of it."""
    arrays, scalars, common = set[int](), set[int](), False
    large = False
    for value in node.reads:
        found = owner.get(value, FREE)
        common = common or found == COMMON
        if found >= 0:
            shaped = bool(graph.values[value].shape)
            (arrays if shaped else scalars).add(found)
            large = large or not small(graph.values[value])
    if len(arrays) > 1:
        return (min(arrays), frozenset(arrays)) if large else (COMMON, frozenset())
    if arrays:
        return arrays.pop(), frozenset()
    if common or len(scalars) > 1:
        return COMMON, frozenset()
    return (scalars.pop() if scalars else FREE), frozenset()


def _levels(graph: Graph, owner: Mapping[int, int]) -> dict[int, int]:
    level: dict[int, int] = {}
    for node in graph.nodes:
        mine, reached = owner.get(node.outputs[0], FREE) if node.outputs else FREE, 0
        for value in node.reads:
            found = owner.get(value, FREE)
            reached = max(reached, level.get(value, 0) + (found >= 0 and found != mine))
        level.update(dict.fromkeys(node.outputs, reached))
    return level


def together(graph: Graph, count: int, states: Sequence[tuple[int, Any]]) -> tuple[list[int], dict[int, str]]:
    """The least leaf with which each of `count` leaves must stay together, and the operations that say so, by that
    leaf. The inputs of `graph` begin with the gradients and the parameters."""
    stay, because = DisjointSets(count), dict[int, str]()
    while True:
        inputs = {graph.inputs[half * count + i]: stay.find(i) for half in (0, 1) for i in range(count)}
        found = ownership(graph, inputs, states)
        sets = [(node.op, owners) for node, owners in found.joined]
        if not sets and found.levels > MOST_LEVELS:
            sets = [("a chain of operations", frozenset(o for o in found.owner.values() if o >= 0))]
        for op, owners in sets:
            firsts = sorted(map(stay.find, owners))
            for other in firsts:
                because.setdefault(firsts[0], because.pop(other, op))
            stay.join(owners)
        if not sets:
            return list(map(stay.find, range(count))), because


def opened(graph: Graph, count: int) -> Graph:
    """The graph with both sides of each branch that handles several leaves, so that it can be divided.

    XLA runs only one side of a branch. Here both are computed, and the result is selected.
    """
    while any(node.op == "cond" for node in graph.nodes):
        behind = _leaves_behind(graph, _leaf_of(graph, count))
        ids = {
            node.id
            for node in graph.nodes
            if node.op == "cond" and len(set[int]().union(*(behind.get(v, frozenset()) for v in node.reads))) > 1
        }
        if not ids:
            break

        def run(*arrays: Any, graph: Graph = graph, ids: set[int] = ids) -> list[Any]:
            return _run_selecting(graph, arrays, ids)

        structs = [_jax.struct(graph.avals[v]) for v in graph.inputs]
        again = drop_dead(trace(run, structs, {}, name="the optimizer").graph)
        graph = replace(again, input_names=graph.input_names, output_names=graph.output_names)
    return graph


def _leaf_of(graph: Graph, count: int) -> dict[int, int]:
    """The leaf to which each input belongs. State whose leaf is not known stands for itself."""
    first = {graph.inputs[half * count + i]: i for half in (0, 1) for i in range(count)}
    states = list(zip(graph.inputs[2 * count :], graph.outputs[count:], strict=True))
    found = ownership(graph, first, states)
    unknown = {value for node, _ in found.joined for value in node.outputs}
    leaf_of = dict(first)
    for number, (value, output) in enumerate(states):
        owner = found.owner.get(value, FREE)
        if owner >= 0 and output not in unknown:
            leaf_of[value] = owner
        elif graph.values[value].shape:
            leaf_of[value] = count + number
    return leaf_of


def _leaves_behind(graph: Graph, owned: Mapping[int, int]) -> dict[int, frozenset[int]]:
    """Up to two of the leaves whose arrays each value is computed from."""
    behind = {value: frozenset({leaf}) for value, leaf in owned.items()}
    for node in graph.nodes:
        found: frozenset[int] = frozenset()
        for value in node.reads:
            if len(found) < 2:
                found |= behind.get(value, frozenset())
        if found:
            behind.update(dict.fromkeys(node.outputs, frozenset(sorted(found)[:2])))
    return behind


def _run_selecting(graph: Graph, arrays: Sequence[Any], ids: set[int]) -> list[Any]:
    """Run a graph, and both sides of these branches."""
    values: dict[int, Any] = {**graph.constants, **dict(zip(graph.inputs, arrays, strict=True))}

    def read(operand: Any) -> Any:
        return _jax.literal_value(operand.value) if isinstance(operand, Literal) else values[operand]

    for node in graph.nodes:
        run = _selected if node.id in ids else _bound
        values.update(zip(node.outputs, run(node.equation, [read(i) for i in node.inputs]), strict=True))
    return [read(o) for o in graph.outputs]


def _bound(equation: Any, arrays: Sequence[Any]) -> list[Any]:
    """The results of an equation with these operands."""
    places, results = range(len(arrays)), range(len(arrays), len(arrays) + len(equation.outvars))
    avals = dict(enumerate(v.aval for v in (*equation.invars, *equation.outvars)))
    return list(_jax.as_function(_jax.build_jaxpr([(equation, places, results)], avals, places, results))(*arrays))


def _selected(equation: Any, arrays: Sequence[Any]) -> list[Any]:
    """The results of a branch (`cond` or `switch`), selected from those of all its sides."""
    which, *operands = arrays
    sides = [_jax.as_function(side)(*operands) for side in equation.params["branches"]]
    index = jnp.clip(which, 0, len(sides) - 1)
    return [jax.lax.select_n(index, *cases) for cases in zip(*sides, strict=True)]
