"""training: loss + optimizer + policies -> a training plan.

The gradient of the loss is one more dataflow graph: it goes through the same passes as any function, is cut
for one replica's devices, and that replica's programs are then repeated for every other. What is new are
its ends. Parameters are not fed but *read* from stores; gradients are not fetched but *pushed* to them, each
as soon as its last microbatch has added to it; and every store has a task of its own that combines what
came in and applies the optimizer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from flowml.compiler import array_bytes, node_views
from flowml.devices import Device, as_devices
from flowml.errors import PlacementError
from flowml.ir import _jax
from flowml.ir.cost import node_seconds
from flowml.ir.graph import Graph, Operand
from flowml.ir.label import label, layer_of
from flowml.ir.simplify import simplify
from flowml.ir.trace import trace
from flowml.ir.verify import verify_graph, verify_partitioned, verify_placed
from flowml.lowering.lower import ExecutableTable, lower_groups
from flowml.lowering.partition import partition
from flowml.lowering.program import Bindings, PartBinding, emit, route
from flowml.lowering.schedule import SCHEDULES, schedule
from flowml.lowering.verify import verify_plan, verify_schedule
from flowml.numbers import whole_number
from flowml.placement import Pipeline, Placement, place
from flowml.placement.estimate import estimate
from flowml.placement.links import Links, links_used
from flowml.plan import ArraySpec, Constant, Plan, StoreSpec, Training
from flowml.policy import DEFAULT_PATTERN, Policy, resolve
from flowml.training.optimizer import OptimizerSlices, slice_optimizer
from flowml.training.replicate import Template, replicate
from flowml.training.stores import StoreDraft, StorePlanner

RNG_WORDS = 3
"""uint32 words of the key feed: seed, work item, microbatch."""


@dataclass(frozen=True)
class TrainingSpec:
    """What the user asked for. See `flowml.Trainer` for the meaning of each."""

    loss: Callable[..., Any]
    optimizer: Any
    replicas: int = 1
    placement: Placement = "auto"
    microbatches: int = 1
    schedule: str = "1f1b"
    policies: Mapping[str, Policy] | Policy | None = None

    def __post_init__(self) -> None:
        for name in ("replicas", "microbatches"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        if self.replicas < 1 or self.microbatches < 1:
            raise ValueError(f"replicas={self.replicas} and microbatches={self.microbatches} must be at least 1")
        if isinstance(self.policies, Policy):
            object.__setattr__(self, "policies", {DEFAULT_PATTERN: self.policies})
        if not isinstance(self.policies, Mapping | None):
            raise TypeError(
                f"policies={self.policies!r} is a {type(self.policies).__name__}; give a mapping from patterns of "
                'parameter paths to policies, such as {"*": fm.policies.every(4)}, or one fm.Policy for all'
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} is not one; choose from {', '.join(SCHEDULES)}")


@dataclass(frozen=True)
class TrainingCompiled:
    """A training plan with the trees of parameters, optimizer state, batch and aux.

    `aux_slots` are the fetch slots of the leaves of aux. Leaves of one value share a slot: it travels once.
    """

    plan: Plan
    params_tree: Any
    state_tree: Any
    batch_tree: Any
    aux_tree: Any
    aux_slots: tuple[int, ...]


def loss_takes_rng(loss: Callable[..., Any]) -> bool:
    """Whether a loss is `loss(params, batch, rng)` rather than `loss(params, batch)`."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p for p in inspect.signature(loss).parameters.values() if p.kind in kinds]
    return len(positional) >= 3 and (positional[2].default is inspect.Parameter.empty or positional[2].name == "rng")


def item_key(seed: Any, item: Any, microbatch: Any, microbatches: int) -> jax.Array:
    """The key that a work item's loss gets: `fold_in(key(seed), item)`, folded again per microbatch if several."""
    key = jax.random.fold_in(jax.random.key(seed), item)
    return jax.random.fold_in(key, microbatch) if microbatches > 1 else key


