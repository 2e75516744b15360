"""Emits the instruction list of each device: late receives, early sends, and frees after the last use.

Messages are pushed by their senders, so a Recv right before the first use costs no time and keeps the lifetime of its
buffer short. All values that one task makes for one device are sent in one message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from flowml.instructions import Feed, Fetch, Free, Instruction, Keep, Push, Read, Recv, Run, Send
from flowml.ir.graph import Graph
from flowml.lowering.schedule import Schedule, TaskGroup
from flowml.lowering.transfer import Edge, describe, transfers
from flowml.plan import Message, Program


@dataclass(frozen=True)
class PartBinding:
    """A part of a store's contribution: its values and its tasks.

    The tasks add two payloads, pack a payload into one array, and finish the sum over the microbatches before it is
    pushed.
    """

    store: int
    part: int
    values: tuple[int, ...]
    accumulate: int | None = None
    pack: int | None = None
    finish: int | None = None


@dataclass(frozen=True)
class Bindings:
    """The sources and destinations of values outside the graph.

    `feeds`: input -> feed slot; `reads`: input -> (store, leaf); `fetches`: value -> fetch slot;
    `keeps`: value -> slot of the values that stay; `parts`: contributions pushed to stores;
    `constants`: value -> index of the plan's constant; `resident`: the inputs that are fed when a task first reads
    them, because the microbatch before makes them.
    """

    feeds: Mapping[int, int]
    fetches: Mapping[int, int]
    constants: Mapping[int, int] = field(default_factory=dict[int, int])
    reads: Mapping[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])
    parts: Sequence[PartBinding] = ()
    keeps: Mapping[int, int] = field(default_factory=dict[int, int])
    resident: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Routing:
    """The messages of a schedule: their table, and for each task the messages that it sends."""

    messages: tuple[Message, ...]
    values: tuple[tuple[int, ...], ...]
    sent_by: Mapping[int, tuple[int, ...]]
    carrying: Mapping[tuple[int, str], int]


def route(graph: Graph, plan: Schedule) -> Routing:
    """Combine the cut edges into messages: one message holds all that one task makes for one device."""
    maker = {v: g.index for g in plan.groups for v in g.outputs}
    grouped: dict[tuple[int, str], list[Edge]] = {}
    for edge in transfers(graph):
        grouped.setdefault((maker[edge.value], edge.destination), []).append(edge)
    messages: list[Message] = []
    values: list[tuple[int, ...]] = []
    sent_by: dict[int, tuple[int, ...]] = {}
    carrying: dict[tuple[int, str], int] = {}
    for (task, destination), edges in sorted(grouped.items()):
        index = len(messages)
        messages.append(Message(edges[0].source, destination, tuple(describe(graph, e) for e in edges)))
        values.append(tuple(e.value for e in edges))
        sent_by[task] = (*sent_by.get(task, ()), index)
        carrying.update({(e.value, destination): index for e in edges})
    return Routing(tuple(messages), tuple(values), sent_by, carrying)


def emit(
    graph: Graph, plan: Schedule, routing: Routing, tasks: Sequence[int], bindings: Bindings, *, feed_first: bool
) -> tuple[Program, ...]:
    """One program for each device. `tasks[i]` is the plan's index of group i. `feed_first` puts the feed first."""
    programs = tuple(
        _Emitter(device, graph, plan, routing, tasks, bindings).emit(order, feed_first)
        for device, order in plan.order.items()
    )
    return _with_reports(programs, len(bindings.fetches)) if bindings.keeps else programs


def _with_reports(programs: Sequence[Program], slots: int) -> tuple[Program, ...]:
    """The programs, in which the last `Keep` of each reports, unless the task's own fetch follows it, which the driver
    waits for anyway. The fetch slots from `slots` on are free."""
    found: list[Program] = []
    for program in programs:
        code = list(program.instructions)
        last = max((n for n, i in enumerate(code) if isinstance(i, Keep)), default=None)
        if last is not None and not _fetches_next(code[last + 1 :]):
            code[last] = msgspec.structs.replace(code[last], done=slots)
            slots += 1
        found.append(msgspec.structs.replace(program, instructions=tuple(code)))
    return tuple(found)


def _fetches_next(code: Sequence[Instruction]) -> bool:
    return isinstance(next((i for i in code if not isinstance(i, Free)), None), Fetch)


