"""Replicas that compute for each other, by a code or in portions, go on without the lost ones and leave nothing out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import optax
import pytest

import flowml as fm
from flowml.errors import WorkerLostError
from tests.training.reference import assert_close, assert_same, data, mlp, mlp_loss

WORKERS, STEPS, BATCH = 4, 12, 32
POLICIES: dict[str, Any] = {
    "fractional": (fm.policies.coded(1), assert_same),
    "cyclic": (fm.policies.coded(1, "cyclic"), assert_close),
    "portions": (fm.policies.speculate(2), assert_same),
}


@pytest.fixture(params=["threads", "processes"], scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[fm.Cluster]:
    make = fm.Cluster.threads if request.param == "threads" else fm.Cluster.local
    with closing(make(workers=WORKERS)) as cluster:
        yield cluster


def fit(cluster: fm.Cluster, policy: fm.Policy, ends: dict[int, str], **options: Any) -> fm.TrainingResult:
    def end(record: dict[str, Any]) -> None:
        if record["step"] in ends:
            cluster.end_worker(ends[record["step"]])

    trainer = fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=cluster, replicas=WORKERS, policies=policy)
    options |= {"batch_size": BATCH, "steps": STEPS, "progress": False, "callbacks": [end]}
    try:
        return trainer.fit(mlp(), data(), **options)
    finally:
        cluster.bring_back(cluster.lost)


@pytest.mark.parametrize("name", POLICIES)
def test_every_batch_is_whole(cluster: fm.Cluster, name: str, tmp_path: Any) -> None:
    policy, assert_like = POLICIES[name]
    whole = fit(cluster, policy, {})
    checkpoint = fm.Checkpoint(tmp_path, every_steps=2)
    with pytest.warns(fm.FlowmlWarning, match="left out with (its|their) replica"):
        found = fit(cluster, policy, {5: "worker:0"}, on_loss="shrink", checkpoint=checkpoint)
    assert [loss.workers for loss in found.losses] == [("worker:0",)]
    assert found.ledger.outstanding == 0
    assert found.ledger.used == whole.ledger.used
    assert_like((found.params, found.opt_state), (whole.params, whole.opt_state))
    losses = [record["loss"] for record in whole.history]
    assert [record["loss"] for record in found.history] == pytest.approx(losses, rel=1e-4)
    waits = [waited for record in found.history[found.losses[0].resumed_at :] for waited in record["waits"].values()]
    assert not any(0 in waited["late"] for waited in waits), "nothing waits for the lost replica"


@pytest.mark.filterwarnings("ignore:worker.0 was lost")  # unless both are known to be lost at once
def test_too_few_for_a_code_end_the_fit(cluster: fm.Cluster) -> None:
    """Replicas 0 and 1 compute the same examples."""
    policy, _ = POLICIES["fractional"]
    text = r"replicas 2, 3 are left, of which the code cannot decode.*coded 1 fractional"
    with pytest.raises(WorkerLostError, match=text):
        fit(cluster, policy, {1: "worker:0", 4: "worker:1"}, on_loss="shrink")