def compile_training(
    spec: TrainingSpec,
    params: Any,
    batch: Any,
    devices: Iterable[Device | str],
    *,
    links: Links | None = None,
    platforms: Sequence[str] = ("cpu",),
) -> TrainingCompiled:
    """Compile a training step for `spec.replicas` copies of the model. `batch` is one global batch (or specs).

    Raises PlacementError, PolicyError or ValueError before anything runs.
    """
    everyone = as_devices(devices)
    template = _template_devices(spec, everyone)
    item, microbatch = _microbatch(batch, spec.replicas, spec.microbatches)
    step, aux_tree, aux_leaves = _step_function(spec, params, microbatch)
    rng = jax.ShapeDtypeStruct((RNG_WORDS,), jnp.uint32)
    takes_rng = loss_takes_rng(spec.loss)
    traced = trace(step, (params, microbatch, *([rng] if takes_rng else [])), {}, name=_name(spec.loss))
    leaves, params_tree = jax.tree_util.tree_flatten_with_path(params)
    paths = tuple(_jax.path_name(p) for p, _ in leaves)
    slices = slice_optimizer(spec.optimizer, params)
    plan, slots = _Compiler(
        spec=spec,
        devices=everyone,
        template=template,
        links=links or Links(),
        platforms=tuple(platforms),
        paths=paths,
        slices=slices,
        item=item,
        takes_rng=takes_rng,
        aux_leaves=aux_leaves,
        batch=tuple(_jax.spec_of(x) for x in jax.tree_util.tree_leaves(microbatch)),
        batch_paths=tuple(_jax.path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(microbatch)[0]),
    ).compile(traced.graph, traced.closed_over)
    batch_tree = jax.tree_util.tree_structure(microbatch)
    return TrainingCompiled(plan, params_tree, slices.state_tree, batch_tree, aux_tree, slots[1:])


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def _template_devices(spec: TrainingSpec, devices: Sequence[Device]) -> tuple[Device, ...]:
    """The devices of the first replica; the others are equal blocks after it."""
    share = len(devices) // spec.replicas
    if isinstance(spec.placement, Pipeline):
        wanted = spec.placement.stages
        if share < wanted:
            raise PlacementError(
                f"{spec.replicas} replicas of {wanted} stages need {spec.replicas * wanted} devices, "
                f"there are {len(devices)}; start more workers or ask for fewer replicas or stages"
            )
        return tuple(devices[:wanted])
    if share < 1:
        raise PlacementError(
            f"{spec.replicas} replicas need at least as many devices, there are {len(devices)}; start more workers"
        )
    return tuple(devices[:share])


def _microbatch(batch: Any, replicas: int, microbatches: int) -> tuple[int, Any]:
    """The size of a work item, and the specs of one microbatch. Raises ValueError if the batch does not divide."""
    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    if not leaves:
        raise ValueError("the batch has no arrays; the source must give a pytree with at least one")
    sizes = {_jax.path_name(p) or "batch": (x.shape[0] if x.shape else None) for p, x in leaves}
    if len(set(sizes.values())) != 1 or None in sizes.values():
        raise ValueError(
            f"the arrays of a batch differ in their first dimension: {sizes}; each needs one row an example"
        )
    size = next(iter(sizes.values()))
    pieces = replicas * microbatches
    if not size or size % pieces:
        raise ValueError(
            f"batch_size {size} does not divide into {replicas} replicas x {microbatches} microbatches; "
            f"use a multiple of {pieces}"
        )
    rows = size // pieces
    return size // replicas, jax.tree_util.tree_map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch
    )


def _step_function(spec: TrainingSpec, params: Any, batch: Any) -> tuple[Callable[..., Any], Any, int]:
    """The function of one microbatch: (loss, aux leaves, gradients), each through a copy of its own.

    The copies give every result a node that makes it, even where it is a constant or an input itself.
    """
    _check_parameters(params)
    has_aux, aux_shape = _check_loss(spec.loss, params, batch)
    aux_leaves, aux_tree = jax.tree_util.tree_flatten(aux_shape)
    gradient = jax.value_and_grad(spec.loss, has_aux=has_aux)

    def step(params: Any, batch: Any, *rng: Any) -> Any:
        keys = [item_key(rng[0][0], rng[0][1], rng[0][2], spec.microbatches)] if rng else []
        value, gradients = gradient(params, batch, *keys)
        loss, aux = value if has_aux else (value, None)
        results = (loss, jax.tree_util.tree_leaves(aux), gradients)
        return jax.tree_util.tree_map(lambda x: jnp.copy(jnp.asarray(x)), results)

    return step, aux_tree, len(aux_leaves)


