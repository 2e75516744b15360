"""Sets the device of every node, and copies cheap nodes to other devices instead of sending their results.

A node is cheap if computing it again on another device moves fewer bytes than sending its result: an iota, a
constant spread over a shape, a scalar broadcast. Each copy reads its (smaller) inputs on its own device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flowml.ir.cost import FUSED, TRANSCENDENTAL
from flowml.ir.graph import Graph, Literal, Node, Operand
from flowml.ir.simplify import drop_dead
from flowml.plan import ArraySpec

_CHEAP = frozenset({"iota", "broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "expand_dims", "copy"})

_FEW = 64
"""Bytes of a few numbers."""


def partition(graph: Graph, assignment: Mapping[int, str]) -> Graph:
    """The graph with a device on every node, and cheap nodes copied to the devices that read them."""
    duplicator = _Duplicator(graph, assignment)
    for node in graph.nodes:
        duplicator.add(node)
    placed = replace(graph, nodes=tuple(duplicator.nodes), values=duplicator.values, avals=duplicator.avals)
    return drop_dead(placed)


def is_cheap(graph: Graph, node: Node) -> bool:
    """Whether copying `node` to another device costs less than sending its result there."""
    if node.calls_python:
        return False
    if all(isinstance(i, Literal) for i in node.inputs):
        return node.op in _CHEAP or sum(graph.values[v].nbytes for v in node.outputs) <= 1024
    incoming = sum(graph.values[v].nbytes for v in set(node.reads))
    return node.op in _CHEAP and incoming < sum(graph.values[v].nbytes for v in node.outputs)


def is_fused(graph: Graph, node: Node) -> bool:
    """Whether XLA computes `node` as part of its reader without writing its result to memory, and the reader reads no
    more than that result: `0.9 * momentum`, the transposed weights of a product, arithmetic of a few numbers."""
    if node.calls_python:
        return False
    incoming = sum(graph.values[v].nbytes for v in set(node.reads))
    outgoing = sum(graph.values[v].nbytes for v in node.outputs)
    if max(incoming, outgoing) <= _FEW:
        return node.op in FUSED or node.op in TRANSCENDENTAL
    return node.op in FUSED and incoming <= outgoing + _FEW


@dataclass
class _Duplicator:
    graph: Graph
    assignment: Mapping[int, str]
    nodes: list[Node] = field(default_factory=list[Node])
    copies: dict[tuple[int, str], int] = field(default_factory=dict[tuple[int, str], int])
    values: dict[int, ArraySpec] = field(init=False)
    avals: dict[int, Any] = field(init=False)
    cheap: dict[int, Node] = field(init=False)
    next_node: int = field(init=False)

    def __post_init__(self) -> None:
        self.values = dict(self.graph.values)
        self.avals = dict(self.graph.avals)
        self.cheap = {v: n for n in self.graph.nodes if is_cheap(self.graph, n) for v in n.outputs}
        self.next_node = max((n.id for n in self.graph.nodes), default=-1) + 1

    def add(self, node: Node) -> None:
        device = self.assignment[node.id]
        inputs = tuple(self.at(i, device) for i in node.inputs)
        self.nodes.append(replace(node, inputs=inputs, device=device))

    def at(self, operand: Operand, device: str) -> Operand:
        """The operand for `device`: the operand itself, or the result of a copy of its cheap node on `device`."""
        if isinstance(operand, Literal) or operand not in self.cheap:
            return operand
        node = self.cheap[operand]
        if self.assignment[node.id] == device:
            return operand
        if (operand, device) not in self.copies:
            inputs = tuple(self.at(i, device) for i in node.inputs)
            outputs = tuple(self._copy_value(v, device) for v in node.outputs)
            self.nodes.append(replace(node, id=self.next_node, inputs=inputs, outputs=outputs, device=device))
            self.next_node += 1
        return self.copies[operand, device]

    def _copy_value(self, value: int, device: str) -> int:
        copy = len(self.values)
        self.values[copy], self.avals[copy] = self.values[value], self.avals[value]
        self.copies[value, device] = copy
        return copy