@dataclass
class _Emitter:
    device: str
    graph: Graph
    plan: Schedule
    routing: Routing
    tasks: Sequence[int]
    bindings: Bindings
    code: list[Instruction] = field(default_factory=list[Instruction])
    buffers: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])
    constants: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    sums: dict[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])
    made: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])
    fed: tuple[int, ...] = ()
    read: tuple[int, ...] = ()
    count: int = 0

    def emit(self, order: Sequence[tuple[int, int]], feed_first: bool) -> Program:
        read_here = {v for i, _ in order for v in self.plan.groups[i].inputs}
        self.fed = tuple(v for v in self.bindings.feeds if v in read_here and v not in self.bindings.resident)
        self.read = tuple(v for v in self.bindings.reads if v in read_here)
        for value, constant in self.bindings.constants.items():
            if value in read_here:
                self.constants.append((self._new(value, -1), constant))
        if feed_first:
            self._feed(0, self.fed)
        for index, microbatch in order:
            self._task(self.plan.groups[index], microbatch)
        return Program(self.device, _with_frees(self.code, {b for b, _ in self.constants}), tuple(self.constants))

    def _new(self, value: int, microbatch: int) -> int:
        self.buffers[value, microbatch] = self.count
        self.count += 1
        return self.count - 1

    def _task(self, group: TaskGroup, microbatch: int) -> None:
        resident = tuple(v for v in group.inputs if v in self.bindings.resident and (v, microbatch) not in self.buffers)
        if resident:
            self._feed(microbatch, resident)
        inputs = tuple(self._find(v, microbatch) for v in group.inputs)
        outputs = tuple(self._new(v, microbatch) for v in group.outputs)
        self.code.append(Run(self.tasks[group.index], inputs, outputs, microbatch))
        for index in self.routing.sent_by.get(group.index, ()):
            sent = tuple(self.buffers[v, microbatch] for v in self.routing.values[index])
            self.code.append(Send(index, sent, microbatch))
        kept = [v for v in group.outputs if v in self.bindings.keeps]
        if kept:
            slots = tuple(self.bindings.keeps[v] for v in kept)
            self.code.append(Keep(slots, tuple(self.buffers[v, microbatch] for v in kept)))
        fetched = [v for v in group.outputs if v in self.bindings.fetches]
        if fetched:
            slots = tuple(self.bindings.fetches[v] for v in fetched)
            self.code.append(Fetch(slots, tuple(self.buffers[v, microbatch] for v in fetched), microbatch))
        self._contribute(group, microbatch)

    def _find(self, value: int, microbatch: int) -> int:
        """The buffer of a value. If the value is not on this device yet, emits the instruction that brings it."""
        for key in ((value, microbatch), (value, -1)):
            if key in self.buffers:
                return self.buffers[key]
        if value in self.bindings.feeds:
            self._feed(microbatch, self.fed)
        elif value in self.bindings.reads:
            self._read(self.bindings.reads[value][0])
            return self.buffers[value, -1]
        else:
            message = self.routing.carrying[value, self.device]
            buffers = tuple(self._new(v, microbatch) for v in self.routing.values[message])
            self.code.append(Recv(message, buffers, microbatch))
        return self.buffers[value, microbatch]

    def _feed(self, microbatch: int, values: Sequence[int]) -> None:
        slots = tuple(self.bindings.feeds[v] for v in values)
        self.code.append(Feed(slots, tuple(self._new(v, microbatch) for v in values), microbatch))

    def _read(self, store: int) -> None:
        values = [v for v in self.read if self.bindings.reads[v][0] == store]
        leaves = tuple(self.bindings.reads[v][1] for v in values)
        self.code.append(Read(store, leaves, tuple(self._new(v, -1) for v in values)))

    def _wait_for(self, store: int) -> None:
        """Emit a read of the store before a push, if the step has not read it yet.

        A gradient that does not depend on the parameters needs no read. Without this wait the device would run clocks
        ahead of the store. What later tasks read is read here too, because a replica may update it when it pushes.
        """
        if not any(isinstance(i, Read) and i.store == store for i in self.code):
            self._read(store)

    def _contribute(self, group: TaskGroup, microbatch: int) -> None:
        for number, part in enumerate(self.bindings.parts):
            fresh = set(part.values).intersection(group.outputs)
            if not fresh:
                continue
            self.made[number, microbatch] = self.made.get((number, microbatch), 0) + len(fresh)
            if self.made[number, microbatch] == len(set(part.values)):
                self._add_part(number, part, microbatch)

    def _add_part(self, number: int, part: PartBinding, microbatch: int) -> None:
        new = tuple(self.buffers[v, microbatch] for v in part.values)
        if part.pack is not None:
            new = self._housekeeping(part.pack, new, 1, microbatch)
        old = self.sums.get(number, ())
        if part.accumulate is None:
            self.sums[number] = (*old, *new)
        elif not old:
            self.sums[number] = new
        else:
            self.sums[number] = self._housekeeping(part.accumulate, (*old, *new), len(new), microbatch, "add")
        if microbatch == self.plan.microbatches - 1:
            if part.finish is not None:
                self.sums[number] = self._housekeeping(part.finish, self.sums[number], len(new), microbatch, "finish")
            self._wait_for(part.store)
            self.code.append(Push(part.store, part.part, self.sums[number]))

    def _housekeeping(
        self,
        task: int,
        inputs: tuple[int, ...],
        count: int,
        microbatch: int,
        role: Literal["compute", "add", "finish"] = "compute",
    ) -> tuple[int, ...]:
        """Run a task on buffers and return the new buffers of its `count` results."""
        outputs = tuple(range(self.count, self.count + count))
        self.count += count
        self.code.append(Run(task, inputs, outputs, microbatch, role))
        return outputs


def _with_frees(code: Sequence[Instruction], resident: set[int]) -> tuple[Instruction, ...]:
    last: dict[int, int] = {}
    for position, instruction in enumerate(code):
        for buffer in touched(instruction):
            last[buffer] = position
    dying: dict[int, list[int]] = {}
    for buffer, position in last.items():
        if buffer not in resident:
            dying.setdefault(position, []).append(buffer)
    result: list[Instruction] = []
    for position, instruction in enumerate(code):
        result.append(instruction)
        if position in dying:
            result.append(Free(tuple(sorted(dying[position]))))
    return tuple(result)


def touched(instruction: Instruction) -> tuple[int, ...]:
    """Every buffer that an instruction reads or writes."""
    if isinstance(instruction, Run):
        return (*instruction.inputs, *instruction.outputs)
    return instruction.buffers


def defined(instruction: Instruction) -> tuple[int, ...]:
    """The buffers that an instruction fills."""
    if isinstance(instruction, Run):
        return instruction.outputs
    return instruction.buffers if isinstance(instruction, Feed | Read | Recv) else ()
