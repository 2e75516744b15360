"""A quorum of replicas with parameters of their own: rounds equal the loop, and every step has a fate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.data import epoch_order
from tests.training.reference import BATCH, EXAMPLES, assert_close, data, mlp, mlp_loss
from tests.training.test_sparse_loco import sent

SOURCE, RATE, EVERY = data(), 0.1, 4
QUICK, SLOW = 0.1, 0.25
TIMES = ((QUICK,) * 12, (QUICK,) * 12, (SLOW, SLOW, SLOW, SLOW, *(0.02,) * 8))
"""Replica 2 is slow at its first steps. It learns in its second that the first round is over. If its work is dropped,
it skips to clock 4; else it goes on, and pushes what it has a round later."""

Push = tuple[int, Sequence[tuple[int, int]]]
"""A replica and the steps of one push: (clock, version of the global parameters that the step's window began with)."""


def batch(clock: int, replica: int, replicas: int = 3) -> Any:
    per_epoch = EXAMPLES // BATCH
    order = epoch_order(EXAMPLES, 0, clock // per_epoch)[clock % per_epoch * BATCH :][:BATCH]
    return {k: v[np.split(order, replicas)[replica]] for k, v in SOURCE.items()}


def rounds_loop(
    rounds: Sequence[Sequence[Push]],
    outer: Any,
    share: float = 1.0,
    loss: Any = mlp_loss,
    weigh: Any = lambda batch: 1,
) -> Any:
    """The global parameters after rounds. Each applies the mean of changes, weighed by what the batches of their steps
    `weigh`: by default, by their numbers of steps.

    With a `share` below 1 a replica sends its largest elements in 4 bits, and keeps what it could not send.
    """
    versions, state = [jax.tree.map(np.asarray, mlp())], outer.init(mlp())
    gradient = jax.jit(jax.grad(loss))
    kept = [jax.tree.map(np.zeros_like, versions[0]) for _ in range(3)]
    for pushes in rounds:
        changes = []
        for replica, steps in pushes:
            change, own, base = jax.tree.map(np.zeros_like, versions[0]), versions[0], -1
            for clock, version in steps:
                own, base = (own, base) if version == base else (versions[version], version)
                step = jax.tree.map(lambda g: np.float32(RATE) * np.asarray(g), gradient(own, batch(clock, replica)))
                own = jax.tree.map(np.subtract, own, step)
                change = jax.tree.map(np.add, change, step)
            if share < 1:
                total = jax.tree.map(np.add, change, kept[replica])
                change = jax.tree.map(lambda v: sent(v, share, 4), total)
                kept[replica] = jax.tree.map(np.subtract, total, change)
            changes.append(change)
        counts = [sum(weigh(batch(clock, replica)) for clock, _ in steps) for replica, steps in pushes]
        mean = jax.tree.map(lambda *cs, n=counts: np.average(cs, axis=0, weights=n).astype(np.float32), *changes)
        updates, state = outer.update(mean, state, versions[-1])
        versions.append(jax.tree.map(np.asarray, optax.apply_updates(versions[-1], updates)))
    return versions[-1]


def window(version: int) -> Sequence[tuple[int, int]]:
    return [(clock, version) for clock in range(EVERY * version, EVERY * version + EVERY)]


def together(version: int) -> list[Push]:
    return [(replica, window(version)) for replica in range(3)]


FIRST: list[Push] = [(0, window(0)), (1, window(0))]
ROUNDS: dict[str, list[list[Push]]] = {
    "drop": [FIRST, together(1), together(2)],
    "fold": [
        FIRST,
        [(0, window(1)), (1, window(1))],
        [*together(2), (2, window(0)), (2, [(clock, 2) for clock in range(4, 8)])],
    ],
}


def simulated(times: Any = TIMES) -> fm.SimulatedCluster:
    return fm.SimulatedCluster(3, fm.sim.Recorded(times), fm.sim.Network(1e-4, 1e9))


def fit(cluster: Any, policy: Any, steps: int = 12, **options: Any) -> fm.TrainingResult:
    trainer = fm.Trainer(mlp_loss, optax.sgd(RATE), cluster=cluster, replicas=3, policies=policy, **options)
    return trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=steps, progress=False)


@pytest.mark.parametrize("late", ROUNDS)
def test_rounds_with_a_late_replica_equal_the_loop(late: Any) -> None:
    """A late replica takes the global parameters when it is dropped, or after its late push, which joins a round."""
    outer = optax.sgd(0.7, momentum=0.9, nesterov=True)
    result = fit(simulated(), fm.policies.decoupled_diloco(EVERY, 2, grace=0.01, late=late))
    assert_close(result.params, rounds_loop(ROUNDS[late], outer))
    ledger = result.ledger
    assert (ledger.used, ledger.dropped, ledger.folded) == ((32, 2, 0) if late == "drop" else (28, 0, 8))
    assert (ledger.returned >= 2) == (late == "drop"), "replica 2 skips clocks 2 and 3"
    assert ledger.outstanding == 0


LATE = ((QUICK,) * 12, (QUICK,) * 12, (0.12,) * 4 + (0.02,) * 8)
"""Replica 2 is in the last step of the first round when the others are done with it."""


def test_a_push_that_comes_late_joins_the_next_round() -> None:
    policy = fm.policies.decoupled_diloco(EVERY, 2, grace=0.01, outer=optax.sgd(1.0))
    result = fit(simulated(LATE), policy)
    rounds = [FIRST, [*together(1), (2, window(0))], together(2)]
    assert_close(result.params, rounds_loop(rounds, optax.sgd(1.0)))
    assert (result.ledger.used, result.ledger.folded, result.ledger.dropped) == (32, 4, 0)


@pytest.mark.parametrize("late", ["drop", "fold"])
def test_feedback_keeps_nothing_of_a_push_that_is_lost(late: Any) -> None:
    """A dropped push takes nothing from what feedback keeps, and adds nothing to it; a folded one counts."""
    filters = (fm.filters.top_k(0.25).with_error_feedback(), fm.filters.quantise(4))
    policy = fm.policies.decoupled_diloco(EVERY, 2, grace=0.01, outer=optax.sgd(1.0), late=late, filters=filters)
    times = (*LATE[:2], (0.02,) * 4 + (0.12,) * 4 + (0.02,) * 4)
    lost: list[Push] = [(0, window(1)), (1, window(1))]
    rounds = [together(0), lost, [*together(2), *([(2, window(1))] if late == "fold" else [])]]
    result = fit(simulated(times), policy)
    assert result.ledger.dropped == (4 if late == "drop" else 0)
    if late == "fold":  # the late push was encoded before the one after it
        rounds[2] = [*together(2)[:2], (2, window(1)), (2, window(2))]
    assert_close(result.params, rounds_loop(rounds, optax.sgd(1.0), 0.25))


@pytest.mark.parametrize(
    "policy",
    [
        fm.policies.decoupled_diloco(4, 2),
        fm.policies.compensate(0.6, every=4),
        fm.policies.diloco(4, delay=1, alpha=0.5, quorum=fm.Quorum(2, late="fold")),
    ],
    ids=str,
)
def test_the_work_of_a_replica_that_is_always_late_is_folded_in(policy: fm.Policy) -> None:
    """Each of its rounds takes three times as long as those of the others, so it would never come to a push in time."""
    result = fit(simulated(((QUICK,), (QUICK,), (3 * QUICK,))), policy, 40)
    assert result.ledger.folded >= 11
    assert result.ledger.dropped <= 4, "what has no push before the last decision"


@pytest.mark.parametrize("late", ["drop", "fold", "requeue"])
def test_workers_account_for_every_item(threads_cluster: fm.Cluster, late: Any) -> None:
    policy = fm.policies.decoupled_diloco(EVERY, 2, grace=0.0, late=late, outer=optax.sgd(0.7))
    result = fit(threads_cluster, policy, 32, delays={"worker:2": 0.03})
    ledger = result.ledger
    assert ledger.outstanding == 0
    assert ledger.used + ledger.dropped + ledger.folded + ledger.unseen == 32 * 3
    assert float(mlp_loss(result.params, SOURCE)) < 0.9 * float(mlp_loss(mlp(), SOURCE))
    assert ledger.dropped > 0 or late != "drop", "what a late replica had done since its last push"
