"""Quorums inside sites and between them: who is left out, that the rest is applied once, and with the right divisor."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import data, mlp, mlp_loss

SERVER = fm.ParameterServer()
FAST = fm.sim.Network(latency_s=1e-4, bytes_per_s=1e9)
UNEVEN = ((0, 1, 2), (3,))
STEPS, BATCH = 6, 24
SOURCE = data(STEPS * BATCH)
INNER = optax.sgd(0.05, momentum=0.9)
GRADIENT = jax.jit(jax.grad(mlp_loss))


def nested(inside: fm.Quorum | fm.Deadline | None, sites: object = UNEVEN, **knobs: Any) -> fm.Policy:
    return fm.Policy(topology=fm.Hierarchy(SERVER, SERVER, sites, inside), **knobs)


def simulated(workers: int, machines: Any, **options: Any) -> fm.SimulatedCluster:
    return fm.SimulatedCluster(workers, machines, FAST, **options)


def fit(cluster: Any, policy: Any, **options: Any) -> Any:
    trainer = fm.Trainer(mlp_loss, INNER, cluster=cluster, replicas=4, policies=policy, **options)
    return trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS, shuffle=False)


def naive(counted: list[int]) -> Any:
    """The plain loop over the shares of these replicas: the mean over all examples that they have."""
    params, state, share = mlp(), INNER.init(mlp()), BATCH // 4
    for step in range(STEPS):
        rows = np.concatenate([np.arange(share) + step * BATCH + r * share for r in counted])
        gradient = GRADIENT(params, {k: v[rows] for k, v in SOURCE.items()})
        update, state = INNER.update(gradient, state, params)
        params = optax.apply_updates(params, update)
    return params


def close(found: Any, expected: Any, rtol: float = 2e-4) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 10)


SLOW = [
    (nested(fm.Quorum()), None, [0, 1, 2, 3]),
    (nested(fm.Quorum(0.6)), 1, [0, 2, 3]),  # inside an uneven site
    (nested(fm.Quorum(0.6)), 0, [1, 2, 3]),  # the leader itself: the site does not wait for its step
    (nested(fm.Deadline(0.6, grace=0.05)), 2, [0, 1, 3]),
    (nested(None, quorum=fm.Quorum(1)), 3, [0, 1, 2]),  # a site as a whole
]


@pytest.mark.parametrize(("policy", "slow", "counted"), SLOW, ids=lambda p: getattr(p, "describe", lambda: p)())
def test_a_straggler_is_left_out_at_its_level(policy: fm.Policy, slow: int | None, counted: list[int]) -> None:
    base = fm.sim.Constant(0.1)
    machines = base if slow is None else fm.sim.Straggler(base, factor=1000, workers=(slow,))
    result = fit(simulated(4, machines), policy)
    close(result.params, naive(counted))
    assert result.ledger.used == len(counted) * STEPS


@pytest.mark.parametrize(("policy", "slow", "counted"), [SLOW[0], SLOW[2], SLOW[4]], ids=["all", "leader", "site"])
def test_real_workers_do_so_too(
    threads_cluster: fm.Cluster, policy: fm.Policy, slow: int | None, counted: list[int]
) -> None:
    delays = {} if slow is None else {f"worker:{slow}": 2.0}
    result = fit(threads_cluster, policy, delays=delays)
    close(result.params, naive(counted))
    assert result.ledger.used == len(counted) * STEPS


def test_values_and_pushed_bytes_are_those_of_real_workers(threads_cluster: fm.Cluster) -> None:
    for policy in (nested(fm.Quorum()), nested(fm.Quorum(), 2, every=3, filters=(fm.filters.top_k(0.5),))):
        real, virtual = (fit(cluster, policy) for cluster in (threads_cluster, simulated(4, fm.sim.Constant(0.1))))
        for a, b in zip(jax.tree.leaves(virtual.params), jax.tree.leaves(real.params), strict=True):
            np.testing.assert_array_equal(a, b)
        for layer, row in real.traffic.items():
            assert virtual.traffic[layer]["pushed_bytes"] == row["pushed_bytes"]


def by_example(params: Any, batch: Any) -> Any:
    """Its gradient names the examples of a batch, and counts them."""
    return jnp.mean(batch["one"] @ params["each"]) + params["all"].sum()


SITES = ((0, 1, 2), (3, 4), (5,))
REPLICAS, ITEM, CLOCKS = 6, 2, 5
EXAMPLES = REPLICAS * ITEM * CLOCKS


def drawn_quorums(seed: int, rng: np.random.Generator) -> tuple[Any, fm.Quorum, Any]:
    """Any quorums inside sites and between them, with one late rule, and machines."""
    late, shares = ("drop", "requeue", "fold")[seed % 3], (0.4, 0.5, 0.75, 1.0, 1)
    inside: Any = fm.Quorum(shares[rng.integers(5)], late=late)
    if seed % 4 == 3:
        inside = fm.Deadline(0.5, grace=0.05, late=late)
    between = fm.Quorum(shares[rng.integers(5)], late=late)
    machines = (fm.sim.LogNormal(mean_s=0.1, sigma=1.0), fm.sim.ShiftedExponential(0.05, 0.1))[rng.integers(2)]
    return inside, between, machines


def drawn(seed: int) -> tuple[fm.Policy, Any]:
    """Any quorums at both levels with any late rule, and machines."""
    rng = np.random.default_rng(seed)
    inside, between, machines = drawn_quorums(seed, rng)
    staleness, apply = (
        0 if isinstance(between.late, fm.Fold) else 2 * int(rng.integers(2)),
        ("sum", "mean")[seed // 3 % 2],
    )
    return nested(inside, SITES, quorum=between, staleness=staleness, apply=apply), machines


@pytest.mark.parametrize("seed", range(12))
def test_each_example_counts_as_often_as_the_ledger_says(seed: int) -> None:
    """With `sum` the parameters count the examples; with `mean` each step has the length of one mean gradient."""
    policy, machines = drawn(seed)
    source = {"one": np.eye(EXAMPLES, dtype=np.float32)}
    cluster = simulated(REPLICAS, machines, seed=seed)
    trainer = fm.Trainer(by_example, optax.sgd(1.0), cluster=cluster, replicas=REPLICAS, policies=policy)
    start = {"each": jnp.zeros(EXAMPLES), "all": jnp.zeros(1)}
    result = trainer.fit(start, source, batch_size=REPLICAS * ITEM, steps=CLOCKS)
    counted, ledger = -np.asarray(result.params["each"]), result.ledger
    taken = ledger.used + ledger.folded
    assert taken + ledger.dropped + ledger.unseen == REPLICAS * CLOCKS
    if policy.apply.averages:
        length = taken / REPLICAS if isinstance(policy.late, fm.Fold) else CLOCKS
        np.testing.assert_allclose(-np.asarray(result.params["all"]), length, rtol=1e-5)
        np.testing.assert_allclose(counted.sum(), length, rtol=1e-5)
    else:
        once = [1 / ITEM] * ITEM * taken
        np.testing.assert_allclose(sorted(counted), [0.0] * (EXAMPLES - len(once)) + once, atol=1e-6)
    seen = ((0, EXAMPLES - ITEM * taken), (1, ITEM * taken))
    assert ledger.seen == tuple((times, count) for times, count in seen if count)


def test_quorums_that_cannot_be_met_raise(threads_cluster: fm.Cluster) -> None:
    for policy, message in (
        (nested(fm.Quorum(2)), "more replicas of the smallest site than there are"),
        (nested(fm.Quorum(1), quorum=fm.Quorum(3)), "more sites than there are"),
    ):
        with pytest.raises(fm.PolicyError, match=message):
            fit(threads_cluster, policy)
    machines = fm.sim.Straggler(fm.sim.Constant(0.1), factor=100, workers=(2,))
    with pytest.raises(fm.FlowmlError, match=r"of site 0, which replica 0 leads, cannot be completed.*replicas 2 are"):
        fit(simulated(4, machines), nested(fm.Quorum(1.0, limit_s=1.0)))


def test_what_is_not_sound_says_why() -> None:
    for wrong, message in (
        (lambda: fm.Hierarchy(fm.Ring(), SERVER, 2, fm.Quorum(0.5)), "none can be left out; give local=.*ParameterS"),
        (lambda: fm.Hierarchy(SERVER, SERVER, 2, fm.Coded(1)), "a code and copies of portions"),  # pyright: ignore
        (lambda: nested(fm.Quorum(0.5, late="fold"), quorum=fm.Quorum(0.5)), "two rules for the same step"),
        (lambda: fm.Policy(topology=fm.Hierarchy(fm.Ring(), SERVER, 2), quorum=fm.Quorum(1)), "the leader decides"),
    ):
        with pytest.raises(fm.PolicyError, match=message):
            wrong()


def test_who_was_late_is_told_by_replica() -> None:
    machines = fm.sim.Straggler(fm.sim.Constant(0.1), factor=3, workers=(1,))
    result = fit(simulated(4, machines), nested(fm.Quorum(0.6)))
    (late,) = result.stragglers()
    assert (late.replica, late.left_out) == (1, STEPS)
    assert sum(sum(found.values()) for found in result.staleness.values()) % (3 * STEPS) == 0
