"""Checks that a placement fits in memory: the parameters, activations and results that a device must hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flowml.devices import Device
from flowml.errors import PlacementError
from flowml.ir.graph import Graph


def resident_bytes(graph: Graph, assignment: Mapping[int, str], device: str) -> int:
    """Bytes of the inputs and constants that a device's nodes read, plus its largest single node's results."""
    nodes = [n for n in graph.nodes if assignment[n.id] == device]
    held = {v for n in nodes for v in n.reads if v not in graph.producer}
    largest = max((sum(graph.values[v].nbytes for v in n.outputs) for n in nodes), default=0)
    return sum(graph.values[v].nbytes for v in held) + largest


def check_memory(
    graph: Graph, assignment: Mapping[int, str], devices: Sequence[Device], limit_bytes: int | None = None
) -> None:
    """Raise PlacementError, with the bytes, if a device cannot hold its share."""
    for device in devices:
        limit = limit_bytes if limit_bytes is not None else device.memory_bytes
        if limit is None:
            continue
        need = resident_bytes(graph, assignment, device.name)
        if need > limit:
            raise PlacementError(
                f"the model does not fit on {device.name}: it needs at least {need:,} bytes there and has {limit:,}; "
                "use more stages, more devices, or raise memory_bytes"
            )
