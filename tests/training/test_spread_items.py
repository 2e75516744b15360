"""In a short fit without common clocks every replica gets a work item before any gets a second one."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.protocol.training.ledger import Asked, Ledger
from flowml_runtime.protocol.training.terms import ReplicaLost
from flowml_runtime.protocol.training.work import Work


@pytest.mark.parametrize(
    ("items", "given"),
    [(4, [1, 1, 1, 1]), (5, [2, 1, 1, 1]), (6, [2, 2, 1, 1]), (7, [2, 2, 2, 1]), (8, [2, 2, 2, 2]), (9, [2, 2, 2, 2])],
)
def test_replicas_that_ask_ahead_leave_an_item_for_each_other(items: int, given: list[int]) -> None:
    ledger = Ledger(Work(4, items, 1, items // 4, aligned=False))
    total = Work(4, items, 1, items // 4, aligned=False).total_items
    grants = [grant for replica in range(4) for grant in ledger.step(Asked(replica, (0, 1)))]
    assert [len(grant.items) for grant in grants] == given
    assert grants[-1].exhausted == (sum(given) == total)


def test_a_lost_replica_needs_no_item() -> None:
    ledger = Ledger(Work(3, 3, 1, 1, aligned=False))
    ledger.step(ReplicaLost(2))
    grants = [grant for replica in range(2) for grant in ledger.step(Asked(replica, (0, 1)))]
    assert [len(grant.items) for grant in grants] == [2, 1]


def test_a_run_that_goes_on_leaves_an_item_for_each_replica() -> None:
    """It pushes with that one what it had gathered before."""
    work = Work(3, 12, 1, 4, aligned=False)
    before = Ledger(work)
    for clock in range(3):
        for replica in range(3):
            before.step(Asked(replica, (clock,)))
    ledger = Ledger(work)
    ledger.restore(before.kept((3, 3, 3)), (3, 3, 3))
    grants = [grant for replica in range(3) for grant in ledger.step(Asked(replica, (3, 4)))]
    assert [len(grant.items) for grant in grants] == [1, 1, 1]


@pytest.mark.parametrize("sharded", [False, True])
def test_whether_a_run_that_goes_on_would_have_an_item_for_each(sharded: bool) -> None:
    ledger = Ledger(Work(3, 6, 1, 2, aligned=False, sharded=sharded))
    for clock in range(2):
        assert ledger.has_one_each
        for replica in range(3):
            ledger.step(Asked(replica, (clock,)))
    assert ledger.has_one_each == sharded


def test_a_short_asynchronous_fit_is_even() -> None:
    cluster = fm.SimulatedCluster(4, fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9), arithmetic=False)
    policy = fm.policies.asynchronous()
    trainer = fm.Trainer(
        lambda w, b: jnp.mean(b["x"] @ w), optax.sgd(0.1), cluster=cluster, replicas=4, policies=policy
    )
    source = {"x": np.ones((8, 2), np.float32)}
    result = trainer.fit(jnp.zeros(2), source, batch_size=8, steps=1, progress=False)
    assert [replica.used for replica in result.ledger.replicas] == [1, 1, 1, 1]
    assert result.virtual_seconds < 0.15, "no replica waits for one that does two"
