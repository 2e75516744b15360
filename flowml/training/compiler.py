"""Compiles a loss, an optimizer and policies to a training plan.

The gradient of the loss is a dataflow graph. It goes through the same passes as any function and is placed on the
devices of one replica; the programs of this replica are then repeated for the others. Only inputs and outputs differ.
Parameters are *read* from stores instead of fed. Gradients are *pushed* to stores instead of fetched, each as soon as
its last microbatch is added. Each store has a task that combines the contributions and applies the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import msgspec

from flowml.captured import warn_of_size
from flowml.compiler import constant_of, node_views
from flowml.devices import Device, as_devices
from flowml.errors import PlacementError
from flowml.home import Coupling
from flowml.ir import _jax
from flowml.ir.cost import node_seconds
from flowml.ir.graph import Graph
from flowml.ir.host import RUN, Effects
from flowml.ir.label import label, layer_of
from flowml.ir.simplify import simplify
from flowml.ir.trace import trace
from flowml.ir.verify import verify_graph, verify_partitioned, verify_placed
from flowml.lowering.lower import ExecutableTable, lower_groups
from flowml.lowering.partition import partition
from flowml.lowering.program import Bindings, PartBinding, emit, route
from flowml.lowering.schedule import schedule
from flowml.lowering.verify import verify_plan, verify_schedule
from flowml.placement import Pipeline, place
from flowml.placement.estimate import estimate
from flowml.placement.homes import check_housed
from flowml.placement.links import Links, links_used
from flowml.plan import ArraySpec, Plan, StateLeaf, StoreSpec, Training
from flowml.policy import (
    Code,
    Policy,
    check_batch,
    coded_by,
    cut_by,
    speculated_by,
)
from flowml.rows import swapped
from flowml.training.cuts import cuts, deciding_stage
from flowml.training.drafts import StoreDraft, coefficient_dtype, share_weight, value_of
from flowml.training.local import Optimizers
from flowml.training.replicate import Replicated, Template, housed, replicate
from flowml.training.spec import TrainingSpec
from flowml.training.state import StateValues, check_policies, layers_of, ordered, settle
from flowml.training.step import (
    RNG_WORDS,
    Metrics,
    StepFunction,
    Treatment,
    by_examples,
    name_of,
    one,
    step_function,
)
from flowml.training.stores import StorePlanner
from flowml.training.valued import is_given


@dataclass(frozen=True)
class TrainingCompiled:
    """A training plan, the optimizers of homes whose state follows that of the Trainer's own, and the meaning of the
    fetch slots."""

    plan: Plan
    outer: tuple[Any, ...]
    metrics: Metrics
    left_out: tuple[str, ...] = ()
    """Calls of `jax.debug` that were left out."""


def compile_training(
    spec: TrainingSpec,
    params: Any,
    batch: Any,
    devices: Iterable[Device | str],
    links: Links | None = None,
    platforms: Sequence[str] = ("cpu",),
    *,
    state: Any = None,
    effects: Effects = RUN,
) -> TrainingCompiled:
    """Compile a training step for `spec.replicas` copies of the model. `batch` is one global batch (or specs), and
    `state` that of the model, if the loss has one.

    Runs nothing. Raises PlacementError, PolicyError or ValueError.
    """
    everyone, homes = spec.divide(as_devices(devices))
    template = _template_devices(spec, everyone)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = _paths(spec, [path for path, _ in leaves])
    policies = spec.resolve({path: jnp.shape(leaf) for path, (_, leaf) in zip(paths, leaves, strict=True)})
    check_housed(homes, policies.values())
    code, speculation = coded_by(policies.values(), spec.replicas), speculated_by(policies.values())
    items = spec.replicas * (speculation.portions if speculation else 1)
    cut = cut_by(policies.values(), spec.replicas, spec.microbatches)
    if spec.has_state:
        check_policies(policies.values())
    weight = spec.weight if cut is None or spec.weight is not None else one
    microbatches = spec.microbatches * (len(code.row(0)) if code else 1)
    item, microbatch = _microbatch(batch, spec.replicas, items, spec.microbatches, code)
    check_batch(policies.values(), item * items)
    treatments = tuple(
        Treatment.of(policies[p], spec.replicas, microbatches, weighted=weight is not None) for p in paths
    )
    held = (state,) if spec.has_state else ()
    step = step_function(
        spec.loss,
        params,
        microbatch,
        microbatches=spec.microbatches,
        weight=weight,
        treatments=treatments,
        counts=items * spec.microbatches > 1,
        state=held,
        evaluations=spec.evaluations,
    )
    fed = _fed(spec, code, [x.dtype for _, x in leaves])
    traced = trace(step.call, (params, microbatch, *fed.values(), *held), {}, name_of(spec.loss), effects)
    optimizers = Optimizers.of(spec.optimizer, tuple(policies[p] for p in paths), params, spec.replicas)
    plan, slots = _Compiler(
        spec=spec,
        devices=everyone,
        homes=homes,
        template=template,
        links=links or Links(),
        platforms=tuple(platforms),
        paths=paths,
        optimizers=optimizers,
        item=item,
        items=items,
        microbatches=microbatches,
        fed={name: _jax.spec_of(struct) for name, struct in fed.items()},
        code=code,
        step=step,
        policies=policies,
        treatments=treatments,
        batch=tuple(_jax.spec_of(x) for x in jax.tree_util.tree_leaves(microbatch)),
        batch_paths=tuple(_jax.path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(microbatch)[0]),
        state_paths=tuple(_jax.path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(state)[0]),
    ).compile(traced.graph, traced.closed_over)
    return TrainingCompiled(plan, optimizers.outer_optimizers, step.metrics(slots), traced.left_out)


def _fed(spec: TrainingSpec, code: Code | None, dtypes: Sequence[Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """What a microbatch is fed beside the batch and the state, by name. `dtypes` are those of the parameters."""
    fed = {"rng": jax.ShapeDtypeStruct((RNG_WORDS,), jnp.uint32)} if spec.takes_words else {}
    if code is not None:
        fed["coefficient"] = jax.ShapeDtypeStruct((), coefficient_dtype(dtypes))
    return fed


def _paths(spec: TrainingSpec, found: Sequence[tuple[Any, ...]]) -> tuple[str, ...]:
    """The names of the parameters, as the caller's tree has them."""
    if spec.has_value:
        whole = {path: _jax.path_name(path) for path in found}
        return tuple(whole[p] if is_given(whole[p]) else _jax.path_name(p[1:]) or "params" for p in found)
    return tuple(_jax.path_name(path) or "params" for path in found)  # a single array has an empty path


