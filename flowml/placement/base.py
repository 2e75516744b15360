"""Places every node on a device: by its pin, else by the user's rule, else next to its data.

A rule decides by layer (a mapping of patterns, a pipeline, `"auto"`) or by node (a callable). Every rule
returns a device for each node and the alternatives that it compared, for `plan.explain()`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from flowml.arguments import is_text, seconds
from flowml.devices import Device, find_device
from flowml.errors import PlacementError, named, one_line, shadowed
from flowml.ir.graph import Graph, Node
from flowml.ir.host import calls
from flowml.ir.label import matches
from flowml.numbers import whole_number
from flowml.placement.auto import choose
from flowml.placement.links import Links
from flowml.placement.memory import check_memory
from flowml.placement.pipeline import pipeline_stages
from flowml.plan import Choice

HELD_SHARE = 0.01
"""A program follows the inputs that are on devices already if they have at least this share of all input bytes."""


@dataclass(frozen=True)
class Pipeline:
    """Cut the layers, in the order in which data reaches them, into `stages` runs of equal cost, one device each.

    A dynamic programme over the layers finds the cut whose slowest stage is fastest. Raises ValueError if
    `stages` < 1.
    """

    stages: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", whole_number("Pipeline: stages", self.stages, least=1))


@dataclass(frozen=True)
class AutoPlacement:
    """Choose between one device and pipelines by their estimated time.

    The search compares one device first, then pipelines from short to long.

    Attributes:
        objective: `"latency"` (one call) or `"throughput"` (many calls in flight).
        memory_bytes: a limit on the memory of each device.
        time_limit_s: a limit on the search in seconds. The clock is read after each alternative. When the time is
            over, the best alternative so far is used, and a note of the plan says so.
        now_s: the clock of the time limit.

    Raises:
        ValueError: for an unknown objective, or a limit that is out of range.
    """

    objective: str = "latency"
    memory_bytes: int | None = None
    time_limit_s: float | None = None
    now_s: Callable[[], float] = field(default=time.monotonic, kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.objective not in ("latency", "throughput"):
            raise ValueError(f"AutoPlacement(objective={self.objective!r}): must be 'latency' or 'throughput'")
        if self.time_limit_s is not None:
            object.__setattr__(self, "time_limit_s", seconds("AutoPlacement: time_limit_s", self.time_limit_s))
        if self.memory_bytes is not None:
            memory = whole_number("AutoPlacement: memory_bytes", self.memory_bytes, least=1)
            object.__setattr__(self, "memory_bytes", memory)


Rule = Callable[[Graph, Sequence[Device]], Mapping[int, Device | str]]
Placement = str | Mapping[str, str] | Pipeline | AutoPlacement | Rule


@dataclass(frozen=True)
class Choices:
    """A device for every node of the graph, the alternatives that were compared, and notes for the user.

    `default` is the device of nodes that no rule, pin or neighbour places; "" stands for the first device.
    """

    assignment: Mapping[int, str]
    weighed: tuple[Choice, ...] = ()
    notes: tuple[str, ...] = field(default=())
    default: str = ""


def place(
    graph: Graph,
    devices: Sequence[Device],
    placement: Placement,
    links: Links,
    held: Mapping[int, str] = MappingProxyType({}),
) -> Choices:
    """Decide where every node runs. Raises PlacementError, which names the device, layer or pin at fault.

    `held` maps inputs that are on a device already to that device. "auto" follows them.
    """
    pins = {n.id: _pin(n, devices) for n in graph.nodes if n.scope.pins}
    if isinstance(placement, str) and placement == "auto" and _are_large(graph, held):
        choices = _beside(graph, held)
    else:
        choices = _apply_rule(graph, devices, placement, links)
    assignment = _follow_data(graph, {**choices.assignment, **pins}, choices.default or devices[0].name)
    assignment = _where_python_runs(graph, devices, assignment, pins)
    check_memory(graph, assignment, devices, placement.memory_bytes if isinstance(placement, AutoPlacement) else None)
    return Choices(assignment, choices.weighed, choices.notes)


def _where_python_runs(
    graph: Graph, devices: Sequence[Device], assignment: Mapping[int, str], pins: Mapping[int, str]
) -> dict[int, str]:
    """The assignment, in which nodes that call Python are on devices that run it."""
    allowed = [d.name for d in devices if d.python]
    moved = [n for n in graph.nodes if n.calls_python and assignment[n.id] not in allowed]
    for node in moved:
        if node.id in pins or not allowed:
            pinned = f" is pinned to {pins[node.id]}, but" if node.id in pins else ":"
            raise PlacementError(
                f"{next(calls(node.equation)).construct}{pinned} Python runs only on "
                f"{named(allowed) or 'other replicas'}; pin it there, or start all workers with allow_python"
            )
    return {**assignment, **{n.id: allowed[0] for n in moved}}


def _are_large(graph: Graph, held: Mapping[int, str]) -> bool:
    """Whether the held inputs are large enough, of all inputs, to decide where a program runs."""
    total = sum(graph.values[v].nbytes for v in graph.inputs)
    return bool(held) and sum(graph.values[v].nbytes for v in held) >= HELD_SHARE * total


def _beside(graph: Graph, held: Mapping[int, str]) -> Choices:
    """Each layer where most bytes of the inputs are that its nodes read."""
    weights: dict[str | int, Counter[str]] = {}
    for value, device in held.items():
        for node in graph.consumers.get(value, ()):
            weights.setdefault(node.layer or node.id, Counter())[device] += graph.values[value].nbytes
    best = {key: max(weight, key=weight.__getitem__) for key, weight in weights.items()}
    found = {n.id: best[key] for n in graph.nodes if (key := n.layer or n.id) in best}
    most: Counter[str] = sum(weights.values(), Counter())
    default = max(most, key=most.__getitem__) if most else next(iter(held.values()))
    note = f"each layer runs where the inputs are that it reads, on {named(sorted(set(held.values())))}"
    return Choices(found, notes=(note,), default=default)


def _apply_rule(graph: Graph, devices: Sequence[Device], placement: Placement, links: Links) -> Choices:
    if isinstance(placement, str) and placement == "auto":
        placement = AutoPlacement()
    if isinstance(placement, AutoPlacement):
        bound, over = placement.memory_bytes, _out_of_time(placement)
        return Choices(*choose(graph, devices, placement.objective, bound, links, over))
    if isinstance(placement, Pipeline):
        if placement.stages > len(devices):
            raise PlacementError(
                f"Pipeline(stages={placement.stages}) needs {placement.stages} devices, there are {len(devices)}; "
                "start more workers or use fewer stages"
            )
        return Choices(pipeline_stages(graph, devices[: placement.stages], links))
    if isinstance(placement, Mapping):
        return _by_pattern(graph, devices, placement)
    if callable(placement):
        return Choices(_by_callable(graph, devices, placement))
    raise PlacementError(
        f"placement={placement!r} is not a placement; give 'auto', a mapping such as {{'conv*': 'worker:0'}}, "
        "fm.Pipeline(stages=2), fm.AutoPlacement() or a callable (graph, devices) -> {node id: device}"
    )


def _out_of_time(placement: AutoPlacement) -> Callable[[], bool]:
    """Whether the time of a search that begins now is over."""
    limit_s, now_s = placement.time_limit_s, placement.now_s
    if limit_s is None:
        return lambda: False
    end_s = now_s() + limit_s
    return lambda: now_s() >= end_s


def _pin(node: Node, devices: Sequence[Device]) -> str:
    """The device of a node's pins; an inner pin may only be narrower than the outer one."""
    layer = one_line(node.layer or "(none)")
    asked = f"fm.device in layer {layer!r}"
    found = [find_device(p, devices, asked) for p in node.scope.pins]
    for outer, inner in zip(node.scope.pins, node.scope.pins[1:], strict=False):
        if inner != outer and not inner.startswith(f"{outer}/"):
            raise PlacementError(
                f"node {node.op} of layer {layer!r} is pinned to {outer!r} and, inside that, to "
                f"{inner!r}; keep one of the two fm.device blocks"
            )
    return found[-1].name


