"""Removes nodes that no output needs, and merges equal nodes.

Nodes are merged only if they have the same label and pin. XLA would merge these within a task anyway, and merging
across layers would add edges between devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flowml.ir import _jax
from flowml.ir.graph import Graph, Literal, Node, Operand


def simplify(graph: Graph) -> Graph:
    return drop_dead(merge_equal(graph))


def drop_dead(graph: Graph) -> Graph:
    """The graph without nodes that no output depends on."""
    needed = set(graph.output_values)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            needed.update(node.reads)
            kept.append(node)
    constants = {v: c for v, c in graph.constants.items() if v in needed}
    return replace(graph, nodes=tuple(reversed(kept)), constants=constants)


def needed_for(graph: Graph, outputs: Sequence[Operand]) -> Graph:
    """The part of a graph that the given outputs need. The time is proportional to the size of the result."""
    nodes: dict[int, Node] = {}
    constants: dict[int, Any] = {}
    stack = [o for o in outputs if not isinstance(o, Literal)]
    while stack:
        value = stack.pop()
        node = graph.producer.get(value)
        if node is not None and node.id not in nodes:
            nodes[node.id] = node
            stack += node.reads
        elif value in graph.constants:
            constants[value] = graph.constants[value]
    kept = tuple(nodes[i] for i in sorted(nodes, key=graph.position.__getitem__))
    return replace(graph, nodes=kept, outputs=tuple(outputs), constants=constants)


def merge_equal(graph: Graph) -> Graph:
    """Merge common subexpressions that have the same label."""
    renamed: dict[int, int] = {}
    seen: dict[Any, Node] = {}
    kept: list[Node] = []
    for node in graph.nodes:
        node = replace(node, inputs=tuple(_rename(i, renamed) for i in node.inputs))
        key = _key(node)
        twin = seen.get(key) if key is not None else None
        if twin is not None:
            renamed.update(zip(node.outputs, twin.outputs, strict=True))
            continue
        if key is not None:
            seen[key] = node
        kept.append(node)
    return replace(graph, nodes=tuple(kept), outputs=tuple(_rename(o, renamed) for o in graph.outputs))


def _rename(operand: Operand, renamed: dict[int, int]) -> Operand:
    return operand if isinstance(operand, Literal) else renamed.get(operand, operand)


def _key(node: Node) -> Any:
    if node.calls_python or _jax.nested_jaxprs(node.equation):
        return None
    inputs = tuple(i.key if isinstance(i, Literal) else i for i in node.inputs)
    parameters = tuple(sorted(node.equation.params.items()))
    key = (node.op, inputs, parameters, node.scope, node.equation.ctx)
    try:
        hash(key)
    except TypeError:
        return None
    return key
