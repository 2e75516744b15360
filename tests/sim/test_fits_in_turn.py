"""Several fits on one simulated cluster: each takes its own seconds, and repeats exactly."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch @ params) ** 2)


def test_fits_of_several_trainers_on_one_simulated_cluster_do_not_meet() -> None:
    """Each is the first fit of its own plan."""
    cluster = fm.SimulatedCluster(4, fm.sim.LogNormal(0.1, 0.3), fm.sim.Network(1e-3, 1e9), seed=3)
    found: list[fm.TrainingResult] = []
    for policy in (fm.policies.synchronous(), fm.policies.quorum(0.75), fm.policies.synchronous()):
        trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=4, policies=policy)
        found.append(trainer.fit(jnp.ones(3), np.ones((64, 3), np.float32), batch_size=8, steps=20, progress=False))
    assert found[0].trace_hash == found[2].trace_hash
    assert found[1].ledger.dropped > 0
    assert found[1].seconds < found[0].seconds == pytest.approx(found[2].seconds)


@pytest.mark.parametrize("arithmetic", [True, False])
def test_each_fit_on_a_simulated_cluster_takes_its_own_seconds(arithmetic: bool) -> None:
    cluster = fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-3, 1e9), arithmetic=arithmetic)
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=2)
    results = [
        trainer.fit(jnp.ones(3), np.ones((64, 3), np.float32), batch_size=8, steps=5, progress=False) for _ in range(3)
    ]
    assert results[0].seconds > 0.5
    for result in results[1:]:
        assert result.seconds == pytest.approx(results[0].seconds)
        assert result.virtual_seconds == results[0].virtual_seconds
        assert result.trace_hash == results[0].trace_hash
        times = [[record["seconds"] for record in r.history] for r in (result, results[0])]
        assert times[0] == pytest.approx(times[1])
