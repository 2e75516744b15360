"""The plan: what crosses, in which order, what it is estimated to cost, and how it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flowml as fm
from flowml.compiler import compile_graph
from flowml.devices import as_devices
from flowml.instructions import Feed, Free, Recv, Run, Send
from flowml.ir.cost import node_seconds
from flowml.ir.trace import trace
from flowml.ir.verify import VerifierError
from flowml.lowering.partition import partition
from flowml.lowering.schedule import schedule
from flowml.lowering.verify import verify_plan, verify_schedule
from flowml.placement.links import Links

X = jnp.ones((4, 8))
TWO = ["worker:0", "worker:1"]


def chain(x: jax.Array) -> jax.Array:
    with fm.layer("a"):
        y = jnp.sin(x)
    with fm.layer("b"):
        z = jnp.cos(y) + jnp.exp(y)
    with fm.layer("a"):
        return z * y


SPLIT = {"a": "worker:0", "b": "worker:1"}


def test_a_value_read_twice_travels_once_and_comes_back_in_one_message() -> None:
    plan = fm.compile(chain, X, devices=TWO, placement=SPLIT)
    assert [(m.source, m.destination, len(m.transfers)) for m in plan.messages] == [
        ("worker:0/cpu:0", "worker:1/cpu:0", 1),
        ("worker:1/cpu:0", "worker:0/cpu:0", 1),
    ]
    assert [t.layer for t in plan.transfers] == ["a", "b"]
    assert plan.estimate.transfer_bytes == 2 * 4 * 8 * 4


def test_constants_and_broadcasts_are_copied_instead_of_sent() -> None:
    def fn(x: jax.Array) -> jax.Array:
        with fm.layer("a"):
            mask = jnp.tril(jnp.ones((8, 8)))
            y = x @ mask
        with fm.layer("b"):
            return y @ jnp.broadcast_to(jnp.arange(8.0)[:, None], (8, 8))

    plan = fm.compile(fn, X, devices=TWO, placement=SPLIT)
    assert [t.shape for t in plan.transfers] == [(4, 8)]


def test_the_nodes_of_a_device_are_few_tasks() -> None:
    plan = fm.compile(chain, X, devices=TWO, placement=SPLIT)
    assert [[t.nodes for t in p.tasks] for p in plan.partitions] == [[1, 1], [3]]


def test_instructions_claim_late_send_early_and_free_at_last_use() -> None:
    plan = fm.compile(chain, X, devices=TWO, placement=SPLIT)
    kinds = [type(i) for i in plan.program("worker:0/cpu:0").instructions]
    assert kinds[:5] == [Feed, Run, Free, Send, Recv]
    assert plan.program("worker:0/cpu:0").instructions[-1] == Free((plan.programs[0].instructions[-2].buffers[0],))


def test_equal_tasks_share_one_executable() -> None:
    def fn(x: jax.Array) -> jax.Array:
        with fm.device("worker:0"):
            a = jnp.sin(x) * 2
        with fm.device("worker:1"):
            b = jnp.sin(x + 0) * 2
        return a, b

    def same(x: jax.Array, y: jax.Array) -> Any:
        with fm.device("worker:0"):
            a = jnp.sin(x) * 2
        with fm.device("worker:1"):
            b = jnp.sin(y) * 2
        return a, b

    plan = fm.compile(same, X, X, devices=TWO)
    assert len(plan.tasks) == 2
    assert len(plan.executables) == 1
    assert len(fm.compile(fn, X, devices=TWO).executables) == 2


def test_what_an_update_reads_is_not_computed_before_its_gradient_comes() -> None:
    """The decayed momentum and the slope of `tanh` are parts of the tasks that read them, as in one executable."""

    def step(params: Any, momentum: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            with fm.layer("a"):
                y = jnp.tanh(x @ params["a"])
            with fm.layer("b"):
                return jnp.mean(jnp.tanh(y @ params["b"]) ** 2)

        gradients = jax.grad(loss)(params)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, gradients)
        return jax.tree.map(lambda p, m: p - 0.1 * m, params, momentum), momentum

    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    plan = fm.compile(step, params, params, X, devices=TWO, placement=SPLIT)
    first, _, last = plan.tasks
    assert [len(t.outputs) for t in (first, last)] == [1, 2], "an activation; a parameter and its momentum"


def test_shapes_suffice() -> None:
    plan = fm.compile(chain, jax.ShapeDtypeStruct((4, 8), jnp.bfloat16), devices=TWO, placement=SPLIT)
    assert {t.dtype for t in plan.transfers} == {"bfloat16"}


def test_plans_survive_a_file(tmp_path: Path) -> None:
    plan = fm.compile(chain, X, devices=TWO, placement=SPLIT)
    plan.save(tmp_path / "p.plan")
    assert fm.Plan.load(tmp_path / "p.plan") == plan


@pytest.mark.parametrize(
    ("damage", "message"), [(lambda b: b"x" + b, "is not a flowml plan"), (lambda b: b[:-20], "is damaged")]
)
def test_damaged_files_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    path = tmp_path / "p.plan"
    path.write_bytes(damage(fm.compile(chain, X, devices=TWO).encode()))
    with pytest.raises(fm.FlowmlError, match=message):
        fm.Plan.load(path)


def test_the_verifier_finds_a_lost_send() -> None:
    import msgspec

    plan = fm.compile(chain, X, devices=TWO, placement=SPLIT)
    program = plan.programs[0]
    without = tuple(i for i in program.instructions if not isinstance(i, Send))
    broken = msgspec.structs.replace(
        plan, programs=(msgspec.structs.replace(program, instructions=without), *plan.programs[1:])
    )
    with pytest.raises(VerifierError, match="sends and receives differ"):
        verify_plan(broken)


def test_compiling_twice_gives_the_same_plan() -> None:
    plans = [fm.compile(chain, X, devices=TWO, placement=SPLIT) for _ in range(2)]
    assert plans[0].encode() == plans[1].encode()


PIPELINE_DEPTH = 4


def stacked(x: jax.Array) -> jax.Array:
    for i in range(PIPELINE_DEPTH):
        with fm.layer(f"l{i}"):
            x = jnp.tanh(x @ jnp.ones((8, 8)))
    return x.sum()


@given(st.integers(1, 6), st.integers(1, PIPELINE_DEPTH), st.sampled_from(["1f1b", "gpipe"]))
def test_schedules_run_everything_once_and_1f1b_bounds_what_is_in_flight(
    microbatches: int, stages: int, kind: str
) -> None:
    traced = trace(jax.grad(stacked), (X,), {})
    devices = as_devices([f"worker:{i}" for i in range(stages)])
    stage = {f"l{i}": devices[i * stages // PIPELINE_DEPTH].name for i in range(PIPELINE_DEPTH)}
    assignment = {n.id: stage.get(n.scope.path, devices[0].name) for n in traced.graph.nodes}
    graph = partition(traced.graph, assignment)
    seconds = {n.id: node_seconds(graph, n, devices[0]) for n in graph.nodes}
    plan = schedule(graph, seconds, microbatches=microbatches, kind=kind)
    verify_schedule(graph, plan)
    if kind == "1f1b":
        for rank, device in enumerate(devices):
            assert most_in_flight(plan, device.name) <= max(stages - rank, 1)


def most_in_flight(plan: Any, device: str) -> int:
    order = plan.order[device]
    left = {m: sum(1 for _, n in order if n == m) for _, m in order}
    started: set[int] = set()
    most = 0
    for _, m in order:
        started.add(m)
        most = max(most, len([k for k in started if left[k]]))
        left[m] -= 1
    return most


@given(st.lists(st.integers(0, 2), min_size=24, max_size=24))
def test_no_random_placement_deadlocks_or_sends_twice(choices: list[int]) -> None:
    traced = trace(jax.grad(stacked), (X,), {}, name="stacked")
    devices = as_devices(["worker:0", "worker:1", "worker:2"])

    def rule(graph: Any, _: Any) -> dict[int, str]:
        return {n.id: devices[choices[i % len(choices)]].name for i, n in enumerate(graph.nodes)}

    plan = compile_graph("stacked", traced, devices, rule, Links(), ("cpu",))
    sent = [(m.source, m.destination, t) for m in plan.messages for t in m.transfers]
    assert plan.estimate.step_seconds > 0
    assert len(plan.messages) <= len(sent)
