"""A task overwrites an argument only if no later instruction of its device touches it, in the order that is emitted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.instructions import Free, Run
from flowml.ir.verify import VerifierError
from flowml.lowering.verify import verify_plan
from flowml.plan import Plan, Program
from tests.training.reference import assert_close, optax_loop

WIDTH = 96
PLACES = {"first": "worker:0", "slow": "worker:1", "quick": "worker:2", "next": "worker:3", "out": "worker:3"}


def crossing_loss(params: Any, batch: Any) -> Any:
    """`kept` has two readers on worker:0. The deeper one (level 3, by way of two quick layers) is ready before the
    other (level 2, by way of a slow layer), so 1F1B runs it first and level order last."""
    x = batch["x"]
    with fm.layer("first"):
        kept = x @ params["first"]["keep"]
        sent = x @ params["first"]["send"]
    with fm.layer("slow"):
        slow = sent
        for _ in range(12):
            slow = jnp.tanh(slow @ params["slow"]["w"])
    with fm.layer("quick"):
        quick = sent + params["quick"]["b"]
    with fm.layer("next"):
        quick = quick * params["next"]["b"]
    with fm.layer("first"):
        by_slow, by_quick = kept + slow, kept - quick
    with fm.layer("out"):
        return jnp.mean(jnp.tanh(by_slow * by_quick))


def parameters() -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    square = [jax.random.normal(k, (WIDTH, WIDTH)) / WIDTH for k in keys]
    return {
        "first": {"keep": square[0], "send": square[1]},
        "slow": {"w": square[2]},
        "quick": {"b": jnp.ones(WIDTH)},
        "next": {"b": jnp.ones(WIDTH)},
    }


def source() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).normal(size=(4 * WIDTH, WIDTH)).astype(np.float32)}


def trainer(cluster: fm.Cluster) -> fm.Trainer:
    return fm.Trainer(crossing_loss, optax.sgd(0.1), cluster=cluster, microbatches=4, placement=PLACES)


def touched_after_donation(plan: Plan) -> list[str]:
    """What the emitted lists do with a buffer after a task was allowed to overwrite it."""
    found: list[str] = []
    for program in plan.programs:
        gone: set[int] = set()
        for instruction in program.instructions:
            used = instruction.inputs if isinstance(instruction, Run) else instruction.buffers
            if type(instruction).__name__ != "Free" and gone.intersection(used):
                found.append(f"{program.device}: {instruction}")
            if isinstance(instruction, Run):
                gone.update(instruction.inputs[i] for i in plan.tasks[instruction.task].donate)
    return found


def test_no_buffer_is_touched_after_it_was_given_away(threads_cluster: fm.Cluster) -> None:
    batch = {"x": jax.ShapeDtypeStruct((4 * WIDTH, WIDTH), "float32")}
    plan = trainer(threads_cluster).plan(parameters(), batch)
    assert any(t.donate for t in plan.tasks), "the case has something to donate"
    assert touched_after_donation(plan) == []


def test_an_order_that_differs_from_that_of_levels_equals_the_loop(threads_cluster: fm.Cluster) -> None:
    expected = optax_loop(
        crossing_loss, parameters(), optax.sgd(0.1), source(), 3, batch_size=4 * WIDTH, microbatches=4
    )
    result = trainer(threads_cluster).fit(parameters(), source(), batch_size=4 * WIDTH, steps=3)
    assert_close(result.params, expected.params)


def test_a_plan_that_touches_what_it_gave_away_is_refused() -> None:
    plan = fm.compile(two_readers, jnp.ones((4, 4)), devices=["worker:0"], placement={"*": "worker:0"})
    (program,) = plan.programs
    (run,) = [i for i in program.instructions if isinstance(i, Run)]
    again = Run(run.task, run.inputs, tuple(b + 100 for b in run.outputs))
    code = [j for i in program.instructions for j in ((i, again, Free(again.outputs)) if i is run else (i,))]
    tasks = tuple(msgspec.structs.replace(t, donate=(0,)) for t in plan.tasks)
    bad = msgspec.structs.replace(
        plan, programs=(Program(program.device, tuple(code), program.constants),), tasks=tasks
    )
    with pytest.raises(VerifierError, match=r"worker:0.* touches a buffer that task0.* was allowed to overwrite"):
        verify_plan(bad)


def two_readers(x: Any) -> Any:
    return jnp.sin(x) @ x
