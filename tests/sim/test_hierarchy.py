"""Hierarchies and gossip of deltas in virtual time have the values of real workers, and the bytes between sites."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 16)).astype(np.float32)
SOURCE = {"x": X, "y": X @ RNG.normal(size=(16, 8)).astype(np.float32)}
UNEVEN = ((0, 1, 2), (3,))
FAST = fm.sim.Network(latency_s=1e-4, bytes_per_s=1e9)
SERVER, REDUCE = fm.ParameterServer(), fm.AllReduce()


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((jnp.tanh(batch["x"] @ params["a"]) @ params["b"] - batch["y"]) ** 2)


def params() -> Any:
    return {"a": 0.3 * jnp.eye(16) + 0.1, "b": jnp.full((16, 8), 0.1)}


def fit(cluster: Any, policy: fm.Policy) -> Any:
    trainer = fm.Trainer(loss, optax.sgd(0.05, momentum=0.5), cluster=cluster, replicas=4, policies=policy)
    return trainer.fit(params(), SOURCE, batch_size=16, steps=9)


@pytest.mark.parametrize(
    "policy",
    [
        fm.Policy(topology=fm.Hierarchy(REDUCE, SERVER, UNEVEN)),
        fm.Policy(topology=fm.Hierarchy(SERVER, SERVER, UNEVEN), every=3, payload=fm.Delta()),
        fm.Policy(topology=fm.Hierarchy(REDUCE, SERVER, 2), every=3, payload=fm.Weights()),
        fm.Policy(topology=fm.Hierarchy(SERVER, fm.Ring(), UNEVEN)),
        fm.Policy(topology=fm.Hierarchy(REDUCE, fm.Gossip("complete"), 2), every=2),
        fm.policies.gaia(0.3, sites=UNEVEN, staleness=0),
        fm.policies.gaia(0.3, local=SERVER, sites=2, staleness=0, every=2),
        fm.Policy(topology=fm.Gossip("complete"), payload=fm.Delta()),
    ],
    ids=lambda p: p.describe(),
)
def test_values_and_bytes_are_those_of_real_workers(threads_cluster: fm.Cluster, policy: fm.Policy) -> None:
    real, simulated = (
        fit(cluster, policy) for cluster in (threads_cluster, fm.SimulatedCluster(4, fm.sim.Constant(0.1), FAST))
    )
    for a, b in zip(jax.tree.leaves(simulated.params), jax.tree.leaves(real.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert simulated.traffic == real.traffic


def test_a_slow_link_between_sites_is_used_less_by_gaia() -> None:
    """Two sites with a slow link: what travels during the next step takes less time, significance less still."""
    slow = {(a, b): (0.01, 1e4) for a in ("east", "west") for b in ("east", "west")}
    network = fm.sim.Sites(slow, {"east": 2, "west": 2}, local=FAST)
    policies = {
        "flat": fm.Policy(),
        "all": fm.policies.gaia(0.0, sites=2),
        "significant": fm.policies.gaia(0.5, sites=2),
    }
    results = {
        name: fit(fm.SimulatedCluster(4, fm.sim.Constant(0.01), network), policy) for name, policy in policies.items()
    }
    seconds = {name: result.virtual_seconds for name, result in results.items()}
    assert seconds["significant"] < seconds["all"] / 2 < seconds["all"] < seconds["flat"]
    clocks = fit(fm.SimulatedCluster(4, fm.sim.Constant(0.01), network, arithmetic=False), policies["all"])
    assert clocks.virtual_seconds == pytest.approx(seconds["all"], rel=0.1)
