"""simplify: drop what no output needs, and compute equal things once.

Equal nodes are merged only inside one label and pin: XLA would merge them anyway within a task, while
merging across layers would add edges between devices.
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
    """Without the nodes whose results reach no output."""
    needed = set(graph.output_values)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            needed.update(node.reads)
            kept.append(node)
    constants = {v: c for v, c in graph.constants.items() if v in needed}
    return replace(graph, nodes=tuple(reversed(kept)), constants=constants)


def needed_for(graph: Graph, outputs: Sequence[Operand]) -> Graph:
    """What of a graph some of its outputs need, as a graph. Takes time in proportion to what it gives."""
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
    """Common subexpressions, label by label."""
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
    if node.op == _jax.CALLBACK or _jax.nested_jaxprs(node.equation):
        return None
    inputs = tuple(i.key if isinstance(i, Literal) else i for i in node.inputs)
    parameters = tuple(sorted(node.equation.params.items()))
    key = (node.op, inputs, parameters, node.scope, node.equation.ctx)
    try:
        hash(key)
    except TypeError:
        return None
    return key
