"""The arrays of flax nnx objects stay on the workers if a step returns the objects where `keep` says."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import flowml as fm
from tests.zoo.loop import rows

BATCH = rows(0)


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc1 = nnx.Linear(6, 8, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.fc2 = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.fc2(self.drop(nnx.relu(self.fc1(x))))


def objects() -> tuple[Any, Any]:
    model = Model(nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


def step(both: Any, batch: Any) -> Any:
    model, optimizer = both
    loss, gradients = nnx.value_and_grad(lambda m: jnp.mean((m(batch["x"]) - batch["y"]) ** 2))(model)
    optimizer.update(model, gradients)
    return both, loss


def plain() -> tuple[Any, list[float]]:
    jitted, both, losses = nnx.jit(lambda both, batch: step(both, batch)[1]), objects(), list[float]()
    for _ in range(4):
        losses.append(float(jitted(both, BATCH)))
    return nnx.state(both[0], nnx.Param), losses


def same(found: Any, wanted: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-5, atol=1e-6)


def test_objects_that_are_returned_stay(threads_cluster: fm.Cluster) -> None:
    place = {"fc1": "worker:0", "fc2": "worker:1"}
    program = fm.dataflow(step, cluster=threads_cluster, placement=place, keep=0, donate_argnums=0)
    both, losses = objects(), list[float]()
    for _ in range(4):
        both, loss = program(both, BATCH)
        losses.append(float(loss))
    wanted, expected = plain()
    state = nnx.state(both[0], nnx.Param)
    assert all(isinstance(leaf, fm.Remote) for leaf in jax.tree.leaves(state))
    assert {leaf.device for leaf in jax.tree.leaves(state)} == {"worker:0/cpu:0", "worker:1/cpu:0"}
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    same(state, wanted)


def test_a_merged_state_stays(threads_cluster: fm.Cluster) -> None:
    graph, state = nnx.split(objects())

    def merged(state: Any, batch: Any) -> Any:
        both, loss = step(nnx.merge(graph, state), batch)
        return nnx.split(both)[1], loss

    program = fm.dataflow(merged, cluster=threads_cluster, keep=0, donate_argnums=0)
    for _ in range(4):
        state, _ = program(state, BATCH)
    assert all(isinstance(leaf, fm.Remote) for leaf in jax.tree.leaves(state))
    model, _ = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.fetch(), state))
    same(nnx.state(model, nnx.Param), plain()[0])


def test_objects_that_are_not_returned_come_back(threads_cluster: fm.Cluster) -> None:
    program = fm.dataflow(lambda both, batch: step(both, batch)[1], cluster=threads_cluster)
    both = objects()
    for _ in range(4):
        program(both, BATCH)
    state = nnx.state(both[0], nnx.Param)
    assert not any(isinstance(leaf, fm.Remote) for leaf in jax.tree.leaves(state))
    same(state, plain()[0])


def test_a_state_of_split_is_a_pytree_that_a_call_leaves_as_it_is() -> None:
    graph, state = cast(tuple[Any, Any], nnx.split(Model(nnx.Rngs(0))))

    def forward(state: Any, x: Any) -> Any:
        model = nnx.merge(graph, state)
        y = jnp.sum(model(x))
        return nnx.split(model)[1], y

    expected = jax.jit(forward)(state, BATCH["x"])
    with fm.Cluster.threads(workers=2) as cluster:
        for keep in (None, 0):
            program = fm.dataflow(forward, cluster=cluster, keep=keep)
            for _ in range(2):
                after, y = program(state, BATCH["x"])
                np.testing.assert_allclose(y, expected[1], rtol=1e-5)
                assert int(after["drop"]["rngs"]["count"][...]) == 1
    assert int(state["drop"]["rngs"]["count"][...]) == 0
