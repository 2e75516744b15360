"""Compiles a JAX function to a `Plan` by running the passes in order.

    trace -> simplify -> label -> place -> partition -> transfer -> schedule -> lower

`compile_graph` below shows the whole compiler. Each pass is in the module of its name, and a verifier checks
its result.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flowml.arrays import ArraySpec
from flowml.captured import LARGE_BYTES, Captured, warn_of_size
from flowml.devices import Device, as_devices
from flowml.effects import EffectsOption
from flowml.errors import UnsupportedError
from flowml.ir import _jax
from flowml.ir.axes import is_pmapped, pmapped
from flowml.ir.calls import Call, bind, check_apart, leaks, static_of
from flowml.ir.cost import node_seconds
from flowml.ir.graph import Graph, Literal
from flowml.ir.host import RUN, Effects
from flowml.ir.label import label
from flowml.ir.simplify import simplify
from flowml.ir.trace import Trace, trace
from flowml.ir.verify import verify_graph, verify_partitioned, verify_placed
from flowml.lowering.lower import ExecutableTable, compile_in_constants, lower_groups
from flowml.lowering.partition import partition
from flowml.lowering.program import Bindings, emit, route
from flowml.lowering.schedule import Schedule, schedule
from flowml.lowering.stay import Stay, in_order_of_call, own_outputs, relay, sent, settled
from flowml.lowering.verify import verify_plan, verify_schedule
from flowml.placement import Placement, place
from flowml.placement.estimate import estimate
from flowml.placement.links import Links, links_used
from flowml.plan import Constant, NodeView, Output, Plan

_NOTHING = Stay()
"""Nothing stays on the devices."""


@dataclass(frozen=True)
class Compiled:
    """A plan with two tree structures: one flattens a call's arguments, the other rebuilds its result."""

    plan: Plan
    in_tree: Any
    out_tree: Any
    left_out: tuple[str, ...] = ()
    """Calls of `jax.debug` that were left out."""


def compile(  # noqa: A001 - the public name
    fn: Callable[..., Any],
    *args: Any,
    devices: Iterable[Device | str],
    placement: Placement = "auto",
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Sequence[str] | None = None,
    platforms: Sequence[str] = ("cpu",),
    effects: str = "run",
    **kwargs: Any,
) -> Plan:
    """Compile `fn` for `devices` without a cluster. Nothing is run.

    Arguments are arrays or `jax.ShapeDtypeStruct`s. `platforms` are the platforms to lower for; this machine
    need not have them. With `effects="drop"` what `jax.debug` does is left out. Raises PlacementError or
    UnsupportedError.
    """
    if not callable(fn):
        raise TypeError(f"compile() takes a function, got {type(fn).__name__}")
    # Arguments are copied to the workers, so there is nothing to donate, and these are only checked.
    check_apart(
        static_of(fn, static_argnums, static_argnames), static_of(fn, donate_argnums, donate_argnames, "donate")
    )
    option, devices = EffectsOption(effects), as_devices(devices)
    compiled = compile_function(
        fn,
        args,
        kwargs,
        devices=devices,
        placement=placement,
        static_argnums=static_argnums,
        static_argnames=static_argnames,
        platforms=platforms,
        effects=option.on(devices),
    )
    option.tell(getattr(fn, "__name__", type(fn).__name__), compiled.left_out)
    return compiled.plan


def compile_function(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    devices: Iterable[Device | str],
    placement: Placement = "auto",
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    platforms: Sequence[str] = ("cpu",),
    links: Links | None = None,
    effects: Effects = RUN,
) -> Compiled:
    """Like `compile`, but also returns the trees of the call. `links` are the known links between the devices."""
    title = getattr(fn, "__name__", type(fn).__name__)
    call = bind(fn, args, kwargs, static_of(fn, static_argnums, static_argnames), title)
    return compile_call(
        fn,
        call,
        devices=devices,
        placement=placement,
        platforms=platforms,
        name=title,
        links=links,
        effects=effects,
    )


def compile_call(
    fn: Callable[..., Any],
    call: Call,
    *,
    devices: Iterable[Device | str],
    placement: Placement,
    platforms: Sequence[str],
    name: str,
    links: Links | None = None,
    stay: Callable[[Trace], Stay] = lambda _: _NOTHING,
    effects: Effects = RUN,
) -> Compiled:
    """Compile a call of `fn` made by `bind`. `stay` says what stays on the devices.

    Raises UnsupportedError if the call stores values of the trace.
    """
    before = leaks(fn)
    try:
        traced = trace(call.fn, call.args, call.kwargs, name, effects)
    except (ValueError, UnsupportedError) as error:
        if is_pmapped(fn):
            raise pmapped(name, error) from None
        raise
    leaked = [where for where, value in leaks(fn).items() if before.get(where) != value]
    if leaked:
        raise UnsupportedError(
            f"{name} stores a value in {leaked[0]}, which would hold a placeholder and never a result, because the "
            "workers compute it; return the value"
        )
    places = as_devices(devices)
    plan = compile_graph(name, traced, places, placement, links or Links(), tuple(platforms), stay(traced))
    return Compiled(plan, traced.in_tree, traced.out_tree, traced.left_out)


