"""Automatic placement: one device against pipelines of two and more, by estimate.

One fast machine hardly ever gains from a pipeline; slow links never do for a single call. The comparison is
kept so that `plan.explain()` can say so with numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from flowml.cost import node_seconds
from flowml.devices import Device, Link
from flowml.errors import PlacementError
from flowml.graph import Graph
from flowml.placement.memory import resident_bytes
from flowml.placement.pipeline import pipeline_items, pipeline_stages
from flowml.plan import Choice


def choose(
    graph: Graph, devices: Sequence[Device], objective: str, memory_bytes: int | None, link: Link
) -> tuple[dict[int, str], tuple[Choice, ...], tuple[str, ...]]:
    """The best assignment that fits, all that were weighed, and notes. Raises PlacementError if none fits."""
    layers = len(pipeline_items(graph))
    candidates: list[tuple[str, dict[int, str]]] = [
        (f"one device ({devices[0].name})", {n.id: devices[0].name for n in graph.nodes})
    ]
    for stages in range(2, min(len(devices), layers) + 1):
        limit = min((_limit(d, memory_bytes) for d in devices[:stages]), default=float("inf"))
        bound = None if limit == float("inf") else int(limit)
        candidates.append((f"pipeline of {stages} stages", pipeline_stages(graph, devices[:stages], link, bound)))
    weighed = [_weigh(graph, name, a, devices, objective, memory_bytes, link) for name, a in candidates]
    fitting = [i for i, (_, fits) in enumerate(weighed) if fits]
    if not fitting:
        smallest = min(c.peak_bytes for c, _ in weighed)
        limit = memory_bytes if memory_bytes is not None else max(d.memory_bytes or 0 for d in devices)
        raise PlacementError(
            f"the model fits on no device: the best split needs at least {smallest:,} bytes on one device, "
            f"devices have {limit:,}; add devices or raise memory_bytes"
        )
    best = min(fitting, key=lambda i: weighed[i][0].step_seconds)
    choices = tuple(
        Choice(c.name, c.step_seconds, c.peak_bytes, c.note, chosen=i == best) for i, (c, _) in enumerate(weighed)
    )
    return candidates[best][1], choices, _notes(best, objective, len(devices))


def _notes(best: int, objective: str, devices: int) -> tuple[str, ...]:
    if best == 0 and devices > 1:
        return (f"one device is expected to be faster than any pipeline here (objective: {objective}).",)
    return ()


def _weigh(
    graph: Graph,
    name: str,
    assignment: dict[int, str],
    devices: Sequence[Device],
    objective: str,
    memory_bytes: int | None,
    link: Link,
) -> tuple[Choice, bool]:
    used = [d for d in devices if d.name in set(assignment.values())] or [devices[0]]
    work = {d.name: sum(node_seconds(graph, n, d) for n in graph.nodes if assignment[n.id] == d.name) for d in used}
    crossing = {
        (value, assignment[user.id])
        for value, users in graph.consumers.items()
        if value in graph.producer
        for user in users
        if assignment[user.id] != assignment[graph.producer[value].id]
    }
    transfers = sum(link.seconds(graph.values[v].nbytes) for v, _ in crossing)
    seconds = sum(work.values()) + transfers if objective == "latency" else max(work.values()) + transfers / len(used)
    peaks = {d.name: resident_bytes(graph, assignment, d.name) for d in used}
    over = [d.name for d in used if peaks[d.name] > _limit(d, memory_bytes)]
    note = f"does not fit on {over[0]}" if over else f"{len(crossing)} values cross" if crossing else ""
    return Choice(name, seconds, max(peaks.values()), note), not over


def _limit(device: Device, memory_bytes: int | None) -> float:
    limit = memory_bytes if memory_bytes is not None else device.memory_bytes
    return float("inf") if limit is None else limit
