"""Where calls of Python run, and what the passes of the compiler leave of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback

import flowml as fm
from flowml.devices import Device
from flowml.instructions import Run
from flowml.ir.simplify import simplify
from flowml.ir.trace import trace
from flowml.training.compiler import compile_training
from flowml.training.spec import TrainingSpec

X = jnp.ones(4)
HERE = r"test_effects\.py:\d+ \("
MIXED = [Device("worker:0/cpu:0", python=False), Device("worker:1/cpu:0"), Device("worker:2/cpu:0", python=False)]


def note(v: Any) -> Any:
    return np.asarray(v)


def noted(x: jax.Array) -> jax.Array:
    with fm.layer("a"):
        y = jnp.sin(x)
        io_callback(note, None, y)
    with fm.layer("b"):
        return jax.lax.fori_loop(0, 3, lambda i, v: jax.pure_callback(note, v, v) * 2, y)


def python_devices(plan: fm.Plan) -> set[str]:
    runs = [(p.device, i.task) for p in plan.programs for i in p.instructions if isinstance(i, Run)]
    return {device for device, task in runs if plan.tasks[task].kind == "python"}


@pytest.mark.parametrize("placement", ["auto", {"a": "worker:0", "b": "worker:2"}, fm.Pipeline(2)])
def test_calls_run_on_the_workers_that_allow_python(placement: Any) -> None:
    assert python_devices(fm.compile(noted, X, devices=MIXED, placement=placement)) == {"worker:1/cpu:0"}


def test_a_pin_to_a_worker_without_python_is_refused() -> None:
    def pinned(x: jax.Array) -> jax.Array:
        with fm.device("worker:2"):
            return noted(x)

    wanted = (
        rf"^jax\.experimental\.io_callback at \S*{HERE}noted\) is pinned to worker:2/cpu:0, but .* only on worker:1"
    )
    with pytest.raises(fm.PlacementError, match=wanted):
        fm.compile(pinned, X, devices=MIXED)


def test_a_loss_calls_python_where_all_replicas_allow_it() -> None:
    def loss(params: Any, batch: Any) -> jax.Array:
        jax.debug.print("{}", params["w"])
        return jnp.mean(jnp.tanh(batch @ params["w"]) @ params["v"])

    def compiled(*python: bool) -> fm.Plan:
        devices = [Device(f"worker:{i}/cpu:0", python=p) for i, p in enumerate(python)]
        spec = TrainingSpec(loss, optax.sgd(0.1), replicas=2, placement=fm.Pipeline(2))
        params = {"v": jnp.ones((3, 2)), "w": jnp.ones((3, 3))}
        return compile_training(spec, params, np.ones((8, 3), np.float32), devices).plan

    assert python_devices(compiled(True, True, False, True)) == {"worker:1/cpu:0", "worker:3/cpu:0"}
    with pytest.raises(fm.PlacementError, match=r"^jax\.debug\.print at .* start all workers with allow_python$"):
        compiled(True, False, False, True)


def test_effects_are_kept_once_and_pure_calls_only_if_used() -> None:
    def fn(x: jax.Array) -> jax.Array:
        for _ in range(2):
            io_callback(note, jax.ShapeDtypeStruct((), jnp.float32), 1.0)
            jax.pure_callback(note, x, x)
        return x + io_callback(note, jax.ShapeDtypeStruct((), jnp.float32), 1.0)

    graph = simplify(trace(fn, (X,), {}).graph)
    assert [n.op for n in graph.nodes].count("io_callback") == 3
    assert "pure_callback" not in [n.op for n in graph.nodes]
    # A literal is cheap to copy to another device, and the call that takes it must not be copied.
    plan = fm.compile(
        lambda x: [fn(x) * i for i in range(3)],
        X,
        devices=["worker:0", "worker:1"],
        placement=lambda graph, devices: {n.id: devices[i % 2] for i, n in enumerate(graph.nodes)},
    )
    runs = [plan.tasks[i.task].kind for p in plan.programs for i in p.instructions if isinstance(i, Run)]
    assert runs.count("python") == 9


def test_ordered_effects_are_a_chain_and_others_are_free() -> None:
    def fn(x: jax.Array) -> jax.Array:
        for ordered in (True, False, True):
            jax.debug.print("{}", x, ordered=ordered)
        return x

    graph = trace(fn, (X,), {}).graph
    first, free, second = (n for n in graph.nodes if n.calls_python)
    assert [n.id for n in graph.parents(second)] == [first.id]
    assert not list(graph.parents(free))


def test_plans_with_effects_can_be_drawn(tmp_path: Path) -> None:
    plan = fm.compile(noted, X, devices=["worker:0", "worker:1"], placement={"a": "worker:0", "b": "worker:1"})
    assert "worker:1" in plan.explain()
    for kind in ("svg", "html", "txt", "dot"):
        assert "worker:1" in plan.render(tmp_path / f"plan.{kind}").read_text()
    assert fm.Plan.decode(plan.encode()) == plan


def test_axes_that_something_binds_keep_their_meaning() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()[:1]), ("i",))
    spec = jax.sharding.PartitionSpec("i")

    def inner(v: jax.Array) -> jax.Array:
        with fm.layer("inner"):
            return v / jax.lax.psum(v, "i") + jax.lax.axis_index("i") + jax.lax.all_gather(v, "i")[0]

    def fn(x: jax.Array) -> Any:
        over_rows = jax.vmap(lambda v: v - jax.lax.pmean(v, "rows"), axis_name="rows")(x)
        return over_rows, jax.shard_map(inner, mesh=mesh, in_specs=spec, out_specs=spec)(x)

    with fm.Cluster.threads(workers=1) as cluster:
        program = fm.dataflow(fn, cluster=cluster)
        jax.tree.map(np.testing.assert_allclose, program(X + 1), jax.jit(fn)(X + 1))
        assert {layer for task in program.plan(X).tasks for layer in task.layers} >= {"inner"}
        single = fm.dataflow(jax.pmap(lambda v: jax.lax.psum(v, "b") * 2, axis_name="b"), cluster=cluster)
        np.testing.assert_allclose(single(X[None]), X[None] * 2)


def test_microbatches_with_ordered_effects_run_in_turn() -> None:
    def loss(params: Any, batch: Any) -> jax.Array:
        jax.debug.print("{}", params["w"], ordered=True)
        return jnp.mean(jnp.tanh(batch @ params["w"]) @ params["v"])

    spec = TrainingSpec(loss, optax.sgd(0.1), microbatches=3, placement=fm.Pipeline(2))
    params = {"v": jnp.ones((3, 2)), "w": jnp.ones((3, 3))}
    plan = compile_training(spec, params, np.ones((6, 3), np.float32), ["worker:0", "worker:1"]).plan
    assert "Microbatches run one after the other, because its effects are ordered." in plan.notes
    for program in plan.programs:
        order = [i.microbatch for i in program.instructions if isinstance(i, Run) and i.role == "compute"]
        assert order == sorted(order)