def _check_parameters(params: Any) -> None:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    if not leaves:
        raise ValueError("params has no arrays; there is nothing to train")
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"parameter {_jax.path_name(path)!r} has dtype {leaf.dtype}; parameters must be floating, so pass the "
                "others in the batch or close over them in the loss"
            )


def _check_loss(loss: Callable[..., Any], params: Any, batch: Any) -> tuple[bool, Any]:
    """Whether the loss returns (scalar, aux), and the shapes of aux."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    shape = jax.eval_shape(loss, params, batch, *([key] if loss_takes_rng(loss) else []))
    has_aux = isinstance(shape, tuple)
    wanted = "a loss returns a floating scalar, or (scalar, aux)"
    if has_aux and len(shape) != 2:
        raise ValueError(f"{_name(loss)} returns {len(shape)} values; {wanted}")
    scalar = shape[0] if has_aux else shape
    if getattr(scalar, "shape", None) != ():
        raise ValueError(f"{_name(loss)} returns {_described(scalar)}; {wanted}, so take the mean over the examples")
    if not jnp.issubdtype(scalar.dtype, jnp.floating):
        raise ValueError(f"{_name(loss)} returns {_described(scalar)}; {wanted}")
    return has_aux, shape[1] if has_aux else None


def _described(value: Any) -> str:
    if not isinstance(value, jax.ShapeDtypeStruct):
        return f"a {type(value).__name__}"
    return f"{value.dtype}[{','.join(map(str, value.shape))}]"


@dataclass(frozen=True)
class _Compiler:
    """The passes of a training plan; `compile` is the list to read."""

    spec: TrainingSpec
    devices: tuple[Device, ...]
    template: tuple[Device, ...]
    links: Links
    platforms: tuple[str, ...]
    paths: tuple[str, ...]
    slices: OptimizerSlices
    item: int
    takes_rng: bool
    aux_leaves: int
    batch: tuple[ArraySpec, ...]
    batch_paths: tuple[str, ...]

    def compile(self, graph: Graph, closed_over: Mapping[int, str]) -> tuple[Plan, tuple[int, ...]]:
        """The plan, and the fetch slot of the loss and of each leaf of aux."""
        spec = self.spec
        fetched = 1 + self.aux_leaves
        verify_graph(graph, "trace")
        graph = simplify(graph)
        verify_graph(graph, "simplify")
        parameters = dict(zip(graph.inputs, self.paths, strict=False))
        outputs = ("",) * fetched + tuple(layer_of(p) for p in self.paths)
        graph = label(graph, parameters, outputs, closed_over)
        planner = StorePlanner(self.paths, self.slices, self._resolve(), spec.replicas, spec.microbatches, self.links)
        gradients = tuple(map(_value, graph.outputs[fetched:]))
        graph, contributions = planner.contributions(graph, gradients)
        graph = simplify(graph)
        verify_graph(graph, "factors")
        choices = place(graph, self.template, spec.placement, self.links)
        verify_placed(graph, choices.assignment, self.template)
        graph = partition(graph, choices.assignment)
        verify_partitioned(graph)

        by_name = {d.name: d for d in self.devices}
        seconds = {n.id: node_seconds(graph, n, by_name[n.device]) for n in graph.nodes}
        stages = tuple(d.name for d in self.template if any(n.device == d.name for n in graph.nodes))
        stores = planner.stores(graph, contributions, stages)
        alone = spec.replicas == 1 and len(stages) == 1
        milestones = [] if alone else [p.values for s in stores for p in s.parts]
        tasks = schedule(graph, seconds, milestones=milestones, microbatches=spec.microbatches, kind=spec.schedule)
        verify_schedule(graph, tasks)
        slots = self._slots(graph)
        routing = route(graph, tasks)
        wide = graph.is_wide or self.slices.graph.is_wide
        table = ExecutableTable(self.platforms, _jax.settings(wide=wide))
        pushed = {v for s in stores for p in s.parts for v in p.values}
        numbers = lower_groups(graph, tasks, table, seconds, frozenset({*graph.output_values, *pushed}))
        constants = tuple(Constant(graph.values[v], array_bytes(c)) for v, c in graph.constants.items())
        parts = planner.lower_parts(graph, stores, table)
        programs = emit(graph, tasks, routing, numbers, self._bind(graph, stores, parts), feed_first=False)
        whole = replicate(Template(programs, routing.messages, stages), self._blocks(stages))
        specs = planner.lower_stores(graph, stores, parts, table, whole.replicas)
        rng = (ArraySpec((RNG_WORDS,), "uint32"),) if self.takes_rng else ()
        single = spec.replicas * spec.microbatches * sum(node_seconds(graph, n, self.template[0]) for n in graph.nodes)
        fed = {"inputs": (*self.batch, *rng), "constants": tuple(c.spec for c in constants)}
        plan = Plan(
            name=_name(spec.loss),
            devices=tuple(p.device for p in whole.programs),
            programs=whole.programs,
            tasks=tuple(table.tasks),
            messages=whole.messages,
            executables=table.executables,
            inputs=fed["inputs"],
            input_names=(*self.batch_paths, *(["rng"] if self.takes_rng else [])),
            outputs=(),
            constants=constants,
            estimate=estimate(whole.programs, table.tasks, whole.messages, by_name, self.links, single, fed, specs),
            choices=choices.weighed,
            notes=(*choices.notes, *planner.notes),
            nodes=node_views(graph, tasks, table),
            training=self._training(whole.replicas, specs, max(slots)),
            platforms=self.platforms,
            links=links_used(self.links, whole.messages, specs),
            settings=table.settings,
        )
        verify_plan(plan)
        return plan, slots

    def _training(
        self, replicas: tuple[tuple[str, ...], ...], stores: tuple[StoreSpec, ...], aux_leaves: int
    ) -> Training:
        return Training(
            replicas=replicas,
            stores=stores,
            microbatches=self.spec.microbatches,
            item_size=self.item,
            batch_leaves=len(self.batch),
            batch_specs=self.batch,
            batch_paths=self.batch_paths,
            takes_rng=self.takes_rng,
            schedule=self.spec.schedule,
            aux_leaves=aux_leaves,
        )

    def _resolve(self) -> dict[str, Policy]:
        policies = self.spec.policies
        assert not isinstance(policies, Policy)
        found = resolve(policies or {}, self.paths)
        return {path: policy for path, (_, policy) in found.items()}

    def _bind(self, graph: Graph, stores: Sequence[StoreDraft], parts: Sequence[PartBinding]) -> Bindings:
        count = len(self.paths)
        where = {leaf: (s, i) for s, store in enumerate(stores) for i, leaf in enumerate(store.leaves)}
        fetched = graph.outputs[: 1 + self.aux_leaves]
        return Bindings(
            feeds={v: i for i, v in enumerate(graph.inputs[count:])},
            fetches=dict(zip(map(_value, fetched), self._slots(graph), strict=True)),
            constants={v: i for i, v in enumerate(graph.constants)},
            reads={v: where[i] for i, v in enumerate(graph.inputs[:count])},
            parts=parts,
        )

    def _slots(self, graph: Graph) -> tuple[int, ...]:
        """The fetch slot of the loss and of each leaf of aux: one a value, however many leaves it is."""
        fetched = graph.outputs[: 1 + self.aux_leaves]
        numbers = {v: i for i, v in enumerate(dict.fromkeys(map(_value, fetched)))}
        return tuple(numbers[_value(v)] for v in fetched)

    def _blocks(self, stages: Sequence[str]) -> tuple[dict[str, str], ...]:
        """For each replica, the template's devices -> its own."""
        width = len(self.template)
        names = [d.name for d in self.devices]
        return tuple(
            {d.name: names[r * width + i] for i, d in enumerate(self.template) if d.name in stages}
            for r in range(self.spec.replicas)
        )


def _value(output: Operand) -> int:
    """An output of the step function, each of which is a copy and so a value."""
    assert isinstance(output, int)
    return output
