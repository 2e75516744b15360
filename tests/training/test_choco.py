"""Gossip of filtered parameters equals CHOCO-SGD, and agrees where averages of filtered parameters do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.policy.graphs import as_graph, matrix
from tests.training.reference import BATCH, data, mlp, mlp_loss
from tests.training.test_checkpoints import assert_goes_on, case
from tests.training.test_gossip import shares, watched_loss

SOURCE = data()
STEPS, REPLICAS, KEPT, PULL = 8, 4, 2, 0.4
FAST = fm.sim.Network(latency_s=1e-4, bytes_per_s=1e9)


def largest(x: np.ndarray) -> np.ndarray:
    flat = np.zeros(x.size, x.dtype)
    chosen = np.argsort(-np.abs(x.reshape(-1)), kind="stable")[:KEPT]
    flat[chosen] = x.reshape(-1)[chosen]
    return flat.reshape(x.shape)


def choco_loop(graph: object, every: int) -> list[list[Any]]:
    """Algorithm 2 of the paper: the parameters of each replica before each step, and after the last one."""
    inner = optax.sgd(0.05, momentum=0.5)
    own = [mlp() for _ in range(REPLICAS)]
    states, public = [inner.init(p) for p in own], [mlp() for _ in range(REPLICAS)]
    seen = [own]
    for step in range(STEPS):
        moved: list[Any] = []
        for r, share in enumerate(shares(step, REPLICAS)):
            update, states[r] = inner.update(jax.grad(mlp_loss)(own[r], share), states[r], own[r])
            moved.append(optax.apply_updates(own[r], update))
        own = moved
        if (step + 1) % every == 0:
            sent = [
                jax.tree.map(lambda x, c: largest(np.asarray(x - c)), p, c) for p, c in zip(own, public, strict=True)
            ]
            public = [jax.tree.map(jnp.add, c, q) for c, q in zip(public, sent, strict=True)]
            weights = matrix(as_graph(graph), REPLICAS, step // every)
            for i in range(REPLICAS):
                for j in range(REPLICAS):
                    own[i] = jax.tree.map(
                        lambda x, a, b, w=weights[i][j]: x + PULL * w * (a - b), own[i], public[j], public[i]
                    )
        seen.append(own)
    return seen


def fit(cluster: Any, policy: fm.Policy) -> Any:
    trainer = fm.Trainer(
        watched_loss, optax.sgd(0.05, momentum=0.5), cluster=cluster, replicas=REPLICAS, policies=policy
    )
    return trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS)


@pytest.mark.parametrize(("graph", "every"), [("ring", 1), ("exponential", 2)])
def test_it_equals_the_loop_on_both_clocks(threads_cluster: fm.Cluster, graph: str, every: int) -> None:
    policy = fm.policies.choco((fm.filters.top_k(KEPT),), PULL, graph, every)
    seen = choco_loop(graph, every)
    real, virtual = (fit(c, policy) for c in (threads_cluster, fm.SimulatedCluster(4, fm.sim.Constant(0.1), FAST)))
    for step, record in enumerate(real.history):
        for found, power in zip(record["aux"], (1, 2), strict=True):
            expected = jax.tree.map(lambda *xs, n=power: np.mean([np.asarray(x) ** n for x in xs], 0), *seen[step])
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)
    mean = jax.tree.map(lambda *xs: np.mean(np.stack(xs), 0), *seen[-1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), real.params, mean)
    jax.tree.map(np.testing.assert_array_equal, real.params, virtual.params)
    assert real.ledger.used == virtual.ledger.used == REPLICAS * STEPS
    assert real.traffic == virtual.traffic


KICKS = np.random.default_rng(1).normal(size=(REPLICAS, 16)).astype(np.float32)
ROUNDS = 60


def apart(rows: np.ndarray) -> float:
    return float(np.square(rows - rows.mean(0)).sum())


def averages_of_filtered(quantise: Any) -> np.ndarray:
    """Gossip in which a replica averages what a filter leaves of its neighbours' parameters."""
    weights, x = matrix(as_graph("ring"), REPLICAS, 0), -KICKS.astype(np.float64)
    for _ in range(ROUNDS):
        x = weights @ np.stack([quantise(row) for row in x])
    return x


