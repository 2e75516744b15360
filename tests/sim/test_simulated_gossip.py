"""Gossip in virtual time has the parameters and bytes of real workers, and waits only for neighbours."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

REPLICAS, STEPS = 4, 6
SOURCE = {"x": np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)}
PARAMS = {"w": np.linspace(-1, 1, 16, dtype=np.float32).reshape(8, 2)}
NETWORK = fm.sim.Network(latency_s=1e-3, bytes_per_s=1e6)
POLICIES = {
    "ring": fm.policies.gossip("ring"),
    "random pairs every 2": fm.policies.gossip("random_pairs", every=2),
    "NoLoCo": fm.policies.no_loco(2, optax.sgd(0.5, momentum=0.5)),
}


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean(jnp.tanh(batch["x"] @ params["w"] - 1) ** 2)


def fit(cluster: Any, policy: fm.Policy) -> fm.TrainingResult:
    trainer = fm.Trainer(loss, optax.adam(0.1), cluster=cluster, replicas=REPLICAS, policies=policy)
    return trainer.fit(PARAMS, SOURCE, batch_size=16, steps=STEPS)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_parameters_state_and_bytes_are_those_of_real_workers(threads_cluster: fm.Cluster, policy: fm.Policy) -> None:
    real = fit(threads_cluster, policy)
    simulated = fit(fm.SimulatedCluster(REPLICAS, fm.sim.LogNormal(0.1, 0.3), NETWORK), policy)
    jax.tree.map(np.testing.assert_array_equal, real.params, simulated.params)
    jax.tree.map(np.testing.assert_array_equal, real.opt_state, simulated.opt_state)
    assert [r["loss"] for r in real.history] == [r["loss"] for r in simulated.history]
    keys = "pushes", "pushed_bytes", "pushed_wire_bytes"
    assert [[t[k] for k in keys] for t in real.traffic.values()] == [
        [t[k] for k in keys] for t in simulated.traffic.values()
    ]


def test_one_slow_step_delays_a_ring_once() -> None:
    """On a ring of 8 the first step of replica 0 takes 1 s. It delays each replica once."""
    slow = fm.sim.Recorded([[1.0, *[0.1] * 7], *[[0.1] * 8 for _ in range(7)]])
    cluster = fm.SimulatedCluster(8, slow, fm.sim.Network(0.0, float("inf")), arithmetic=False)
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=8, policies=fm.policies.gossip("ring"))
    result = trainer.fit(PARAMS, SOURCE, batch_size=16, steps=8)
    assert result.virtual_seconds == pytest.approx(1.7)
    steps = np.diff([r["seconds"] for r in result.history])
    assert steps.max() == pytest.approx(0.1), "the later steps wait no longer than for their own compute time"


def test_a_round_takes_its_messages_when_they_do_not_fit_into_the_step() -> None:
    """64 bytes at 1,000 bytes a second take longer than the step that hides them."""
    network = fm.sim.Network(latency_s=0.0, bytes_per_s=1000.0)
    cluster = fm.SimulatedCluster(REPLICAS, fm.sim.Constant(0.05), network)
    ring = fit(cluster, fm.policies.gossip("ring")).virtual_seconds
    every = fit(cluster, fm.policies.gossip("ring", every=2)).virtual_seconds
    sent = PARAMS["w"].nbytes / 1000
    assert sent == 0.064
    ends = 2 * sent  # the first parameters come from the home, and the last go there
    assert ring == pytest.approx(STEPS * sent + ends)
    assert every == pytest.approx(STEPS / 2 * (0.05 + sent) + ends)
