"""Metrics and predictions run over all examples, on the trainer's cluster, and equal those of one device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import BATCH, data, mlp, mlp_loss, predict

SOURCE = data(50)


def metrics(params: Any, batch: Any) -> Any:
    error = predict(params, batch["x"]) - batch["y"]
    return {"loss": jnp.mean(error**2), "close": jnp.mean(jnp.abs(error) < 0.5), "bias": jnp.mean(error, axis=0)}


def outputs(params: Any, batch: Any) -> Any:
    return {"y": predict(params, batch["x"])}


def clusters(threads: fm.Cluster, processes: fm.Cluster) -> dict[str, Any]:
    simulated = fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9), arithmetic=True)
    return {"threads": threads, "processes": processes, "simulated": simulated}


@pytest.mark.parametrize("kind", ["threads", "processes", "simulated"])
def test_a_short_last_batch_counts_by_its_examples(
    threads_cluster: fm.Cluster, process_cluster: fm.Cluster, kind: str
) -> None:
    cluster = clusters(threads_cluster, process_cluster)[kind]
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=cluster, placement=fm.Pipeline(stages=2))
    result = trainer.fit(mlp(), data(), batch_size=BATCH, steps=2, progress=False)
    for params in (mlp(), result.params):
        found, wanted = trainer.evaluate(params, SOURCE, metrics, batch_size=16), metrics(params, SOURCE)
        assert isinstance(found["loss"], float)
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6)
        rows = trainer.predict(params, SOURCE, outputs, batch_size=16)
        np.testing.assert_allclose(rows["y"], predict(params, SOURCE["x"]), rtol=1e-5, atol=1e-6)


def test_functions_with_state_get_it(threads_cluster: fm.Cluster) -> None:
    def loss(params: Any, state: Any, batch: Any) -> Any:
        return mlp_loss(params, {**batch, "x": batch["x"] - state["mean"]}), {"mean": jnp.mean(batch["x"], axis=0)}

    def shifted(params: Any, state: Any, batch: Any) -> Any:
        return {"loss": loss(params, state, batch)[0]}

    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=threads_cluster, has_state=True)
    begun = {"mean": jnp.zeros(12)}
    result = trainer.fit(mlp(), data(), batch_size=BATCH, steps=2, state=begun, progress=False)
    found = trainer.evaluate(result.params, SOURCE, shifted, state=result.state)
    wanted = jax.jit(shifted)(result.params, result.state, SOURCE)
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=1e-5)
    with pytest.raises(ValueError, match="none is given; give state="):
        trainer.evaluate(result.params, SOURCE, shifted)


def test_what_is_no_metric_and_no_prediction_is_refused(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster)
    with pytest.raises(TypeError, match=r"mlp_loss returns a .*; metrics return a dict of means"):
        trainer.evaluate(mlp(), SOURCE, mlp_loss)
    with pytest.raises(ValueError, match=r"mlp_loss returns an array of shape \[\] for 50 examples"):
        trainer.predict(mlp(), SOURCE, mlp_loss)
    with pytest.raises(ValueError, match="has no examples"):
        trainer.evaluate(mlp(), {"x": np.zeros((0, 12)), "y": np.zeros((0, 2))}, metrics)
    silent: Any = fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9), arithmetic=False)
    with pytest.raises(fm.UnsupportedError, match="computes nothing; give it arithmetic=True"):
        fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=silent).evaluate(mlp(), SOURCE, metrics)
