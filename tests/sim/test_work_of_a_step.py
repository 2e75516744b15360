"""A simulated step takes the time of the examples that its replica computes, whatever the policy makes it compute."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.training.pieces import pieces
from flowml_tools.bench import fidelity

STEPS, SECONDS, BATCH = 5, 0.1, 144
SOURCE = {"x": np.ones((BATCH * STEPS, 4), np.float32)}
PARAMS = {"w": jnp.ones((4, 2))}
POLICIES = {
    "synchronous": (4, fm.Policy(), 1.0),
    "fractional": (4, fm.policies.coded(1), 2.0),
    "cyclic": (4, fm.policies.coded(2, "cyclic"), 3.0),
    "tree": (6, fm.policies.coded_reduce(2, 2, 1), 3.0),
    "portions": (4, fm.policies.speculate(2, copies=0), 1.0),
    "sums": (4, fm.policies.all_reduce(), 1.0),
}
"""The replicas, the policy, and how many replicas' shares of the batch each computes in the time of a step."""


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch["x"] @ params["w"]) ** 2)


@pytest.mark.parametrize("arithmetic", [True, False], ids=["arithmetic", "clocks only"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_step_takes_the_time_of_the_shares_that_a_replica_computes(name: str, arithmetic: bool) -> None:
    replicas, policy, shares = POLICIES[name]
    free = fm.sim.Network(0.0, float("inf"))
    cluster = fm.SimulatedCluster(replicas, fm.sim.Constant(SECONDS), free, arithmetic=arithmetic)
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=replicas, policies=policy)
    result = trainer.fit(PARAMS, SOURCE, batch_size=BATCH, steps=STEPS, progress=False)
    assert result.virtual_seconds == pytest.approx(STEPS * SECONDS * shares)
    training = trainer.plan(PARAMS, {"x": SOURCE["x"][:BATCH]}).training
    assert training is not None
    if training.code is not None:
        for replica in range(replicas):
            computed = sum(piece.size for piece in pieces(training, replica, 0, 0))
            assert computed == shares * BATCH / replicas


def test_the_first_of_each_pair_completes_a_coded_clock_in_twice_the_time_of_its_share() -> None:
    """The draws of a code are those of a replica's share, so that policies are compared on the same machines."""
    slow = fm.sim.Straggler(fm.sim.LogNormal(0.1, 0.4), factor=10, workers=(3,))
    free = fm.sim.Network(0.0, float("inf"))

    def steps(policy: fm.Policy, machines: Any) -> list[float]:
        cluster = fm.SimulatedCluster(4, machines, free, seed=7, arithmetic=False)
        trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=4, policies=policy)
        return [r["seconds"] for r in trainer.fit(PARAMS, SOURCE, batch_size=BATCH, steps=STEPS).history]

    draws = slow.draw(7, np.arange(4)[:, None], np.arange(STEPS))
    firsts = np.maximum(draws[:2].min(axis=0), draws[2:].min(axis=0))[0]
    assert steps(fm.policies.coded(1), slow)[0] == pytest.approx(2 * firsts)


@pytest.mark.parametrize("composition", fidelity.compositions(), ids=lambda c: c.name)
def test_the_costs_of_a_composition_are_recorded_from_steps_of_the_same_work(
    composition: fidelity.Composition,
) -> None:
    """As many examples in as many microbatches, so that the recorded tasks are those of the composition."""
    cluster = fm.SimulatedCluster(fidelity.REPLICAS, fm.sim.Constant(0.1), fm.sim.Network(1e-3, 1e9))

    def work(policy: fm.Policy, microbatches: int, batch: int) -> tuple[int, int]:
        trainer, params, source = fidelity.prepared(cluster, policy, None, microbatches)
        training = trainer.plan(params, {name: rows[:batch] for name, rows in source.items()}).training
        assert training is not None
        found = pieces(training, 0, 0, 0)
        return sum(piece.size for piece in found), len(found)

    policy = composition.make(fm.policies)
    assert work(policy, composition.microbatches, fidelity.BATCH) == work(*fidelity.recorded(composition))
