"""Filters of what replicas add up among themselves, for real and simulated."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import assert_close, assert_same, data, mlp, mlp_loss

f = fm.filters
STEPS, BATCH = 6, 24
SOURCE = data(STEPS * BATCH)
SERVER = fm.ParameterServer()
RANK, RANDOM = (f.low_rank(1).with_error_feedback(),), (f.random_k(0.2).with_error_feedback(),)
TOP = (f.top_k(0.1).with_error_feedback(),)
CASES = {
    "all-reduce": fm.Policy(fm.AllReduce(), filters=RANK),
    "ring": fm.Policy(fm.Ring(), filters=RANDOM),
    "tree, every 2": fm.Policy(fm.Tree(2), every=2, filters=RANK),
    "no feedback": fm.Policy(fm.Ring(), filters=(f.low_rank(2),)),
    "sites": fm.Policy(fm.Hierarchy(SERVER, fm.Ring(), 2), filters=RANK),
    "sites that decide": fm.Policy(fm.Hierarchy(SERVER, fm.Ring(), 2, fm.Quorum()), filters=RANK),
    "sites of rings": fm.Policy(fm.Hierarchy(fm.Ring(), fm.AllReduce(), 2), filters=RANDOM),
    "machines": fm.Policy(fm.Hierarchy(sites=2), filters=RANK),
    "top-k": fm.Policy(fm.AllReduce(), filters=TOP),
    "4 bits in a ring": fm.Policy(fm.Ring(), filters=(f.quantise(4, stochastic=True).with_error_feedback(),)),
    "signs in a tree": fm.Policy(fm.Tree(2), every=2, filters=(f.sign().with_error_feedback(),)),
    "4 bits of sites": fm.Policy(fm.Hierarchy(SERVER, fm.Ring(), 2), filters=(f.quantise(4),)),
    "top-k of sites that decide": fm.Policy(fm.Hierarchy(SERVER, fm.AllReduce(), 2, fm.Quorum()), filters=TOP),
    "4 bits between machines": fm.Policy(fm.Hierarchy(sites=2), filters=(f.quantise(4),)),
    "SparseLoCo": fm.policies.diloco(2, topology=fm.Ring(), filters=(*TOP, f.quantise(2))),
    "DiLoCo": fm.policies.diloco(2, topology=fm.AllReduce(), filters=RANK),
}


def simulated(workers: int = 4, *, arithmetic: bool = True) -> fm.SimulatedCluster:
    return fm.SimulatedCluster(workers, fm.sim.Constant(0.1), fm.sim.Network(1e-3, 1e9), arithmetic=arithmetic)


def fit(cluster: Any, policy: Any, loss: Any = mlp_loss, **options: Any) -> fm.TrainingResult:
    source, params = options.pop("source", SOURCE), options.pop("params", None)
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=4, policies=policy, **options)
    return trainer.fit(params or mlp(), source, batch_size=BATCH, steps=STEPS, progress=False)


def counted(result: fm.TrainingResult, what: str) -> int:
    return sum(by[what] for by in result.traffic.values())


@pytest.mark.parametrize("name", CASES)
def test_a_simulated_fit_adds_up_as_a_real_one(threads_cluster: fm.Cluster, name: str) -> None:
    policy = CASES[name]
    whole, real, virtual = (
        fit(threads_cluster, policy=fm.Policy(policy.topology, every=policy.every, payload=policy.payload)),
        fit(threads_cluster, policy),
        fit(simulated(), policy),
    )
    assert_same(virtual.params, real.params)
    assert virtual.traffic == real.traffic
    assert virtual.ledger.kept == pytest.approx(real.ledger.kept)  # stages are added up in the order of their reports
    assert dataclasses.replace(virtual.ledger, kept=real.ledger.kept) == real.ledger
    assert fit(simulated(arithmetic=False), policy).traffic == real.traffic
    assert counted(real, "pushed_bytes") < 0.5 * counted(whole, "pushed_bytes")
    assert counted(real, "pushed_wire_bytes") < counted(whole, "pushed_wire_bytes")
    assert bool(real.ledger.kept) == f.feeds_back(policy.filters)
    assert mlp_loss(real.params, SOURCE) < mlp_loss(mlp(), SOURCE)


def test_processes_add_up_what_threads_do(threads_cluster: fm.Cluster, process_cluster: fm.Cluster) -> None:
    policy = CASES["all-reduce"]
    real = [
        fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=c, replicas=2, policies=policy).fit(
            mlp(), SOURCE, batch_size=BATCH, steps=STEPS, progress=False
        )
        for c in (threads_cluster, process_cluster)
    ]
    assert_same(real[1].params, real[0].params)
    assert real[1].traffic == real[0].traffic


def test_replicas_of_one_worker_filter_as_if_apart() -> None:
    """What a replica keeps is its own, wherever it runs: only the order of additions may differ."""
    with fm.Cluster.threads(workers=2, devices_per_worker=2) as cluster:
        together = fit(cluster, CASES["ring"])
    with fm.Cluster.threads(workers=4) as cluster:
        apart = fit(cluster, CASES["ring"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), together.params, apart.params)


def test_a_rank_that_the_gradient_has_loses_nothing(threads_cluster: fm.Cluster) -> None:
    one = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(12, 5)), jnp.float32)}
    rows = {"x": np.random.default_rng(1).normal(size=(96, 12)).astype(np.float32)}

    def loss(params: Any, batch: Any) -> Any:  # its gradient has rank 1
        return jnp.mean(jnp.sum(batch["x"] @ params["w"], axis=1) ** 2)

    found: list[Any] = []
    for chain in ((), (f.low_rank(1),)):
        policy = fm.Policy(fm.Ring(), filters=chain)
        trainer = fm.Trainer(loss, optax.sgd(0.01), cluster=threads_cluster, replicas=4, policies=policy)
        found.append(trainer.fit(one, rows, batch_size=24, steps=4, progress=False).params["w"])
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    assert np.abs(np.asarray(found[0] - one["w"])).max() > 0.01


@pytest.mark.parametrize("topology", [fm.AllReduce(), fm.Ring(), fm.Tree(2)], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("chain", [TOP, (*TOP, f.quantise(4)), (f.quantise(8),)], ids=str)
def test_an_exchange_adds_up_what_a_home_does(threads_cluster: fm.Cluster, topology: Any, chain: Any) -> None:
    """What replicas encode has the same bits, and is added in the same order."""
    found, expected = (fit(threads_cluster, fm.Policy(t, filters=chain)) for t in (topology, fm.ParameterServer()))
    assert_close(found.params, expected.params)
    kept = [math.hypot(*result.ledger.kept.values()) for result in (found, expected)]
    assert kept[0] == pytest.approx(kept[1])


def test_the_bytes_of_an_exchange(threads_cluster: fm.Cluster) -> None:
    """A worker sends its replica's slot to each other one, and a tree all slots up and down."""
    sent: dict[str, int] = {}
    for topology in (fm.AllReduce(), fm.Ring(), fm.Tree(2)):
        by = fit(threads_cluster, fm.Policy(topology, filters=TOP)).traffic
        sent[type(topology).__name__] = sum(each["pushed_wire_bytes"] for each in by.values())
        pushed = sum(each["pushed_bytes"] for each in by.values())  # of four replicas
    assert sent == {"AllReduce": 3 * pushed, "Ring": 3 * pushed, "Tree": 6 * pushed}


