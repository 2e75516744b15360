"""Verifies schedules and finished plans; `ir.verify` verifies graphs."""

from __future__ import annotations

from collections import Counter

from flowml.instructions import Feed, Free, Recv, Run, Send
from flowml.ir.graph import Graph
from flowml.ir.verify import VerifierError, require
from flowml.lowering.program import defined, touched
from flowml.lowering.schedule import Schedule
from flowml.plan import Plan, Program


def verify_schedule(graph: Graph, plan: Schedule) -> None:
    """Check that each node is in one task, tasks are in topological order, and each (task, microbatch) runs once."""
    nodes = Counter(n.id for g in plan.groups for n in g.nodes)
    require(nodes == Counter(n.id for n in graph.nodes), "schedule", "a node is in no task or in two")
    made: set[int] = {*graph.inputs, *graph.constants}
    for group in plan.groups:
        require(made.issuperset(group.inputs), "schedule", f"task {group.index} reads what a later task makes")
        made.update(group.outputs)
    runs = Counter(pair for order in plan.order.values() for pair in order)
    expected = Counter((g.index, m) for g in plan.groups for m in range(plan.microbatches))
    require(runs == expected, "schedule", "a task runs not once a microbatch")


def verify_plan(plan: Plan) -> None:
    """Check the buffers and messages of a plan.

    Buffers are filled before use, freed once, and not used after they were donated. Every Send has one Recv. No value
    is sent twice to one device.
    """
    sends: Counter[tuple[int, int]] = Counter()
    receives: Counter[tuple[int, int]] = Counter()
    verified: dict[tuple[int, tuple[tuple[int, int], ...]], list[Send | Recv]] = {}
    """The messages of programs. Those of replicas may share their instructions."""
    for program in plan.programs:
        alike = id(program.instructions), program.constants
        messages = verified.get(alike)
        if messages is None:
            messages = verified[alike] = [i for i in program.instructions if isinstance(i, Send | Recv)]
            _verify_buffers(program)
            _verify_donations(plan, program)
            _verify_tasks(plan, program)
        for instruction in messages:
            if isinstance(instruction, Send):
                sends[instruction.message, instruction.microbatch] += 1
                source = plan.messages[instruction.message].source
                require(source == program.device, "lower", f"{program.device} sends a message of {source}")
            else:
                receives[instruction.message, instruction.microbatch] += 1
    require(sends == receives, "lower", f"sends and receives differ: {sends - receives} {receives - sends}")
    require(all(n == 1 for n in sends.values()), "lower", "a value travels to a device twice")


def _verify_tasks(plan: Plan, program: Program) -> None:
    for instruction in program.instructions:
        if isinstance(instruction, Run):
            task = plan.tasks[instruction.task]
            require(task.executable in plan.executables, "lower", f"{task.name} has no executable")
            require(len(task.inputs) == len(instruction.inputs), "lower", f"{task.name} gets too many inputs")


def _verify_buffers(program: Program) -> None:
    live = {b for b, _ in program.constants}
    for instruction in program.instructions:
        new = set(defined(instruction))
        used = set(touched(instruction)) - new
        if not used <= live or not new.isdisjoint(live):
            fault = "fills a live buffer" if used <= live else "uses buffers that are not filled"
            raise VerifierError(f"after lower: {program.device} at {instruction} {fault}")
        if isinstance(instruction, Free):
            live -= used
        else:
            live |= new
    resident = {b for b, _ in program.constants}
    fed = {b for i in program.instructions if isinstance(i, Feed) for b in i.buffers}
    require(live <= resident | fed, "lower", f"{program.device} leaks buffers")


def _verify_donations(plan: Plan, program: Program) -> None:
    """Check that a buffer that a task may overwrite is passed to it once and not used later in the list."""
    overwritten: dict[int, str] = {}
    for instruction in program.instructions:
        for buffer in () if isinstance(instruction, Free) else touched(instruction):
            if buffer in overwritten:
                raise VerifierError(
                    f"after lower: {program.device}: {instruction} touches a buffer that {overwritten[buffer]} was "
                    "allowed to overwrite"
                )
        if isinstance(instruction, Run):
            task = plan.tasks[instruction.task]
            given = [instruction.inputs[i] for i in task.donate]
            times = Counter(instruction.inputs) if given else {}
            twice = any(times[b] > 1 for b in given)
            require(not twice, "lower", f"{task.name} on {program.device} overwrites an argument that it gets twice")
            overwritten.update(dict.fromkeys(given, task.name))
