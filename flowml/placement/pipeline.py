"""Cuts layers into pipeline stages by an exact dynamic programme.

Layers, in the order in which data reaches them, are cut into contiguous stages. The cut minimises the time of the
slowest stage or transfer into a stage: best[s][j] = min over i of max(best[s-1][i], cost(i, j)), the linear-partition
recurrence that PipeDream (Harlap et al., 2018) uses for pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from flowml.devices import Device
from flowml.errors import PlacementError
from flowml.ir.cost import node_seconds
from flowml.ir.graph import Graph, Node
from flowml.ir.keys import is_key, is_random
from flowml.placement.links import Links

_MAX_ITEMS = 600
_Key = str | int
"""A layer, or a node without one."""


def pipeline_stages(
    graph: Graph, devices: Sequence[Device], links: Links, limit_bytes: int | None = None
) -> dict[int, str]:
    """node id -> device, stage by stage. Raises PlacementError if there are fewer layers than stages.

    `limit_bytes` bounds the inputs (mostly parameters) that a stage holds; it is ignored if no cut meets it.
    """
    items = pipeline_items(graph)
    stages = cut(graph, items, devices, links, limit_bytes)
    return {node.id: devices[stage].name for item, stage in zip(items, stages, strict=True) for node in item}


def pipeline_items(graph: Graph) -> list[list[Node]]:
    """The units of a cut, in the order in which data reaches them: the nodes of a layer, or one unlabelled node.

    Data is what is computed from an input that is neither a parameter nor a key. Nodes that prepare a layer's weights
    or split its keys do not show the layer's position in the model.
    """
    data, joined = _data_nodes(graph), _joined(graph)
    groups: dict[_Key, list[Node]] = {}
    begins: dict[str | int, int] = {}
    for position, node in enumerate(graph.nodes):
        key = joined.get(node.layer, node.layer) or -1 - node.id
        groups.setdefault(key, []).append(node)
        if node.id in data:
            begins.setdefault(key, position)
    groups = _without_copies(graph, groups)
    first_use = {key: position for position, key in enumerate(groups)}
    order = sorted(groups, key=lambda k: (begins.get(k, -1), first_use[k]))
    items = [groups[key] for key in order]
    if len(items) <= _MAX_ITEMS:
        return items
    step = -(-len(items) // _MAX_ITEMS)
    return [[n for item in items[i : i + step] for n in item] for i in range(0, len(items), step)]


def _without_copies(graph: Graph, groups: Mapping[_Key, list[Node]]) -> dict[_Key, list[Node]]:
    """The groups, of which one that only copies what another has made is part of that.

    A gradient is a copy with the layer of the parameter's path, which may be another than that of the scope in which
    the parameter is used. A stage of such copies would have no work, and keep a parameter away from where it is read.
    """
    of = {node.id: key for key, nodes in groups.items() for node in nodes}
    found = {key: list(nodes) for key, nodes in groups.items()}
    for key, nodes in groups.items():
        if all(node.op == "copy" for node in nodes):
            makers = {of[graph.producer[v].id] for node in nodes for v in node.reads if v in graph.producer}
            if len(makers) == 1 and (maker := makers.pop()) != key and maker in found:
                found[maker] += found.pop(key)
    return found


def _joined(graph: Graph) -> dict[str, str]:
    """Layer -> the layer that it belongs to: the one that reads its parameters first.

    The update of a parameter has the layer of the parameter's path, and where it is used that of a scope. They have
    one stage, so that a new parameter is made where the next step reads it.
    """
    first: dict[int, str] = {}
    behind: dict[str, set[str]] = {}
    for node in graph.nodes:
        for value in graph.parameters.intersection(node.reads) if node.layer else ():
            behind.setdefault(node.layer, set()).add(first.setdefault(value, node.layer))
    alone = {layer: next(iter(found)) for layer, found in behind.items() if len(found) == 1}
    return {layer: home for layer, home in alone.items() if alone.get(home) == home}


def _data_nodes(graph: Graph) -> set[int]:
    """The nodes that depend on data. Constants and scalars (such as a step number) count only if nothing else does."""
    free = [v for v in (*graph.inputs, *graph.constants) if v not in graph.parameters and not is_key(graph.avals[v])]
    arrays = [v for v in free if graph.values[v].shape and v not in graph.constants]
    reached = set(arrays or free)
    found: set[int] = set()
    for node in graph.nodes:
        if not reached.isdisjoint(node.reads) and not is_random(node.op):
            reached.update(node.outputs)
            found.add(node.id)
    return found


def cut(
    graph: Graph,
    items: Sequence[Sequence[Node]],
    devices: Sequence[Device],
    links: Links,
    limit_bytes: int | None = None,
) -> list[int]:
    """The stage of every item: the cut whose slowest stage is fastest, and among equal cuts the most even one."""
    count, stages = len(items), len(devices)
    if count < stages:
        raise PlacementError(
            f"Pipeline(stages={stages}) has only {count} layers to cut; use fewer stages or label more with fm.layer"
        )
    alike = {(d.flops_per_s, d.bytes_per_s): d for d in devices}
    work_on = {kind: [sum(node_seconds(graph, n, d) for n in item) for item in items] for kind, d in alike.items()}
    work = np.array([work_on[d.flops_per_s, d.bytes_per_s] for d in devices])
    compute = np.concatenate([np.zeros((stages, 1)), np.cumsum(work, axis=1)], axis=1)
    transfer = _transfer_seconds(crossing_bytes(graph, items), devices, links)
    held = np.concatenate([[0], np.cumsum(_input_bytes(graph, items))])
    largest = max((sum(graph.values[v].nbytes for v in n.outputs) for item in items for n in item), default=0)
    limit = np.inf if limit_bytes is None else limit_bytes - largest

    over = held[None, :] - held[:-1, None] > limit

    def slowest(stage: int) -> np.ndarray:
        seconds = compute[stage][None, :] - compute[stage][:-1, None]
        np.maximum(seconds, transfer[stage][:, None], out=seconds)
        seconds[over] = np.inf
        return seconds

    best, _ = _linear_partition(slowest, stages, count)
    if not np.isfinite(best):
        return cut(graph, items, devices, links)

    def most_compute(stage: int) -> np.ndarray:
        seconds = compute[stage][None, :] - compute[stage][:-1, None]
        seconds[slowest(stage) > best] = np.inf
        return seconds

    return _linear_partition(most_compute, stages, count)[1]


def _linear_partition(cost: Callable[[int], np.ndarray], stages: int, count: int) -> tuple[float, list[int]]:
    """Cut `count` items into `stages` runs so that the largest cost is least: (that cost, stage of each item).

    `cost(stage)[start, end]` is the cost of the run start..end; entries with end <= start are not used.
    """
    best = np.full((stages + 1, count + 1), np.inf)
    choice = np.zeros((stages + 1, count + 1), dtype=int)
    best[0, 0] = 0.0
    backwards = np.tri(count, count + 1, dtype=bool)
    ends = np.arange(count + 1)
    for s in range(1, stages + 1):
        costs = np.maximum(best[s - 1, :-1, None], cost(s - 1))
        costs[backwards] = np.inf
        choice[s] = np.argmin(costs, axis=0)
        best[s] = costs[choice[s], ends]
    stage_of = [0] * count
    end = count
    for s in range(stages, 0, -1):
        start = int(choice[s, end])
        stage_of[start:end] = [s - 1] * (end - start)
        end = start
    return float(best[stages, count]), stage_of


def _input_bytes(graph: Graph, items: Sequence[Sequence[Node]]) -> list[int]:
    """Bytes of the inputs and constants that each item is the first to read."""
    seen: set[int] = set()
    found: list[int] = []
    for item in items:
        fresh = {v for n in item for v in n.reads if v not in graph.producer} - seen
        seen |= fresh
        found.append(sum(graph.values[v].nbytes for v in fresh))
    return found


def _transfer_seconds(crossing: Sequence[int], devices: Sequence[Device], links: Links) -> np.ndarray:
    """[stage, item] -> seconds to send to the stage what crosses a cut in front of the item."""
    into = [links.between(a.name, b.name) for a, b in pairwise(devices)]
    return np.array([[0.0] * len(crossing), *([k.seconds(n) if n else 0.0 for n in crossing] for k in into)])


def crossing_bytes(graph: Graph, items: Sequence[Sequence[Node]]) -> list[int]:
    """Bytes that cross a cut in front of each item except the first."""
    position = {node.id: i for i, item in enumerate(items) for node in item}
    change = [0] * (len(items) + 1)
    for value, users in graph.consumers.items():
        maker = graph.producer.get(value)
        if maker is None:
            continue
        places = [position[maker.id], *(position[u.id] for u in users)]
        first, last = min(places), max(places)
        if first != last:
            change[first + 1] += graph.values[value].nbytes
            change[last + 1] -= graph.values[value].nbytes
    return np.cumsum(change)[: len(items)].tolist()
