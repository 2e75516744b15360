"""Groups each device's nodes into a few large tasks, and orders tasks and microbatches.

The level of a node is the largest number of device changes on a path to it; a node that calls Python counts as a
change. No path leaves the nodes of one device and level and returns to them, so these nodes form one task. Tasks sorted
by level are in topological order. This order is global, so no placement can deadlock.

A training stage should send each layer's gradient as soon as it exists. A task may therefore be cut further at
milestones: one segment holds everything that a milestone needs and no earlier milestone needed.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from flowml.ir.graph import Graph, Node
from flowml.lowering.partition import is_cheap, is_fused

SCHEDULES = ("1f1b", "gpipe")


@dataclass(frozen=True)
class TaskGroup:
    """The nodes that become one executable. `inputs` and `outputs` are values, in a fixed order.

    `compiled_in` are the closed-over arrays that are part of the executable.
    """

    index: int
    device: str
    level: int
    segment: int
    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    compiled_in: tuple[int, ...] = ()

    @property
    def calls_python(self) -> bool:
        return any(n.calls_python for n in self.nodes)


@dataclass(frozen=True)
class Schedule:
    """Tasks in global topological order, and for each device its (task, microbatch) pairs in the order of execution."""

    groups: tuple[TaskGroup, ...]
    order: Mapping[str, tuple[tuple[int, int], ...]]
    microbatches: int


def schedule(
    graph: Graph,
    seconds: Mapping[int, float],
    *,
    milestones: Sequence[Sequence[int]] = (),
    microbatches: int = 1,
    kind: str = "1f1b",
) -> Schedule:
    """Tasks and their order. `seconds` estimates each node; `milestones` are sets of values that are needed early."""
    groups = _group(graph, milestones)
    durations = [sum(seconds.get(n.id, 0.0) for n in g.nodes) + 1e-5 for g in groups]
    return Schedule(groups, task_order(groups, durations, microbatches, kind), microbatches)


def task_order(
    groups: Sequence[TaskGroup], durations: Sequence[float], microbatches: int, kind: str
) -> dict[str, tuple[tuple[int, int], ...]]:
    """For each device its (task, microbatch) pairs in the order of execution. `durations` are those of the groups."""
    if microbatches == 1 or kind == "gpipe":
        return _in_level_order(groups, microbatches)
    return _one_forward_one_backward(groups, _dependencies(groups), durations, microbatches)


def in_turn(plan: Schedule) -> Schedule:
    """The same tasks, where each microbatch ends before the next one begins."""
    keyed = sorted((m, g.level, g.segment, g.index) for g in plan.groups for m in range(plan.microbatches))
    order: dict[str, list[tuple[int, int]]] = {d: [] for d in plan.order}
    for microbatch, _, _, index in keyed:
        order[plan.groups[index].device].append((index, microbatch))
    return replace(plan, order={d: tuple(o) for d, o in order.items()})


def _levels(graph: Graph) -> dict[int, int]:
    levels: dict[int, int] = {}
    for node in graph.nodes:
        level = 0
        for parent in graph.parents(node):
            apart = parent.device != node.device or parent.calls_python or node.calls_python
            level = max(level, levels[parent.id] + apart)
        levels[node.id] = level
    _sink_cheap(graph, levels)
    _sink_copies(graph, levels)
    return levels


def _sink_cheap(graph: Graph, levels: dict[int, int]) -> None:
    """Move cheap nodes to the level of their first reader, so that a constant does not become a separate task, and what
    is fused with its reader is not written to memory for it."""
    exported = set(graph.output_values)
    for node in reversed(graph.nodes):
        users = [u for v in node.outputs for u in graph.consumers.get(v, ())]
        stays = exported.intersection(node.outputs) or any(u.device != node.device for u in users)
        if users and not stays and (is_cheap(graph, node) or is_fused(graph, node)):
            levels[node.id] = min(levels[u.id] for u in users)


def _sink_copies(graph: Graph, levels: dict[int, int]) -> None:
    """Move a copy of an input for an output to the level of the last reader of the input on its device.

    If the input is donated, the copy can then be in its memory.
    """
    for node in graph.nodes:
        if node.op == "copy" and not graph.consumers.get(node.outputs[0]):
            for value in node.reads:
                if value not in graph.producer:
                    levels[node.id] = max(levels[u.id] for u in graph.consumers[value] if u.device == node.device)


def _segments(graph: Graph, levels: Mapping[int, int], milestones: Sequence[Sequence[int]]) -> dict[int, int]:
    """node -> the first milestone, in order of completion, that needs it (within its device and level)."""
    position = positions(graph)
    made = [[graph.producer[v] for v in m if v in graph.producer] for m in milestones]
    # A part is complete when its deepest value is; values of earlier levels exist by then.
    deepest = [max(levels[n.id] for n in ms) if ms else 0 for ms in made]
    made = [[n for n in ms if levels[n.id] == d] for ms, d in zip(made, deepest, strict=True)]
    ordered = sorted((m for m in made if m), key=lambda ms: max(position[n.id] for n in ms))
    segment: dict[int, int] = {}
    for index, goal in enumerate(ordered):
        stack = list(goal)
        while stack:
            node = stack.pop()
            if node.id in segment:
                continue
            segment[node.id] = index
            for parent in graph.parents(node):
                if parent.device == node.device and levels[parent.id] == levels[node.id]:
                    stack.append(parent)
    return {n.id: segment.get(n.id, len(ordered)) for n in graph.nodes}


def positions(graph: Graph) -> dict[int, int]:
    """The position of each node in the program. A copy for an output has the position of the node that it copies."""
    position: dict[int, int] = {}
    for index, node in enumerate(graph.nodes):
        made = [position[p.id] for p in graph.parents(node)] if node.op == "copy" else []
        position[node.id] = max(made, default=index)
    return position


def _group(graph: Graph, milestones: Sequence[Sequence[int]]) -> tuple[TaskGroup, ...]:
    levels = _levels(graph)
    segments = _segments(graph, levels, milestones)
    members: dict[tuple[int, int, str, int], list[Node]] = {}
    for node in graph.nodes:
        callback = node.id if node.calls_python else -1
        members.setdefault((levels[node.id], segments[node.id], node.device, callback), []).append(node)
    exported = set(graph.output_values)
    home = {v: key for key, nodes in members.items() for n in nodes for v in n.outputs}
    groups: list[TaskGroup] = []
    for key in sorted(members):
        nodes = members[key]
        inputs = dict.fromkeys(v for n in nodes for v in n.reads if home.get(v) != key)
        outputs = tuple(
            v
            for n in nodes
            for v in n.outputs
            if v in exported or any(home[u.outputs[0]] != key for u in graph.consumers.get(v, ()))
        )
        level, segment, device, _ = key
        groups.append(TaskGroup(len(groups), device, level, segment, tuple(nodes), tuple(inputs), outputs))
    return tuple(groups)


def _dependencies(groups: Sequence[TaskGroup]) -> list[set[int]]:
    maker = {v: g.index for g in groups for v in g.outputs}
    return [{maker[v] for v in g.inputs if v in maker} for g in groups]


def _in_level_order(groups: Sequence[TaskGroup], microbatches: int) -> dict[str, tuple[tuple[int, int], ...]]:
    """GPipe (Huang et al., 2019): all microbatches finish a level before any starts the next."""
    keyed = sorted((g.level, m, g.segment, g.index) for g in groups for m in range(microbatches))
    order: dict[str, list[tuple[int, int]]] = {}
    for _, microbatch, _, index in keyed:
        order.setdefault(groups[index].device, []).append((index, microbatch))
    return {d: tuple(o) for d, o in order.items()}


def _one_forward_one_backward(
    groups: Sequence[TaskGroup], needs: Sequence[set[int]], durations: Sequence[float], microbatches: int
) -> dict[str, tuple[tuple[int, int], ...]]:
    """1F1B (PipeDream, Harlap et al., 2018) by list scheduling with the estimated times.

    A device always runs the deepest ready task, so backward tasks come before forward tasks. It keeps at most as many
    microbatches in flight as there are devices from it to the end of the pipeline.
    """
    users: list[list[int]] = [[] for _ in groups]
    for index, sources in enumerate(needs):
        for source in sources:
            users[source].append(index)
    devices = sorted({g.device for g in groups}, key=lambda d: min((g.level, g.index) for g in groups if g.device == d))
    state = {d: _DeviceState(limit=len(devices) - rank, tasks=0) for rank, d in enumerate(devices)}
    for group in groups:
        state[group.device].tasks += 1
    missing = {(g.index, m): len(needs[g.index]) for g in groups for m in range(microbatches)}
    for (index, m), count in missing.items():
        if count == 0:
            state[groups[index].device].offer(groups[index], m)
    order: dict[str, list[tuple[int, int]]] = {d: [] for d in devices}
    running: list[tuple[float, int, int]] = []
    now = 0.0
    while True:
        for device in devices:
            pick = state[device].take() if not state[device].busy else None
            if pick is not None:
                order[device].append(pick)
                heapq.heappush(running, (now + durations[pick[0]], *pick))
        if not running:
            break
        now, index, m = heapq.heappop(running)
        state[groups[index].device].finish(m)
        for user in users[index]:
            missing[user, m] -= 1
            if missing[user, m] == 0:
                state[groups[user].device].offer(groups[user], m)
    return {d: tuple(o) for d, o in order.items()}


@dataclass
class _DeviceState:
    """One device of the simulated list schedule: its ready tasks, and the microbatches in flight."""

    limit: int
    tasks: int
    busy: bool = False
    started: int = 0
    ready: list[tuple[int, int, int, int]] = field(default_factory=list[tuple[int, int, int, int]])
    left: dict[int, int] = field(default_factory=dict[int, int])

    def offer(self, group: TaskGroup, microbatch: int) -> None:
        insort(self.ready, (-group.level, microbatch, group.segment, group.index))

    def take(self) -> tuple[int, int] | None:
        for entry in self.ready:
            _, microbatch, _, index = entry
            in_flight = sum(1 for n in self.left.values() if n)
            if microbatch in self.left or (microbatch == self.started and in_flight < self.limit):
                self.ready.remove(entry)
                if microbatch not in self.left:
                    self.left[microbatch] = self.tasks
                    self.started += 1
                self.busy = True
                return index, microbatch
        return None

    def finish(self, microbatch: int) -> None:
        self.left[microbatch] -= 1
        self.busy = False
