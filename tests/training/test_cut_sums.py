"""Sums over replicas that have stopped at different microbatches are the mean over the examples that were used."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.data import epoch_order
from tests.training.reference import data, mlp, mlp_loss

SOURCE = data()
MICROBATCHES, BATCH = 4, 36
CLIPPED = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))
"""All layers are one store, which gets a part from each stage."""


@pytest.mark.parametrize("knobs", [{"topology": fm.AllReduce()}, {"topology": fm.Hierarchy(sites=2)}], ids=str)
def test_replicas_of_one_worker_stop_at_different_microbatches(knobs: dict[str, Any]) -> None:
    """Two replicas have their first stage on one worker, and their last on different ones, of which one is slow. The
    parts of the sum then came from workers whose last replicas had computed different numbers of microbatches."""
    policy = fm.Policy(quorum=fm.Quorum(4, of="microbatches"), **knobs)
    options: dict[str, Any] = {"placement": fm.Pipeline(2), "microbatches": MICROBATCHES, "delays": {"worker:1": 1.0}}
    with fm.Cluster.threads(workers=2, devices_per_worker=3) as cluster:
        trainer = fm.Trainer(mlp_loss, CLIPPED, cluster=cluster, replicas=3, policies=policy, **options)
        result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=1, seed=5, progress=False)
    size = BATCH // 3
    used = [size - t.left_out for t in result.ledger.replicas]
    assert len(set(used)) > 1
    order = epoch_order(len(SOURCE["x"]), 5, 0)
    chosen = np.concatenate([order[r * size :][:n] for r, n in enumerate(used)])
    gradient = jax.grad(mlp_loss)(mlp(), {k: v[chosen] for k, v in SOURCE.items()})
    update, _ = CLIPPED.update(gradient, CLIPPED.init(mlp()), mlp())
    expected = optax.apply_updates(mlp(), update)
    for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
