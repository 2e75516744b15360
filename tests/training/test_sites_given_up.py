"""A site that the others have gone on without ends its step, also where another layer uses that step."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

import flowml as fm

SERVER = fm.ParameterServer()
FOLDS = fm.Policy(quorum=fm.Quorum(0.5, late="fold"), every=2, apply="sum")
STEPS = 6


def loss(params: Any, batch: Any) -> Any:
    """The gradient by b says which examples are in it, and that by a is one for each step."""
    return jnp.sum(batch["one"] @ params["b"]) + params["a"].sum()


def sited(sites: Any, need: int) -> fm.Policy:
    return fm.Policy(topology=fm.Hierarchy(SERVER, SERVER, sites), quorum=fm.Quorum(need), payload=fm.Delta())


def fit(cluster: Any, a: fm.Policy, b: fm.Policy, **options: Any) -> Any:
    policies = {"a": a, "b": b}
    trainer = fm.Trainer(loss, optax.sgd(1.0), cluster=cluster, replicas=4, policies=policies, **options)
    source = {"one": np.eye(4 * STEPS, dtype=np.float32)}
    start = {"a": jnp.zeros(1), "b": jnp.zeros(4 * STEPS)}
    return trainer.fit(start, source, batch_size=4, steps=STEPS, shuffle=False, progress=False)


NETWORK = fm.sim.Network(latency_s=1e-3, bytes_per_s=1e9)
ONE_ALONE = ((0,), (1,), (2, 3))


def check(result: Any) -> None:
    """What the ledger says of b is in it."""
    (told,) = [tally for name, tally in result.ledger.groups.items() if name.startswith("b ")]
    assert np.count_nonzero(result.params["b"]) == told.used + told.folded


def test_its_step_counts_for_the_layer_that_folds_late_work_in() -> None:
    machines = fm.sim.Straggler(fm.sim.Constant(0.1), factor=3, workers=(1,))
    result = fit(fm.SimulatedCluster(4, machines, NETWORK), sited(ONE_ALONE, 2), FOLDS)
    check(result)
    assert result.ledger.replicas[1].folded > 0


def test_real_workers_do_so_too(threads_cluster: fm.Cluster) -> None:
    delays = {f"worker:{i}": 0.03 if i == 1 else 0.01 for i in range(4)}
    check(fit(threads_cluster, sited(ONE_ALONE, 2), FOLDS, delays=delays))


def test_the_leader_of_a_site_runs_the_steps_in_which_others_follow_it() -> None:
    """It is slow, and would go on after the clocks that have been decided without its site."""
    machines = fm.sim.Straggler(fm.sim.Constant(0.1), factor=20, workers=(2,))
    arrives = fm.Policy(staleness=fm.UNBOUNDED, every=2, apply="sum")
    result = fit(fm.SimulatedCluster(4, machines, NETWORK), sited(((0, 1), (2, 3)), 1), arrives)
    assert np.count_nonzero(result.params["b"]) == result.ledger.used > 3 * STEPS
