"""Exports tasks as StableHLO and decides which of their arguments are donated.

Each task is exported once, as a function of a flat list of arrays. Equal modules share one executable, so a worker
compiles replicas and repeated layers once. A buffer is donated to the last task that reads it, if nothing else can
still use it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from flowml.captured import OwnCall
from flowml.errors import UnsupportedError, one_line
from flowml.ir import _jax, host
from flowml.ir.cost import node_bytes, node_flops
from flowml.ir.exports import export, export_traceable
from flowml.ir.forms import form_of
from flowml.ir.graph import Graph, Literal, Node
from flowml.lowering.pickling import dumps
from flowml.lowering.recipe import recipe_of_node
from flowml.lowering.schedule import Schedule, TaskGroup
from flowml.plan import ArraySpec, Setting, Task, fingerprint


@dataclass
class ExecutableTable:
    """Executables by fingerprint, and the tasks that use them."""

    platforms: tuple[str, ...]
    settings: tuple[Setting, ...]
    """JAX's settings during lowering."""
    executables: dict[str, bytes] = field(default_factory=dict[str, bytes])
    tasks: list[Task] = field(default_factory=list[Task])
    known: dict[Any, bytes] = field(default_factory=dict[Any, bytes])
    """Exported functions, by form."""

    def add(self, task: Task) -> int:
        self.tasks.append(task)
        return len(self.tasks) - 1

    def store(self, data: bytes) -> str:
        key = fingerprint(data)
        self.executables[key] = data
        return key

    def export(self, fn: Callable[..., Any], inputs: Sequence[Any], form: Any = None) -> str:
        """Export a function of flat arrays and return its key. `form` is the function's form, if known."""
        with _jax.under(self.settings):
            return self.store(export(fn, inputs, self.platforms, self.known, form))

    def traceable(self, fn: Callable[..., Any], inputs: Sequence[Any]) -> bytes:
        """A function of flat arrays as StableHLO, for a recipe."""
        with _jax.under(self.settings):
            return export_traceable(fn, inputs, self.platforms)

    def add_function(
        self,
        name: str,
        fn: Callable[..., Any],
        inputs: Sequence[ArraySpec],
        outputs: Sequence[ArraySpec],
        donate: tuple[int, ...] = (),
    ) -> int:
        """Add a task that is not part of the graph, such as accumulate or apply."""
        executable = self.export(fn, [_jax.struct_of(s) for s in inputs])
        touched = sum(s.nbytes for s in (*inputs, *outputs))
        return self.add(Task(name, "xla", executable, tuple(inputs), tuple(outputs), donate, nbytes=float(touched)))

    def outputs(self, fn: Callable[..., Any], inputs: Sequence[ArraySpec]) -> tuple[ArraySpec, ...]:
        """The specs of what a function of flat arrays returns."""
        with _jax.under(self.settings):
            found = jax.eval_shape(fn, *[_jax.struct_of(s) for s in inputs])
        return tuple(map(_jax.spec_of, jax.tree_util.tree_leaves(found)))


COMPILED_IN_BYTES = 2**20
"""If the closed-over arrays have more bytes than this in total, they are arguments of the tasks that read them."""


def compile_in_constants(graph: Graph, plan: Schedule) -> Schedule:
    """If a plan has one task, compile its closed-over arrays into the executable, as jit does.

    XLA then evaluates at compile time what depends only on them, with the same bits as for jit. If a plan has several
    tasks, the arrays are arguments, so that equal layers with different arrays share an executable.
    """
    if len(plan.groups) != 1 or plan.groups[0].calls_python:
        return plan
    (group,) = plan.groups
    constants = tuple(v for v in group.inputs if v in graph.constants)
    if sum(graph.values[v].nbytes for v in constants) > COMPILED_IN_BYTES:
        return plan
    inputs = tuple(v for v in group.inputs if v not in constants)
    return replace(plan, groups=(replace(group, inputs=inputs, compiled_in=constants),))


def lower_groups(
    graph: Graph,
    plan: Schedule,
    table: ExecutableTable,
    seconds: Mapping[int, float],
    keep: frozenset[int],
    given: frozenset[int] = frozenset(),
) -> list[int]:
    """Export every task group; returns the index in `table.tasks` of each.

    Values in `keep` are never donated. `given` are inputs that may be.
    """
    made = given | graph.producer.keys()
    readers = _last_readers(graph, plan, made)
    donations = [_donations(graph, g, readers, made - keep) for g in plan.groups]
    return [table.add(_lower_group(graph, g, table, seconds, d)) for g, d in zip(plan.groups, donations, strict=True)]


