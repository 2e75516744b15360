"""The time of shared-memory fits is predicted from probes of ten steps."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.methods import TimeModel


def fit(replicas: int, steps: int) -> fm.TrainingResult:
    cluster = fm.SimulatedCluster(
        1,
        fm.sim.LogNormal(0.1, 0.1),
        fm.sim.Network(1e-4, 1e9),
        homes=fm.sim.Homes(apply_s=2e-3),
        devices_per_worker=replicas,
        arithmetic=False,
    )

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((batch @ params) ** 2)

    source = np.ones((replicas * 10, 4), np.float32)
    trainer = fm.Trainer(
        loss,
        optax.sgd(0.1),
        cluster=cluster,
        replicas=replicas,
        policies=fm.policies.hogwild(),
        placement=fm.Pipeline(1),
    )
    return trainer.fit(jnp.zeros(4), source, batch_size=replicas, steps=steps, progress=False)


def test_two_probes_predict_a_longer_fit_on_more_replicas() -> None:
    model = TimeModel.of({1: fit(1, 10), 2: fit(2, 10)})
    for replicas in (2, 4, 8):
        result = fit(replicas, 100)
        assert abs(model.error(result, replicas)) < 0.15
        items = replicas * 100
        assert model.seconds(items, replicas) == pytest.approx(100 * model.step_s(replicas))


def test_a_model_needs_two_probes_of_some_steps() -> None:
    result = fit(1, 2)
    with pytest.raises(ValueError, match="two numbers of replicas"):
        TimeModel.of({1: result})
    with pytest.raises(ValueError, match="give it 10"):
        TimeModel.of({1: result, 2: result})
