"""`flowml bench recovery`: what it takes for a gap, and that both sides come to their end."""

from __future__ import annotations

import flowml as fm
from flowml_tools.bench import left_behind, lost, recovery, suspended
from flowml_tools.bench.table import render


def test_both_sides_survive_their_kills_and_each_kill_has_a_gap() -> None:
    rows = recovery.rows(1, 40, lambda: fm.Cluster.threads(workers=recovery.REPLICAS))
    assert [len(row.ours.values) for row in rows] == [recovery.KILLS, 1, 1] * 2 * len(recovery.VICTIMS)
    for row in rows:
        assert row.peer.sample is not None
        assert len(row.peer.sample.values) == len(row.ours.values)
    gaps, late, goodput = rows[:3]
    assert late.ours.median <= max(gaps.ours.values)
    assert 0 < goodput.ours.median < 2
    assert "kill of a home, a spare: gap, median of 3" in render("recovery", rows)


def test_a_coordinator_and_a_driver_are_lost() -> None:
    longest, takeover, driver = lost.rows(1, 40)
    assert longest.peer.sample is not None
    assert driver.peer.sample is not None
    assert takeover.met is True
    assert len(takeover.ours.values) == 2, "one fit warms up"


def test_a_gap_is_the_longest_time_without_a_new_step_soon_after_the_kill() -> None:
    class Cluster:
        def __init__(self) -> None:
            self.ended: list[str] = []

        def end_worker(self, worker: str) -> None:
            self.ended.append(worker)

    kills = recovery.Kills("worker:1", [2])
    kills.cluster = Cluster()
    for step in (0, 1, 2, 3, 1, 2, 3, 4):
        kills({"step": step})
    assert kills.cluster.ended == ["worker:1"], "once, although the step is done again"
    assert len(kills.gaps()) == 1


def test_a_replica_that_nobody_waits_for_is_lost() -> None:
    (row,) = left_behind.rows(1, 60)
    assert row.ours.median > 0
    assert row.peer.sample is not None


def test_a_worker_is_stopped_in_bursts() -> None:
    (step,) = suspended.rows(1, 16)
    assert step.ours.median > 0 < step.peer.sample.median  # type: ignore[union-attr]