def _template_devices(spec: TrainingSpec, devices: Sequence[Device]) -> tuple[Device, ...]:
    """The devices of the first replica. The others are equal blocks after it."""
    share = len(devices) // spec.replicas
    fewer = ", fewer homes," if spec.homes else ""
    if isinstance(spec.placement, Pipeline):
        wanted = spec.placement.stages
        if share < wanted:
            raise PlacementError(
                f"{spec.replicas} replicas of {wanted} stages need {spec.replicas * wanted} devices, "
                f"there are {_left(spec, devices)}; start more workers or ask for{fewer} fewer replicas or stages"
            )
        return _alike(devices, wanted, spec.replicas)
    if share < 1:
        raise PlacementError(
            f"{spec.replicas} replicas need at least as many devices, there are {_left(spec, devices)}; start more "
            f"workers{fewer and ' or give fewer homes'}"
        )
    return _alike(devices, share, spec.replicas)


def _left(spec: TrainingSpec, devices: Sequence[Device]) -> str:
    """How many devices there are for replicas."""
    return f"{len(devices)}{' beside homes' if spec.homes else ''}"


def _alike(devices: Sequence[Device], width: int, replicas: int) -> tuple[Device, ...]:
    """The devices of the first replica. One runs Python if those at its place in all replicas do."""
    return tuple(
        replace(d, python=all(devices[r * width + i].python for r in range(replicas)))
        for i, d in enumerate(devices[:width])
    )


def _microbatch(batch: Any, replicas: int, items: int, microbatches: int, code: Code | None) -> tuple[int, Any]:
    """The size of a work item, and the specs of one microbatch. Raises ValueError if the batch does not divide."""
    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    if not leaves:
        raise ValueError("the batch has no arrays; the source must give a pytree with at least one")
    sizes = {_jax.path_name(p) or "batch": (x.shape[0] if x.shape else None) for p, x in leaves}
    if len(set(sizes.values())) != 1 or None in sizes.values():
        wrong = swapped({_jax.path_name(p) or "batch": x.shape for p, x in leaves})
        raise ValueError(
            f"the arrays of a batch differ in their first dimension: {sizes}; "
            f"{wrong or 'each needs one row an example'}"
        )
    size = next(iter(sizes.values()))
    pieces = items * microbatches
    if code is not None:
        pieces = math.lcm(replicas, code.partitions * microbatches)
    if not size or size % pieces:
        what = f"{replicas} replicas" if code is None else f"{code.partitions} partitions of a code"
        what += f" x {items // replicas} portions" if items > replicas else ""
        raise ValueError(
            f"batch_size {size} does not divide into {what} x {microbatches} microbatches; use a multiple of {pieces}"
        )
    rows = size // ((code.partitions if code else items) * microbatches)
    return size // items, jax.tree_util.tree_map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)


