"""Variants of a training plan: programs for batches of another shape, over the same stores.

Parameters, optimizer state and what replicas send for them do not depend on the shape of a batch, so the programs of
one plan can run steps of another if the two agree on them, and on who does what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec

from flowml.devices import Device
from flowml.home import Applies
from flowml.instructions import Fetch, Run
from flowml.ir.graph import Graph
from flowml.placement import Pipeline
from flowml.plan import ArraySpec, Plan, StoreSpec, Training
from flowml.training.compiler import TrainingCompiled
from flowml.training.spec import TrainingSpec


def difference(one: TrainingCompiled, other: TrainingCompiled) -> str:
    """In what two plans differ so that the programs of one cannot run steps of the other; "" if in nothing."""
    a, b = one.plan.training, other.plan.training
    assert a is not None and b is not None
    if a.replicas != b.replicas:
        return "which devices it runs on"
    for mine, its in zip(a.stores, b.stores, strict=False):
        if _essence(mine) != _essence(its):
            return f"what is sent for layer {mine.name!r}, or from where"
    if len(a.stores) != len(b.stores):
        return "which layers are kept together"
    if (one.metrics, a.aux_leaves, _fetched(one.plan)) != (other.metrics, b.aux_leaves, _fetched(other.plan)):
        return "the shapes or dtypes of aux"
    if a.state != b.state:
        return "where the state of the model is"
    return "" if _rest(a) == _rest(b) else "how a batch is divided"


def placed_alike(spec: TrainingSpec, plan: Plan, devices: Sequence[Device]) -> tuple[TrainingSpec, tuple[Device, ...]]:
    """The spec and the devices for which a batch of another shape is placed as the plan is."""
    devices, homes = spec.divide(devices)
    width = spec.placement.stages if isinstance(spec.placement, Pipeline) else len(devices) // spec.replicas
    known = {(n.id, n.op): n.device for n in plan.nodes}

    def rule(graph: Graph, _: Sequence[Device]) -> Mapping[int, Device | str]:
        return {n.id: known[n.id, n.op] for n in graph.nodes if (n.id, n.op) in known}

    named = tuple(dict.fromkeys(home.worker for home in homes))
    placed = replace(spec, placement=rule, homes=named or None)
    return placed, (*devices[: width * spec.replicas], *homes)


def _essence(store: StoreSpec) -> StoreSpec:
    """The store without its tasks, whose numbers differ among plans."""
    parts = tuple(msgspec.structs.replace(p, accumulate=None, pack=None, finish=None) for p in store.parts)
    local = store.local and msgspec.structs.replace(store.local, update=0, send=None, take=None, fold=None, mix=None)
    return msgspec.structs.replace(
        store, applies=Applies(store.applies.width, 0), parts=parts, local=local, coupled=None
    )


def _rest(training: Training) -> tuple[object, ...]:
    divided = training.microbatches, training.code
    return *divided, training.batch_paths, training.takes_rng, training.schedule


def _fetched(plan: Plan) -> dict[int, ArraySpec]:
    """What is fetched, by slot."""
    found: dict[int, ArraySpec] = {}
    for program in plan.programs:
        made: dict[int, ArraySpec] = {}
        for instruction in program.instructions:
            if isinstance(instruction, Run):
                made.update(zip(instruction.outputs, plan.tasks[instruction.task].outputs, strict=True))
            elif isinstance(instruction, Fetch):
                found.update((s, made[b]) for s, b in zip(instruction.slots, instruction.buffers, strict=True))
    return found
