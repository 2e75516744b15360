"""Compiles programs that find inputs on their devices and leave outputs there.

A program reads a held input on the device that holds it. If other devices read it too, the holder copies it, and the
copy is sent to them like any other value. Outputs that stay are bound to `Keep` instructions instead of fetches. As
with jit, each is a value of its own, which can be deleted or donated without effect on others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from flowml.ir import _jax
from flowml.ir.graph import Graph, Literal, Node, Operand
from flowml.ir.scopes import Scope
from flowml.lowering.schedule import Schedule


@dataclass(frozen=True)
class Stay:
    """What stays on the devices between calls, by position among the flat inputs and outputs.

    `held` are inputs that are on a device already. `kept` are outputs that are not fetched. `donated` are inputs whose
    memory the program may overwrite. The caller sees the first `shown` outputs, or all. Those behind them are states of
    objects that were passed in, and an input among them is there already.
    """

    held: Mapping[int, str] = field(default_factory=dict[int, str])
    kept: frozenset[int] = frozenset()
    donated: frozenset[int] = frozenset()
    shown: int | None = None

    def shows(self, position: int) -> bool:
        """Whether the caller sees this output."""
        return self.shown is None or position < self.shown


def settled(graph: Graph, stay: Stay) -> dict[int, str]:
    """The devices on which inputs of the placed graph will be from the second call on, if outputs replace them.

    In a training loop the donated inputs are one state, and the outputs that stay are the next one. An input of a
    program that is read there in the first call too is in its place in all calls, so that one program serves them.
    """
    given = [graph.inputs[i] for i in sorted(stay.donated)]
    made = [graph.outputs[i] for i in sorted(stay.kept)]
    if [graph.values[v] for v in given] != [None if isinstance(o, Literal) else graph.values[o] for o in made]:
        return {}
    pairs = zip(given, made, strict=True)
    return {v: graph.producer[o].device for v, o in pairs if not isinstance(o, Literal) and o in graph.producer}


@dataclass
class Copies:
    """Copies of values of a placed graph, to be added to it."""

    graph: Graph
    nodes: list[Node] = field(default_factory=list[Node])

    def add(self, value: int, layer: str, device: str) -> int:
        """The copy of a value that `device` makes."""
        number = len(self.nodes)
        node, copy = self._next_node + number, self._next_value + number
        equation = _jax.copy_equation(self.graph.avals[value])
        self.nodes.append(Node(node, "copy", (value,), (copy,), Scope((), ()), layer, device, equation))
        return copy

    def placed(self, graph: Graph, *, first: bool = False) -> Graph:
        """A graph of the same values, with the copies before its nodes or behind them."""
        made = {n.outputs[0]: n.inputs[0] for n in self.nodes if not isinstance(n.inputs[0], Literal)}
        return replace(
            graph,
            nodes=(*self.nodes, *graph.nodes) if first else (*graph.nodes, *self.nodes),
            values={**graph.values, **{copy: graph.values[v] for copy, v in made.items()}},
            avals={**graph.avals, **{copy: graph.avals[v] for copy, v in made.items()}},
        )

    @cached_property
    def _next_node(self) -> int:
        return max((n.id for n in self.graph.nodes), default=-1) + 1

    @cached_property
    def _next_value(self) -> int:
        return max(self.graph.values) + 1


def own_outputs(graph: Graph, stay: Stay, first: str) -> Graph:
    """The placed graph, in which each output that stays is a value of its own, also if it is an input.

    So is an output that is fetched, if it is an input on a device. A copy of an input that no device holds or reads is
    made on the device `first`. XLA makes no copy if the input is donated.
    """
    there = {**settled(graph, stay), **{graph.inputs[i]: device for i, device in stay.held.items()}}
    held = {graph.inputs[i] for i in stay.held}
    inputs, added, outputs = set(graph.inputs), Copies(graph), list[Operand](graph.outputs)
    taken: set[Operand] = {o for n, o in enumerate(outputs) if n not in stay.kept} | {*graph.tokens}
    for position, output in enumerate(graph.outputs):
        if isinstance(output, Literal) or graph.values[output].dtype == "float0":
            continue
        kept = position in stay.kept
        if output in inputs and (kept or (output in held and stay.shows(position))):
            reader = next(iter(graph.consumers.get(output, ())), None)
            device = there.get(output) or (reader.device if reader else first)
            outputs[position] = added.add(output, reader.layer if reader else "", device)
        elif kept and output in graph.producer and output in taken:
            node = graph.producer[output]
            outputs[position] = added.add(output, node.layer, node.device)
        elif kept:
            taken.add(output)
    return added.placed(replace(graph, outputs=tuple(outputs))) if added.nodes else graph


def relay(graph: Graph, held: Mapping[int, str]) -> tuple[Graph, tuple[int, ...]]:
    """The placed graph, in which each held input is read only on its own device; and the copies that are sent.

    `held` maps inputs to their devices.
    """
    wanted = {
        v: device for v, device in held.items() if any(user.device != device for user in graph.consumers.get(v, ()))
    }
    if not wanted:
        return graph, ()
    added = Copies(graph)
    copies = {v: added.add(v, graph.consumers[v][0].layer, device) for v, device in wanted.items()}

    def at(operand: Operand, device: str) -> Operand:
        if isinstance(operand, Literal) or wanted.get(operand, device) == device:
            return operand
        return copies[operand]

    users = [replace(node, inputs=tuple(at(i, node.device) for i in node.inputs)) for node in graph.nodes]
    return added.placed(replace(graph, nodes=tuple(users)), first=True), tuple(copies.values())


def sent(graph: Graph) -> tuple[int, ...]:
    """The values that other devices read. A program that updates its state makes them before it does that."""
    return tuple(
        v for n in graph.nodes for v in n.outputs if any(u.device != n.device for u in graph.consumers.get(v, ()))
    )


def in_order_of_call(graph: Graph, plan: Schedule) -> Schedule:
    """The schedule, in which tasks take inputs and give outputs of the program in the order of the call.

    JAX gives the memory of a donated argument to the next result of its type. In this order a new state overwrites the
    old one leaf by leaf, in place. In another order XLA would have to copy what is overwritten too early.
    """
    given = {v: i for i, v in enumerate(graph.inputs)}
    returned = {v: i for i, v in enumerate(graph.output_values)}
    groups = tuple(
        g
        if g.calls_python
        else replace(
            g,
            inputs=tuple(sorted(g.inputs, key=lambda v: given.get(v, len(given)))),
            outputs=tuple(sorted(g.outputs, key=lambda v: returned.get(v, len(returned)))),
        )
        for g in plan.groups
    )
    return replace(plan, groups=groups)
