"""After a loss callbacks still see each record when its step is over, in fits of layers with rules of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax
import pytest

import flowml as fm
from tests.training.reference import BATCH, data, mlp, mlp_loss
from tests.training.test_elastic import STEP_S, doing, without
from tests.training.test_lost_and_replaced import REPLICAS

STEPS = 120
named = fm.policies
MIXES = {
    "quorum and sums": (named.quorum(0.75), named.all_reduce()),
    "deadline and ring": (named.deadline(0.75), named.ring()),
    "decoupled and sums": (named.decoupled_diloco(4, quorum=0.5), named.all_reduce()),
    "quorum and gossip": (named.quorum(0.75), named.gossip("ring")),
    "quorum, local and no bound": (named.quorum(0.75), named.local_sgd(4), named.asynchronous()),
    "quorum among sites": (
        fm.Policy(
            topology=fm.Hierarchy(fm.AllReduce(), fm.ParameterServer(), sites=2), quorum=fm.Quorum(0.5, late="fold")
        ),
    ),
}


def fit(cluster: fm.Cluster, mix: str, at: dict[int, Callable[[], object]], **options: Any) -> fm.TrainingResult:
    policies = dict(zip(("fc0*", "fc1*", "*"), MIXES[mix], strict=False))
    policies["*"] = policies.get("*", MIXES[mix][-1])
    delays = {f"worker:{r}": STEP_S / 4 for r in range(REPLICAS)}
    trainer = fm.Trainer(
        mlp_loss, optax.sgd(1e-2), cluster=cluster, replicas=REPLICAS, policies=policies, delays=delays
    )
    options = {"batch_size": BATCH, "steps": STEPS, "progress": False, "callbacks": [doing(at)], **options}
    try:
        with pytest.warns(fm.FlowmlWarning, match="was lost at step"):
            return trainer.fit(mlp(), data(), **options)
    finally:
        cluster.bring_back(cluster.lost)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("elastic", [False, True], ids=["shrink", "elastic"])
def test_callbacks_keep_up_with_the_steps(threads: fm.Cluster, mix: str, elastic: bool) -> None:
    ends = {12: "worker:3", 30: "worker:1"}
    if elastic:
        ends = {12: "worker:2"}
        without(threads, "worker:3")
    at: dict[int, Callable[[], object]] = {
        step: lambda worker=worker: threads.end_worker(worker) for step, worker in ends.items()
    }
    found = fit(threads, mix, at, **({"replicas": "elastic"} if elastic else {"on_loss": "shrink"}))
    assert [loss.workers for loss in found.losses] == [(worker,) for worker in ends.values()]
    for step, loss in zip(ends, found.losses, strict=True):
        assert step <= loss.step < step + 40, "the step of the newest record"
        assert loss.resumed_at <= loss.step
    assert [record["step"] for record in found.history] == list(range(STEPS))
    assert found.history[90]["seconds"] < found.history[-1]["seconds"], "it does not wait for the end"
    assert {record["replicas"] for record in found.history[90:]} <= {1, 2}
