"""Any two topologies nested: each pair trains as it should, for real and in virtual time, or is refused with a reason.

Each layer of one model has a pair of its own, so that one fit tests them all.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.test_gossip import averaged

LOCAL = (fm.ParameterServer(), fm.AllReduce(), fm.Ring(), fm.Tree(2))
REMOTE = LOCAL
UNSOUND = (fm.Gossip("ring"), fm.SharedMemory())
SITES: tuple[Any, ...] = (((0, 1, 2), (3,)), ((0, 1), (2, 3)))
GRAPH = [[0.75, 0.25], [0.25, 0.75]]
STEPS, BATCH, WIDTH = 3, 16, 6
RATE = 0.3
X = np.random.default_rng(0).normal(size=(STEPS * BATCH, WIDTH)).astype(np.float32)
SOURCE = {"x": X, "y": np.tanh(X @ np.random.default_rng(1).normal(size=(WIDTH, 2)).astype(np.float32))}
FAST = fm.sim.Network(latency_s=1e-4, bytes_per_s=1e9)


def loss(params: Any, batch: Any) -> Any:
    x = batch["x"]
    for name in sorted(params):
        x = x + jnp.tanh(x @ params[name]) / len(params)
    return jnp.mean((x[:, :2] - batch["y"]) ** 2)


def layers(count: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), count)
    return {f"layer{i:02}": jax.random.normal(key, (WIDTH, WIDTH)) / 3 for i, key in enumerate(keys)}


def share(step: int, replica: int) -> dict[str, np.ndarray]:
    first = step * BATCH + replica * BATCH // 4
    return {k: v[first : first + BATCH // 4] for k, v in SOURCE.items()}


def gossip_of_sites(params: Any, sites: Any) -> Any:
    """Two sites that average their parameters at each step, before they add their own gradients' steps."""
    own = [params, params]
    for step in range(STEPS):
        gradients = [
            averaged([1 / len(site)] * len(site), [jax.grad(loss)(p, share(step, r)) for r in site])
            for p, site in zip(own, sites, strict=True)
        ]
        mixed = [averaged(weights, own) for weights in GRAPH]
        own = [jax.tree.map(lambda p, g: p - RATE * g, p, g) for p, g in zip(mixed, gradients, strict=True)]
    return averaged([0.5, 0.5], own)


def synchronous(params: Any) -> Any:
    for step in range(STEPS):
        rows = {k: v[step * BATCH : (step + 1) * BATCH] for k, v in SOURCE.items()}
        params = jax.tree.map(lambda p, g: p - RATE * g, params, jax.grad(loss)(params, rows))
    return params


@pytest.mark.parametrize("kind", ["sums", "gossip"])
def test_each_pair_equals_the_loop_that_defines_it(threads_cluster: fm.Cluster, kind: str) -> None:
    if kind == "sums":
        nested = [fm.Hierarchy(a, b, SITES[i % 2]) for i, (a, b) in enumerate(product(LOCAL, REMOTE))]
    else:
        nested = [fm.Hierarchy(a, fm.Gossip(GRAPH), SITES[1]) for a in LOCAL]
    params = layers(len(nested))
    policies = {f"layer{i:02}": fm.Policy(topology=topology) for i, topology in enumerate(nested)}
    expected = synchronous(params) if kind == "sums" else gossip_of_sites(params, SITES[1])
    found = []
    for cluster in (threads_cluster, fm.SimulatedCluster(4, fm.sim.Constant(0.1), FAST)):
        trainer = fm.Trainer(loss, optax.sgd(RATE), cluster=cluster, replicas=4, policies=policies)
        found.append(trainer.fit(params, SOURCE, batch_size=BATCH, steps=STEPS, shuffle=False))
        for name, value in found[-1].params.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=str(policies[name]))
    for name in params:
        np.testing.assert_array_equal(found[0].params[name], found[1].params[name])


@pytest.mark.parametrize(
    ("local", "remote"),
    [
        *product(UNSOUND[:1], (*REMOTE, UNSOUND[1])),
        *product(UNSOUND[1:], (*REMOTE, *UNSOUND)),
        *product(LOCAL, UNSOUND[1:]),
    ],
    ids=lambda t: type(t).__name__,
)
def test_other_pairs_are_refused_with_the_reason(local: Any, remote: Any) -> None:
    why = {
        fm.Gossip: "parameters of their own, so the gradient of none stands",
        fm.SharedMemory: "no step at whose end the site has",
    }.get(type(local), "share no memory")
    why = "share no memory" if (local, remote) == UNSOUND else why
    with pytest.raises(fm.PolicyError, match=f"is not sound: .*{why}.*; give "):
        fm.Hierarchy(local, remote)


