"""A replica is silent for long, and is lost then: the fit goes on from a snapshot of the others, with a true ledger."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.policy import Fold
from flowml_runtime.driver.training import saving

REPLICAS, STEPS = 4, 320
SILENT, SILENT_AT, LOST_AT = "worker:3", 10, 240
"""The model has three layers, so this worker is the home of none."""
BEFORE = 40
"""A snapshot of all replicas is of an earlier step: a replica has work for few steps ahead."""
EXAMPLES = STEPS * REPLICAS


@pytest.fixture(scope="module")
def patient() -> Iterator[fm.Cluster]:
    with closing(fm.Cluster.local(workers=REPLICAS, lost_after_s=120)) as cluster:
        yield cluster


def count(cluster: fm.Cluster, policy: Any, on_loss: Any) -> fm.TrainingResult:
    """A fit in which a replica falls silent, whose parameters show the weight with which each example was applied."""

    def loss(params: Any, batch: Any) -> Any:
        return -sum(jnp.mean(batch @ params[layer]["w"]) for layer in "abc")

    def callback(record: dict[str, Any]) -> None:
        step = record["step"]
        if step in (SILENT_AT, LOST_AT):
            os.kill(pid, signal.SIGSTOP if step == SILENT_AT else signal.SIGKILL)
        if SILENT_AT < step <= LOST_AT:
            time.sleep(0.02)  # snapshots are taken by time

    pid = cluster.pids[SILENT]
    trainer = fm.Trainer(loss, optax.sgd(1.0), cluster=cluster, replicas=REPLICAS, policies=policy)
    params = {layer: {"w": jnp.zeros(EXAMPLES)} for layer in "abc"}
    source = np.eye(EXAMPLES, dtype=np.float32)
    fixed: dict[str, Any] = {"batch_size": REPLICAS, "steps": STEPS, "progress": False}
    return trainer.fit(params, source, callbacks=[callback], on_loss=on_loss, **fixed)


ROUNDS: dict[str, Any] = {"every": 4, "quorum": 0.75, "outer": optax.sgd(1.0), "grace": 0.0}


@pytest.mark.filterwarnings("ignore:worker.3 was lost")
@pytest.mark.parametrize(
    ("policy", "on_loss"),
    [
        (fm.policies.quorum(0.75), "replace"),
        (fm.policies.quorum(0.75), "shrink"),
        (fm.policies.quorum(0.75, late="fold"), "replace"),
        (fm.policies.quorum(0.75, late="requeue"), "replace"),
        (fm.policies.decoupled_diloco(**ROUNDS), "replace"),
        (fm.policies.decoupled_diloco(**ROUNDS, late="drop"), "replace"),
        (fm.policies.decoupled_diloco(**ROUNDS), "shrink"),
    ],
    ids=["quorum", "quorum-shrinks", "folds", "requeues", "rounds-fold", "rounds-drop", "rounds-shrink"],
)
def test_others_lose_few_steps(
    patient: fm.Cluster, policy: fm.Policy, on_loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "MOST_SHARE", 1.0)
    try:
        found = count(patient, policy, on_loss)
    finally:
        patient.bring_back(patient.lost)
    [loss] = found.losses
    assert loss.workers == (SILENT,)
    assert BEFORE < loss.resumed_at <= loss.step + 1
    assert [record["step"] for record in found.history] == list(range(STEPS))
    ledger = found.ledger
    assert ledger.outstanding == 0
    assert ledger.used + ledger.dropped + ledger.folded + ledger.unseen == EXAMPLES
    layers = [np.asarray(found.params[layer]["w"]) for layer in "abc"]
    for weights in layers:
        np.testing.assert_array_equal(weights, layers[0], "all layers have the same items")
    applied = np.count_nonzero(layers[0])
    assert applied == ledger.used + ledger.folded, "what was acknowledged was applied, and nothing else"
    late = isinstance(policy.late, Fold)
    if not late and policy.every.push == 1:
        counts = [record["replicas"] for record in found.history]
        expected = np.sort(np.concatenate([np.full(n, np.float32(1) / n) for n in counts]))
        np.testing.assert_allclose(np.sort(layers[0][layers[0] != 0]), expected, rtol=1e-6, err_msg="each once")
