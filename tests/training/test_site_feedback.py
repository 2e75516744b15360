"""What filters keep of the sum of a site follows the fate of the sum: a dropped one takes nothing along that was kept
before, and leaves nothing behind. It does not matter whether the step of the site's leader is in the sum."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

CLOCKS = 40
SERVER = fm.ParameterServer()


def by_example(params: Any, batch: Any) -> Any:
    """Its gradient names the examples of a batch, each of them once."""
    return jnp.sum(batch["one"] @ params["each"])


def counted(cluster: Any, replicas: int, inside: Any, late: Any, chain: Any) -> tuple[int, int]:
    """The examples that the ledger counts, and those in the parameters or still kept by the filters of two sites.

    Each site has sums that come too late, because a clock is decided with the first sum.
    """
    half = replicas // 2
    sites = tuple(range(half)), tuple(range(half, replicas))
    policy = fm.Policy(
        topology=fm.Hierarchy(SERVER, SERVER, sites, inside),
        quorum=fm.Quorum(1, late=late),
        staleness=1,
        apply="sum",
        filters=(chain.with_error_feedback(),),
    )
    trainer = fm.Trainer(by_example, optax.sgd(1.0), cluster=cluster, replicas=replicas, policies=policy)
    examples = replicas * CLOCKS
    source = {"one": np.eye(examples, dtype=np.float32)}
    start = {"each": jnp.zeros(examples)}
    result = trainer.fit(start, source, batch_size=replicas, steps=CLOCKS, shuffle=False, progress=False)
    found = -np.asarray(result.params["each"])
    length = found.max()
    np.testing.assert_allclose(found[found > 0], length, rtol=1e-5)
    kept = sum(result.ledger.kept.values()) ** 2 / length**2
    assert 0 < result.ledger.used < examples
    return result.ledger.used, np.count_nonzero(found) + round(kept)


TOP = fm.filters.top_k(1)


@pytest.mark.parametrize("late", ["drop", "requeue"])
def test_what_the_filters_of_a_site_keep_follows_its_sums(late: str) -> None:
    for seed in range(3):
        machines, network = fm.sim.LogNormal(0.1, 0.3), fm.sim.Network(latency_s=0.01, bytes_per_s=1e9)
        cluster = fm.SimulatedCluster(6, machines, network, seed=seed)
        used, there = counted(cluster, 6, fm.Quorum(2, late=late), late, TOP)
        assert there == used


def test_real_workers_do_so_too(threads_cluster: fm.Cluster) -> None:
    used, there = counted(threads_cluster, 4, fm.Quorum(), "drop", TOP)
    assert there == used


def test_sums_of_a_site_are_compared_with_its_newest_parameters() -> None:
    """Its leader may never have read any."""
    machines = fm.sim.Straggler(fm.sim.Constant(0.1), factor=1000, workers=(0,))
    cluster = fm.SimulatedCluster(4, machines, fm.sim.Network(latency_s=1e-4, bytes_per_s=1e9))
    used, there = counted(cluster, 4, fm.Quorum(1), "drop", fm.filters.kkt(0.1))
    assert there == used