@pytest.mark.parametrize("sites", SITES, ids=["uneven", "even"])
def test_a_gossip_of_sites_that_gossip_equals_its_loop(threads_cluster: fm.Cluster, sites: Any) -> None:
    """Every third round leaders average with each other, and in the others all replicas of a site do."""
    nested = fm.Hierarchy(fm.Gossip("complete"), fm.Gossip(GRAPH, every=3), sites)
    policy, params = fm.Policy(topology=nested), layers(2)
    assert policy.describe() == "gossip complete in sites, gossip 2x2 matrix every 3 between"
    rows = tuple(map(tuple, GRAPH))
    assert (
        str(policy.topology)
        == f"fm.Hierarchy(local=fm.Gossip('complete'), remote=fm.Gossip({rows}, every=3), sites={sites})"
    )
    inside, between = np.eye(4), np.eye(4)
    for site in sites:
        inside[np.ix_(site, site)] = 1 / len(site)
    leaders = [site[0] for site in sites]
    between[np.ix_(leaders, leaders)] = GRAPH
    own = [params] * 4
    for step in range(7):
        steps = [jax.grad(loss)(p, share(step % STEPS, r)) for r, p in enumerate(own)]
        mixed = [averaged(row, own) for row in (between if step % 3 == 2 else inside)]
        own = [jax.tree.map(lambda p, g: p - RATE * g, p, g) for p, g in zip(mixed, steps, strict=True)]
    expected, found = averaged([0.25] * 4, own), []
    for cluster in (threads_cluster, fm.SimulatedCluster(4, fm.sim.Constant(0.1), FAST)):
        trainer = fm.Trainer(loss, optax.sgd(RATE), cluster=cluster, replicas=4, policies=policy)
        found.append(trainer.fit(params, SOURCE, batch_size=BATCH, steps=7, shuffle=False))
        for name, value in found[-1].params.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5)
    assert found[0].traffic == found[1].traffic
    assert any(not np.allclose(own[0][name], own[1][name]) for name in params)


@pytest.mark.parametrize(
    ("local", "remote", "sites", "reason"),
    [
        (fm.Gossip(), fm.Gossip(), 2, "give the gossip between sites every=2"),
        (fm.Gossip(every=2), fm.Gossip(every=3), 2, "give the gossip between sites every=4"),
        (fm.Gossip(), fm.Gossip(every=2), None, "give sites=2"),
        (fm.Gossip(), fm.Gossip(every=2, pull=0.5), 2, "give both the same pull"),
    ],
)
def test_two_gossips_that_are_not_the_rounds_of_one_are_refused(
    local: fm.Gossip, remote: fm.Gossip, sites: Any, reason: str
) -> None:
    with pytest.raises(fm.PolicyError, match=reason):
        fm.Hierarchy(local, remote, sites)


@pytest.mark.parametrize(("sites", "rows"), [(3, GRAPH), (2, [[1 / 3] * 3] * 3)])
def test_a_graph_of_sites_for_another_number_of_sites_or_replicas_is_refused(sites: int, rows: Any) -> None:
    with pytest.raises(fm.PolicyError, match="rows, but there are"):
        fm.Trainer(
            loss,
            optax.sgd(RATE),
            cluster=fm.SimulatedCluster(4, fm.sim.Constant(0.1), FAST),
            replicas=4,
            policies=fm.Policy(topology=fm.Hierarchy(fm.Gossip(), fm.Gossip(rows, every=2), sites)),
        ).fit(layers(1), SOURCE, batch_size=BATCH, steps=1)


def in_sites(params: Any, sites: Any, payload: Any, every: int, steps: int, inner: Any) -> Any:
    """Each site makes one step of its mean gradient. Every so many steps, and at the end, gradients since then are
    applied to the parameters of all, or the parameters of sites are averaged, by the numbers of their replicas."""
    alone = isinstance(payload, fm.Gradient)
    own, states, kept = [params] * len(sites), [inner.init(params)] * len(sites), []
    counts = [len(site) / 4 for site in sites]
    for step in range(steps):
        due = (step + 1) % every == 0 or step == steps - 1
        gradients = [
            averaged([1 / len(site)] * len(site), [jax.grad(loss)(p, share(step % STEPS, r)) for r in site])
            for p, site in zip(own, sites, strict=True)
        ]
        if alone:
            kept.append(averaged(counts, gradients))
            if due:
                update, states[0] = inner.update(averaged([1 / len(kept)] * len(kept), kept), states[0], own[0])
                own, kept = [optax.apply_updates(own[0], update)] * len(sites), []
            continue
        for i, gradient in enumerate(gradients):
            update, states[i] = inner.update(gradient, states[i], own[i])
            own[i] = optax.apply_updates(own[i], update)
        if due:
            own = [averaged(counts, own)] * len(sites)
    return own[0]


@pytest.mark.parametrize("sites", SITES, ids=["uneven", "even"])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("payload", [fm.Gradient(), fm.Delta(), fm.Weights()], ids=str)
def test_each_payload_and_rhythm_of_sites_equals_its_loop_or_is_refused(payload: Any, every: int, sites: Any) -> None:
    policies: dict[str, fm.Policy] = {}
    for local, remote in product((*LOCAL, fm.Hierarchy()), REMOTE):
        topology, sums = fm.Hierarchy(local, remote, sites), not isinstance(remote, fm.ParameterServer)
        if sums and payload != fm.Gradient():
            with pytest.raises(fm.PolicyError, match=r"by the replicas of each.*; use a Hierarchy with remote="):
                fm.Policy(topology=topology, every=every, payload=payload)
        else:
            policies[f"layer{len(policies):02}"] = fm.Policy(topology=topology, every=every, payload=payload)
    params, inner, cluster = layers(len(policies)), optax.adam(0.05), fm.SimulatedCluster(4, fm.sim.Constant(0.1), FAST)
    trainer = fm.Trainer(loss, inner, cluster=cluster, replicas=4, policies=policies)
    found = trainer.fit(params, SOURCE, batch_size=BATCH, steps=6, shuffle=False, progress=False)
    expected = in_sites(params, sites, payload, every, 6, inner)
    for name, value in found.params.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=str(policies[name]))