def two_bits(row: np.ndarray) -> np.ndarray:
    """The nearest of the values that two bits can say."""
    scale = np.abs(row).max() or 1.0
    return np.round(row / scale) * scale


@pytest.mark.parametrize(
    "chain", [(fm.filters.quantise(2, block=0),), (fm.filters.top_k(2), fm.filters.key_cache())], ids=str
)
def test_replicas_agree_on_the_mean_where_averages_of_filtered_parameters_do_not(
    threads_cluster: fm.Cluster, chain: Any
) -> None:
    """Each replica's first gradient differs from those of the others, and all later gradients are 0."""
    x = np.concatenate([KICKS, np.zeros((ROUNDS * REPLICAS, 16), np.float32)])

    def loss(params: Any, batch: Any) -> Any:
        w = params["w"]
        return jnp.mean(batch["x"] @ w), (w, jnp.square(w))

    trainer = fm.Trainer(
        loss,
        optax.sgd(1.0),
        cluster=threads_cluster,
        replicas=REPLICAS,
        policies=fm.policies.choco(chain, 0.2),
    )
    result = trainer.fit({"w": jnp.zeros(16)}, {"x": x}, batch_size=REPLICAS, steps=ROUNDS + 1, shuffle=False)
    np.testing.assert_allclose(result.params["w"], -KICKS.mean(0), atol=1e-5)
    mean, square = (np.asarray(a, np.float64) for a in result.history[-1]["aux"])
    left = REPLICAS * float((square - mean**2).sum())
    naive = averages_of_filtered(two_bits)
    assert left < 1e-2 * apart(KICKS)
    assert np.square(naive - (-KICKS.mean(0))).sum() > 0.1 * apart(KICKS), "and the naive way ends elsewhere"


def test_sites_follow_each_other_too(threads_cluster: fm.Cluster) -> None:
    topology = fm.Hierarchy(fm.AllReduce(), fm.Gossip("complete", pull=0.5), sites=2)
    policy = fm.Policy(topology=topology, filters=(fm.filters.quantise(4),))
    real, virtual = (fit(c, policy) for c in (threads_cluster, fm.SimulatedCluster(4, fm.sim.Constant(0.1), FAST)))
    jax.tree.map(np.testing.assert_array_equal, real.params, virtual.params)
    assert float(mlp_loss(real.params, SOURCE)) < float(mlp_loss(mlp(), SOURCE))


def test_a_stopped_fit_goes_on_with_the_copies(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    chain = (fm.filters.top_k(KEPT), fm.filters.key_cache())
    assert_goes_on(case(threads_cluster, tmp_path, fm.policies.choco(chain, PULL, every=2), optax.sgd(0.05)))


def test_bytes_without_arithmetic_are_those_with_it() -> None:
    policy = fm.policies.choco((fm.filters.quantise(4),), PULL)
    counted = [
        fit(fm.SimulatedCluster(4, fm.sim.Constant(0.1), FAST, arithmetic=a), policy).traffic for a in (True, False)
    ]
    assert counted[0] == counted[1]


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        (
            {"topology": fm.Gossip("random_pairs")},
            "one that is not a neighbour in all rounds has missed some; give graph='ring'",
        ),
        ({"apply": fm.Outer()}, "lag behind them; leave apply out"),
        ({"topology": fm.Gossip(pull=1.5)}, r"give a pull in \(0, 1\]"),
        ({"filters": (fm.filters.kkt(0.1),)}, "its condition is on gradients"),
        ({"filters": (fm.filters.quantise(1, stochastic=True),)}, "its error may be larger"),
    ],
)
def test_what_cannot_be_followed_is_refused(knobs: dict[str, Any], reason: str) -> None:
    with pytest.raises(fm.PolicyError, match=reason):
        fm.Policy(**{"topology": fm.Gossip(), "filters": (fm.filters.top_k(0.5),)} | knobs)