def test_replicas_of_one_worker_have_slots_of_their_own() -> None:
    found: list[Any] = []
    for workers, devices in ((2, 2), (3, 2), (4, 1)):  # of three workers, two have two and none
        with fm.Cluster.threads(workers=workers, devices_per_worker=devices) as cluster:
            found.append(fit(cluster, CASES["4 bits in a ring"]).params)
    for one in found[:2]:
        assert_close(one, found[2])


def test_what_is_added_up_late_is_filtered_once(threads_cluster: fm.Cluster) -> None:
    """A real replica may read a sum before it must: here the gradient, of rank 1, is the same at all parameters."""
    start = {"w": jnp.ones((12, 5))}
    rows = {"x": np.random.default_rng(1).normal(size=(STEPS * BATCH, 12)).astype(np.float32)}

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean(jnp.sum(batch["x"] @ params["w"], axis=1))

    policy = fm.Policy(fm.Ring(), staleness=1, filters=RANK)
    real, virtual = (fit(c, policy, loss, source=rows, params=start) for c in (threads_cluster, simulated()))
    expected = np.broadcast_to(1 - 0.1 * STEPS * rows["x"].mean(axis=0)[:, None], (12, 5))
    for result in (real, virtual):
        np.testing.assert_allclose(result.params["w"], expected, atol=1e-5)
        assert result.ledger.used == 4 * STEPS
    assert virtual.traffic == real.traffic


@pytest.mark.parametrize("chain", [RANK, RANDOM], ids=str)
def test_a_sum_with_nan_is_left_out_and_what_is_kept_stays_finite(threads_cluster: fm.Cluster, chain: Any) -> None:
    rows = {**SOURCE, "bad": np.ones(len(SOURCE["x"]), np.float32)}
    rows["bad"][BATCH + 7] = np.nan

    def loss(params: Any, batch: Any) -> Any:
        return mlp_loss(params, batch) * jnp.mean(batch["bad"])

    policy = fm.Policy(fm.Ring(), filters=chain)
    with pytest.warns(fm.FlowmlWarning, match="holds NaN"):
        real, virtual = (fit(c, policy, loss, source=rows) for c in (threads_cluster, simulated()))
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(real.params))
    assert_same(virtual.params, real.params)
    assert virtual.ledger.nonfinite == real.ledger.nonfinite
    assert np.isfinite(list(real.ledger.kept.values())).all()
    assert all(sum(by.values()) == 1 for by in real.ledger.nonfinite.values()) and real.ledger.nonfinite
