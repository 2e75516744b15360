"""Elastic averaging, ADMM, outer optimizers and votes among sites, of which each counts as one replica.

Against the loops that define them, on threads and in virtual time.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import BATCH, data, mlp, mlp_loss
from tests.training.test_gossip import averaged
from tests.training.test_hierarchy import close, site_gradients

SOURCE = data()
STEPS, RATE, EVERY = 8, 0.05, 2
UNEVEN = ((0, 1, 2), (3,))
PARTS = [len(site) / 4 for site in UNEVEN]
SERVER, REDUCE = fm.ParameterServer(), fm.AllReduce()
FAST = fm.sim.Network(latency_s=1e-4, bytes_per_s=1e9)


def fit(cluster: Any, policy: fm.Policy, **options: Any) -> Any:
    trainer = fm.Trainer(mlp_loss, optax.sgd(RATE), cluster=cluster, replicas=4, policies=policy, **options)
    return trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS)


def step(params: Any, gradient: Any) -> Any:
    return jax.tree.map(lambda p, g: p - RATE * g, params, gradient)


def elastic(pull: float) -> Any:
    """The centre is pulled to each site by the share of the replicas that the site has."""
    own, centre = [mlp() for _ in UNEVEN], mlp()
    for clock in range(STEPS):
        own = [step(p, g) for p, g in zip(own, site_gradients(own, UNEVEN, clock), strict=True)]
        if (clock + 1) % EVERY == 0:
            mean = averaged(PARTS, own)
            drawn = [jax.tree.map(lambda x, z: x - pull * (x - z), p, centre) for p in own]
            centre = jax.tree.map(lambda z, m: z + len(UNEVEN) * pull * (m - z), centre, mean)
            own = drawn
    return centre


def consensus(rho: float) -> Any:
    """ADMM in scaled form, where each site has the mean loss of its replicas and counts by their number."""
    x, z = [mlp() for _ in UNEVEN], mlp()
    u = [jax.tree.map(jnp.zeros_like, z) for _ in UNEVEN]
    for clock in range(STEPS):
        pulled = [
            jax.tree.map(lambda g, a, c, b: g + rho * (a - c + b), g, a, z, b)
            for g, a, b in zip(site_gradients(x, UNEVEN, clock), x, u, strict=True)
        ]
        x = [step(p, g) for p, g in zip(x, pulled, strict=True)]
        if (clock + 1) % EVERY == 0:
            u = [jax.tree.map(lambda b, a, c: b + a - c, b, a, z) for b, a in zip(u, x, strict=True)]
            z = averaged(PARTS, [jax.tree.map(jnp.add, a, b) for a, b in zip(x, u, strict=True)])
    return z


def voted(rows: int) -> Any:
    """Each site votes with its gradient for its largest rows; of the mean over replicas the winners count."""
    params = mlp()
    for clock in range(STEPS):
        gradients = site_gradients([params] * len(UNEVEN), UNEVEN, clock)
        mean = averaged(PARTS, gradients)

        def chosen(total: Any, *each: Any) -> Any:
            flat = [np.square(np.asarray(g, np.float64)).reshape(len(g), -1).sum(1) for g in (total, *each)]
            votes = sum(np.isin(np.arange(len(total)), np.argsort(-f, kind="stable")[:rows]) for f in flat[1:])
            won = np.lexsort((-flat[0], -np.asarray(votes)))[: 2 * rows]
            kept = np.zeros_like(np.asarray(total))
            kept[won] = np.asarray(total)[won]
            return kept

        params = step(params, jax.tree.map(chosen, mean, *gradients))
    return params


OUTER = optax.sgd(0.7, momentum=0.9, nesterov=True)


def diloco() -> Any:
    """Each site adds up gradients at each step; every few steps the mean change of sites goes to an outer optimizer."""
    centre, state = mlp(), OUTER.init(mlp())
    own = [centre for _ in UNEVEN]
    for clock in range(STEPS):
        own = [step(p, g) for p, g in zip(own, site_gradients(own, UNEVEN, clock), strict=True)]
        if (clock + 1) % EVERY == 0:
            change = jax.tree.map(lambda z, m: z - m, centre, averaged(PARTS, own))
            update, state = OUTER.update(change, state, centre)
            centre = optax.apply_updates(centre, update)
            own = [centre for _ in UNEVEN]
    return centre


def nested(local: Any, **knobs: Any) -> fm.Policy:
    return fm.Policy(topology=fm.Hierarchy(local, SERVER, UNEVEN), **knobs)


MIX: dict[str, Any] = {"payload": fm.Weights(), "apply": fm.Mix(0.3), "every": EVERY}
ADMM: dict[str, Any] = {"payload": fm.Delta(), "apply": fm.Consensus(0.5), "every": EVERY}


@pytest.mark.parametrize(
    ("policy", "loop"),
    [
        (nested(REDUCE, **MIX), lambda: elastic(0.3)),
        (nested(SERVER, **MIX), lambda: elastic(0.3)),
        (nested(REDUCE, **ADMM), lambda: consensus(0.5)),
        (nested(SERVER, **ADMM), lambda: consensus(0.5)),
        (nested(REDUCE, payload=fm.Delta(), every=EVERY, apply=fm.Outer(OUTER)), diloco),
        (nested(REDUCE, apply=fm.Vote(1)), lambda: voted(1)),
        (nested(SERVER, apply=fm.Vote(1), quorum=fm.Quorum()), lambda: voted(1)),
    ],
    ids=lambda v: v.describe() if isinstance(v, fm.Policy) else "",
)
@pytest.mark.filterwarnings("ignore:.*is not convex")
def test_each_equals_the_loop_on_both_clocks(
    threads_cluster: fm.Cluster, policy: fm.Policy, loop: Callable[[], Any]
) -> None:
    real, virtual = (fit(c, policy) for c in (threads_cluster, fm.SimulatedCluster(4, fm.sim.Constant(0.1), FAST)))
    close(real.params, loop(), rtol=2e-4)
    assert real.ledger.used == virtual.ledger.used == 4 * STEPS
    for a, b in zip(jax.tree.leaves(real.params), jax.tree.leaves(virtual.params), strict=True):
        np.testing.assert_array_equal(a, b)
    for layer, row in real.traffic.items():
        assert virtual.traffic[layer]["pushed_bytes"] == row["pushed_bytes"]


@pytest.mark.parametrize("local", [REDUCE, SERVER], ids=lambda t: type(t).__name__)
def test_sites_that_do_not_wait_keep_equal_parameters_inside(threads_cluster: fm.Cluster, local: Any) -> None:
    """All replicas of a site are pulled to the version of the centre that their leader has at the end of the step."""

    def watched(params: Any, batch: Any) -> Any:
        return mlp_loss(params, batch), (params, jax.tree.map(jnp.square, params))

    topology = fm.Hierarchy(local, SERVER, sites=1)
    policy = fm.Policy(topology=topology, **{**MIX, "every": 1}, staleness=2)
    slow = fm.SimulatedCluster(4, fm.sim.LogNormal(0.1, 0.5), FAST)
    for cluster in (threads_cluster, slow):
        trainer = fm.Trainer(watched, optax.sgd(RATE), cluster=cluster, replicas=4, policies=policy)
        result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS)
        # A record is four reports in order of arrival. While each has all four replicas, these are of one step.
        whole = list(takewhile(lambda r: r["replicas"] == 4, result.history))
        assert cluster is threads_cluster or len(whole) == STEPS
        for record in whole:
            mean, square = record["aux"]
            for m, s in zip(jax.tree.leaves(mean), jax.tree.leaves(square), strict=True):
                np.testing.assert_allclose(np.square(np.float64(m)), s, rtol=1e-5, atol=1e-7)


def test_sites_do_not_pull_a_centre_beyond_their_mean(threads_cluster: fm.Cluster) -> None:
    """It is the number of sites that counts, not that of replicas."""
    fit(threads_cluster, nested(REDUCE, payload=fm.Weights(), apply=fm.Mix(0.5), every=EVERY))
    with pytest.raises(fm.PolicyError, match=r"of 2 sites at once is not sound: .*give pull=0.5 or less"):
        fit(threads_cluster, nested(REDUCE, payload=fm.Weights(), apply=fm.Mix(0.6), every=EVERY))
