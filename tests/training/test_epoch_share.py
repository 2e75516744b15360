"""An epoch that ends at a share of its examples: what was used, what was left, and that nothing counts twice."""

from __future__ import annotations

import math
import random
from typing import Any

import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flowml as fm
from flowml.policy import check_composition
from flowml_runtime.protocol.training.ledger import Asked, Ledger, Settled, Work
from tests.training.reference import EXAMPLES, data, mlp, mlp_loss

EPOCHS, REPLICAS, BATCH = 3, 4, 8
ITEMS = EXAMPLES // BATCH * REPLICAS


def rule(late: Any = "drop", share: float = 0.75) -> fm.Policy:
    return fm.Policy(staleness=fm.UNBOUNDED, quorum=fm.Quorum(share, of="samples", over="epoch", late=late))


def fit(cluster: Any, policy: fm.Policy, **settings: Any) -> fm.TrainingResult:
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.01), cluster=cluster, replicas=REPLICAS, policies=policy, **settings)
    return trainer.fit(mlp(), data(), batch_size=BATCH, epochs=EPOCHS)


def simulated() -> fm.SimulatedCluster:
    compute = fm.sim.Straggler(fm.sim.Constant(1.0), 6, workers=[1])
    return fm.SimulatedCluster(workers=REPLICAS, compute=compute, network=fm.sim.Network(1e-4, 1e9), arithmetic=False)


def check(result: fm.TrainingResult) -> None:
    ledger, quota = result.ledger, math.ceil(0.75 * ITEMS)
    assert ledger.outstanding == 0
    for epoch in ledger.epochs:
        assert quota <= epoch.used <= ITEMS
        assert epoch.used + epoch.unseen == ITEMS
    assert sum(t.used for t in ledger.replicas) == sum(t.used for t in ledger.epochs) == ledger.used
    assert len(result.history) == -(-ledger.used // REPLICAS)
    epochs = [record["epoch"] for record in result.history]
    assert epochs == sorted(epochs)
    assert set(epochs) == set(range(EPOCHS))


def test_a_simulated_epoch_ends_at_three_quarters_and_takes_less_time() -> None:
    whole = fit(simulated(), fm.policies.asynchronous())
    result = fit(simulated(), rule())
    check(result)
    assert (result.virtual_seconds or 0) < (whole.virtual_seconds or 0)
    assert all(epoch.unseen > 0 for epoch in result.ledger.epochs)
    assert result.ledger.replicas[1].used < min(result.ledger.replicas[r].used for r in (0, 2, 3))


def test_items_that_are_left_are_done_first_in_the_next_epoch() -> None:
    ledger = fit(simulated(), rule("requeue")).ledger
    assert [epoch.unseen for epoch in ledger.epochs[:-1]] == [0, 0]
    assert ledger.epochs[-1].unseen > 0


def test_an_epoch_ends_early_on_workers(threads_cluster: fm.Cluster) -> None:
    check(fit(threads_cluster, rule(), delays={"worker:1": 0.02}))


@given(
    share=st.sampled_from([0.25, 0.5, 0.75, 1.0]),
    requeues=st.booleans(),
    replicas=st.integers(1, 4),
    per_replica=st.integers(1, 5),
    rng=st.randoms(use_true_random=False),
)
def test_every_item_of_an_epoch_is_used_once_or_left(
    share: float, requeues: bool, replicas: int, per_replica: int, rng: random.Random
) -> None:
    size = replicas * per_replica
    work = Work(replicas, size, 1, 3 * per_replica, aligned=False, epoch_share=share, requeues=requeues)
    ledger, held, clock = Ledger(work), {r: [] for r in range(replicas)}, [0] * replicas
    granted: list[int] = []
    active = set(range(replicas))
    while active:
        r = rng.choice(sorted(active))
        if held[r] and rng.random() < 0.6:
            ledger.step(Settled(r, ((held[r].pop(0), "used"),)))
        else:
            (grant,) = ledger.step(Asked(r, (clock[r],)))
            clock[r] += 1
            held[r] += [item for _, item in grant.items]
            granted += [item.sequence for _, item in grant.items]
            if not grant.items:
                active.discard(r)
                ledger.step(Settled(r, tuple((item, "used") for item in held[r])))
        ledger.validate()
    assert len(granted) == len(set(granted))
    summary = ledger.summary()
    assert summary.used == len(granted)
    for number, epoch in enumerate(summary.epochs):
        assert math.ceil(share * size) <= epoch.used
        assert epoch.used + epoch.unseen == size
        if requeues and number < 2:
            assert epoch.unseen == 0


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: fm.Quorum(0.75, over="epoch"), "a share of its examples"),
        (lambda: fm.Quorum(3, of="samples", over="epoch"), "a share of its examples"),
        (lambda: fm.Quorum(0.75, of="samples", over="epoch", late="fold"), "late='requeue'"),
        (lambda: fm.Quorum(0.75, of="samples", over="epoch", limit_s=1.0), "no limit_s"),
        (lambda: fm.Quorum(0.75, over="year"), "over='epoch'"),
        (lambda: fm.Policy(quorum=fm.Quorum(0.75, of="samples", over="epoch")), "staleness=0 is not sound"),
        (lambda: check_composition({"a": rule(), "b": fm.policies.asynchronous()}, 4), "for the whole model"),
    ],
)
def test_what_is_not_sound_says_why(make: Any, why: str) -> None:
    with pytest.raises(fm.PolicyError, match=why):
        make()
