"""The bytes in the records of a fit add up to its traffic, whatever the policy, and no record changes afterwards."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

STEPS, BATCH = 6, 24
X = np.random.default_rng(0).normal(size=(STEPS * BATCH, 6)).astype(np.float32)
SOURCE = {"x": X, "y": X.sum(axis=1, keepdims=True)}
PARAMS = {"w": jnp.zeros((6, 1)), "b": jnp.zeros(1)}
SERVER, AVERAGE = fm.ParameterServer(), fm.AllReduce()
SITES = ((0,), (1, 2, 3))
POLICIES = {
    "sync": fm.Policy(),
    "rhythm": fm.policies.every(4),
    "quorum": fm.policies.quorum(0.75),
    "compensate": fm.policies.compensate(0.75),
    "bound": fm.policies.asynchronous(staleness=2),
    "free": fm.policies.asynchronous(),
    "sum": fm.policies.all_reduce(),
    "gossip": fm.policies.gossip(),
    "local": fm.policies.local_sgd(4),
    "shared": fm.policies.hogwild(),
    "coded": fm.policies.coded(stragglers=1),
    "copies": fm.policies.speculate(3, after=0.1),
    "sites": fm.Policy(topology=fm.Hierarchy(AVERAGE, SERVER, SITES)),
    "site quorum": fm.Policy(topology=fm.Hierarchy(SERVER, SERVER, SITES, fm.Quorum(0.66))),
    "filtered": fm.Policy(filters=(fm.filters.TopK(0.5),)),
}


def loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


def check(cluster: Any, policy: fm.Policy | dict[str, fm.Policy], **options: Any) -> Any:
    seen: list[dict[str, Any]] = []
    trainer = fm.Trainer(loss, optax.sgd(0.05), cluster=cluster, replicas=4, policies=policy, **options)
    result = trainer.fit(
        PARAMS,
        SOURCE,
        batch_size=BATCH,
        steps=STEPS,
        progress=False,
        callbacks=[lambda record: seen.append(copy.deepcopy(record))],
    )
    assert len(seen) == STEPS and seen == result.history, "a record has changed after callbacks had it"
    for layer, counts in result.traffic.items():
        assert sum(r["pushed_bytes"].get(layer, 0) for r in seen) == counts["pushed_bytes"], layer
        crossed = sum(amount for name, amount in counts.items() if "wire" in name)
        assert sum(r["wire_bytes"].get(layer, 0) for r in seen) == crossed, layer
        stale = sum((Counter(r["staleness"].get(layer)) for r in seen), Counter[int]())
        assert stale == Counter(result.staleness.get(layer)), layer
    return result


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_the_bytes_of_records_add_up_in_virtual_time(policy: fm.Policy) -> None:
    workers = 1 if policy == POLICIES["shared"] else 4
    machines = fm.sim.Straggler(fm.sim.Constant(0.1), factor=3, workers=(workers - 1,))
    network = fm.sim.Network(1e-4, 1e9)
    result = check(fm.SimulatedCluster(workers, machines, network, devices_per_worker=4 // workers), policy)
    assert any(counts["pushes"] for counts in result.traffic.values())
    if workers > 1:
        assert any(r["wire_bytes"] for r in result.history[:-1]), "no bytes are told before the end"


ROUNDS = {"no_loco": fm.policies.no_loco(2), "exponential": fm.policies.gossip("exponential", every=2)}
OUTER = {
    "diloco": fm.policies.diloco(4, delay=1, alpha=0.5),
    "gaia": fm.policies.gaia(0.01, sites=2),
}


@pytest.mark.parametrize("seed", range(24))
def test_the_bytes_of_records_add_up_for_random_mixes(seed: int) -> None:
    """Of two layers with policies of their own, one of which sends to neighbours in half of the cases."""
    rng = np.random.default_rng(seed)
    names = [name for name in POLICIES if name not in ("shared", "coded", "copies")]
    others = {**POLICIES, **ROUNDS, **OUTER}
    pairs = [str(rng.choice(names)), str(rng.choice([*names, *(["gossip", *ROUNDS, *OUTER] * 2)]))]
    machines = fm.sim.Straggler(fm.sim.LogNormal(0.1, 0.5), factor=3, workers=(int(rng.integers(4)),))
    cluster = fm.SimulatedCluster(4, machines, fm.sim.Network(1e-4, 1e6), seed=seed)
    check(cluster, dict(zip(("w", "b"), map(others.__getitem__, pairs), strict=True)))


def test_each_round_of_gossip_is_in_its_record() -> None:
    cluster = fm.SimulatedCluster(4, fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9))
    result = check(cluster, fm.policies.gossip())
    rounds = {r["wire_bytes"]["w"] for r in result.history[1:-1]}  # the first has the first parameters too
    assert rounds == {2 * 4 * PARAMS["w"].nbytes}, "to two neighbours each"


@pytest.mark.parametrize("name", ["quorum", "copies", "site quorum", "free", "gossip", "sum"])
def test_the_bytes_of_records_add_up_on_threads(threads_cluster: fm.Cluster, name: str) -> None:
    check(threads_cluster, POLICIES[name], delays={"worker:3": 0.02})


@pytest.mark.parametrize("slow", [0, 1, 3])
def test_the_bytes_of_a_site_are_in_the_record_of_their_clock(slow: int) -> None:
    """Whether the leader's own step has ended when its site decides or not. The leaders are replicas 0 and 1."""
    machines = fm.sim.Straggler(fm.sim.Constant(0.1), factor=3, workers=(slow,))
    result = check(fm.SimulatedCluster(4, machines, fm.sim.Network(1e-4, 1e9)), POLICIES["site quorum"])
    each = {name: {r["pushed_bytes"][name] for r in result.history[:-1]} for name in ("w", "b")}
    assert all(len(found) == 1 for found in each.values()), each


def test_the_bytes_of_a_site_are_in_the_record_of_their_clock_on_threads(threads_cluster: fm.Cluster) -> None:
    policy = fm.Policy(topology=fm.Hierarchy(SERVER, SERVER, SITES, fm.Quorum(1.0)))
    result = check(threads_cluster, policy, delays={"worker:3": 0.01})
    each = {name: {r["pushed_bytes"][name] for r in result.history} for name in ("w", "b")}
    assert all(len(found) == 1 for found in each.values()), each
