"""A later stage of a replica is silent while its first one goes on: others go on, and so do their snapshots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.driver.training import saving
from tests.training.test_silent_replicas import BEFORE, SILENT, STEPS, WAITING, check, falls_silent

REPLICAS, STAGES = 2, 2
EXAMPLES = STEPS * REPLICAS


@pytest.fixture(scope="module")
def patient() -> Iterator[fm.Cluster]:
    """The last worker has the second stage of replica 1, and is the home of no layer."""
    with closing(fm.Cluster.local(workers=REPLICAS * STAGES, lost_after_s=120)) as cluster:
        yield cluster


def loss(params: Any, batch: Any) -> Any:
    """The gradient of each stage is that of the mean. That of the first one comes through the second, as usual."""
    with fm.layer("a"):
        first = jnp.mean(batch @ params["a"]["w"])
    with fm.layer("b"):
        second = jnp.mean(batch @ params["b"]["w"])
        one = 1.0 + 0.0 * jax.lax.stop_gradient(second)
        return -(first * one + second)


@pytest.mark.filterwarnings("ignore:worker.3 was lost")
@pytest.mark.parametrize(
    ("policy", "on_loss"),
    [
        (fm.policies.quorum(0.5), "replace"),
        (fm.policies.quorum(0.5), "shrink"),
        (fm.policies.quorum(0.5, late="fold"), "replace"),
        (fm.policies.quorum(0.5, late="requeue"), "replace"),
        ({"a/*": fm.policies.quorum(0.5), "*": fm.policies.quorum(0.5, late="fold")}, "replace"),
        (fm.policies.decoupled_diloco(every=4, quorum=0.5, outer=optax.sgd(1.0), grace=0.0), "replace"),
        (fm.policies.coded(1), "replace"),
        (fm.policies.speculate(1), "replace"),
        (fm.policies.asynchronous(), "replace"),
    ],
    ids=["quorum", "shrinks", "folds", "requeues", "mixed", "rounds", "coded", "portions", "asynchronous"],
)
def test_others_lose_few_steps(patient: fm.Cluster, monkeypatch: pytest.MonkeyPatch, policy: Any, on_loss: Any) -> None:
    monkeypatch.setattr(saving, "MOST_SHARE", 1.0)
    placement = fm.Pipeline(stages=STAGES)
    about: dict[str, Any] = {"cluster": patient, "replicas": REPLICAS, "placement": placement, "policies": policy}
    trainer = fm.Trainer(loss, optax.sgd(1.0), **about)
    params = {layer: {"w": jnp.zeros(EXAMPLES)} for layer in "ab"}
    size: dict[str, Any] = {"batch_size": REPLICAS, "steps": STEPS, "progress": False}
    try:
        source, callbacks = np.eye(EXAMPLES, dtype=np.float32), [falls_silent(patient)]
        found = trainer.fit(params, source, callbacks=callbacks, on_loss=on_loss, **size)
    finally:
        patient.bring_back(patient.lost)
    [lost] = found.losses
    assert lost.workers == (SILENT,)
    assert BEFORE < lost.resumed_at <= lost.step + WAITING
    assert [record["step"] for record in found.history] == list(range(STEPS))
    if not isinstance(policy, dict):
        check(found)
        return
    for name, items in found.ledger.groups.items():  # one rule counts later what the other one drops
        assert np.count_nonzero(found.params[name.split()[0]]["w"]) == items.used + items.folded
