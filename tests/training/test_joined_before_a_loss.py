"""Elastic fits that lose so many replicas that they go on only with workers that have joined and take no part yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import flowml as fm
from tests.conftest import wait_until
from tests.training.reference import BATCH, data, mlp, mlp_loss
from tests.training.test_elastic import doing, fit, without

ALONE = {
    "synchronous": {},
    "ring": fm.policies.ring(),
    "quorum": fm.policies.quorum(0.75),
    "gathered": fm.policies.every(3),
    "DiLoCo": fm.policies.diloco(5),
    "gossip": fm.policies.gossip("ring"),
    "asynchronous": fm.policies.asynchronous(),
    "portions": fm.policies.speculate(),
}
LOST_AT, SAVED_EVERY = 13, 4


def change(cluster: fm.Cluster, joins: Sequence[int], lost: Sequence[int]) -> Callable[[], object]:
    """What a callback calls, so that the fit hears of all of it at once: workers join, and others are lost."""

    def now() -> None:
        for number in joins:
            cluster.start_worker(f"worker:{number}")
        without(cluster, *(f"worker:{number}" for number in lost))

    return now


def restarted(cluster: fm.Cluster, worker: str) -> None:
    without(cluster, worker)
    cluster.start_worker(worker)
    wait_until(lambda: worker in {d.worker for d in cluster.devices}, "the worker is back")


def saved(path: Path) -> dict[str, Any]:
    """A snapshot lies a step behind a push, and some before the loss."""
    return {"checkpoint": fm.Checkpoint(path, every_steps=SAVED_EVERY), "steps": 40}


@pytest.mark.parametrize("policy", ALONE)
def test_one_that_has_joined_takes_the_place_of_the_last(threads: fm.Cluster, policy: str, tmp_path: Path) -> None:
    """It goes on with all that the last one had at the snapshot, so the bits are those of a fit without a loss."""
    options: dict[str, Any] = {"replicas": 2, "policies": ALONE[policy]}
    without(threads, "worker:1", "worker:2", "worker:3")
    whole = fit(threads, {}, **options, **saved(tmp_path / "whole"))
    without(threads, "worker:1", "worker:2", "worker:3")
    with pytest.warns(fm.FlowmlWarning, match="worker:0 was lost .* from step .*, with worker:1, which has joined"):
        found = fit(threads, {LOST_AT: change(threads, [1], [0])}, **options, **saved(tmp_path / "found"))
    (loss,), (joined,) = found.losses, found.changes
    assert loss.workers == ("worker:0",)
    assert LOST_AT - SAVED_EVERY < loss.resumed_at <= loss.step
    assert (joined.joined, joined.step, joined.replicas) == (("worker:1",), loss.resumed_at, 1)
    assert [record["step"] for record in found.history] == list(range(40))
    assert (found.ledger.used, found.ledger.outstanding) == (whole.ledger.used, 0)
    for mine, other in zip(jax.tree.leaves(found.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_the_fewest_replicas_are_there_with_one_that_has_joined(threads: fm.Cluster) -> None:
    without(threads, "worker:2", "worker:3")
    with pytest.warns(fm.FlowmlWarning, match="worker:1 was lost .*, with worker:2, which has joined$"):
        found = fit(threads, {LOST_AT: change(threads, [2], [1])}, replicas=3, min_replicas=2, steps=40)
    assert [(change.joined, change.replicas) for change in found.changes] == [(("worker:2",), 2)]
    assert {record["replicas"] for record in found.history} == {2}
    assert found.ledger.used == 2 * 40


def test_while_enough_are_left_none_waits_for_those_that_have_joined(threads: fm.Cluster) -> None:
    without(threads, "worker:2", "worker:3")
    with pytest.warns(fm.FlowmlWarning, match=r"worker:1 was lost .* the fit goes on from step \d+$"):
        found = fit(threads, {LOST_AT: change(threads, [2], [1])}, replicas=3, steps=300)
    assert [(change.joined, change.replicas) for change in found.changes] == [(("worker:2",), 2)]
    assert found.changes[0].step > found.losses[0].resumed_at


def test_two_are_lost_at_once_when_two_have_joined(threads: fm.Cluster) -> None:
    without(threads, "worker:2", "worker:3")
    policies = fm.policies.diloco(5)
    with pytest.warns(fm.FlowmlWarning, match=r"worker:0.*worker:1 were lost .*, with .*worker:3, which have joined$"):
        found = fit(threads, {LOST_AT: change(threads, [2, 3], [0, 1])}, policies=policies, min_replicas=2, steps=40)
    assert [(change.joined, change.replicas) for change in found.changes] == [(("worker:2", "worker:3"), 2)]
    assert {record["replicas"] for record in found.history} == {2}
    assert found.ledger.used == 2 * 40


def test_one_that_has_joined_is_lost_too(threads: fm.Cluster) -> None:
    without(threads, "worker:2", "worker:3")
    with pytest.warns(fm.FlowmlWarning, match="were lost .*, with worker:2, which has joined$"):
        found = fit(threads, {LOST_AT: change(threads, [2, 3], [0, 1, 3])}, steps=40)
    assert [(change.joined, change.replicas) for change in found.changes] == [(("worker:2",), 1)]
    without(threads, "worker:1", "worker:2", "worker:3")
    with pytest.raises(fm.WorkerLostError, match="0 of 2 replicas are left, and the fit needs at least one"):
        fit(threads, {LOST_AT: change(threads, [1], [0, 1])}, replicas=2, steps=40)


def test_the_last_one_is_back_before_the_fit_hears_of_its_loss(threads: fm.Cluster) -> None:
    without(threads, "worker:1", "worker:2", "worker:3")
    with pytest.warns(fm.FlowmlWarning, match="worker:0 was lost"):
        found = fit(threads, {LOST_AT: lambda: restarted(threads, "worker:0")}, replicas=1, steps=40)
    assert [(change.joined, change.replicas) for change in found.changes] == [(("worker:0",), 1)]
    assert found.ledger.used == 40


def test_a_replica_takes_part_when_all_its_stages_have_joined(threads: fm.Cluster) -> None:
    options: dict[str, Any] = {"replicas": 2, "placement": fm.Pipeline(2), "microbatches": 2, "steps": 40}
    without(threads, "worker:2", "worker:3")
    with pytest.warns(fm.FlowmlWarning, match="worker:0 was lost"):
        found = fit(threads, {LOST_AT: change(threads, [2, 3], [0])}, **options)
    assert [(change.joined, change.replicas) for change in found.changes] == [(("worker:2", "worker:3"), 1)]
    assert found.ledger.used == 40
    without(threads, "worker:2", "worker:3")
    with pytest.raises(fm.WorkerLostError, match="0 of 2 replicas are left, and the fit needs at least one"):
        fit(threads, {LOST_AT: change(threads, [3], [0])}, **options)


def test_state_that_counts_goes_on_when_all_are_lost(threads: fm.Cluster, tmp_path: Path) -> None:
    def loss(params: Any, state: Any, batch: Any) -> Any:
        return mlp_loss(params, batch), {"steps": state["steps"] + 1}

    without(threads, "worker:2", "worker:3")
    rules: dict[str, Any] = {"has_state": True, "state_rules": {"steps": "sum"}}
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=threads, replicas=4, **rules)
    at = {LOST_AT: change(threads, [2, 3], [0, 1])}
    options: dict[str, Any] = {"callbacks": [doing(at)], "replicas": "elastic", "batch_size": BATCH, "progress": False}
    try:
        state = {"steps": np.zeros((), np.int32)}
        with pytest.warns(fm.FlowmlWarning, match="were lost"):
            found = trainer.fit(mlp(), data(), state=state, **options, **saved(tmp_path / "state"))
    finally:
        threads.bring_back(threads.lost)
    assert found.losses[0].resumed_at > 0
    assert int(found.state["steps"]) == 2 * 40


@pytest.mark.parametrize("policy", [fm.policies.asynchronous(), fm.policies.coded(1), fm.policies.quorum(1)])
@pytest.mark.parametrize("least", [1, 2])
def test_an_error_of_which_no_replica_is_left_says_what_helps(threads: fm.Cluster, policy: Any, least: int) -> None:
    without(threads, "worker:2", "worker:3")
    with pytest.raises(fm.WorkerLostError) as raised:
        lost = {LOST_AT: change(threads, [], [0, 1])}
        fit(threads, lost, policies=policy, replicas=2, min_replicas=least, steps=40)
    needs = "2 (min_replicas=)" if least == 2 else "at least one"
    told = f"0 of 2 replicas are left, and the fit needs {needs}; give more replicas, so that some are left"
    assert str(raised.value).endswith(told)


def test_a_fit_that_only_shrinks_takes_in_nobody(threads: fm.Cluster) -> None:
    at: dict[int, Callable[[], object]] = {5: lambda: without(threads, "worker:1"), LOST_AT: change(threads, [1], [0])}
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads, replicas=2)
    without(threads, "worker:2", "worker:3")
    options: dict[str, Any] = {"batch_size": BATCH, "steps": 40, "callbacks": [doing(at)], "progress": False}
    try:
        with (
            pytest.warns(fm.FlowmlWarning, match="worker:1 was lost"),
            pytest.raises(fm.WorkerLostError, match=r"0 of 2 .*; give on_loss='replace', or more replicas"),
        ):
            trainer.fit(mlp(), data(), on_loss="shrink", **options)
    finally:
        threads.bring_back(threads.lost)
