"""Gossip equals the loop that defines it: each replica averages with its neighbours, then adds its own step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.data import epoch_order
from flowml.policy.graphs import Graph, as_graph, gap, matrix
from tests.training.reference import BATCH, EXAMPLES, assert_close, assert_same, data, mlp, mlp_loss

SOURCE = data()
STEPS = 9
REPLICAS = 4
OWN = [[0.4, 0.6, 0.0, 0.0], [0.0, 0.4, 0.6, 0.0], [0.0, 0.0, 0.4, 0.6], [0.6, 0.0, 0.0, 0.4]]


def shares(step: int, replicas: int) -> list[Any]:
    """The batch of each replica at a step."""
    per_epoch = EXAMPLES // BATCH
    order = epoch_order(EXAMPLES, 0, step // per_epoch)[step % per_epoch * BATCH :][:BATCH]
    return [{k: v[rows] for k, v in SOURCE.items()} for rows in np.split(order, replicas)]


def gossip_loop(graph: Graph, every: int, inner: Any, replicas: int = REPLICAS, steps: int = STEPS) -> list[list[Any]]:
    """D-PSGD: the parameters of each replica before each step, and after the last one."""
    own = [mlp() for _ in range(replicas)]
    states = [inner.init(p) for p in own]
    gradient = jax.jit(jax.grad(mlp_loss))
    seen = [own]
    for step in range(steps):
        updates: list[Any] = []
        for r, share in enumerate(shares(step, replicas)):
            update, states[r] = inner.update(gradient(own[r], share), states[r], own[r])
            updates.append(update)
        if (step + 1) % every == 0:
            weights = matrix(graph, replicas, step // every)
            own = [averaged(w, own) for w in weights]
        own = [optax.apply_updates(p, u) for p, u in zip(own, updates, strict=True)]
        seen.append(own)
    return seen


def mean(replicas: list[Any]) -> Any:
    return jax.tree.map(lambda *xs: np.mean(np.stack(xs), axis=0), *replicas)


def watched_loss(params: Any, batch: Any) -> Any:
    """The loss, the parameters and their squares: a record has the means of these over replicas."""
    return mlp_loss(params, batch), (params, jax.tree.map(jnp.square, params))


@pytest.fixture(scope="module")
def four_processes() -> Iterator[fm.Cluster]:
    with closing(fm.Cluster.local(workers=2, devices_per_worker=2)) as cluster:
        yield cluster


@pytest.fixture(params=["threads", "processes"])
def cluster(request: pytest.FixtureRequest) -> fm.Cluster:
    return request.getfixturevalue({"threads": "threads_cluster", "processes": "four_processes"}[request.param])


def fit(cluster: fm.Cluster, policy: Any, inner: Any, replicas: int = REPLICAS, **settings: Any) -> Any:
    trainer = fm.Trainer(watched_loss, inner, cluster=cluster, replicas=replicas, policies=policy, **settings)
    return trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS)


CASES = {
    "ring": (fm.policies.gossip(), "ring", 1),
    "ring every 3": (fm.policies.gossip("ring", every=3), "ring", 3),
    "torus": (fm.policies.gossip("torus"), "torus", 1),
    "exponential": (fm.policies.gossip("exponential"), "exponential", 1),
    "random pairs": (fm.policies.gossip("random_pairs", every=2), "random_pairs", 2),
    "complete": (fm.policies.gossip("complete"), "complete", 1),
    "own, directed": (fm.policies.gossip(OWN), OWN, 1),
}


def averaged(weights: Any, trees: list[Any]) -> Any:
    return jax.tree.map(lambda *xs: sum(w * x for w, x in zip(weights, xs, strict=True)), *trees)


def no_loco_loop(every: int, inner: Any, outer: Any, pull: float) -> list[list[Any]]:
    """NoLoCo: the parameters of each replica before each step, and after the last one."""
    own, began = [mlp() for _ in range(REPLICAS)], [mlp() for _ in range(REPLICAS)]
    states, outers = [inner.init(p) for p in own], [outer.init(p) for p in own]
    gradient = jax.jit(jax.grad(mlp_loss))
    seen = [own]
    for step in range(STEPS):
        updated: list[Any] = []
        for r, share in enumerate(shares(step, REPLICAS)):
            update, states[r] = inner.update(gradient(own[r], share), states[r], own[r])
            updated.append(optax.apply_updates(own[r], update))
        own = updated
        if (step + 1) % every == 0:
            weights = matrix(as_graph("random_pairs"), REPLICAS, step // every)
            after: list[Any] = []
            averages = [[averaged(w, trees) for w in weights] for trees in (began, own)]
            for r, (then, now) in enumerate(zip(*averages, strict=True)):
                gradients = jax.tree.map(lambda y, x, mine: y - x + pull * (mine - y), then, now, began[r])
                update, outers[r] = outer.update(gradients, outers[r], began[r])
                after.append(optax.apply_updates(began[r], update))
            own, began = after, after
        seen.append(own)
    return seen


OUTERS = {"default": None, "own": optax.sgd(0.5, momentum=0.5), "of three arrays a parameter": optax.adam(0.05)}


@pytest.mark.parametrize("outer", OUTERS.values(), ids=OUTERS)
def test_no_loco_is_its_loop(cluster: fm.Cluster, outer: Any) -> None:
    inner, pull = optax.adam(0.02), 0.8
    result = fit(cluster, fm.policies.no_loco(3, outer, pull), inner, placement=fm.Pipeline(1))
    optimizer = optax.sgd(0.7, momentum=0.9, nesterov=True) if outer is None else outer
    expected = no_loco_loop(3, inner, optimizer, pull)
    for record, own in zip(result.history, expected, strict=False):
        params, squares = record["aux"]
        assert_close(params, mean(own), 1e-4)
        assert_close(squares, mean([jax.tree.map(jnp.square, p) for p in own]), 1e-4)
    assert_close(result.params, mean(expected[-1]), 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_that_of_the_loop(cluster: fm.Cluster, case: str) -> None:
    policy, graph, every = CASES[case]
    inner = optax.adam(0.02)
    result = fit(cluster, policy, inner, placement=fm.Pipeline(1))
    expected = gossip_loop(as_graph(graph), every, inner)
    for record, own in zip(result.history, expected, strict=False):
        params, squares = record["aux"]
        assert_close(params, mean(own), 1e-4)
        assert_close(squares, mean([jax.tree.map(jnp.square, p) for p in own]), 1e-4)
    assert_close(result.params, mean(expected[-1]), 1e-4)
    ledger = result.ledger
    assert (ledger.used, ledger.dropped, ledger.outstanding) == (STEPS * REPLICAS, 0, 0)


def test_two_stages_and_microbatches(threads_cluster: fm.Cluster) -> None:
    inner = optax.sgd(0.1, momentum=0.9)
    result = fit(threads_cluster, fm.policies.gossip(), inner, replicas=2, placement=fm.Pipeline(2), microbatches=2)
    assert_close(result.params, mean(gossip_loop(as_graph("ring"), 1, inner, replicas=2)[-1]), 1e-4)


def test_a_slow_replica_changes_no_bit(threads_cluster: fm.Cluster) -> None:
    results = [
        fit(threads_cluster, fm.policies.gossip("exponential"), optax.sgd(0.1), delays=delays)
        for delays in ({}, {"worker:2": 0.01})
    ]
    assert_same(results[0].params, results[1].params)


def test_replicas_approach_each_other_at_the_gap(threads_cluster: fm.Cluster) -> None:
    """After a step apart at a high rate replicas only average: the variance over replicas decays as the graph says."""
    inner = optax.sgd(lambda count: jnp.where(count == 0, 0.5, 0.0))
    result = fit(threads_cluster, fm.policies.gossip("ring"), inner)
    variances: list[float] = []
    for record in result.history[1:]:
        params, squares = record["aux"]
        spread = jax.tree.map(lambda p, s: float(np.sum(s - p**2)), params, squares)
        variances.append(sum(jax.tree.leaves(spread)))
    rate = 1 - gap(as_graph("ring"), REPLICAS)
    assert variances[0] > 0
    for before, after in pairwise(variances[:3]):
        assert after <= rate**2 * before * 1.05 + 1e-6


def test_layers_may_gossip_beside_synchronous_ones(threads_cluster: fm.Cluster) -> None:
    policies = {"fc0*": fm.policies.gossip("ring"), "*": fm.Policy()}
    result = fit(threads_cluster, policies, optax.sgd(0.1))
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert "gossip ring" in result.table()


def test_bytes_are_those_of_the_edges(four_processes: fm.Cluster) -> None:
    """Replicas 0 and 1 are on one process, 2 and 3 on the other: two of the ring's four edges cross, both ways."""
    size = sum(p.nbytes for p in jax.tree.leaves(mlp()))
    result = fit(four_processes, fm.policies.gossip("ring"), optax.sgd(0.1), placement=fm.Pipeline(1))
    crossed = sum(t["pushed_wire_bytes"] for t in result.traffic.values())
    assert STEPS * 4 * size <= crossed <= STEPS * 4 * size + 4 * size


def test_one_replica_and_other_numbers(threads_cluster: fm.Cluster) -> None:
    inner = optax.sgd(0.1)
    for replicas in (2, 3):
        result = fit(threads_cluster, fm.policies.gossip("ring"), inner, replicas=replicas, placement=fm.Pipeline(1))
        assert_close(result.params, mean(gossip_loop(as_graph("ring"), 1, inner, replicas)[-1]), 1e-4)
    with pytest.raises(fm.PolicyError, match="needs at least 2 replicas, and there is one"):
        fit(threads_cluster, fm.policies.gossip("ring"), inner, replicas=1, placement=fm.Pipeline(1))


def test_a_matrix_for_other_replicas_is_refused(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(
        mlp_loss, optax.sgd(0.1), cluster=threads_cluster, replicas=3, policies=fm.policies.gossip(OWN)
    )
    with pytest.raises(fm.PolicyError, match="has 4 rows, but there are 3 replicas"):
        trainer.plan(mlp(), jax.tree.map(lambda a: a[:24], SOURCE))
