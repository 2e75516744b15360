"""Compiles programs that find inputs on their devices and leave outputs there.

A program reads a held input on the device that holds it. If other devices read it too, the holder copies it, and the
copy is sent to them like any other value. Outputs that stay are bound to `Keep` instructions instead of fetches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flowml.ir import _jax
from flowml.ir.graph import Graph, Literal, Node, Operand
from flowml.ir.scopes import Scope
from flowml.lowering.schedule import Schedule
from flowml.plan import ArraySpec


@dataclass(frozen=True)
class Stay:
    """What stays on the devices between calls, by position among the flat inputs and outputs.

    `held` are inputs that are on a device already. `kept` are outputs that are not fetched. `donated` are inputs whose
    memory the program may overwrite.
    """

    held: Mapping[int, str] = field(default_factory=dict[int, str])
    kept: frozenset[int] = frozenset()
    donated: frozenset[int] = frozenset()


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


def relay(graph: Graph, held: Mapping[int, str]) -> tuple[Graph, tuple[int, ...]]:
    """The placed graph, in which each held input is read only on its own device; and the copies that are sent.

    `held` maps inputs to their devices.
    """
    wanted = {
        v: device for v, device in held.items() if any(user.device != device for user in graph.consumers.get(v, ()))
    }
    if not wanted:
        return graph, ()
    values, avals = dict[int, ArraySpec](graph.values), dict[int, Any](graph.avals)
    next_id = max((n.id for n in graph.nodes), default=-1) + 1
    copies: dict[int, int] = {}
    nodes: list[Node] = []
    for number, (value, device) in enumerate(wanted.items()):
        copy = copies[value] = max(values) + 1
        values[copy], avals[copy] = values[value], avals[value]
        layer = graph.consumers[value][0].layer
        equation = _jax.copy_equation(avals[value])
        nodes.append(Node(next_id + number, "copy", (value,), (copy,), Scope((), ()), layer, device, equation))

    def at(operand: Operand, device: str) -> Operand:
        if isinstance(operand, Literal) or wanted.get(operand, device) == device:
            return operand
        return copies[operand]

    for node in graph.nodes:
        nodes.append(replace(node, inputs=tuple(at(i, node.device) for i in node.inputs)))
    return replace(graph, nodes=tuple(nodes), values=values, avals=avals), tuple(copies.values())


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
