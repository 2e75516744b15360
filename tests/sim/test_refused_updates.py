"""A gradient with NaN leaves a replica's own parameters as they are, in virtual time as on real workers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

REPLICAS, STEPS, RATE = 4, 6, 0.1
X = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
X[[5, 40]] = np.nan  # replica 1 at steps 0 and 4, replica 2 at step 2
SOURCE = {"x": X}
PARAMS = {"w": np.linspace(-1, 1, 16, dtype=np.float32).reshape(8, 2)}
POLICIES = {
    "gossip": fm.policies.gossip("ring"),
    "NoLoCo": fm.policies.no_loco(2, optax.sgd(0.5, momentum=0.5)),
    "Gaia": fm.policies.gaia(0.01, sites=2, staleness=0),
    "four sites of one replica": fm.Policy(
        fm.Hierarchy(fm.ParameterServer(), fm.Gossip("complete"), sites=4),
        payload=fm.Delta(),
        filters=(fm.filters.significance(0.01),),
    ),
}


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch["x"] @ params["w"] - 1) ** 2)


def fit(cluster: Any, policy: fm.Policy) -> fm.TrainingResult:
    trainer = fm.Trainer(loss, optax.sgd(RATE), cluster=cluster, replicas=REPLICAS, policies=policy)
    with pytest.warns(fm.FlowmlWarning, match="holds NaN or infinity"):
        return trainer.fit(PARAMS, SOURCE, batch_size=16, steps=STEPS, shuffle=False)


def simulated() -> fm.SimulatedCluster:
    return fm.SimulatedCluster(REPLICAS, fm.sim.Constant(0.1), fm.sim.Network(1e-3, 1e6))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_parameters_are_those_of_real_workers(threads_cluster: fm.Cluster, policy: fm.Policy) -> None:
    real, virtual = fit(threads_cluster, policy), fit(simulated(), policy)
    assert real.ledger.nonfinite == virtual.ledger.nonfinite != {}
    jax.tree.map(np.testing.assert_array_equal, real.params, virtual.params)


def test_a_refused_step_mixes_what_the_replica_has() -> None:
    """Against D-PSGD in NumPy: x_i <- sum_j W[i, j] x_j - rate * gradient_i, where a refused gradient counts as 0."""
    own = [PARAMS["w"].astype(np.float64)] * REPLICAS
    for step in range(STEPS):
        steps = []
        for replica, w in enumerate(own):
            begin = step % 4 * 16 + replica * 4
            x = X[begin : begin + 4].astype(np.float64)
            steps.append(0 * w if np.isnan(x).any() else 2 * x.T @ (x @ w - 1) / 8)
        own = [sum(own[(i + j) % 4] for j in (-1, 0, 1)) / 3 - RATE * steps[i] for i in range(REPLICAS)]
    found = fit(simulated(), POLICIES["gossip"]).params["w"]
    np.testing.assert_allclose(found, np.mean(own, axis=0), atol=1e-6)
