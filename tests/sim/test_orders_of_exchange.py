"""Layers that replicas exchange with others, in orders that let no two replicas wait for each other."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.policy import Delta, Gossip, Outer, ParameterServer, Policy
from flowml_tools.faults.campaign import check_rest
from flowml_tools.faults.checker import check
from flowml_tools.faults.layout import make
from tests.training.reference import BATCH, data, mlp, mlp_loss

KINDS = {"changes": {"payload": Delta()}, "an outer optimizer": {"apply": Outer()}}
"""Gossips that tell neighbours only after the update."""
PAIR_FIRST, PAIR_LAST = ((0, 1), (2,)), ((0,), (1, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sites", [(PAIR_FIRST, PAIR_LAST), (PAIR_LAST, PAIR_FIRST), (PAIR_FIRST, None)])
def test_gossips_of_different_sites_do_not_wait_for_each_other(kind: str, sites: tuple[object, ...]) -> None:
    """A replica that was alone in its site exchanged the layer before those of later pushes, and others after them."""

    def rule(split: object) -> Policy:
        remote = Gossip("complete")
        return Policy(topology=fm.Hierarchy(ParameterServer(), remote, split) if split else remote, **KINDS[kind])

    for rules in (sites, sites[::-1]):
        run = make([rule(split) for split in rules], replicas=3, stages=1, clocks=3, items=3)
        run.go()
        check_rest(run)
        assert check(run.history) == []


def test_real_workers_exchange_them_as_simulated_ones_do(threads_cluster: fm.Cluster) -> None:
    remote = fm.Gossip("complete")
    whole, first = (
        fm.Policy(topology=fm.Hierarchy(fm.ParameterServer(), remote, split), apply=fm.Outer(optax.sgd(1.0)))
        for split in (((0, 1), (2,)), ((0,), (1, 2)))
    )

    def fit(cluster: Any) -> Any:
        trainer = fm.Trainer(
            mlp_loss, optax.sgd(0.05), cluster=cluster, replicas=3, policies={"fc1/*": first, "*": whole}
        )
        return trainer.fit(mlp((4,)), data(), batch_size=BATCH, steps=2).params

    real, simulated = map(
        fit, (threads_cluster, fm.SimulatedCluster(3, fm.sim.Constant(0.1), fm.sim.Network(1e-3, 1e9)))
    )
    for a, b in zip(jax.tree.leaves(simulated), jax.tree.leaves(real), strict=True):
        np.testing.assert_array_equal(a, b)
