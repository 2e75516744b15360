"""Updates of a layer in shared memory follow one another in virtual time, because each holds the layer's lock."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

STEPS, COMPUTE_S = 5, 0.1
SOURCE = {"x": np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)}
ONE = {"a": np.ones((4, 2), np.float32)}
TWO = {"a": np.ones((4, 8), np.float32), "b": np.ones((8, 2), np.float32)}


def loss(params: Any, batch: Any) -> Any:
    x = batch["x"] @ params["a"]
    return jnp.mean(x @ params["b"] if "b" in params else x)


def fit(
    homes: fm.sim.Homes, replicas: int, params: Any = ONE, *, steps: int = STEPS, arithmetic: bool = False
) -> fm.TrainingResult:
    idle = fm.sim.Network(0.0, float("inf"))
    compute = fm.sim.Constant(COMPUTE_S)
    cluster = fm.SimulatedCluster(1, compute, idle, devices_per_worker=replicas, homes=homes, arithmetic=arithmetic)
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=replicas, policies=fm.policies.hogwild())
    result = trainer.fit(params, SOURCE, batch_size=8, steps=steps, progress=False)
    assert result.ledger.used == steps * replicas
    return result


def test_replicas_with_short_updates_wait_for_the_lock_once() -> None:
    """The first updates follow one another. After that the replicas stay apart by the time of an update."""
    result = fit(fm.sim.Homes(apply_s=0.01), 4)
    assert result.virtual_seconds == pytest.approx(STEPS * (COMPUTE_S + 0.01) + 3 * 0.01)


def test_long_updates_are_as_slow_as_one_replica_that_made_all() -> None:
    result = fit(fm.sim.Homes(apply_s=0.05), 4)
    assert result.virtual_seconds == pytest.approx(COMPUTE_S + 4 * STEPS * 0.05)


def test_each_layer_has_a_lock_of_its_own() -> None:
    result = fit(fm.sim.Homes(apply_s=0.05), 2, TWO)
    assert result.virtual_seconds == pytest.approx(STEPS * (COMPUTE_S + 2 * 0.05) + 0.05)


def test_an_update_takes_the_bytes_of_one_gradient() -> None:
    result = fit(fm.sim.Homes(bytes_per_s=ONE["a"].nbytes / 0.02), 1)
    assert result.virtual_seconds == pytest.approx(STEPS * (COMPUTE_S + 0.02))


def test_all_updates_are_made_and_none_twice() -> None:
    """The gradient of this loss does not depend on the parameters. An epoch has 16 items of two examples."""
    result = fit(fm.sim.Homes(apply_s=0.05), 4, steps=4, arithmetic=True)
    assert result.virtual_seconds == fit(fm.sim.Homes(apply_s=0.05), 4, steps=4).virtual_seconds
    expected = 1 - 0.1 * (SOURCE["x"].sum(0)[:, None] / 2) / 2
    np.testing.assert_allclose(result.params["a"], np.broadcast_to(expected, (4, 2)), rtol=1e-5)