def _lower_group(
    graph: Graph, group: TaskGroup, table: ExecutableTable, seconds: Mapping[int, float], donate: tuple[int, ...]
) -> Task:
    if group.calls_python:
        kind = "python"
        executable, own = _called(group, table)
    else:
        kind, own = "xla", OwnCall()
        try:
            executable = _export(graph, group.nodes, group.inputs, group.outputs, table, group.compiled_in)
        except Exception as error:
            raise _culprit(graph, group.nodes, table, error) from error
    layers = tuple(dict.fromkeys(n.layer for n in group.nodes if n.layer))
    return Task(
        name=_name(group, layers),
        kind=kind,
        executable=executable,
        inputs=tuple(graph.values[v] for v in group.inputs),
        outputs=tuple(graph.values[v] for v in group.outputs),
        donate=donate,
        layers=layers,
        nodes=len(group.nodes),
        flops=sum(node_flops(n) for n in group.nodes),
        nbytes=sum(node_bytes(graph, n) for n in group.nodes),
        seconds=sum(seconds.get(n.id, 0.0) for n in group.nodes),
        own=own,
    )


def _export(
    graph: Graph,
    nodes: Sequence[Node],
    inputs: Sequence[int],
    outputs: Sequence[int],
    table: ExecutableTable,
    compiled_in: Sequence[int] = (),
) -> str:
    equations = [(n.equation, [i.value if isinstance(i, Literal) else i for i in n.inputs], n.outputs) for n in nodes]
    closed = _jax.build_jaxpr(equations, graph.avals, (*inputs, *compiled_in), outputs)
    structs, run = [_jax.struct(graph.avals[v]) for v in inputs], _jax.as_function(closed)
    if not compiled_in:
        return table.export(run, structs, form_of(closed.jaxpr, ()))
    constants = [graph.constants[v] for v in compiled_in]
    return table.export(lambda *arrays: run(*arrays, *constants), structs)


def _culprit(graph: Graph, nodes: Sequence[Node], table: ExecutableTable, error: Exception) -> UnsupportedError:
    """The error that names the node that prevents the export of a task."""
    alone = ExecutableTable(table.platforms, table.settings)
    node = nodes[0]
    for node in nodes:
        try:
            _export(graph, (node,), tuple(dict.fromkeys(node.reads)), node.outputs, alone)
        except Exception as own:
            error = own
            break
    reason = str(error).strip().partition("\n")[0]
    what = _jax.whereabouts(node.equation, node.layer)
    return UnsupportedError(f"{what} cannot run on a worker: {reason}; compute it outside the dataflow function")


def _name(group: TaskGroup, layers: Sequence[str]) -> str:
    ends = dict.fromkeys([*layers[:1], *layers[-1:]])
    span = "..".join(map(one_line, ends)) or group.nodes[0].op
    return f"task{group.index}:{span}"


def _called(group: TaskGroup, table: ExecutableTable) -> tuple[str, OwnCall]:
    """The recipe of a node that calls Python: the key of its pickled form, and the recipe itself.

    Raises UnsupportedError if something in it cannot be pickled.
    """
    (node,) = group.nodes
    recipe = recipe_of_node(node, group.inputs, group.outputs, table.traceable)
    try:
        return table.store(dumps(recipe)), OwnCall(recipe)
    except Exception as error:  # pickling runs code of the user's objects
        found = next(host.calls(node.equation))
        raise UnsupportedError(
            f"{found.construct} cannot be sent to a worker, because its function, or what it closes over, cannot be "
            f"pickled ({error}); make such objects inside the function"
        ) from error


def _last_readers(graph: Graph, plan: Schedule, made: Container[int]) -> dict[int, int]:
    """value -> the last task that reads it on its own device, in the device's order, for values in `made`.

    A value is left out if this task differs between microbatches, because a task has one list of donations.
    """
    last: dict[tuple[int, int], int] = {}
    for device, order in plan.order.items():
        for index, microbatch in order:
            for value in plan.groups[index].inputs:
                producer = graph.producer.get(value)
                if value in made and (producer is None or producer.device == device):
                    last[value, microbatch] = index
    readers: dict[int, set[int]] = {}
    for (value, _), index in last.items():
        readers.setdefault(value, set()).add(index)
    return {value: indices.pop() for value, indices in readers.items() if len(indices) == 1}


def _donations(graph: Graph, group: TaskGroup, last: Mapping[int, int], may: Container[int]) -> tuple[int, ...]:
    """Arguments in `may` that this task is the last to read, that only this device reads, and whose shape equals that
    of a result."""
    if group.calls_python:
        return ()
    room = Counter(_shape(graph.values[v]) for v in group.outputs)
    donated: list[int] = []
    for position, value in enumerate(group.inputs):
        users = graph.consumers.get(value, ())
        private = all(u.device == group.device for u in users)
        if not private or value not in may or last.get(value) != group.index:
            continue
        shape = _shape(graph.values[value])
        if room[shape]:
            room[shape] -= 1
            donated.append(position)
    return tuple(donated)


def _shape(spec: ArraySpec) -> tuple[tuple[int, ...], str]:
    return spec.shape, spec.dtype
