"""A worker that is slow as the home of layers is named, with what a second fit without it saves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import flowml as fm
from tests.training.test_observations import PARAMS, SOURCE, loss

POLICIES = {
    "synchronous": fm.Policy(),
    "rhythm": fm.policies.every(2),
    "quorum": fm.policies.quorum(0.75),
    "local": fm.policies.local_sgd(2),
    "no bound": fm.policies.asynchronous(),
    "bound": fm.policies.asynchronous(2),
    "overlapping": fm.policies.double_buffer(),
}


def simulated(policy: fm.Policy, homes: fm.sim.Homes, machines: Any = None) -> fm.TrainingResult:
    machines = machines or fm.sim.Constant(0.1)
    cluster = fm.SimulatedCluster(4, machines, fm.sim.Network(1e-4, 1e9), homes=homes, arithmetic=False)
    trainer = fm.Trainer(loss, optax.sgd(0.05), cluster=cluster, replicas=4, policies=policy)
    return trainer.fit(PARAMS, SOURCE, batch_size=16, steps=20, progress=False)


@pytest.mark.parametrize("name", POLICIES)
def test_the_cost_is_the_difference_of_two_fits(name: str) -> None:
    plan = simulated(POLICIES[name], fm.sim.AT_ONCE).plan.training
    assert plan is not None
    slow = max(int(store.home.split("/")[0].rpartition(":")[2]) for store in plan.stores)
    result = simulated(POLICIES[name], fm.sim.Homes(0.01, slow={slow: 20}))
    ideal = simulated(POLICIES[name], fm.sim.Homes(0.01))
    (found,) = result.stragglers().homes
    assert found.worker == f"worker:{slow}" and found.layers
    saved = (result.virtual_seconds or 0.0) - (ideal.virtual_seconds or 0.0)
    assert found.cost_s == pytest.approx(saved, rel=0.2)
    assert not ideal.stragglers().homes
    assert f"worker:{slow} was slow as the home of {found.layers[0]}" in str(result.stragglers())


def test_a_home_that_nobody_waits_for_is_not_told() -> None:
    result = simulated(POLICIES["overlapping"], fm.sim.Homes(0.001, slow={1: 20}))
    assert "home" not in str(result.stragglers())


def test_the_slow_workers_exist() -> None:
    with pytest.raises(fm.SimulationError, match=r"^Homes: slow names worker 4, and the cluster has workers 0 to 3$"):
        simulated(fm.Policy(), fm.sim.Homes(0.01, slow={4: 20}))
    with pytest.raises(
        fm.SimulationError, match=r"^Homes: slow\[1\]=0\.5 makes no sense; give a finite number of at l"
    ):
        fm.sim.Homes(0.01, slow={1: 0.5})


def heavy() -> optax.GradientTransformation:
    """An optimizer whose update multiplies matrices for some time, and adds nothing."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        matrix = jnp.eye(128)

        def work(_: Any, x: Any) -> Any:
            return x @ matrix

        def longer(u: Any) -> Any:
            return u + 0 * jax.lax.fori_loop(0, 200, work, matrix + jnp.sum(u)).sum()

        return jax.tree.map(longer, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def test_the_home_is_named_on_threads(threads_cluster: fm.Cluster) -> None:
    labels = {"w": "w", "b": "b"}
    optimizer = optax.partition({"w": optax.sgd(0.05), "b": optax.chain(heavy(), optax.sgd(0.05))}, labels)
    policies = {"w": fm.Policy(), "b": fm.policies.synchronous(filters=(fm.filters.compress(),))}
    trainer = fm.Trainer(loss, optimizer, cluster=threads_cluster, replicas=4, policies=policies)
    result = trainer.fit(PARAMS, SOURCE, batch_size=16, steps=20, progress=False)
    assert result.plan.training is not None
    homes = {store.name: store.home.split("/")[0] for store in result.plan.training.stores}
    assert homes["w"] != homes["b"]
    (found, *_) = result.stragglers().homes
    assert (found.worker, found.layers) == (homes["b"], ("b",))
    assert 0 < found.cost_s < result.seconds