def compile_graph(
    name: str,
    traced: Trace,
    devices: Sequence[Device],
    placement: Placement,
    links: Links,
    platforms: tuple[str, ...],
    stay: Stay = _NOTHING,
) -> Plan:
    """Run the passes. Each maps a graph to a graph, or to the next type."""
    graph = traced.graph
    held = {graph.inputs[i]: device for i, device in stay.held.items()}
    verify_graph(graph, "trace")
    graph = simplify(graph)
    verify_graph(graph, "simplify")
    graph = label(graph, traced.parameters, closed_over=traced.closed_over)
    verify_graph(graph, "label")
    choices = place(graph, devices, placement, links, held)
    verify_placed(graph, choices.assignment, devices)
    graph = partition(graph, choices.assignment)
    graph = own_outputs(graph, stay, devices[0].name)
    graph, relayed = relay(graph, {**settled(graph, stay), **held})
    verify_partitioned(graph)
    by_name = {d.name: d for d in devices}
    seconds = {n.id: node_seconds(graph, n, by_name[n.device]) for n in graph.nodes}
    early = [relayed, *([v] for v in sent(graph))] if stay.kept else [relayed]
    tasks = schedule(graph, seconds, milestones=early)
    verify_schedule(graph, tasks)
    donated = frozenset(graph.inputs[i] for i in stay.donated)
    tasks = compile_in_constants(graph, in_order_of_call(graph, tasks) if donated else tasks)
    routing = route(graph, tasks)
    table = ExecutableTable(platforms, _jax.settings(wide=graph.is_wide))
    numbers = lower_groups(graph, tasks, table, seconds, frozenset(graph.output_values), donated)
    bindings, outputs, constants = _bind(graph, {v for g in tasks.groups for v in g.compiled_in}, stay.kept)
    programs = emit(graph, tasks, routing, numbers, bindings, feed_first=True)
    inputs = tuple(graph.values[v] for v in graph.inputs)
    specs = {"inputs": inputs, "constants": tuple(c.spec for c in constants)}
    single = sum(node_seconds(graph, n, devices[0]) for n in graph.nodes) + devices[0].dispatch_s
    plan = Plan(
        name=name,
        devices=tuple(p.device for p in programs),
        programs=programs,
        tasks=tuple(table.tasks),
        messages=routing.messages,
        executables=table.executables,
        inputs=inputs,
        input_names=graph.input_names,
        outputs=outputs,
        constants=constants,
        estimate=estimate(programs, table.tasks, routing.messages, by_name, links, single, specs),
        choices=choices.weighed,
        notes=choices.notes,
        nodes=node_views(graph, tasks, table),
        platforms=platforms,
        links=links_used(links, routing.messages),
        donated=tuple(sorted(stay.donated)),
        settings=table.settings,
        ordered=graph.ordered,
    )
    verify_plan(plan)
    warn_of_size(name, (c.spec for c in constants if c.captured))
    return plan


def _bind(
    graph: Graph, compiled_in: Container[int], stays: Container[int]
) -> tuple[Bindings, tuple[Output, ...], tuple[Constant, ...]]:
    """Number the feeds, fetches, kept values and constants of a graph.

    Inputs and outputs belong to the driver, except the outputs at the positions `stays`. The driver fetches the tokens
    too, so that a call ends when its effects have happened, but they are no outputs.
    """
    made = [(v, n in stays) for n, v in enumerate(graph.outputs) if not isinstance(v, Literal) and v in graph.producer]
    slots = {v: i for i, v in enumerate(dict.fromkeys((*(v for v, kept in made if not kept), *graph.tokens)))}
    keeps = {v: i for i, v in enumerate(dict.fromkeys(v for v, kept in made if kept))}
    position = {v: i for i, v in enumerate(graph.inputs)}
    kept = [v for v in graph.constants if v not in compiled_in or v in graph.output_values]
    constants = [constant_of(graph.values[v], graph.constants[v]) for v in kept]
    numbers = {v: i for i, v in enumerate(kept)}
    outputs: list[Output] = []
    for number, output in enumerate(graph.outputs):
        kept = number in stays
        name = graph.output_names[number] if kept else ""
        if isinstance(output, Literal):
            constants.append(constant_of(_jax.spec_of(output.aval), _jax.literal_value(output.value)))
            outputs.append(Output(constants[-1].spec, "constant", len(constants) - 1, kept, "", name))
        elif output in graph.producer and kept:
            device = graph.producer[output].device
            outputs.append(Output(graph.values[output], "keep", keeps[output], kept, device, name))
        elif output in graph.producer:
            outputs.append(Output(graph.values[output], "fetch", slots[output]))
        elif output in position:
            outputs.append(Output(graph.values[output], "input", position[output], kept, "", name))
        else:
            outputs.append(Output(graph.values[output], "constant", numbers[output], kept, "", name))
    bindings = Bindings(feeds=position, fetches=slots, constants=numbers, keeps=keeps)
    return bindings, tuple(outputs), tuple(constants)


def constant_of(spec: ArraySpec, array: Any) -> Constant:
    """A concrete array as a constant of a plan (the key data, for typed keys)."""
    if isinstance(array, jax.Array) and jax.numpy.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    values = np.asarray(array, order="C")
    if values.nbytes < LARGE_BYTES:
        return Constant(spec, values.tobytes())
    # the owner of a NumPy array may write to it, and the program may be loaded again
    return Constant(
        spec, captured=Captured.of(values.reshape(-1).view(np.uint8), copy=not isinstance(array, jax.Array))
    )


def node_views(graph: Graph, tasks: Schedule, table: ExecutableTable) -> tuple[NodeView, ...]:
    """The placed graph, for drawing: each node with its producers and its task."""
    task_of = {n.id: table.tasks[i].name for i, g in enumerate(tasks.groups) for n in g.nodes}
    return tuple(
        NodeView(n.id, n.op, n.layer, n.device, tuple(p.id for p in graph.parents(n)), task_of[n.id])
        for n in graph.nodes
    )


__all__ = ["Compiled", "compile", "compile_call", "compile_function", "compile_graph"]
