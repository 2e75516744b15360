"""The benchmark of the training machines: a whole run ends, and its cost grows with its messages and no faster."""

from __future__ import annotations

import pytest

from flowml.policy import Policy, Quorum
from flowml_tools.bench.machines import Run
from flowml_tools.bench.rows import Goal, Peer, Row, Sample
from flowml_tools.bench.table import render

EVENTS_A_STEP = 7
"""Contribution, StepFinished, Commit, Published; in a short run Ask, Grant and Settled, which a long one needs less."""


@pytest.mark.parametrize("share", [1.0, 0.75])
def test_the_events_of_a_run_grow_with_replicas_times_clocks(share: float) -> None:
    for replicas, clocks in ((4, 10), (40, 10), (40, 30)):
        events = Run(replicas, clocks, Policy(quorum=Quorum(share))).go()
        assert 4 * replicas * clocks <= events <= EVENTS_A_STEP * replicas * (clocks + 2)


def test_a_replica_of_a_long_run_asks_for_several_items_at_once() -> None:
    events = Run(40, 100, Policy(quorum=Quorum(1.0))).go()
    assert events <= (4 + 3 / 6) * 40 * (100 + 2)


def test_a_goal_may_bound_the_value_itself() -> None:
    goal = Goal("at most", 10.0, of="value")
    rows = [Row("run", "s", Sample((seconds,)), Peer("no peer"), goal) for seconds in (9.0, 11.0)]
    assert [row.met for row in rows] == [True, False]
    text = render("machines", rows)
    assert "≤ 10.0 s" in text
    assert text.count("MISSED") == 1
