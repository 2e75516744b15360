"""A fit with the state of a model goes on without lost replicas: what they have counted stays, their means do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import BATCH, FEATURES, assert_same, data, mlp, mlp_loss

WORKERS, STEPS = 4, 24
SOURCE = data() | {"number": np.arange(len(data()["x"]), dtype=np.int32)}
RULES: Any = {"seen": "sum", "own": "local", "first": "first"}


def loss(params: Any, state: Any, batch: Any) -> Any:
    mean = 0.5 * state["mean"] + 0.5 * batch["x"].mean(0)
    new = {
        "seen": state["seen"] + batch["x"].shape[0],
        "most": jnp.maximum(state["most"], batch["number"].max()),
        "mean": mean,
        "own": mean,
        "first": mean,
    }
    return mlp_loss(params, batch), new


@pytest.fixture(params=["threads", "processes"], scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[fm.Cluster]:
    make = fm.Cluster.threads if request.param == "threads" else fm.Cluster.local
    with closing(make(workers=WORKERS)) as cluster:
        yield cluster


@pytest.mark.parametrize("policy", [fm.policies.synchronous(), fm.policies.all_reduce(), fm.policies.asynchronous()])
def test_lost_replicas_stay_in_sums_and_not_in_means(cluster: fm.Cluster, policy: fm.Policy, tmp_path: Path) -> None:
    ends = {8: "worker:0", 16: "worker:2"}

    def end(record: dict[str, Any]) -> None:
        if record["step"] in ends:
            cluster.end_worker(ends[record["step"]])

    zero = jnp.zeros(FEATURES)
    state = {"seen": jnp.int32(0), "most": jnp.int32(0), "mean": zero, "own": zero, "first": zero}
    about: dict[str, Any] = {"cluster": cluster, "replicas": WORKERS, "has_state": True, "state_rules": RULES}
    trainer = fm.Trainer(loss, optax.adam(1e-2), policies=policy, **about)
    options: dict[str, Any] = {"batch_size": BATCH, "steps": STEPS, "progress": False, "state": state}
    options |= {"checkpoint": fm.Checkpoint(tmp_path, every_steps=3), "on_loss": "shrink", "callbacks": [end]}
    try:
        with pytest.warns(fm.FlowmlWarning, match="left out with (its|their) replica"):
            found = trainer.fit(mlp(), SOURCE, **options)
    finally:
        cluster.bring_back(cluster.lost)
    assert [loss.workers for loss in found.losses] == [("worker:0",), ("worker:2",)]
    assert int(found.state["seen"]) == found.ledger.used * BATCH // WORKERS, "each item that is used is counted once"
    assert int(found.state["most"]) == len(SOURCE["x"]) - 1
    own = [found.replica_states[r] for r in (1, 3)]
    np.testing.assert_allclose(found.state["mean"], (own[0]["mean"] + own[1]["mean"]) / 2, rtol=1e-5)
    for name in ("own", "first"):
        np.testing.assert_array_equal(found.state[name], own[0]["mean"])
    restored = fm.restore(tmp_path)
    assert restored.step == STEPS
    assert_same(restored.state, found.state)


def test_the_own_optimizer_state_is_that_of_the_first_replica_that_is_left(cluster: fm.Cluster) -> None:
    def end(record: dict[str, Any]) -> None:
        if record["step"] == 8:
            cluster.end_worker("worker:0")

    trainer = fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=cluster, replicas=WORKERS, policies=fm.policies.diloco(4))
    options: dict[str, Any] = {"batch_size": BATCH, "steps": STEPS, "progress": False, "on_loss": "shrink"}
    try:
        with pytest.warns(fm.FlowmlWarning, match="left out with its replica"):
            found = trainer.fit(mlp(), data(), callbacks=[end], **options)
    finally:
        cluster.bring_back(cluster.lost)
    assert int(found.opt_state.own[0].count) == STEPS
