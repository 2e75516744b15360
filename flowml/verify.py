"""verify: what must hold after each pass. A violation is a bug in flowml, never the user's; it names the pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from flowml.devices import Device
from flowml.graph import Graph, Literal
from flowml.plan import Feed, Free, Plan, Program, Recv, Run, Send
from flowml.program import defined, touched
from flowml.schedule import Schedule


class VerifierError(AssertionError):
    """A pass broke a rule of its stage."""


def _require(condition: bool, stage: str, message: str) -> None:
    if not condition:
        raise VerifierError(f"after {stage}: {message}")


def verify_graph(graph: Graph, stage: str) -> None:
    """Every value has one maker and is made before it is read; ids are unique; outputs exist."""
    known = {*graph.inputs, *graph.constants}
    ids: set[int] = set()
    for node in graph.nodes:
        _require(node.id not in ids, stage, f"two nodes have id {node.id}")
        ids.add(node.id)
        for value in node.reads:
            _require(value in known, stage, f"node {node.id} ({node.op}) reads value {value} before it is made")
        for value in node.outputs:
            _require(value not in known, stage, f"value {value} is made twice")
            known.add(value)
            _require(value in graph.values and value in graph.avals, stage, f"value {value} has no type")
    for output in graph.outputs:
        _require(isinstance(output, Literal) or output in known, stage, f"output {output} is never made")


def verify_placed(graph: Graph, assignment: Mapping[int, str], devices: Sequence[Device]) -> None:
    """Every node has exactly one device, and it exists."""
    names = {d.name for d in devices}
    for node in graph.nodes:
        _require(assignment.get(node.id) in names, "place", f"node {node.id} ({node.op}) has no device that exists")


def verify_partitioned(graph: Graph) -> None:
    verify_graph(graph, "partition")
    for node in graph.nodes:
        _require(bool(node.device), "partition", f"node {node.id} ({node.op}) has no device")


def verify_schedule(graph: Graph, plan: Schedule) -> None:
    """Every node is in one task, tasks are in topological order, every (task, microbatch) runs once."""
    nodes = Counter(n.id for g in plan.groups for n in g.nodes)
    _require(nodes == Counter(n.id for n in graph.nodes), "schedule", "a node is in no task or in two")
    made: set[int] = {*graph.inputs, *graph.constants}
    for group in plan.groups:
        _require(made.issuperset(group.inputs), "schedule", f"task {group.index} reads what a later task makes")
        made.update(group.outputs)
    runs = Counter(pair for order in plan.order.values() for pair in order)
    expected = Counter((g.index, m) for g in plan.groups for m in range(plan.microbatches))
    _require(runs == expected, "schedule", "a task runs not once a microbatch")


def verify_plan(plan: Plan) -> None:
    """Buffers are filled before use and freed once; every Send meets one Recv; no value travels twice."""
    sends: Counter[tuple[int, int]] = Counter()
    receives: Counter[tuple[int, int]] = Counter()
    for program in plan.programs:
        _verify_buffers(program)
        for instruction in program.instructions:
            if isinstance(instruction, Send):
                sends[instruction.message, instruction.microbatch] += 1
                source = plan.messages[instruction.message].source
                _require(source == program.device, "lower", f"{program.device} sends a message of {source}")
            elif isinstance(instruction, Recv):
                receives[instruction.message, instruction.microbatch] += 1
            elif isinstance(instruction, Run):
                task = plan.tasks[instruction.task]
                _require(task.executable in plan.executables, "lower", f"{task.name} has no executable")
                _require(len(task.inputs) == len(instruction.inputs), "lower", f"{task.name} gets too many inputs")
    _require(sends == receives, "lower", f"sends and receives differ: {sends - receives} {receives - sends}")
    _require(all(n == 1 for n in sends.values()), "lower", "a value travels to a device twice")


def _verify_buffers(program: Program) -> None:
    live = {b for b, _ in program.constants}
    for instruction in program.instructions:
        new = set(defined(instruction))
        used = set(touched(instruction)) - new
        where = f"{program.device} at {instruction}"
        _require(used <= live, "lower", f"{where} uses buffers that are not filled")
        _require(not new & live, "lower", f"{where} fills a live buffer")
        live = live - used if isinstance(instruction, Free) else live | new
    resident = {b for b, _ in program.constants}
    fed = {b for i in program.instructions if isinstance(i, Feed) for b in i.buffers}
    _require(live <= resident | fed, "lower", f"{program.device} leaks buffers")
