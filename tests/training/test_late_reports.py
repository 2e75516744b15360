"""A replica that counts but stops before its report holds the history up for a bounded number of clocks."""

from __future__ import annotations

from typing import Any

import flowml as fm
from flowml.training.step import Metrics
from flowml_runtime.driver.training.history import MAX_AHEAD, History
from tests.training.test_history import REPLICAS, report, training


def begun(cluster: fm.Cluster, **policy: Any) -> History:
    """Clock 0 counts all replicas, and replica 2 has not reported it."""
    history = History(training(cluster, fm.policies.quorum(2, **policy)), 4, Metrics())
    history.committed(0, ())
    for replica in range(REPLICAS - 1):
        report(history, replica, 0, 1.0 + replica)
    return history


def test_newer_clocks_go_on_without_it(threads_cluster: fm.Cluster) -> None:
    history = begun(threads_cluster)
    for clock in range(1, MAX_AHEAD):
        history.committed(clock, (2,))
        report(history, 0, clock, 1.0)
        assert history.ready() == [], "replica 1 has not reported"
        report(history, 1, clock, 3.0)
        assert history.ready() == [], f"only {clock} clocks are newer"
    history.committed(MAX_AHEAD, (2,))
    for replica in range(REPLICAS - 1):
        report(history, replica, MAX_AHEAD, 2.0)
    records = history.ready()
    assert [r["step"] for r in records] == list(range(MAX_AHEAD + 1))
    assert [r["replicas"] for r in records] == [2] * (MAX_AHEAD + 1)
    assert [r["loss"] for r in records[:2]] == [1.5, 2.0]


def test_newer_batches_go_on_without_the_report_of_a_portion(threads_cluster: fm.Cluster) -> None:
    """Its result had arrived, and the replica stopped before it reported."""
    history = History(training(threads_cluster, fm.policies.speculate(1)), 4, Metrics())
    records = list[dict[str, Any]]()
    for clock in range(MAX_AHEAD + 1):
        assert records == [], f"only {clock - 1} batches are newer"
        for replica in range(REPLICAS - (clock == 0)):
            report(history, replica, clock, 1.0 + replica)
        records += history.ready()
    report(history, REPLICAS - 1, 0, 100.0)  # too late
    assert history.ready() == []
    assert [r["step"] for r in records] == list(range(MAX_AHEAD + 1))
    assert [r["replicas"] for r in records] == [REPLICAS - 1] + [REPLICAS] * MAX_AHEAD
    assert [r["loss"] for r in records[:2]] == [REPLICAS / 2, (REPLICAS + 1) / 2]


def test_its_report_is_in_time_before_that_and_ignored_after_it(threads_cluster: fm.Cluster) -> None:
    for late in (False, True):
        history = begun(threads_cluster)
        for clock in range(1, MAX_AHEAD + late):
            history.committed(clock, (2,))
            for replica in range(REPLICAS - 1):
                report(history, replica, clock, 2.0)
        records = history.ready()
        report(history, 2, 0, 6.0)
        records += history.ready()
        assert len(records) == MAX_AHEAD + late
        assert (records[0]["replicas"], records[0]["loss"]) == ((2, 1.5) if late else (3, 3.0))


def test_a_report_that_is_slow_for_all_is_waited_for(threads_cluster: fm.Cluster) -> None:
    history = begun(threads_cluster)
    for clock in range(1, 3 * MAX_AHEAD):
        history.committed(clock, ())
        report(history, 0, clock, 1.0)
    assert history.ready() == []
