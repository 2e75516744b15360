"""Fits whose replicas join while they run: no step is done twice, and each is one of the replicas that are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.data import epoch_order
from tests.conftest import wait_until
from tests.training.reference import BATCH, assert_close, data, mlp, mlp_loss
from tests.training.test_lost_and_replaced import POLICIES, REPLICAS, UNALIGNED

STEP_S = 0.01
"""What a step takes at least, so that workers join before the end."""


def without(cluster: fm.Cluster, *workers: str) -> None:
    for worker in workers:
        cluster.end_worker(worker)
    wait_until(lambda: {d.worker for d in cluster.devices}.isdisjoint(workers), "the workers are known to be lost")


def doing(at: dict[int, Callable[[], object]]) -> Callable[[dict[str, Any]], None]:
    """A callback that does something at steps, once each."""

    def callback(record: dict[str, Any]) -> None:
        at.pop(record["step"], bool)()

    return callback


def fit(cluster: fm.Cluster, at: dict[int, Callable[[], object]], **options: Any) -> fm.TrainingResult:
    layout = {
        name: options.pop(name) for name in ("policies", "placement", "replicas", "microbatches") if name in options
    }
    trainer = fm.Trainer(
        mlp_loss,
        optax.adam(1e-2),
        cluster=cluster,
        delays={"worker:0": STEP_S},
        **{"replicas": REPLICAS, **layout},
    )
    options = {"batch_size": BATCH, "steps": 300, "seed": 3, "progress": False, **options}
    callbacks = [doing(at), *options.pop("callbacks", ())]
    try:
        return trainer.fit(mlp(), data(), callbacks=callbacks, replicas="elastic", **options)
    finally:
        cluster.bring_back(cluster.lost)


def plain(replicas: Sequence[int], share: int) -> tuple[Any, list[float]]:
    """The usual loop over the examples that so many replicas take at each step, in the order of the epoch."""
    params, source = mlp(), data()
    optimizer = optax.adam(1e-2)
    gradient_of, update = jax.jit(jax.value_and_grad(mlp_loss)), jax.jit(optimizer.update)
    state, losses, at = optimizer.init(params), list[float](), 0
    examples = len(source["x"])
    for step, count in enumerate(replicas):
        epoch, first = divmod(step, examples // BATCH)
        at = at if first else 0
        rows = epoch_order(examples, 3, epoch, shuffle=True)[at : at + count * share]
        at += count * share
        loss, gradient = gradient_of(params, {name: part[rows] for name, part in source.items()})
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    return params, losses


def assert_joined(found: fm.TrainingResult, joined: Sequence[tuple[str, ...]]) -> None:
    steps = len(found.history)
    assert [record["step"] for record in found.history] == list(range(steps))
    assert [change.joined for change in found.changes] == list(joined)
    ledger = found.ledger
    assert ledger.outstanding == 0
    assert ledger.used + ledger.dropped + ledger.folded + ledger.unseen >= steps * REPLICAS


@pytest.mark.parametrize("where", ["threads", "processes"])
def test_replicas_that_join_take_their_share_of_each_step(where: str, request: pytest.FixtureRequest) -> None:
    cluster: fm.Cluster = request.getfixturevalue(where)
    without(cluster, "worker:2", "worker:3")
    last = ["worker:3"]

    def start_the_last(record: dict[str, Any]) -> None:
        if record["replicas"] == REPLICAS - 1 and last:
            cluster.start_worker(last.pop())

    start = {20: lambda: cluster.start_worker("worker:2")}
    found = fit(cluster, start, callbacks=[start_the_last], steps=600)
    assert_joined(found, [("worker:2",), ("worker:3",)])
    replicas = [record["replicas"] for record in found.history]
    second, third = (change.step for change in found.changes)
    assert replicas == [2] * second + [3] * (third - second) + [4] * (len(replicas) - third)
    assert found.ledger.used == sum(replicas), "no step is done twice, and no item is lost"
    params, losses = plain(replicas, BATCH // REPLICAS)
    np.testing.assert_allclose([record["loss"] for record in found.history], losses, rtol=1e-4, atol=1e-6)
    assert_close(found.params, params)


@pytest.mark.parametrize("policy", POLICIES)
def test_replicas_are_lost_and_join_under_each_policy(threads: fm.Cluster, policy: str) -> None:
    without(threads, "worker:3")
    at: dict[int, Callable[[], object]] = {
        20: lambda: threads.start_worker("worker:3"),
        80: lambda: threads.end_worker("worker:1"),
        140: lambda: threads.start_worker("worker:1"),
    }
    with pytest.warns(fm.FlowmlWarning, match="worker:1 was lost"):
        found = fit(threads, at, policies=POLICIES[policy])
    assert_joined(found, [("worker:3",), ("worker:1",)])
    assert [loss.workers for loss in found.losses] == [("worker:1",)]
    if policy != "DiLoCo":  # whose loss goes up and down on so few examples, also without a change
        assert found.history[-1]["loss"] < found.history[0]["loss"] / 2
    if policy in UNALIGNED:
        assert found.ledger.used == len(found.history) * REPLICAS, "those that are there take all items"
    elif policy != "quorum":
        assert [found.history[step]["replicas"] for step in (0, -1)] == [REPLICAS - 1, REPLICAS]


def test_twenty_joins_and_leaves(threads: fm.Cluster) -> None:
    at: dict[int, Callable[[], object]] = {}
    for turn in range(10):
        worker = f"worker:{1 + turn % 3}"
        at[50 * turn + 10] = lambda worker=worker: threads.end_worker(worker)
        at[50 * turn + 30] = lambda worker=worker: threads.start_worker(worker)
    with pytest.warns(fm.FlowmlWarning, match="was lost"):
        found = fit(threads, at, steps=540)
    assert_joined(found, [(f"worker:{1 + turn % 3}",) for turn in range(10)])
    assert len(found.losses) == 10
    assert found.ledger.used == sum(record["replicas"] for record in found.history)
    assert found.history[-1]["replicas"] == REPLICAS


def test_a_replica_of_two_stages_joins_when_both_workers_are_there(processes: fm.Cluster) -> None:
    without(processes, "worker:2", "worker:3")
    start = {20: lambda: processes.start_worker("worker:3"), 60: lambda: processes.start_worker("worker:2")}
    found = fit(processes, start, replicas=2, placement=fm.Pipeline(2), microbatches=2)
    assert [(change.joined, change.replicas) for change in found.changes] == [(("worker:2", "worker:3"), 2)]
    assert found.changes[0].step > 60
    assert found.ledger.used == sum(record["replicas"] for record in found.history)
    params, losses = plain([record["replicas"] for record in found.history], BATCH // 2)
    np.testing.assert_allclose([record["loss"] for record in found.history], losses, rtol=1e-4, atol=1e-6)
    assert_close(found.params, params)


def test_state_that_counts_is_added_up_once(threads: fm.Cluster) -> None:
    def loss(params: Any, state: Any, batch: Any) -> Any:
        return mlp_loss(params, batch), {"steps": state["steps"] + 1}

    without(threads, "worker:2", "worker:3")
    at: dict[int, Callable[[], object]] = {
        20: lambda: threads.start_worker("worker:2"),
        80: lambda: threads.end_worker("worker:1"),
        140: lambda: threads.start_worker("worker:1"),
    }
    options: dict[str, Any] = {
        "has_state": True,
        "state_rules": {"steps": "sum"},
        "delays": {"worker:0": STEP_S, "worker:2": STEP_S},
    }
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=threads, replicas=REPLICAS, **options)
    try:
        with pytest.warns(fm.FlowmlWarning, match="worker:1 was lost"):
            found = trainer.fit(
                mlp(),
                data(),
                batch_size=BATCH,
                steps=300,
                progress=False,
                state={"steps": np.zeros((), np.int32)},
                callbacks=[doing(at)],
                replicas="elastic",
            )
    finally:
        threads.bring_back(threads.lost)
    assert_joined(found, [("worker:2",), ("worker:1",)])
    assert int(found.state["steps"]) == sum(record["replicas"] for record in found.history)


def test_a_lost_worker_that_the_placement_names_has_its_place_beside_enough_others(threads: fm.Cluster) -> None:
    """Three workers are there for two replicas, and the first replica is on the one that is lost."""
    without(threads, "worker:0")
    back = {3: lambda: threads.bring_back("worker:0")}
    found = fit(threads, back, placement={"*": "worker:0"}, replicas=2, steps=600)
    assert found.history[0]["replicas"] == 1
    assert [change.joined for change in found.changes] == [("worker:0",)]
    assert found.history[-1]["replicas"] == 2


def test_what_cannot_be(threads: fm.Cluster) -> None:
    with pytest.raises(ValueError, match="replicas='many': give 'elastic'"):
        fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads).fit(
            mlp(),
            data(),
            batch_size=BATCH,
            steps=1,
            replicas="many",  # type: ignore[arg-type]
        )
    for on_loss in ("replace", "raise"):
        with pytest.raises(ValueError, match=f"on_loss='{on_loss}': an elastic fit .*; leave on_loss out$"):
            fit(threads, {}, on_loss=on_loss)
    with pytest.raises(ValueError, match="min_replicas=5 can never be met: the Trainer has 4 replicas"):
        fit(threads, {}, min_replicas=5)
    with pytest.raises(fm.WorkerLostError, match=r"the fit needs 4 \(min_replicas=\); give a smaller min_replicas$"):
        fit(threads, {5: lambda: threads.end_worker("worker:1")}, min_replicas=4)
    stages: dict[str, Any] = {"microbatches": 4}
    with pytest.raises(
        fm.WorkerLostError,
        match=r"0 of 1 replicas are left, and the fit needs at least one; give more replicas, so that some are left$",
    ):
        fit(threads, {5: lambda: threads.end_worker("worker:1")}, replicas=1, placement=fm.Pipeline(3), **stages)
    without(threads, "worker:1", "worker:2")
    with pytest.raises(ValueError, match=r"0 of 2 .* needs at least one to begin; start worker:1, .* `flowml worker`$"):
        fit(threads, {}, replicas=2, placement=fm.Pipeline(2), **stages)
    without(threads, "worker:1", "worker:2")
    with pytest.raises(
        ValueError, match=r"2 of 4 replicas have their workers, and the fit needs 3 .*worker:1, worker:2"
    ):
        fit(threads, {}, min_replicas=3)


@pytest.mark.parametrize("where", ["threads", "processes"])
def test_a_worker_that_is_there_is_not_started_again(where: str, request: pytest.FixtureRequest) -> None:
    cluster: fm.Cluster = request.getfixturevalue(where)
    found = fit(cluster, {20: lambda: cluster.start_worker("worker:1")}, steps=60)
    assert (found.losses, found.changes) == ((), ())
    assert found.ledger.used == 60 * REPLICAS
