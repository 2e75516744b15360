"""The record of a clock: of the reports that the decision counts and of no others, each by its weight."""

from __future__ import annotations

import math
from typing import Any

import jax
import msgspec
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.plan import Training
from flowml.training.step import Metrics
from flowml_runtime import wire
from flowml_runtime.driver.training.history import History
from tests.training.reference import data, mlp, mlp_loss

REPLICAS = 3
IDS: dict[str, Any] = {"plan_id": "p", "run": 0}


def training(cluster: fm.Cluster, policy: fm.Policy) -> Training:
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=cluster, replicas=REPLICAS, policies=policy, microbatches=2)
    plan = trainer.plan(mlp(), {k: jax.ShapeDtypeStruct((24, *v.shape[1:]), v.dtype) for k, v in data().items()})
    assert plan.training is not None
    return plan.training


def report(history: History, replica: int, clock: int, loss: float, weight: float | None = None) -> None:
    """A replica's sums over two microbatches."""
    item = wire.Item(sequence=clock * REPLICAS + replica, epoch=0, start=0, size=8)
    slots = (0,) if weight is None else (0, 1)
    values = [np.float32(2 * loss)] if weight is None else [np.float32(weight * loss), np.float32(weight)]
    message = wire.Report(**IDS, replica=replica, clock=clock, item=item, slots=slots, seconds=0.1)
    history.report(message, [np.asarray(v) for v in values])


def test_exactly_those_that_are_committed(threads_cluster: fm.Cluster) -> None:
    history = History(training(threads_cluster, fm.policies.quorum(2)), 4, Metrics())
    report(history, 0, 0, 1.0)
    report(history, 1, 0, 3.0)
    assert history.ready() == [], "not decided"
    history.committed(0, (1,))
    assert history.ready() == [], "replica 2 counts and has not reported"
    report(history, 2, 0, 2.0)
    (record,) = history.ready()
    assert (record["loss"], record["replicas"]) == (1.5, 2)
    for clock in (1, 2):
        history.committed(clock, (2,))
        report(history, 0, clock, 1.0)
        report(history, 1, clock, 2.0)
    assert [r["loss"] for r in history.ready()] == [1.5, 1.5], "a replica that is stuck holds nothing up"


def test_a_clock_without_a_decision_goes_with_the_next(threads_cluster: fm.Cluster) -> None:
    history = History(training(threads_cluster, fm.policies.quorum(2, every=2)), 4, Metrics())
    for replica in range(REPLICAS):
        report(history, replica, 0, float(replica))
    report(history, 0, 1, 4.0)
    report(history, 2, 1, 8.0)
    assert history.ready() == []
    history.committed(1, (1,))
    assert [(r["loss"], r["replicas"]) for r in history.ready()] == [(1.0, 2), (6.0, 2)]


@pytest.mark.parametrize("excluded", [(), (1,)], ids=["none", "lost"])
def test_a_lost_replica_is_not_waited_for_whether_the_decision_names_it_or_not(
    threads_cluster: fm.Cluster, excluded: tuple[int, ...]
) -> None:
    """Beside a layer whose gradients all replicas add up, a decision leaves out none for the whole fit."""
    plan = msgspec.structs.replace(training(threads_cluster, fm.policies.quorum(2)), lost=(1,))
    history = History(plan, 4, Metrics())
    history.committed(0, excluded)
    report(history, 0, 0, 1.0)
    assert history.ready() == [], "replica 2 has not reported"
    report(history, 2, 0, 3.0)
    assert [(r["loss"], r["replicas"]) for r in history.ready()] == [(2.0, 2)]


def test_others_report_the_portions_of_a_lost_replica(threads_cluster: fm.Cluster) -> None:
    portions = 2
    plan = msgspec.structs.replace(training(threads_cluster, fm.policies.speculate(portions)), lost=(1,))
    history = History(plan, 4, Metrics())
    for sequence in range(REPLICAS * portions):
        assert history.ready() == [], "the batch is not whole"
        item = wire.Item(sequence=sequence, epoch=0, start=0, size=4)
        message = wire.Report(**IDS, replica=sequence % 2 * 2, clock=sequence // 2, item=item, slots=(0,), seconds=0.1)
        history.report(message, [np.float32(2 * sequence)])
    assert [(r["loss"], r["replicas"]) for r in history.ready()] == [(2.5, 2)]


@pytest.mark.parametrize("policy", [fm.Policy(), fm.policies.quorum(2)], ids=str)
def test_reports_count_by_their_weight(threads_cluster: fm.Cluster, policy: fm.Policy) -> None:
    plan = training(threads_cluster, policy)
    history = History(_with_slots(plan), 4, Metrics(weight=1), leaves_out=True)
    report(history, 0, 0, 1.0, weight=1)
    report(history, 1, 0, 2.0, weight=3)
    report(history, 2, 0, math.nan, weight=5)
    history.committed(0, ())
    (record,) = history.ready()
    assert (record["loss"], record["replicas"]) == (1.75, 2)


def test_a_last_step_that_nobody_reports_has_a_record(threads_cluster: fm.Cluster) -> None:
    """A replica that has pushed may be told to stop before it reports, and the others have skipped the step."""
    history = History(training(threads_cluster, fm.policies.quorum(2)), 4, Metrics())
    for replica in range(REPLICAS):
        report(history, replica, 0, 1.0)
    history.committed(1, ())
    records = history.rest(2)
    assert [(r["step"], r["replicas"]) for r in records] == [(0, 3), (1, 0)]
    assert math.isnan(records[1]["loss"])


def _with_slots(plan: Training) -> Training:
    return msgspec.structs.replace(plan, aux_leaves=1)
