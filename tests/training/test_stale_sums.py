"""With a staleness, replicas that add up gradients among themselves compute the next step meanwhile."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import data, mlp, mlp_loss

STEPS, BATCH, RATE = 6, 24, 0.05
SOURCE = data(STEPS * BATCH)
SERVER = fm.ParameterServer()
TOPOLOGIES = [
    fm.AllReduce(),
    fm.Ring(),
    fm.Hierarchy(fm.AllReduce(), fm.Tree(2), 2),
    fm.Hierarchy(SERVER, fm.Ring(), 2),
]


def fit(cluster: Any, policy: fm.Policy) -> Any:
    trainer = fm.Trainer(mlp_loss, optax.sgd(RATE), cluster=cluster, replicas=4, policies=policy)
    return trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS, shuffle=False)


def one_late() -> Any:
    """Each gradient is of the parameters before the last update."""
    versions = [mlp()]
    for step in range(STEPS):
        rows = {k: v[step * BATCH : (step + 1) * BATCH] for k, v in SOURCE.items()}
        gradient = jax.grad(mlp_loss)(versions[max(step - 1, 0)], rows)
        versions.append(jax.tree.map(lambda p, g: p - RATE * g, versions[-1], gradient))
    return versions[-1]


@pytest.mark.parametrize("topology", TOPOLOGIES[:3], ids=lambda t: type(t).__name__)
def test_a_step_takes_the_longer_of_computing_and_adding_up(topology: Any) -> None:
    network = fm.sim.Network(latency_s=0.02, bytes_per_s=1e9)
    seconds = []
    for staleness in (0, 1):
        cluster = fm.SimulatedCluster(4, fm.sim.Constant(0.2), network)
        result = fit(cluster, fm.Policy(topology=topology, staleness=staleness))
        seconds.append(result.virtual_seconds)
    assert seconds[1] < seconds[0] - (STEPS - 1) * 0.03  # two rounds of 0.02 s are hidden in each step but the last
    for found, expected in zip(jax.tree.leaves(result.params), jax.tree.leaves(one_late()), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("topology", [TOPOLOGIES[1], TOPOLOGIES[3]], ids=lambda t: type(t).__name__)
def test_no_gradient_is_lost_by_real_workers(threads_cluster: fm.Cluster, topology: Any) -> None:
    """With a loss whose gradient does not depend on the parameters the sum is known, however stale they are."""
    source = {"x": np.arange(64, dtype=np.float32)}
    policy = fm.Policy(topology=topology, staleness=2)
    trainer = fm.Trainer(
        lambda p, b: jnp.mean(b["x"]) * p["w"].sum(),
        optax.sgd(0.01),
        cluster=threads_cluster,
        replicas=4,
        policies=policy,
        delays={"worker:2": 0.02},
    )
    result = trainer.fit({"w": jnp.ones(8)}, source, batch_size=16, epochs=3)
    np.testing.assert_allclose(result.params["w"], 1 - 0.01 * 12 * np.mean(source["x"]), rtol=1e-4)
    assert result.ledger.used == 4 * 12


def test_an_unbounded_sum_is_refused() -> None:
    for topology in TOPOLOGIES:
        with pytest.raises(fm.PolicyError, match="pile up without bound; give a finite staleness"):
            fm.Policy(topology=topology, staleness=fm.UNBOUNDED)
