"""Training plans: gradients leave early and in the order in which they are made, factors where they are smaller."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import flowml as fm
from flowml.instructions import Push, Run, Send
from flowml.plan import Plan
from flowml.training.compiler import compile_training
from flowml.training.spec import TrainingSpec

WIDTH = 64


def deep(params: Any, batch: Any) -> jax.Array:
    x = batch["x"]
    for i in range(4):
        x = jnp.tanh(x @ params[f"l{i}"]["w"] + params[f"l{i}"]["b"])
    return jnp.mean((x - batch["y"]) ** 2)


PARAMS = {f"l{i}": {"w": jnp.ones((WIDTH, WIDTH)), "b": jnp.ones(WIDTH)} for i in range(4)}


def batch(size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {k: jax.ShapeDtypeStruct((size, WIDTH), jnp.float32) for k in ("x", "y")}


def compiled(size: int = 8, workers: int = 4, optimizer: Any = None, **options: Any) -> Plan:
    spec = TrainingSpec(deep, optimizer or optax.sgd(0.1), **options)
    return compile_training(spec, PARAMS, batch(size), [f"worker:{i}" for i in range(workers)]).plan


def pushes(plan: Plan, device: str) -> list[str]:
    assert plan.training is not None
    found = [plan.training.stores[i.store].name for i in plan.program(device).instructions if isinstance(i, Push)]
    return list(dict.fromkeys(found))


def test_gradients_leave_last_layer_first_and_before_the_backward_pass_is_over() -> None:
    plan = compiled(replicas=2, placement=fm.Pipeline(2))
    assert pushes(plan, "worker:1/cpu:0") == ["l3", "l2"]
    assert pushes(plan, "worker:0/cpu:0") == ["l1", "l0"]
    code = plan.program("worker:0/cpu:0").instructions
    first_push = next(i for i, x in enumerate(code) if isinstance(x, Push))
    assert any(isinstance(x, Run) for x in code[first_push:])


def test_a_lone_replica_is_one_task_and_one_store() -> None:
    plan = compiled(workers=1)
    assert plan.training is not None
    assert len(plan.training.stores) == 1
    assert sum(isinstance(i, Run) for i in plan.programs[0].instructions) == 1


def test_only_activations_and_their_gradients_cross_between_stages() -> None:
    plan = compiled(replicas=1, placement=fm.Pipeline(2), workers=2)
    assert [(t.source[7], t.destination[7], t.shape) for t in plan.transfers] == [
        ("0", "1", (8, WIDTH)),
        ("1", "0", (8, WIDTH)),
    ]


def test_microbatches_repeat_the_tasks_and_1f1b_keeps_the_first_stage_ahead() -> None:
    plan = compiled(replicas=1, placement=fm.Pipeline(2), workers=2, microbatches=4)
    runs = [i for i in plan.program("worker:1/cpu:0").instructions if isinstance(i, Run)]
    assert {i.microbatch for i in runs} == {0, 1, 2, 3}
    sends = [i.microbatch for i in plan.program("worker:0/cpu:0").instructions if isinstance(i, Send)]
    assert sends == [0, 1, 2, 3]


def test_factors_take_their_bytes_and_fall_back_where_the_gradient_is_smaller() -> None:
    factors = {"l*": fm.policies.factors()}
    small = compiled(8, replicas=2, policies=factors)
    large = compiled(256, replicas=2, policies=factors)
    assert small.training is not None and large.training is not None
    for store in small.training.stores:
        kernel = next(p for p in store.parts if p.factors)
        assert kernel.nbytes == 4 * (WIDTH + WIDTH) * 4  # B (m + n) float32, B = 8 / 2
    assert not any(p.factors for s in large.training.stores for p in s.parts)
    assert any("factors would take" in n for n in large.notes)


CLIPPED = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))


def test_coupled_layers_exchange_values_and_others_do_not() -> None:
    clipped, plain = compiled(replicas=2, optimizer=CLIPPED), compiled(replicas=2, optimizer=optax.adam(1e-3))
    assert clipped.training is not None and plain.training is not None
    for training in (clipped.training, plain.training):
        assert [s.name for s in training.stores] == ["l0", "l1", "l2", "l3"]
        assert all(0 in s.state for s in training.stores)  # the step count goes with every store
    assert not plain.training.couplings
    (coupling,) = clipped.training.couplings
    assert (coupling.stores, len(coupling.rounds)) == ((0, 1, 2, 3), 1)
    shared = [s.coupled.shares[0].nbytes for s in clipped.training.stores if s.coupled is not None]
    assert shared == [4, 8, 8, 8]  # sums of the squares of two gradients, which the first home can add up


def test_coupled_layers_share_a_home_where_contributions_share_no_clock() -> None:
    plan = compiled(replicas=2, optimizer=CLIPPED, policies=fm.policies.asynchronous())
    assert plan.training is not None and len(plan.training.stores) == 1
    assert any("l0, l1, l2, l3 share a home" in note and "share no clock" in note for note in plan.notes)


@pytest.mark.parametrize("replicas", [1, 2])
def test_layers_that_share_a_home_because_an_operation_cannot_be_divided_are_named(replicas: int) -> None:
    plan = compiled(replicas=replicas, placement=fm.Pipeline(2), optimizer=optax.flatten(optax.adam(1e-3)))
    assert plan.training is not None and len(plan.training.stores) == 1
    said = "l0, l1, l2, l3 share a home: the optimizer couples them, and its concatenate of them cannot be divided."
    assert plan.notes.count(said) == 1
    assert said in plan.explain()


def test_layers_of_a_lone_device_share_a_home_anyway() -> None:
    plan = compiled(workers=1, optimizer=optax.flatten(optax.adam(1e-3)))
    assert not any("share a home" in note for note in plan.notes)


@pytest.mark.parametrize(
    "policy",
    [fm.policies.asynchronous(), fm.policies.local_sgd(2), fm.policies.ssp(1), fm.policies.diloco(2)],
    ids=lambda policy: policy.describe(),
)
def test_layers_that_are_clipped_alone_because_of_their_rule_are_named(policy: fm.Policy) -> None:
    with pytest.warns(fm.FlowmlWarning, match=r"the optimizer couples (l0 and l1, l2, l3|l1, l2, l3 and l0), which"):
        compiled(replicas=2, optimizer=CLIPPED, policies={"l0*": policy})


def test_coupled_layers_of_several_clocks_are_coupled_apart() -> None:
    with pytest.warns(fm.FlowmlWarning, match="the optimizer couples l0 and l1, l2, l3, which share no clock"):
        plan = compiled(replicas=2, optimizer=CLIPPED, policies={"l0*": fm.policies.every(2)})
    assert plan.training is not None
    assert [c.stores for c in plan.training.couplings] == [(1, 2, 3)]
    assert plan.training.stores[0].coupled is None


def test_homes_are_spread_over_the_replicas_of_their_stage() -> None:
    plan = compiled(replicas=2, placement=fm.Pipeline(2))
    assert plan.training is not None
    homes = [(s.parts[0].stage, s.home) for s in plan.training.stores]
    assert all(home in {r[stage] for r in plan.training.replicas} for stage, home in homes)
    assert len({home for _, home in homes}) == 4


def test_equal_replicas_share_executables() -> None:
    one = compiled(4, replicas=1, placement=fm.Pipeline(2), workers=2)
    two = compiled(8, replicas=2, placement=fm.Pipeline(2))
    stage_tasks = {i.task for p in two.programs for i in p.instructions if isinstance(i, Run)}
    assert len(stage_tasks) <= len(one.tasks) + 4  # milestones cut tasks, replicas add none
    assert len(two.programs) == 4
