"""Whole training runs: the real machines joined over a fake link, under random speeds, delays and policies."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flowml import policies
from flowml.policy import UNBOUNDED, Deadline, Fold, Policy, Quorum
from flowml_runtime import wire
from flowml_runtime.protocol.training import ledger
from flowml_runtime.protocol.training.actions import Received
from flowml_tools.faults.campaign import check_rest
from flowml_tools.faults.checker import check
from flowml_tools.faults.history import Turn
from flowml_tools.faults.layout import MICROBATCHES, make
from flowml_tools.faults.world import World


def check_all(run: World) -> ledger.Summary:
    """The run ends, comes to rest, and keeps its promises."""
    run.go()
    check_rest(run)
    assert check(run.history) == []
    assert run.history.summary is not None
    return run.history.summary


def test_full_synchrony_applies_exactly_the_reference_sum_of_every_row() -> None:
    for seed in range(20):
        run = make([policies.synchronous()] * 3, replicas=3, stages=3, clocks=9, items=10, speeds=(1, 5, 2), seed=seed)
        summary = check_all(run)
        assert summary.used == 27
        assert (summary.dropped, summary.returned, summary.unseen) == (0, 0, 3)  # 10 items are 3 rows of 3, and one
        for versions in run.applied.values():
            rows = [[(who, clock, value) for who, clock, value, _ in version] for version in versions]
            sequence = [(c // 3) * 10 + (c % 3) * 3 for c in range(9)]
            assert rows == [[(r, c, 16 ** (sequence[c] + r)) for r in range(3)] for c in range(9)]


def test_pushing_every_k_applies_sums_over_windows_and_the_last_one_is_short() -> None:
    run = make([policies.every(4)], replicas=2, clocks=10, items=20, speeds=(1, 3))
    check_all(run)
    windows = [range(4), range(4, 8), range(8, 10)]
    expected = [[(r, w[-1], sum(16 ** (2 * c + r) for c in w)) for r in range(2)] for w in windows]
    assert [[entry[:3] for entry in version] for version in run.applied[0]] == expected


def test_a_quorum_leaves_the_slow_replica_behind_and_loses_only_its_items() -> None:
    run = make([policies.quorum(0.75)] * 3, replicas=4, clocks=40, items=80, speeds=(1, 1, 1, 12), twice=0.2)
    summary = check_all(run)
    assert len(run.driver.commits) == 40
    assert all(len(c.excluded) <= 1 for c in run.driver.commits)
    slow = summary.replicas[3]
    assert slow.used < 20
    assert slow.dropped > 5
    assert all(summary.replicas[r].used > slow.used for r in range(3))


def test_asynchronous_replicas_share_the_queue_by_their_speed() -> None:
    run = make([policies.asynchronous()] * 2, replicas=2, clocks=20, speeds=(1, 8), items=16)
    summary = check_all(run)
    assert summary.used == run.work.total_items
    assert summary.unseen + summary.used == run.work.epochs * 16
    assert summary.replicas[0].used > 2 * summary.replicas[1].used


def test_more_replicas_than_items_left_retire_without_a_step() -> None:
    run = make([policies.asynchronous(staleness=1)], replicas=4, stages=3, clocks=1, items=4, speeds=(1, 9, 9, 9))
    assert check_all(run).used == 4


def test_a_sum_counts_steps_not_replicas() -> None:
    run = make([policies.every(3, apply="sum")], replicas=2, clocks=6)
    check_all(run)
    assert {factor for version in run.applied[0] for *_, factor in version} == {1 / MICROBATCHES}


def test_a_sum_of_all_replicas_is_one_contribution_and_needs_no_decision() -> None:
    run = make([policies.all_reduce(every=2)], replicas=3, stages=1, clocks=5, items=15, speeds=(1, 5, 2))
    assert check_all(run).used == 15
    assert run.driver.commits == []
    expected = [sum(16 ** (3 * c + r) for c in window for r in range(3)) for window in ((0, 1), (2, 3), (4,))]
    assert run.applied[0] == [
        [(0, clock, value, pytest.approx(1 / (3 * steps * MICROBATCHES)))]
        for clock, value, steps in zip((1, 3, 4), expected, (2, 2, 1), strict=True)
    ]


def about(turn: Turn) -> object:
    """The message that a machine has received in a turn."""
    return turn.event.message if isinstance(turn.event, Received) else None


SYNC, ASYNC = policies.synchronous(), policies.asynchronous()
FOLD = policies.quorum(0.5, late="fold")
COMPOSITIONS: dict[str, list[Policy]] = {
    "sync": [SYNC] * 3,
    "every": [policies.every(3)] * 3,
    "rhythms": [SYNC, policies.every(2), policies.every(5)],
    "quorum": [policies.quorum(0.5)] * 3,
    "first of all": [policies.quorum(1)] * 3,
    "quorum every": [policies.quorum(0.5, every=3)] * 3,
    "quorum rhythms": [policies.quorum(0.5), policies.quorum(0.5, every=3), policies.quorum(0.5, every=4)],
    "quorums": [policies.quorum(0.5), policies.quorum(1.0, every=3)],
    "bounded": [policies.asynchronous(2)] * 3,
    "bounded every": [policies.asynchronous(1, every=2), policies.asynchronous(4, every=3)],
    "unbounded": [ASYNC, policies.asynchronous(every=3), ASYNC],
    "mixed": [SYNC, ASYNC, policies.asynchronous(2, every=2)],
    "mixed every": [ASYNC, policies.every(3), policies.asynchronous(1)],
    "sums": [policies.all_reduce()] * 3,
    "sums every": [policies.all_reduce(every=3), policies.all_reduce(every=2), policies.all_reduce()],
    "sums and commits": [policies.all_reduce(), SYNC, policies.all_reduce(every=2), policies.every(3)],
    "sums and arrivals": [ASYNC, policies.all_reduce(every=3), policies.all_reduce(), ASYNC],
    "stale": [Policy(staleness=2, quorum=Quorum(1.0))] * 3,
    "stale quorum": [policies.quorum(0.5, staleness=2)] * 3,
    "stale quorum every": [policies.quorum(0.5, staleness=3, every=2)] * 3,
    "stale quorum rhythms": [policies.quorum(0.5, staleness=3), policies.quorum(0.5, staleness=2, every=4)],
    "groups": [policies.quorum(0.5), SYNC, policies.quorum(0.75, every=2)],
    "quorum and arrivals": [policies.quorum(0.5), ASYNC, policies.asynchronous(1, every=3)],
    "quorum and sums": [policies.quorum(0.5), policies.all_reduce(every=2), policies.quorum(1, every=3)],
    "fold": [FOLD] * 3,
    "fold every": [policies.quorum(0.5, late="fold", every=3), policies.quorum(1, late=Fold(0.5), every=2)],
    "fold and others": [FOLD, policies.quorum(0.5), SYNC],
    "fold and sums": [FOLD, policies.all_reduce()],
    "requeue": [policies.quorum(0.5, late="requeue")] * 3,
    "requeue every": [policies.quorum(0.5, late="requeue", every=3)],
    "requeue and others": [policies.quorum(0.5, late="requeue"), policies.quorum(0.75), FOLD],
    "samples": [Policy(quorum=Quorum(0.6, of="samples"))] * 2,
    "deadline": [Policy(quorum=Deadline(0.5, grace=0.3))] * 3,
    "adaptive deadline": [Policy(quorum=Deadline(0.5)), Policy(quorum=Deadline(1, late="fold"))],
    "time limit": [Policy(quorum=Deadline(1.0, limit_s=1.5)), SYNC],
    "softsync": [Policy(staleness=UNBOUNDED, quorum=Quorum(0.5, late="fold"))] * 3,
    "bounded softsync": [Policy(staleness=1, quorum=Quorum(1.0, late="fold")), ASYNC],
    "softsync and quorum": [Policy(staleness=2, quorum=Quorum(0.5, late="fold"), every=2), policies.quorum(0.5)],
}


@pytest.mark.parametrize("name", COMPOSITIONS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    replicas=st.integers(1, 4),
    stages=st.integers(1, 3),
    workers=st.none() | st.integers(1, 5),
    clocks=st.integers(1, 14),
    speeds=st.lists(st.sampled_from([0.1, 1.0, 4.0, 20.0]), min_size=4, max_size=4),
    twice=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**32),
)
def test_every_composition_ends_and_keeps_its_promises(
    name: str,
    replicas: int,
    stages: int,
    workers: int | None,
    clocks: int,
    speeds: list[float],
    twice: float,
    seed: int,
) -> None:
    rules = COMPOSITIONS[name]
    kwargs: dict[str, Any] = {"clocks": clocks, "speeds": speeds, "twice": twice, "seed": seed, "workers": workers}
    run = make(rules, replicas=replicas, stages=stages, items=replicas * 3 + seed % 2, **kwargs)
    summary = check_all(run)
    if all(p.quorum.never_drops(replicas) or not p.clocked for p in rules):
        assert summary.dropped == 0
        assert summary.used == (clocks * replicas if run.terms.aligned else run.work.total_items)


def test_a_stage_gets_an_item_again_before_it_has_used_its_first_batch() -> None:
    """The first stage has given the item up and begun others. The batch of the new grant is one more."""
    run = make(COMPOSITIONS["requeue"], replicas=2, stages=3, clocks=10, items=6, speeds=(4, 20), twice=0.5, seed=5182)
    assert check_all(run).requeued > 0


class SlowBatches:
    """What the driver feeds a worker takes very long. Implements `network.Tamper`."""

    def delays(self, source: str, to: str, message: object) -> tuple[float, ...]:
        return (1e6 if isinstance(message, wire.Batch) and to == "worker:3" else 0.1,)


def test_a_step_that_is_given_up_does_not_wait_for_its_batch() -> None:
    run = make([policies.quorum(0.5)] * 2, replicas=2, clocks=4, under=SlowBatches())
    assert check_all(run).used >= 4
    retired = [f.at for f in run.history.facts if isinstance(f, Turn) and isinstance(about(f), wire.Retired)]
    assert max(retired) < 1e6


@pytest.mark.parametrize("name", ["sync", "every", "rhythms", "quorum every", "bounded", "mixed", "stale quorum every"])
@settings(max_examples=15, deadline=None)
@given(victim=st.integers(1, 3), when=st.floats(0, 60), seed=st.integers(0, 2**32))
@example(victim=2, when=59.45820216403237, seed=2428028403)  # its last words come after the run is over
def test_the_rest_goes_on_without_a_lost_replica(name: str, victim: int, when: float, seed: int) -> None:
    rules = COMPOSITIONS[name]
    run = make(rules, replicas=4, clocks=12, seed=seed, homes_on=0)
    run.lose(victim, when)
    check_all(run)


def test_one_seed_gives_one_story() -> None:
    stories = [make(COMPOSITIONS["quorum"], replicas=4, speeds=(1, 2, 3, 9), seed=7) for _ in range(2)]
    for run in stories:
        check_all(run)
    assert stories[0].applied == stories[1].applied
    assert stories[0].driver.commits == stories[1].driver.commits
    assert stories[0].clock.trace_hash == stories[1].clock.trace_hash
    other = make(COMPOSITIONS["quorum"], replicas=4, speeds=(1, 2, 3, 9), seed=8)
    check_all(other)
    assert other.clock.trace_hash != stories[0].clock.trace_hash
