"""A site that is left out of a clock is one contribution less, however many replicas it has."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

SOURCE = {"x": np.ones((64, 4), np.float32)}
SITES = ((0,), (1, 2, 3))


@pytest.mark.parametrize("inside", [None, fm.Quorum(0.66)])
def test_sites_that_a_quorum_leaves_out_are_not_counted_by_replica(inside: fm.Quorum | None) -> None:
    server = fm.ParameterServer()
    topology = fm.Hierarchy(server, server, sites=SITES, quorum=inside)
    policy = fm.Policy(topology=topology, quorum=fm.Quorum(0.5), every=3, payload=fm.Delta())
    machines = fm.sim.Straggler(fm.sim.Constant(0.1), 3, workers=(1,))  # the leader of the second site
    cluster = fm.SimulatedCluster(4, machines, fm.sim.Network(1e-4, 1e9), arithmetic=False)
    trainer = fm.Trainer(
        lambda w, b: jnp.mean(b["x"] @ w), optax.sgd(0.1), cluster=cluster, replicas=4, policies=policy
    )
    result = trainer.fit(jnp.zeros(4), SOURCE, batch_size=16, steps=12, progress=False)
    assert result.ledger.used == 12  # of the first site
    assert list(result.staleness.values()) == [{0: 4}]  # one site at each of four pushes
