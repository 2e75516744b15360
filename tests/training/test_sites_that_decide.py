"""Sites that have parameters of their own and do with some of their replicas: against the loop, and by the ledger."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import mlp, mlp_loss
from tests.training.test_gossip import averaged
from tests.training.test_site_quorum import (
    BATCH,
    CLOCKS,
    EXAMPLES,
    GRADIENT,
    INNER,
    ITEM,
    REPLICAS,
    SERVER,
    SITES,
    SOURCE,
    STEPS,
    UNEVEN,
    by_example,
    close,
    drawn_quorums,
    fit,
    naive,
    simulated,
)

EVERY = 3
GRAPH = fm.Gossip("complete")


def nested(inside: Any, remote: Any = SERVER, sites: Any = UNEVEN, **knobs: Any) -> fm.Policy:
    return fm.Policy(topology=fm.Hierarchy(SERVER, remote, sites, inside), **knobs)


def local(counted: list[int], gossip: bool = False, mirrored: bool = False, bad: Any = ()) -> Any:
    """The plain loop over sites, each with parameters and an optimizer of its own, and the gradients of `counted`, but
    for the `bad` (step, replica)."""
    sites = [[r for r in site if r in counted] for site in UNEVEN]
    parts = [len(site) / 4 if found else 0.0 for site, found in zip(UNEVEN, sites, strict=True)]
    parts = [0.5, 0.5] if gossip else [p / sum(parts) for p in parts]
    own, states = [mlp() for _ in sites], [INNER.init(mlp()) for _ in sites]
    share = BATCH // 4
    for step in range(STEPS):
        updates: list[Any] = []
        for s, site in enumerate(sites):
            mine = [r for r in site or UNEVEN[s] if (step, r) not in bad]
            rows = [np.arange(share) + step * BATCH + r * share for r in mine]
            gradient = GRADIENT(own[s], {k: v[np.concatenate(rows)] for k, v in SOURCE.items()})
            update, states[s] = INNER.update(gradient, states[s], own[s])
            updates.append(update)
        if mirrored:  # each site adds the steps of both, by the share of its replicas
            total = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, *updates)
            own = [optax.apply_updates(p, total) for p in own]
            continue
        before = [averaged(parts, own)] * 2 if gossip else own
        own = [optax.apply_updates(p, u) for p, u in zip(before, updates, strict=True)]
        if not gossip and ((step + 1) % EVERY == 0 or step == STEPS - 1):
            own = [averaged(parts, own)] * 2
    return averaged(parts, own)


DELTA: dict[str, Any] = {"payload": fm.Delta(), "every": EVERY}
WEIGHTS: dict[str, Any] = {"payload": fm.Weights(), "every": EVERY}
CASES: list[tuple[str, fm.Policy, int | None, list[int], dict[str, bool]]] = [
    ("all", nested(fm.Quorum(), **DELTA), None, [0, 1, 2, 3], {}),
    ("one of a site", nested(fm.Quorum(0.6), **DELTA), 1, [0, 2, 3], {}),
    ("one of a site, weights", nested(fm.Quorum(0.6), **WEIGHTS), 2, [0, 1, 3], {}),
    ("a site", nested(None, quorum=fm.Quorum(1), **DELTA), 3, [0, 1, 2], {}),
    ("a site by its leader", nested(fm.Quorum(0.6), quorum=fm.Quorum(1), **WEIGHTS), 0, [3], {}),
    ("gossip", nested(fm.Quorum(0.6), GRAPH), 1, [0, 2, 3], {"gossip": True}),
    ("mirrors", nested(fm.Quorum(0.6), GRAPH, payload=fm.Delta()), 2, [0, 1, 3], {"mirrored": True}),
]
NAMES = [case[0] for case in CASES]


def machines(slow: int | None) -> Any:
    base = fm.sim.Constant(0.1)
    return base if slow is None else fm.sim.Straggler(base, factor=1000, workers=(slow,))


@cache
def virtual_fit(number: int) -> fm.TrainingResult:
    """The simulated fit of a case, once for all tests."""
    _, policy, slow, *_ = CASES[number]
    return fit(simulated(4, machines(slow)), policy)


@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_a_straggler_is_left_out_and_the_rest_is_local_sgd_of_sites(number: int) -> None:
    *_, counted, kind = CASES[number]
    result = virtual_fit(number)
    close(result.params, local(counted, **kind))
    assert result.ledger.used == len(counted) * STEPS
    assert result.ledger.outstanding == 0


@pytest.mark.parametrize("number", [1, 3, 5], ids=[NAMES[i] for i in (1, 3, 5)])
def test_real_workers_do_so_too(threads_cluster: fm.Cluster, number: int) -> None:
    _, policy, slow, counted, _ = CASES[number]
    real, virtual = fit(threads_cluster, policy, delays={f"worker:{slow}": 2.0}), virtual_fit(number)
    assert real.ledger.used == len(counted) * STEPS
    jax.tree.map(np.testing.assert_array_equal, real.params, virtual.params)
    for layer, row in real.traffic.items():
        assert virtual.traffic[layer]["pushed_bytes"] == row["pushed_bytes"]


@pytest.mark.filterwarnings("ignore:.*NaN:flowml.FlowmlWarning")
def test_a_gradient_that_may_not_be_applied_is_not_in_the_mean_of_its_site(threads_cluster: fm.Cluster) -> None:
    first, source = 2 * BATCH + BATCH // 4, {k: v.copy() for k, v in SOURCE.items()}
    source["x"][first : first + BATCH // 4] = np.nan
    for cluster in (threads_cluster, simulated(4, machines(None))):
        trainer = fm.Trainer(
            mlp_loss, INNER, cluster=cluster, replicas=4, policies=nested(fm.Quorum(), **DELTA), on_nonfinite="refuse"
        )
        result = trainer.fit(mlp(), source, batch_size=BATCH, steps=STEPS, shuffle=False)
        close(result.params, local([0, 1, 2, 3], bad=[(2, 1)]))


def test_the_stages_of_a_pipeline_send_to_those_of_the_leader(threads_cluster: fm.Cluster) -> None:
    policy, found = nested(fm.Quorum(), sites=1, **DELTA), []
    for cluster in (threads_cluster, simulated(4, machines(None))):
        trainer = fm.Trainer(
            mlp_loss, INNER, cluster=cluster, replicas=2, placement=fm.Pipeline(2), microbatches=2, policies=policy
        )
        found.append(trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS, shuffle=False))
        assert found[-1].ledger.used == 2 * STEPS
    jax.tree.map(np.testing.assert_array_equal, found[0].params, found[1].params)
    plain = fm.Trainer(mlp_loss, INNER, cluster=threads_cluster, replicas=2).fit(
        mlp(), SOURCE, batch_size=BATCH, steps=STEPS, shuffle=False
    )
    close(found[0].params, plain.params)  # one site is synchronous SGD


@pytest.mark.parametrize(("remote", "slow"), [(fm.Ring(), 1), (fm.AllReduce(), 0), (fm.Tree(2), 2)], ids=str)
def test_leaders_add_up_what_their_sites_have(threads_cluster: fm.Cluster, remote: Any, slow: int) -> None:
    """The mean is one over the gradients that took part, and a slow leader is left out as any other."""
    policy, counted = nested(fm.Quorum(0.6), remote), [r for r in range(4) if r != slow]
    virtual = fit(simulated(4, machines(slow)), policy)
    close(virtual.params, naive(counted))
    assert virtual.ledger.used == 3 * STEPS
    if slow != 1:
        return  # one of them on threads
    real = fit(threads_cluster, policy, delays={f"worker:{slow}": 2.0})
    jax.tree.map(np.testing.assert_array_equal, real.params, virtual.params)
    assert real.ledger.used == 3 * STEPS
    for layer, row in real.traffic.items():
        assert virtual.traffic[layer]["pushed_bytes"] == row["pushed_bytes"]


def drawn(seed: int) -> tuple[fm.Policy, Any]:
    """Any quorums at both levels with any late rule, and machines."""
    rng = np.random.default_rng(seed)
    inside, between, speeds = drawn_quorums(seed, rng)
    knobs: dict[str, Any] = {"payload": fm.Delta(), "every": int(rng.integers(1, 4))}
    kind = ("clocks", "clocks", "arrivals", "gossip", "sums")[int(rng.integers(5))]
    if kind == "clocks":
        knobs["quorum"] = between
    elif kind == "arrivals":
        knobs |= {"staleness": 4, "apply": "sum"}
    elif kind == "gossip":
        knobs = {"remote": GRAPH, "every": knobs["every"]}
    else:
        knobs = {"remote": (fm.Ring(), fm.AllReduce())[rng.integers(2)], "staleness": int(rng.integers(2))}
    return nested(inside, sites=SITES, **knobs), speeds


@pytest.mark.parametrize("seed", range(10))
def test_the_parameters_have_the_examples_that_the_ledger_counts(seed: int) -> None:
    policy, speeds = drawn(seed)
    cluster = simulated(REPLICAS, speeds, seed=seed)
    trainer = fm.Trainer(by_example, optax.sgd(1.0), cluster=cluster, replicas=REPLICAS, policies=policy)
    start = {"each": jnp.zeros(EXAMPLES), "all": jnp.zeros(1)}
    source = {"one": np.eye(EXAMPLES, dtype=np.float32)}
    result = trainer.fit(start, source, batch_size=REPLICAS * ITEM, steps=CLOCKS)
    ledger, counted = result.ledger, -np.asarray(result.params["each"])
    taken = ledger.used + ledger.folded
    assert taken + ledger.dropped + ledger.unseen == REPLICAS * CLOCKS
    assert np.count_nonzero(counted > 1e-7) == ITEM * taken, policy.describe()
    assert np.all(counted >= 0)
    seen = ((0, EXAMPLES - ITEM * taken), (1, ITEM * taken))
    assert ledger.seen == tuple((times, count) for times, count in seen if count)


def test_late_sites_with_other_locals_count_later(threads_cluster: fm.Cluster) -> None:
    """With `fold` all replicas run all steps, so those of a late site need no leader that gives up steps for them."""
    topology = fm.Hierarchy(fm.AllReduce(), SERVER, UNEVEN)
    policy = fm.Policy(topology=topology, quorum=fm.Quorum(1, late="fold"), **DELTA)
    slow = fm.sim.Straggler(fm.sim.Constant(0.1), factor=2, workers=(3,))
    for cluster, options in ((threads_cluster, {"delays": {"worker:3": 0.01}}), (simulated(4, slow), {})):
        result = fit(cluster, policy, **options)
        assert result.ledger.used + result.ledger.folded + result.ledger.dropped == 4 * STEPS
        assert float(mlp_loss(result.params, SOURCE)) < float(mlp_loss(mlp(), SOURCE))


def test_processes_do_as_threads(threads_cluster: fm.Cluster) -> None:
    mixed = fm.Hierarchy(fm.AllReduce(), SERVER, UNEVEN)
    policies = {
        "fc0/*": nested(fm.Quorum(), sites=2, **DELTA),
        "fc1/kernel": nested(fm.Quorum(), fm.Ring(), sites=2),
        "fc1/bias": nested(fm.Quorum(), GRAPH, sites=2),
        "fc2/kernel": fm.policies.choco((fm.filters.top_k(2),), 0.4),
        "fc2/bias": fm.Policy(topology=mixed, payload=fm.Weights(), apply=fm.Mix(0.3), every=EVERY),
    }
    with fm.Cluster.local(workers=2, devices_per_worker=2) as processes:
        found, expected = (fit(cluster, policies) for cluster in (processes, threads_cluster))
        close(found.params, expected.params, rtol=1e-5)
    assert found.ledger.used == expected.ledger.used == 4 * STEPS
