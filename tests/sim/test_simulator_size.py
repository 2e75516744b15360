"""What a simulated machine costs does not depend on how many others there are."""

from __future__ import annotations

import tracemalloc
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.protocol.training.accounts import NOTHING
from flowml_runtime.worker.training.counts import NO_BYTES


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch["x"] @ params["w"]) ** 2)


def bytes_each(workers: int) -> float:
    """The most bytes of Python objects during a fit, for each machine."""
    cluster = fm.SimulatedCluster(workers, fm.sim.Constant(0.1), fm.sim.Network(1e-3, 1e9), arithmetic=False)
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=workers, policies=fm.policies.quorum(0.75))
    params, source = {"w": jnp.ones(4)}, {"x": np.zeros((workers, 4), np.float32)}
    trainer.plan(params, source)
    tracemalloc.start()
    try:
        trainer.fit(params, source, batch_size=workers, steps=2, progress=False)
        return tracemalloc.get_traced_memory()[1] / workers
    finally:
        tracemalloc.stop()


def test_the_memory_of_a_machine_does_not_grow_with_their_number() -> None:
    # The least of two: what threads of other tests allocate meanwhile counts too.
    few, many = (min(bytes_each(workers) for _ in range(2)) for workers in (100, 800))
    assert many < 1.2 * few, f"{few:.0f} bytes for each of 100 machines, {many:.0f} for each of 800"


@pytest.mark.parametrize("policy", [fm.policies.quorum(0.75, late=fm.Fold()), fm.policies.ssp(3)], ids=["fold", "ssp"])
def test_the_empty_tables_that_machines_share_stay_empty(policy: fm.Policy) -> None:
    models = fm.sim.LogNormal(0.1, 0.5), fm.sim.Network(1e-3, 1e3)  # versions wait for the links
    cluster = fm.SimulatedCluster(4, *models, arithmetic=False, homes=fm.sim.Homes(apply_s=0.01))
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=4, policies=policy)
    source = {"x": np.zeros((16, 4), np.float32)}
    trainer.fit({"w": jnp.ones(4)}, source, batch_size=4, steps=8, progress=False)
    assert not NOTHING and not NO_BYTES