def _by_pattern(graph: Graph, devices: Sequence[Device], patterns: Mapping[str, str]) -> Choices:
    """The first pattern that matches a layer places it. A pattern that matches any name is also the default."""
    layers = [layer for layer in dict.fromkeys(n.layer for n in graph.nodes) if layer]
    with_part: dict[str, list[str]] = {}
    for layer in layers:
        for part in dict.fromkeys(layer.split("/")):
            with_part.setdefault(part, []).append(layer)
    chosen: dict[str, tuple[str, str]] = {}
    """Layer -> the first pattern that matches it, and the device of that."""
    default = ""
    for pattern, wanted in patterns.items():
        asked = f"placement pattern {pattern!r}"
        if not is_text(pattern):
            raise PlacementError(f"{asked} is of type {type(pattern).__name__}; patterns are text, such as 'conv*'")
        device = find_device(_device_name(wanted, asked), devices, asked).name
        plain = not any(c in pattern for c in "*?[")
        hit = [k for k in (with_part.get(pattern.split("/")[0], ()) if plain else layers) if matches(k, pattern)]
        if fnmatchcase("", pattern):
            default = default or device
        elif not hit:
            known = f"{named(sorted(layers))}; give a pattern of one" if layers else "none; label code with fm.layer"
            raise PlacementError(f"placement pattern {pattern!r} matches no layer; layers are: {known}")
        elif all(layer in chosen for layer in hit):
            raise PlacementError(shadowed(asked, {layer: chosen[layer][0] for layer in hit}))
        for layer in hit:
            chosen.setdefault(layer, (pattern, device))
    return Choices({n.id: chosen[n.layer][1] for n in graph.nodes if n.layer in chosen}, default=default)


def _by_callable(graph: Graph, devices: Sequence[Device], rule: Rule) -> dict[int, str]:
    known = {n.id for n in graph.nodes}
    assignment: dict[int, str] = {}
    placed, asked = rule(graph, devices), "the placement callable"
    if not isinstance(placed, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlacementError(f"{asked} returns a {type(placed).__name__}; return a mapping from node ids to devices")
    for node, device in placed.items():
        if node not in known:
            raise PlacementError(f"{asked} names node {node!r}, which the graph does not have")
        assignment[node] = find_device(_device_name(device, asked), devices, asked).name
    return assignment


def _device_name(device: Any, asked_by: str) -> str:
    name = device.name if isinstance(device, Device) else device
    if not isinstance(name, str):
        raise PlacementError(f"{asked_by} names {name!r}, which is no device; give a name such as 'worker:0'")
    return name


def _follow_data(graph: Graph, placed: Mapping[int, str], default: str) -> dict[int, str]:
    """Unplaced nodes go to the device of their largest placed input, else of a consumer, else to `default`."""
    assignment = dict(placed)
    for node in graph.nodes:
        if node.id not in assignment:
            parents = [p for p in graph.parents(node) if p.id in assignment]
            if parents:
                heaviest = max(parents, key=lambda p: sum(graph.values[v].nbytes for v in p.outputs if v in node.reads))
                assignment[node.id] = assignment[heaviest.id]
    for node in reversed(graph.nodes):
        if node.id not in assignment:
            users = (c.id for v in node.outputs for c in graph.consumers.get(v, ()))
            assignment[node.id] = next((assignment[u] for u in users if u in assignment), default)
    return assignment
