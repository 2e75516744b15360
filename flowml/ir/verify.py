"""Verifies graphs after each pass. A violation is a bug of flowml, and the error names the pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flowml.devices import Device
from flowml.ir.graph import Graph, Literal


class VerifierError(AssertionError):
    """A pass broke a rule of its stage."""


def require(condition: bool, stage: str, message: str) -> None:
    """Raise VerifierError, which names the pass, unless the condition holds."""
    if not condition:
        raise VerifierError(f"after {stage}: {message}")


def verify_graph(graph: Graph, stage: str) -> None:
    """Check that each value has one producer, which precedes its readers, that ids are unique and outputs exist."""
    known = {*graph.inputs, *graph.constants}
    ids: set[int] = set()
    for node in graph.nodes:
        require(node.id not in ids, stage, f"two nodes have id {node.id}")
        ids.add(node.id)
        for value in node.reads:
            require(value in known, stage, f"node {node.id} ({node.op}) reads value {value} before it is made")
        for value in node.outputs:
            require(value not in known, stage, f"value {value} is made twice")
            known.add(value)
            require(value in graph.values and value in graph.avals, stage, f"value {value} has no type")
    for output in graph.outputs:
        require(isinstance(output, Literal) or output in known, stage, f"output {output} is never made")


def verify_placed(graph: Graph, assignment: Mapping[int, str], devices: Sequence[Device]) -> None:
    """Check that every node has exactly one device, and that the device exists."""
    names = {d.name for d in devices}
    for node in graph.nodes:
        require(assignment.get(node.id) in names, "place", f"node {node.id} ({node.op}) has no device that exists")


def verify_partitioned(graph: Graph) -> None:
    verify_graph(graph, "partition")
    for node in graph.nodes:
        require(bool(node.device), "partition", f"node {node.id} ({node.op}) has no device")
