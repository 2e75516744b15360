"""Gossip of one layer beside a quorum of another: a late replica takes part in every round, and its rest is dropped."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax
import pytest

import flowml as fm
from flowml.policy.graphs import as_graph
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Terms
from tests.training.reference import BATCH, assert_close, data, mlp, mlp_loss
from tests.training.test_gossip import STEPS, gossip_loop, mean

SOURCE = data()
REPLICAS = 4


def loss(params: Any, batch: Any) -> Any:
    """The layers of the two policies do not influence each other."""
    return mlp_loss(params["gossip"], batch) + jnp.mean((batch["x"] @ params["quorum"]) ** 2)


def fit(cluster: Any, every: int, **settings: Any) -> fm.TrainingResult:
    rules = {"gossip/*": fm.policies.gossip("ring", every), "quorum": fm.policies.quorum(0.75)}
    trainer = fm.Trainer(loss, optax.sgd(0.05), cluster=cluster, replicas=REPLICAS, policies=rules, **settings)
    params = {"gossip": mlp(), "quorum": jnp.ones((12, 2))}
    return trainer.fit(params, SOURCE, batch_size=BATCH, steps=STEPS)


def dropped(result: fm.TrainingResult) -> int:
    (group,) = [tally for name, tally in result.ledger.groups.items() if name.startswith("quorum")]
    return group.dropped


def test_simulated_rounds_have_every_replica_although_one_is_late_for_each_clock() -> None:
    compute = fm.sim.Straggler(fm.sim.Constant(0.1), 3, workers=[2])
    cluster = fm.SimulatedCluster(workers=REPLICAS, compute=compute, network=fm.sim.Network(1e-4, 1e9), seed=0)
    result = fit(cluster, 1)
    assert_close(result.params["gossip"], mean(gossip_loop(as_graph("ring"), 1, optax.sgd(0.05))[-1]), 1e-5)
    assert dropped(result) > 0
    assert result.ledger.used == STEPS * REPLICAS


@pytest.mark.parametrize("every", [1, 3])
def test_rounds_on_workers_have_every_replica_although_one_is_late(threads_cluster: fm.Cluster, every: int) -> None:
    result = fit(threads_cluster, every, delays={"worker:2": 0.03})
    if every == 1:  # otherwise the late replica may skip the steps between two rounds
        assert_close(result.params["gossip"], mean(gossip_loop(as_graph("ring"), 1, optax.sgd(0.05))[-1]), 1e-5)
    assert dropped(result) > 0
    assert result.ledger.outstanding == 0
    assert len(result.history) == STEPS


def test_a_clock_with_a_round_may_not_be_skipped() -> None:
    rules = [fm.policies.gossip("ring", 3), fm.policies.quorum(0.75)]
    terms = Terms(4, 1, 1, tuple(StoreTerms((0,), rule) for rule in rules), 9)
    assert [clock for clock in range(9) if not terms.may_skip(clock)] == [2, 5, 8]
