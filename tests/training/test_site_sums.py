"""Every replica of a site takes the sum of its gradients before it begins the next one, also one that needs it not."""

from __future__ import annotations

import gc
from typing import Any

import optax
import pytest

import flowml as fm
from flowml_runtime.worker.training.run import Run
from tests.training.reference import BATCH, data, mlp, mlp_loss

STEPS = 4


@pytest.mark.parametrize("local", [fm.ParameterServer(), fm.Ring()], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("payload", [fm.Gradient(), fm.Delta()], ids=lambda p: type(p).__name__)
def test_no_sum_is_left_after_its_step(threads_cluster: fm.Cluster, local: Any, payload: Any) -> None:
    every = 1 if payload == fm.Gradient() else 2
    policy = fm.Policy(topology=fm.Hierarchy(local, fm.ParameterServer(), sites=2), every=every, payload=payload)
    left: list[tuple[int, ...]] = []

    def look(record: Any) -> None:
        runs = [found for found in gc.get_objects() if isinstance(found, Run) and not found.stopped]
        assert runs
        for run in runs:
            with run.changed:
                left.extend(key for key in run.told if key[2] < 0 and key[3] <= record["step"])

    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), policies=policy, replicas=4, cluster=threads_cluster)
    trainer.fit(mlp(), data(), batch_size=BATCH, steps=STEPS, callbacks=[look], progress=False)
    assert left == []
