"""A machine that leaves in a record ends a fit on a simulated cluster, as a lost worker ends one on a real cluster."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

RECORD = {"metadata": {"gap_seconds": 300}, "data": [3, 3, 2, 3]}
CHURN = fm.sim.Churn.from_spot(RECORD, gap_s=1.0, seed=1)
SOURCE = {"x": np.ones((32, 4), np.float32)}


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch["x"] @ params["w"]) ** 2)


def fit(workers: int, steps: int) -> fm.TrainingResult:
    models = fm.sim.Constant(0.1), fm.sim.Network(0.0, float("inf"))
    cluster = fm.SimulatedCluster(workers, *models, arithmetic=False, faults=[CHURN])
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=workers)
    return trainer.fit({"w": jnp.ones((4, 2))}, SOURCE, batch_size=6 * workers, steps=steps)


def test_a_departure_ends_the_fit_with_the_worker_and_the_time() -> None:
    ((time_s, worker, up), *_) = CHURN.changes
    assert (time_s, up) == (2.0, False)
    with pytest.raises(fm.WorkerLostError, match=rf"worker:{worker}.*it stopped at 2 s"):
        fit(3, steps=100)


def test_a_fit_that_ends_before_the_departure_does_not_notice_it() -> None:
    assert fit(3, steps=15).virtual_seconds == pytest.approx(1.5)


def test_only_the_first_departure_of_each_worker_that_exists_counts() -> None:
    churn = fm.sim.Churn([(1.0, 0, False), (2.0, 0, True), (3.0, 0, False), (2.5, 5, False)])
    assert churn.crashes(workers=3) == (fm.sim.Crash(0, 1.0),)
