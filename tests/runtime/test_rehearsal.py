"""Workers that join a running fit run their executables once on zeros before they take part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.ir import _mlir
from flowml.plan import Plan
from flowml_runtime.execution import programs
from flowml_runtime.execution.programs import ExecutableCache, load_programs
from flowml_runtime.execution.task_functions import TaskFunction, compile_module_of
from tests.conftest import wait_until
from tests.training.reference import BATCH, data, mlp, mlp_loss

Runs = list[tuple[str, Sequence[np.ndarray[Any, Any]]]]
"""The task of each run of an executable, and copies of its arguments."""


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """The runs of executables that are compiled from now on."""
    found: Runs = []

    def noted(task: Any, *about: Any) -> TaskFunction:
        call = compile_module_of(task, *about)

        def run(*arguments: Any) -> Any:
            found.append((task.name, [np.array(a) for a in arguments]))
            return call(*arguments)

        return run

    monkeypatch.setattr(programs, "compile_module_of", noted)
    return found


def load(plan: Plan, *, rehearse: bool) -> None:
    devices = {program.device: jax.local_devices()[0] for program in plan.programs}
    load_programs(plan, devices, ExecutableCache(), python=True, rehearse=rehearse)


@pytest.fixture
def two() -> Iterator[fm.Cluster]:
    with fm.Cluster.threads(workers=2) as cluster:
        yield cluster


def three(x: jax.Array, key: jax.Array) -> jax.Array:
    """A layer without a loop, one with a loop that does not end for zeros, and one with loops that end and a key."""
    with fm.layer("plain"):
        x = jnp.sin(x) + 1
    with fm.layer("endless"), fm.device("worker:1"):
        x = jax.lax.while_loop(lambda v: v[0] < 1, lambda v: v * 2, x)
    with fm.layer("odd"), fm.device("worker:2"):
        x, _ = jax.lax.scan(lambda total, one: (jnp.tanh(total + one), None), x, jnp.stack([x, 2 * x]))
        return x.astype(jnp.bfloat16) + jax.random.normal(key, x.shape, jnp.bfloat16)


def compiled() -> Plan:
    workers = [f"worker:{number}" for number in range(3)]
    placement = {"plain": workers[0], "endless": workers[1], "odd": workers[2]}
    shapes = jax.ShapeDtypeStruct((3,), "float32"), jax.eval_shape(lambda: jax.random.key(0))
    return fm.compile(three, *shapes, devices=workers, placement=placement)


def test_each_executable_whose_loops_end_runs_once_on_zeros(runs: Runs) -> None:
    plan = compiled()
    load(plan, rehearse=True)
    tasks = [task.name for task in plan.tasks if "endless" not in task.name]
    assert len(plan.tasks) > len(tasks) > 2
    assert sorted(name for name, _ in runs) == sorted(tasks)
    assert not any(array.any() for _, arguments in runs for array in arguments)


END: dict[str, Any] = {
    "none": jnp.sin,
    "scan": lambda x: jax.lax.scan(lambda c, a: (jnp.tanh(c @ c) + a, c), x, x),
    "its derivative": jax.grad(lambda x: jax.lax.scan(lambda c, a: (jnp.tanh(c * a), None), x[0], x)[0].sum()),
    "reversed": lambda x: jax.lax.scan(lambda c, a: (c + a, c), x[0], x, reverse=True, unroll=2),
    "fixed bounds": lambda x: jax.lax.fori_loop(2, 5, lambda i, c: c * i, x),
    "map": lambda x: jax.lax.map(jnp.sum, x),
    "random numbers": lambda x: jax.random.normal(jax.random.key(0), x.shape),
}
MAY_NOT_END: dict[str, Any] = {
    "a condition on values": lambda x: jax.lax.while_loop(lambda v: v[0, 0] < 1, lambda v: v * 2, x),
    "bounds that are computed": lambda x: jax.lax.fori_loop(0, x.astype(int)[0, 0], lambda i, c: c + 1, x),
    "one inside another": lambda x: jax.lax.scan(
        lambda c, a: (jax.lax.while_loop(lambda v: v[0] < 1, lambda v: v * 2, c), None), x[0], x
    ),
    "a float counts": lambda x: jax.lax.while_loop(lambda v: v < 3.0, lambda v: v + 1.0, 0.0),
    "the counter goes back": lambda x: jax.lax.while_loop(
        lambda v: v[0] < 3, lambda v: (jnp.where(v[1] > 0, 0, v[0] + 1), v[1]), (jnp.int32(0), x[0, 0])
    ),
    "nothing is added": lambda x: jax.lax.while_loop(lambda v: v < 3, lambda v: v + 0, 0),
    "from a value": lambda x: jax.lax.while_loop(lambda v: v < 3, lambda v: v + 1, x.astype(int)[0, 0]),
    "rejection": lambda x: jax.random.gamma(jax.random.key(0), x),
}


@pytest.mark.parametrize("name", [*END, *MAY_NOT_END])
def test_loops_that_count_to_a_constant_end(name: str) -> None:
    module = jax.jit((END | MAY_NOT_END)[name]).lower(jnp.ones((3, 3))).compiler_ir("stablehlo")
    assert _mlir.may_not_end(module) == (name in MAY_NOT_END)


def test_others_run_nothing_before_their_steps(runs: Runs) -> None:
    load(compiled(), rehearse=False)
    assert runs == []


def test_an_executable_that_fails_on_zeros_is_loaded_all_the_same(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("these are zeros")

    monkeypatch.setattr(programs, "compile_module_of", lambda *about: refuse)
    load(compiled(), rehearse=True)


def test_a_worker_that_joins_a_fit_runs_its_executables_before_its_first_step(
    two: fm.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others have run theirs, and go on."""
    cluster, told = two, list[tuple[str, ...]]()
    session, load = cluster.session, cluster.session.load

    def spied(*arguments: Any, **about: Any) -> Any:
        told.append(tuple(about.get("rehearsing", arguments[2] if len(arguments) > 2 else ())))
        return load(*arguments, **about)

    monkeypatch.setattr(session, "load", spied)
    cluster.end_worker("worker:1")
    wait_until(lambda: "worker:1" in cluster.lost, "its loss is known")

    def join(record: dict[str, Any]) -> None:
        if record["step"] == 10:
            cluster.start_worker("worker:1")

    trainer = fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=cluster, replicas=2, delays={"worker:0": 0.01})
    about: dict[str, Any] = {"batch_size": BATCH, "steps": 300, "callbacks": [join], "progress": False}
    found = trainer.fit(mlp(), data(), replicas="elastic", **about)
    assert [change.joined for change in found.changes] == [("worker:1",)]
    assert told == [(), ("worker:1",)]