@dataclass(frozen=True)
class _Compiler:
    """The passes of a training plan. `compile` runs them in order."""

    spec: TrainingSpec
    devices: tuple[Device, ...]
    homes: tuple[Device, ...]
    template: tuple[Device, ...]
    links: Links
    platforms: tuple[str, ...]
    paths: tuple[str, ...]
    optimizers: Optimizers
    item: int
    """The number of examples of a work item."""
    items: int
    """The number of work items in a global batch."""
    microbatches: int
    fed: Mapping[str, ArraySpec]
    """What a microbatch is fed beside the batch, by name."""
    code: Code | None
    step: StepFunction
    policies: Mapping[str, Policy]
    treatments: tuple[Treatment, ...]
    batch: tuple[ArraySpec, ...]
    batch_paths: tuple[str, ...]
    state_paths: tuple[str, ...]

    def compile(self, graph: Graph, closed_over: Mapping[int, str]) -> tuple[Plan, tuple[int, ...]]:
        """The plan, and the fetch slot of each metric."""
        spec = self.spec
        verify_graph(graph, "trace")
        graph = simplify(graph)
        verify_graph(graph, "simplify")
        held, returned = graph.inputs[len(graph.inputs) - self.step.held :], self.step.fetched + self.step.held
        graph = self._label(graph, held, returned, closed_over)
        about = self.optimizers, self.policies, self.treatments, spec.replicas, self.microbatches, self.links
        planner = StorePlanner(self.paths, *about, weighed=spec.weight not in (None, by_examples), homes=self.homes)
        graph, contributions = planner.contributions(graph, returned)
        graph = simplify(graph)
        verify_graph(graph, "factors")
        choices = place(graph, self.template, spec.placement, self.links)
        verify_placed(graph, choices.assignment, self.template)
        graph, state = settle(partition(graph, choices.assignment), held, self.step.fetched)
        if any(t.weighted for t in self.treatments):
            graph, contributions = share_weight(graph, contributions, self._weight(graph), self.treatments)
        verify_partitioned(graph)

        by_name = {d.name: d for d in (*self.devices, *self.homes)}
        seconds = {n.id: node_seconds(graph, n, by_name[n.device]) for n in graph.nodes}
        stages = tuple(d.name for d in self.template if any(n.device == d.name for n in graph.nodes))
        stores = planner.stores(graph, contributions, stages)
        alone = self.items == 1 and len(stages) == 1 and not self.homes
        milestones = [] if alone else [p.sent for s in stores for p in s.parts]
        tasks = schedule(graph, seconds, milestones=milestones, microbatches=self.microbatches, kind=spec.schedule)
        tasks, notes = ordered(tasks, state, graph.ordered)
        verify_schedule(graph, tasks)
        slots = self._slots(graph)
        leaves = self._state_leaves(graph, state, stages, max(slots))
        routing = route(graph, tasks)
        wide = graph.is_wide or self.optimizers.is_wide
        table = ExecutableTable(self.platforms, _jax.settings(wide=wide))
        pushed = {v for s in stores for p in s.parts for v in p.sent}
        numbers = lower_groups(graph, tasks, table, seconds, frozenset({*graph.output_values, *pushed}))
        constants = tuple(constant_of(graph.values[v], c) for v, c in graph.constants.items())
        parts = planner.lower_parts(graph, stores, table)
        programs = emit(
            graph, tasks, routing, numbers, self._bind(graph, stores, parts, state, leaves), feed_first=False
        )
        whole = replicate(Template(programs, routing.messages, stages), self._blocks(stages))
        specs = planner.lower_stores(graph, stores, parts, table, whole.replicas)
        whole = housed(whole, specs)
        batch = (self.code.partitions if self.code else self.items) * spec.microbatches
        single = batch * sum(node_seconds(graph, n, self.template[0]) for n in graph.nodes)
        inputs = (*self.batch, *self.fed.values(), *(leaf.spec for leaf in leaves))
        fed = {"inputs": inputs, "constants": tuple(c.spec for c in constants)}
        plan = Plan(
            name=name_of(spec.loss),
            devices=tuple(p.device for p in whole.programs),
            programs=whole.programs,
            tasks=tuple(table.tasks),
            messages=whole.messages,
            executables=table.executables,
            inputs=inputs,
            input_names=(*self.batch_paths, *self.fed, *(leaf.name for leaf in leaves)),
            outputs=(),
            constants=constants,
            estimate=estimate(whole.programs, table.tasks, whole.messages, by_name, self.links, single, fed, specs),
            choices=choices.weighed,
            notes=(*choices.notes, *planner.notes, *notes),
            nodes=node_views(graph, tasks, table),
            training=self._training(whole, specs, planner.couplings, max(slots), leaves),
            platforms=self.platforms,
            links=links_used(self.links, whole.messages, specs),
            settings=table.settings,
        )
        verify_plan(plan)
        warn_of_size(plan.name, (c.spec for c in constants if c.captured))
        return plan, slots

    def _label(self, graph: Graph, held: Sequence[int], returned: int, closed_over: Mapping[int, str]) -> Graph:
        """Give each node a layer. `held` are the leaves of state, and gradients follow the `returned` outputs."""
        parameters = dict(zip(graph.inputs, self.paths, strict=False))
        layers = tuple(layer_of(p) for p in self.paths)
        owned = dict(zip(held, layers_of(self.state_paths, layers), strict=True))
        return label(graph, parameters, ("",) * returned + layers * 2, {**closed_over, **owned})

    def _state_leaves(
        self, graph: Graph, state: StateValues, stages: Sequence[str], last: int
    ) -> tuple[StateLeaf, ...]:
        """The leaves of state. Their fetch slots follow `last`, that of the last metric."""
        first = len(self.batch) + len(self.fed)
        return tuple(
            StateLeaf(path, graph.values[value], stages.index(device), first + i, last + 1 + i)
            for i, (path, value, device) in enumerate(zip(self.state_paths, state.inputs, state.devices, strict=True))
        )

    def _training(
        self,
        whole: Replicated,
        stores: tuple[StoreSpec, ...],
        couplings: tuple[Coupling, ...],
        aux_leaves: int,
        state: tuple[StateLeaf, ...],
    ) -> Training:
        training = Training(
            replicas=whole.replicas,
            stores=stores,
            microbatches=self.microbatches,
            item_size=self.item,
            batch_leaves=len(self.batch),
            batch_specs=self.batch,
            batch_paths=self.batch_paths,
            takes_rng="rng" in self.fed,
            schedule=self.spec.schedule,
            aux_leaves=aux_leaves,
            code=self.code,
            state=state,
            couplings=couplings,
            untrained=self.spec.untrained.specs if self.spec.untrained else (),
        )
        if not cuts(training):
            return training
        return msgspec.structs.replace(training, cuts_at=deciding_stage(training, whole.programs))

    def _weight(self, graph: Graph) -> int:
        """The weight of a microbatch, which is the last metric."""
        return value_of(graph.outputs[self.step.fetched - 1])

    def _bind(
        self,
        graph: Graph,
        stores: Sequence[StoreDraft],
        parts: Sequence[PartBinding],
        state: StateValues,
        leaves: Sequence[StateLeaf],
    ) -> Bindings:
        count = len(self.paths)
        where = {leaf: (s, i) for s, store in enumerate(stores) for i, leaf in enumerate(store.leaves)}
        fetched = dict(zip(map(value_of, graph.outputs[: self.step.fetched]), self._slots(graph), strict=True))
        return Bindings(
            feeds={v: i for i, v in enumerate(graph.inputs[count:])},
            fetches=fetched | {v: leaf.fetch for v, leaf in zip(state.outputs, leaves, strict=True)},
            resident=frozenset(state.inputs),
            constants={v: i for i, v in enumerate(graph.constants)},
            reads={v: where[i] for i, v in enumerate(graph.inputs[:count])},
            parts=parts,
        )

    def _slots(self, graph: Graph) -> tuple[int, ...]:
        """The fetch slot of each metric. Leaves of aux with the same value share a slot."""
        fetched = graph.outputs[: self.step.fetched]
        numbers = {v: i for i, v in enumerate(dict.fromkeys(map(value_of, fetched)))}
        return tuple(numbers[value_of(v)] for v in fetched)

    def _blocks(self, stages: Sequence[str]) -> tuple[dict[str, str], ...]:
        """For each replica, a mapping from the template's devices to its own."""
        width = len(self.template)
        names = [d.name for d in self.devices]
        return tuple(
            {d.name: names[r * width + i] for i, d in enumerate(self.template) if d.name in stages}
            for r in range(self.spec.replicas)
        )
