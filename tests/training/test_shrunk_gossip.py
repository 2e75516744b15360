"""Replicas that average with their neighbours go on without the lost ones, in a graph among those that are left."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest

import flowml as fm
from flowml import filters
from flowml.data import epoch_order
from flowml.errors import UnsupportedError
from flowml.policy import Gossip
from flowml.policy.graphs import NestedGraph, RingGraph, among, matrix, own_matrix
from tests.training.reference import BATCH, EXAMPLES, assert_close, data, mlp, mlp_loss
from tests.training.test_gossip import OWN, averaged, mean

WORKERS, STEPS = 4, 9
NESTED = NestedGraph(RingGraph(), own_matrix([[0.7, 0.3], [0.3, 0.7]]), ((0, 1), (2, 3)), 2)
PAIR = Gossip([[0.9, 0.1], [0.1, 0.9]])
SITES_OF_TWO = fm.Policy(topology=fm.Hierarchy(PAIR, Gossip("ring", every=2), 2))
SOURCE = data()


def shares(step: int, left: int) -> list[Any]:
    """The items of a step of which the lost replicas have none: the others take the next ones of the epoch."""
    per_epoch, size = EXAMPLES // BATCH, BATCH // WORKERS
    order = epoch_order(EXAMPLES, 0, step // per_epoch)[step % per_epoch * left * size :][: left * size]
    return [{name: rows[part] for name, rows in SOURCE.items()} for part in np.split(order, left)]


def loop(gossip: Gossip, left: int, inner: Any) -> Any:
    """The mean over replicas after a fit of which so many take part from the beginning."""
    own, states = [mlp() for _ in range(left)], [inner.init(mlp()) for _ in range(left)]
    gradient = jax.jit(jax.grad(mlp_loss))
    for step in range(STEPS):
        updates: list[Any] = []
        for r, share in enumerate(shares(step, left)):
            update, states[r] = inner.update(gradient(own[r], share), states[r], own[r])
            updates.append(update)
        if gossip.due(step):
            own = [averaged(row, own) for row in matrix(gossip.graph, left, step // gossip.every)]
        own = [optax.apply_updates(p, u) for p, u in zip(own, updates, strict=True)]
    return mean(own)


@pytest.mark.parametrize("graph", ["ring", "exponential", "complete", "random_pairs", "torus", OWN, NESTED], ids=str)
@pytest.mark.parametrize("every", [1, 3])
def test_the_graph_is_formed_anew_among_those_that_are_left(threads: fm.Cluster, graph: Any, every: int) -> None:
    """Two workers end at the first step, before there is a snapshot, so that the fit begins anew without them."""
    policy, inner = fm.Policy(topology=Gossip(graph), every=every), optax.sgd(0.1)
    ends = {0: "worker:0", 1: "worker:2"} if every == 3 else {0: "worker:0"}

    def end(record: dict[str, Any]) -> None:
        if record["step"] in ends:
            threads.end_worker(ends[record["step"]])

    trainer = fm.Trainer(mlp_loss, inner, cluster=threads, replicas=WORKERS, policies=policy)
    try:
        with pytest.warns(fm.FlowmlWarning, match="left out with (its|their) replica"):
            found = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS, callbacks=[end], on_loss="shrink")
    finally:
        threads.bring_back(threads.lost)
    assert {loss.resumed_at for loss in found.losses} == {0}
    left = WORKERS - len(ends)
    assert found.ledger.used == left * STEPS
    assert found.ledger.outstanding == 0
    gone = {int(worker.rpartition(":")[2]) for worker in ends.values()}
    assert isinstance(policy.remote, Gossip)
    assert_close(found.params, loop(Gossip(among(policy.remote.graph, WORKERS, gone), every), left, inner))


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (SITES_OF_TWO, "the mixing matrix of layer .* is for the 2 replicas of a site"),
        (fm.policies.choco([filters.quantise(8)]), "know of each other's parameters"),
    ],
)
def test_what_cannot_be_formed_anew_is_refused(threads: fm.Cluster, policy: fm.Policy, why: str) -> None:
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads, replicas=WORKERS, policies=policy)
    asked: dict[str, Any]
    for asked in ({"on_loss": "shrink"}, {"replicas": "elastic"}):  # the error names what was given
        ((name, value),) = asked.items()
        with pytest.raises(
            UnsupportedError, match=f"^{name}='{value}': .*{why}.* give on_loss='replace' in its place$"
        ):
            trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS, **asked)
