"""Layers with different rules in one model: each group of layers decides alone, and the ledger says for which."""

from __future__ import annotations

from typing import Any

import optax
import pytest

import flowml as fm
from tests.training.reference import BATCH, EXAMPLES, data, mlp, mlp_loss

SOURCE = data()
REPLICAS = 4
EPOCHS = 10
STEPS = EPOCHS * EXAMPLES // BATCH
SLOW = {"worker:3": 0.03}
"""Replica 3 takes far longer than the others."""


def fit(cluster: fm.Cluster, policies: dict[str, fm.Policy], *, replicas: int = REPLICAS, **options: Any) -> Any:
    trainer = fm.Trainer(
        mlp_loss,
        optax.sgd(0.2),
        cluster=cluster,
        replicas=replicas,
        placement=fm.Pipeline(1),
        policies=policies,
        **options,
    )
    result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, epochs=EPOCHS)
    ledger = result.ledger
    assert ledger.outstanding == 0
    items = EPOCHS * EXAMPLES // BATCH * replicas
    assert ledger.used + ledger.dropped + ledger.folded + ledger.unseen == items
    assert float(mlp_loss(result.params, SOURCE)) < 0.9 * float(mlp_loss(mlp(), SOURCE))
    return result


@pytest.mark.parametrize("kind", ["threads_cluster", "process_cluster"])
def test_a_synchronous_layer_does_not_turn_the_drop_of_another_off(kind: str, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue(kind)
    replicas = min(REPLICAS, len(cluster.devices))
    slow = {f"worker:{replicas - 1}": 0.03}
    policies = {"fc0*": fm.policies.backup_workers(replicas - 1), "*": fm.Policy()}
    ledger = fit(cluster, policies, delays=slow, replicas=replicas).ledger
    dropping, strict = ledger.groups.values()
    assert list(ledger.groups) == [f"fc0 (quorum {replicas - 1} drop)", "fc1, fc2 (sync)"]
    assert ledger.used == strict.used == STEPS * replicas, "each item counts for the synchronous layers"
    assert dropping.dropped > 0, "the slow replica is left out of the other"
    assert dropping.used + dropping.dropped == STEPS * replicas
    assert f"fc0 (quorum {replicas - 1} drop)" in str(ledger)


def test_a_quorum_beside_layers_without_decisions(threads_cluster: fm.Cluster) -> None:
    for other in (fm.policies.asynchronous(), fm.policies.all_reduce()):
        result = fit(threads_cluster, {"fc0*": fm.policies.quorum(0.75), "*": other}, delays=SLOW)
        assert result.ledger.used > 3 * STEPS, "an item that the quorum drops counts for the other layer"


def test_late_work_is_folded_in(threads_cluster: fm.Cluster) -> None:
    ledger = fit(threads_cluster, {"*": fm.policies.compensate(0.75)}, delays=SLOW).ledger
    assert ledger.folded >= 1
    assert ledger.dropped <= 1, "only the last clock has no later one"


def test_late_work_is_requeued_and_done_by_another(threads_cluster: fm.Cluster) -> None:
    ledger = fit(threads_cluster, {"*": fm.policies.quorum(0.75, late="requeue")}, delays=SLOW).ledger
    assert ledger.requeued >= 1
    assert ledger.dropped == 0


@pytest.mark.parametrize(
    "policy",
    [
        fm.policies.deadline(0.75),
        fm.policies.deadline(0.5, grace=0.01),
        fm.Policy(quorum=fm.Deadline(1.0, limit_s=0.1)),
        fm.Policy(quorum=fm.Quorum(0.75, of="samples")),
        fm.policies.backup_workers(3),
    ],
    ids=fm.Policy.describe,
)
def test_a_slow_replica_does_not_hold_a_clock_up(threads_cluster: fm.Cluster, policy: fm.Policy) -> None:
    ledger = fit(threads_cluster, {"*": policy}, delays={"worker:3": 0.5}).ledger  # far beyond the limit of 0.1 s
    assert ledger.replicas[3].used < STEPS // 2
    assert sum(t.used for t in ledger.replicas[:3]) > 2 * STEPS


@pytest.mark.parametrize("policy", [fm.policies.softsync(2), fm.policies.double_buffer()], ids=fm.Policy.describe)
def test_stale_rules_learn_and_lose_nothing(threads_cluster: fm.Cluster, policy: fm.Policy) -> None:
    assert fit(threads_cluster, {"*": policy}).ledger.dropped == 0
