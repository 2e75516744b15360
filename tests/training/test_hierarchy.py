"""Sites keep in step inside by one topology and between each other by another, equal to the loops that define it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import BATCH, data, mlp, mlp_loss
from tests.training.test_gossip import averaged, shares

SOURCE = data()
STEPS = 8
UNEVEN = ((0, 1, 2), (3,))
SERVER, REDUCE = fm.ParameterServer(), fm.AllReduce()


def fit(cluster: fm.Cluster, policy: fm.Policy, inner: Any, **settings: Any) -> Any:
    trainer = fm.Trainer(mlp_loss, inner, cluster=cluster, replicas=4, policies=policy, **settings)
    return trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS)


def close(found: Any, expected: Any, rtol: float = 1e-4) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 10)


def site_gradients(own: list[Any], sites: Any, step: int) -> list[Any]:
    """The mean gradient of each site at its own parameters."""
    batches = shares(step, 4)
    found: list[Any] = []
    for params, site in zip(own, sites, strict=True):
        each = [jax.grad(mlp_loss)(params, batches[r]) for r in site]
        found.append(averaged([1 / len(site)] * len(site), each))
    return found


@pytest.mark.parametrize(
    ("local", "remote"),
    [
        (SERVER, SERVER),
        (REDUCE, SERVER),
        (SERVER, fm.Ring()),
        (fm.Ring(), fm.AllReduce()),
        (fm.Hierarchy(sites=1), fm.Tree(2)),
    ],
    ids=lambda t: type(t).__name__,
)
def test_sums_of_sites_that_are_added_up_are_the_sum_of_all(
    threads_cluster: fm.Cluster, local: Any, remote: Any
) -> None:
    inner = optax.sgd(0.05, momentum=0.9)
    nested = fit(threads_cluster, fm.Policy(topology=fm.Hierarchy(local, remote, UNEVEN)), inner)
    close(nested.params, fit(threads_cluster, fm.Policy(), inner).params, rtol=2e-4)
    assert nested.ledger.used == 4 * STEPS


@pytest.mark.parametrize(("local", "payload"), [(REDUCE, fm.Delta()), (SERVER, fm.Weights())], ids=["delta", "weights"])
def test_sites_with_a_rhythm_are_replicas_of_local_sgd(threads_cluster: fm.Cluster, local: Any, payload: Any) -> None:
    inner, sites = optax.sgd(0.05, momentum=0.9), ((0, 1), (2, 3))
    policy = fm.Policy(topology=fm.Hierarchy(local, SERVER, sites=2), every=3, payload=payload)
    own, states = [mlp(), mlp()], [inner.init(mlp())] * 2
    for step in range(STEPS):
        for s, gradient in enumerate(site_gradients(own, sites, step)):
            update, states[s] = inner.update(gradient, states[s], own[s])
            own[s] = optax.apply_updates(own[s], update)
        if (step + 1) % 3 == 0 or step == STEPS - 1:
            own = [averaged([0.5, 0.5], own)] * 2
    close(fit(threads_cluster, policy, inner).params, own[0], rtol=1e-4)


@pytest.mark.parametrize("local", [REDUCE, SERVER], ids=lambda t: type(t).__name__)
def test_sites_gossip_as_replicas_do(threads_cluster: fm.Cluster, local: Any) -> None:
    inner, sites = optax.sgd(0.05), ((0,), (1, 2), (3,))
    weights = [[0.5, 0.5, 0], [0.25, 0.5, 0.25], [0.25, 0, 0.75]]
    policy = fm.Policy(topology=fm.Hierarchy(local, fm.Gossip(weights), sites), every=2)
    own = [mlp()] * 3
    for step in range(STEPS):
        gradients = site_gradients(own, sites, step)
        before = [averaged(w, own) for w in weights] if (step + 1) % 2 == 0 else own
        own = [
            optax.apply_updates(p, jax.tree.map(lambda g: -0.05 * g, g)) for p, g in zip(before, gradients, strict=True)
        ]
    close(fit(threads_cluster, policy, inner).params, averaged([1 / 3] * 3, own), rtol=1e-4)


def gaia_loop(sites: Any, threshold: float, shares_of: list[float]) -> list[Any]:
    """Gaia without staleness: the parameters of each site at the end."""
    rate = 0.05
    own = [jax.tree.map(np.asarray, mlp()) for _ in sites]
    kept: list[dict[str, Any]] = [{} for _ in sites]
    for step in range(STEPS):
        shipped: list[Any] = []
        for s, gradient in enumerate(site_gradients(own, sites, step)):
            delta = jax.tree.map(lambda g, s=s: np.asarray(rate * shares_of[s] * g), gradient)
            own[s] = jax.tree.map(np.subtract, own[s], delta)
            leaves: list[Any] = []
            for i, (value, parameter) in enumerate(zip(jax.tree.leaves(delta), jax.tree.leaves(own[s]), strict=True)):
                total = value + kept[s].get(str(i), 0)
                limit = threshold / np.sqrt(step + 1)
                chosen = (np.abs(total) > limit * np.abs(parameter)) | (step == STEPS - 1)
                leaves.append(np.where(chosen, total, 0))
                kept[s][str(i)] = total - leaves[-1]
            shipped.append(jax.tree.unflatten(jax.tree.structure(own[s]), leaves))
        for s in range(len(sites)):
            for other in range(len(sites)):
                if other != s:
                    own[s] = jax.tree.map(np.subtract, own[s], shipped[other])
    return own


@pytest.mark.parametrize("local", [REDUCE, SERVER], ids=lambda t: type(t).__name__)
def test_gaia_sends_what_is_significant_and_loses_nothing(threads_cluster: fm.Cluster, local: Any) -> None:
    policy = fm.policies.gaia(0.2, local=local, sites=UNEVEN, staleness=0)
    result = fit(threads_cluster, policy, optax.sgd(0.05))
    own = gaia_loop(UNEVEN, 0.2, [0.75, 0.25])
    close(own[0], own[1], rtol=1e-4)  # what was kept has arrived in the end
    close(result.params, own[0], rtol=1e-3)
    pushed = sum(row["pushed_bytes"] for row in result.traffic.values())
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(mlp()))
    assert pushed < 0.75 * whole * 2 * STEPS  # each site sends to the other


def test_mirrors_that_send_everything_are_synchronous(threads_cluster: fm.Cluster) -> None:
    mirrored = fit(threads_cluster, fm.policies.gaia(0.0, sites=UNEVEN, staleness=0), optax.sgd(0.05))
    close(mirrored.params, fit(threads_cluster, fm.Policy(), optax.sgd(0.05)).params)


def watched(params: Any, batch: Any) -> Any:
    """The loss, the parameters and their squares, of which a record has the means over replicas."""
    return mlp_loss(params, batch), (params, jax.tree.map(jnp.square, params))


def test_mirrors_differ_by_less_than_the_threshold(threads_cluster: fm.Cluster) -> None:
    policy, threshold = fm.policies.gaia(0.1, sites=2, staleness=0), 0.1
    trainer = fm.Trainer(watched, optax.sgd(0.05), cluster=threads_cluster, replicas=4, policies=policy)
    history = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS).history
    apart = []
    for step, (mean, square) in enumerate([record["aux"] for record in history[1:]], 1):
        for m, s in zip(jax.tree.leaves(mean), jax.tree.leaves(square), strict=True):
            half = np.sqrt(np.maximum(np.float64(s) - np.float64(m) ** 2, 0))  # of the distance of two sites
            assert np.all(half <= threshold / np.sqrt(step) * (np.abs(m) + half) + 1e-3)
            apart.append(half.max())
    assert max(apart) > 2e-3


@pytest.mark.parametrize("staleness", [1, 3])
def test_stale_mirrors_lose_nothing(threads_cluster: fm.Cluster, staleness: int) -> None:
    """With a loss whose gradient does not depend on the parameters the sum is known, however late parts come."""
    source = {"x": np.arange(64, dtype=np.float32)}
    policy = fm.policies.gaia(0.5, sites=UNEVEN, staleness=staleness)
    trainer = fm.Trainer(
        lambda p, b: jnp.mean(b["x"]) * p["w"].sum(),
        optax.sgd(0.01),
        cluster=threads_cluster,
        replicas=4,
        policies=policy,
    )
    result = trainer.fit({"w": jnp.ones(8)}, source, batch_size=16, epochs=2)
    np.testing.assert_allclose(result.params["w"], 1 - 0.01 * 8 * np.mean(source["x"]), rtol=1e-4)


def test_sites_may_be_stale_against_each_other(threads_cluster: fm.Cluster) -> None:
    policy = fm.Policy(topology=fm.Hierarchy(REDUCE, SERVER, sites=2), staleness=2)
    result = fit(threads_cluster, policy, optax.sgd(0.02), delays={"worker:3": 0.01})
    assert result.ledger.used == 4 * STEPS
    assert float(mlp_loss(result.params, SOURCE)) < float(mlp_loss(mlp(), SOURCE))


def test_processes_do_as_threads(threads_cluster: fm.Cluster) -> None:
    with fm.Cluster.local(workers=2, devices_per_worker=2) as processes:
        for policy in (
            fm.policies.gaia(0.1, sites=UNEVEN, staleness=0),
            fm.Policy(topology=fm.Hierarchy(SERVER, fm.AllReduce(), sites=2)),
        ):
            found, expected = (fit(cluster, policy, optax.sgd(0.05)) for cluster in (processes, threads_cluster))
            close(found.params, expected.params, rtol=1e-5)


def test_a_site_without_members_is_refused(threads_cluster: fm.Cluster) -> None:
    for sites, text in (
        (5, "each site needs one replica at least"),
        (((0, 1),), "each of the replicas 0 to 3 belongs"),
    ):
        with pytest.raises(fm.PolicyError, match=text):
            fit(threads_cluster, fm.Policy(topology=fm.Hierarchy(REDUCE, SERVER, sites)), optax.sgd(0.1))
    with pytest.raises(fm.PolicyError, match="there are 2 sites"):
        fit(
            threads_cluster,
            fm.Policy(topology=fm.Hierarchy(REDUCE, fm.Gossip(np.eye(3) / 2 + 1 / 6), 2)),
            optax.sgd(0.1),
        )


@pytest.mark.parametrize("staleness", [0, fm.UNBOUNDED])
def test_a_large_layer_in_a_site_with_a_slow_replica(staleness: float) -> None:
    """The others send the leader all pieces of a gradient before the slow one sends its first."""
    params, source = {"w": jnp.ones(1_500_000)}, {"x": np.ones((15, 1), np.float32)}
    topology = fm.Hierarchy(fm.ParameterServer(), fm.ParameterServer(), sites=1)
    policy = fm.Policy(topology=topology, staleness=staleness)
    with fm.Cluster.threads(workers=3) as cluster:
        trainer = fm.Trainer(
            lambda p, b: jnp.mean(b["x"]) * jnp.mean(p["w"]),
            optax.sgd(1e5),
            cluster=cluster,
            replicas=3,
            policies=policy,
            delays={"worker:2": 0.1},
        )
        result = trainer.fit(params, source, batch_size=15, steps=3)
    np.testing.assert_allclose(result.params["w"][:3], 1 - 3 * 1e5 / 1_500_000, rtol=1e-4)
