"""A site that the others have gone on without ends its step, also where another layer uses that step."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

import flowml as fm

SERVER = fm.ParameterServer()
SITES = ((0,), (1,), (2, 3))
POLICIES = {
    "a": fm.Policy(topology=fm.Hierarchy(SERVER, SERVER, SITES), quorum=fm.Quorum(2), payload=fm.Delta()),
    "b": fm.Policy(quorum=fm.Quorum(0.5, late="fold"), every=2, apply="sum"),
}
STEPS = 6


def loss(params: Any, batch: Any) -> Any:
    """The gradient by b says which examples are in it, and that by a is one for each step."""
    return jnp.sum(batch["one"] @ params["b"]) + params["a"].sum()


def fit(cluster: Any, **options: Any) -> Any:
    trainer = fm.Trainer(loss, optax.sgd(1.0), cluster=cluster, replicas=4, policies=POLICIES, **options)
    source = {"one": np.eye(4 * STEPS, dtype=np.float32)}
    start = {"a": jnp.zeros(1), "b": jnp.zeros(4 * STEPS)}
    return trainer.fit(start, source, batch_size=4, steps=STEPS, shuffle=False, progress=False)


def check(result: Any) -> None:
    """What the ledger says of b is in it."""
    (told,) = [tally for name, tally in result.ledger.groups.items() if name.startswith("b ")]
    assert np.count_nonzero(result.params["b"]) == told.used + told.folded


def test_its_step_counts_for_the_layer_that_folds_late_work_in() -> None:
    machines = fm.sim.Straggler(fm.sim.Constant(0.1), factor=3, workers=(1,))
    result = fit(fm.SimulatedCluster(4, machines, fm.sim.Network(latency_s=1e-3, bytes_per_s=1e9)))
    check(result)
    assert result.ledger.replicas[1].folded > 0


def test_real_workers_do_so_too(threads_cluster: fm.Cluster) -> None:
    check(fit(threads_cluster, delays={"worker:0": 0.01, "worker:1": 0.03, "worker:2": 0.01, "worker:3": 0.01}))
