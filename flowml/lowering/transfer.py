"""Finds the values that cross between devices. Each value is sent to a device at most once."""

from __future__ import annotations

from dataclasses import dataclass

from flowml.ir.graph import Graph
from flowml.plan import Transfer


@dataclass(frozen=True)
class Edge:
    """A value made on `source` that nodes of `destination` read."""

    value: int
    source: str
    destination: str


def transfers(graph: Graph) -> tuple[Edge, ...]:
    """The distinct cut edges of a partitioned graph, in the order in which their values are made."""
    found: dict[Edge, None] = {}
    for node in graph.nodes:
        for value in node.outputs:
            for user in graph.consumers.get(value, ()):
                if user.device != node.device:
                    found[Edge(value, node.device, user.device)] = None
    return tuple(found)


def describe(graph: Graph, edge: Edge) -> Transfer:
    spec = graph.values[edge.value]
    layer = graph.producer[edge.value].layer
    return Transfer(edge.source, edge.destination, spec.shape, spec.dtype, spec.nbytes, layer)
