"""Portions of batches, and copies of them: each counts once, whoever computes it, and every grant comes back."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowml import policies
from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.decision import Wake
from flowml_runtime.protocol.training.ledger import Asked, Ledger, Settled, Summary, Work
from flowml_runtime.protocol.training.portions import Portions
from flowml_runtime.protocol.training.replica import Settle
from flowml_runtime.protocol.training.speculation import MOST_IN_VAIN
from flowml_runtime.protocol.training.stage import (
    Abandon,
    Ask,
    Begin,
    BeginReceived,
    Granted,
    LeaderRetired,
    Retire,
    Start,
    Started,
    StepFinished,
    StorePublished,
)
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Committed, ReplicaLost, Terms, Tick
from flowml_tools.faults.layout import make
from flowml_tools.faults.world import World

WORK = Work(2, 8, item_size=4, total_clocks=2, aligned=True, portions=2, copies=1)


def item(sequence: int, copy: int = 0) -> wire.Item:
    return wire.Item(sequence, 0, sequence * 4, 4, copy)


def granted(ledger: Ledger, replica: int, clock: int, *, copy: bool = False) -> wire.Item | None:
    (grant,) = ledger.step(Asked(replica, (clock,), copy=0 if copy else None))
    return grant.items[0][1] if grant.items else None


# The ledger.


def test_idle_replicas_take_the_next_portion_and_then_a_copy_of_the_oldest() -> None:
    ledger = Ledger(WORK)
    assert [granted(ledger, 1, n) for n in range(2)] == [item(0), item(1)]
    assert [granted(ledger, 0, n) for n in range(3)] == [item(2), item(3), item(4)]  # the last one for later
    assert granted(ledger, 0, 3, copy=True) == item(1, copy=1)
    assert granted(ledger, 0, 4, copy=True) is None  # replica 1 has one portion, which has a copy
    ledger.step(Settled(0, ((item(2), "used"), (item(3), "used"), (item(1, 1), "used"))))
    ledger.step(Settled(1, ((item(0), "used"), (item(1), "duplicate"))))
    ledger.validate()
    summary = ledger.summary()
    assert (summary.used, summary.duplicate, summary.outstanding) == (4, 1, 1)
    assert [(t.used, t.duplicate) for t in summary.replicas] == [(3, 0), (1, 1)]
    assert "duplicate" in str(summary)


def test_a_result_counts_once_in_whatever_order_its_grants_come_back() -> None:
    ledger = Ledger(WORK)
    assert granted(ledger, 1, 0) == item(0)
    assert [granted(ledger, 0, n) for n in range(4)] == [item(1), item(2), item(3), item(4)]
    assert granted(ledger, 0, 4, copy=True) == item(0, copy=1)
    ledger.step(Settled(1, ((item(0), "duplicate"),)))
    ledger.validate()
    ledger.step(Settled(0, ((item(0, 1), "used"),)))
    ledger.validate()
    with pytest.raises(ProtocolError, match="does not have it"):
        ledger.step(Settled(0, ((item(0, 1), "used"),)))


def test_a_portion_of_a_lost_replica_is_granted_again_and_counts_once() -> None:
    ledger = Ledger(WORK)
    assert granted(ledger, 1, 0) == item(0)
    assert granted(ledger, 0, 0) == item(1)
    ledger.step(ReplicaLost(1))
    assert granted(ledger, 0, 1) == item(0, copy=1)
    ledger.step(Settled(0, ((item(1), "used"), (item(0, 1), "duplicate"))))  # what the lost one had sent was first
    ledger.validate()
    ledger.close()
    summary = ledger.summary()
    assert (summary.used, summary.duplicate, summary.outstanding) == (2, 1, 0)
    assert [t.used for t in summary.replicas] == [1, 1]


def test_a_portion_is_copied_whose_replica_stops_after_it_asked_for_more() -> None:
    """It had asked before its result was sent."""
    ledger = Ledger(WORK)
    assert [granted(ledger, 1, n) for n in range(2)] == [item(0), item(1)]
    assert [granted(ledger, 0, n) for n in range(3)] == [item(2), item(3), item(4)]
    assert granted(ledger, 1, 2) == item(5)  # and nothing more is heard of it
    assert granted(ledger, 0, 3, copy=True) is None  # the results may be under way
    assert granted(ledger, 0, 4, copy=True) == item(1, copy=1), "the others of its portions are known to be finished"
    ledger.validate()


def test_no_portion_is_copied_whose_replica_waits_for_its_result_to_arrive() -> None:
    ledger = Ledger(WORK)
    assert [granted(ledger, 1, n) for n in range(2)] == [item(0), item(1)]
    assert [granted(ledger, 0, n) for n in range(3)] == [item(2), item(3), item(4)]
    assert granted(ledger, 1, 2) == item(5)
    for clock in range(MOST_IN_VAIN):
        assert granted(ledger, 0, 3 + clock, copy=True) is None
        assert granted(ledger, 1, 3 + clock, copy=True) is None
    assert granted(ledger, 0, 20, copy=True) == item(0, copy=1), "a later stage may have stopped"
    ledger.validate()


# A replica.


def replica(stage: int = 0, after: float = 1.0) -> Portions:
    store = StoreTerms((0, 1), policies.speculate(2, after=after))
    return Portions(Terms(2, 2, 1, (store,), 2), 1, stage)


def test_an_idle_replica_holds_a_portion_of_the_next_batch_and_asks_for_a_copy_after_a_while() -> None:
    machine = replica()
    assert machine.step(Started(), 10.0) == [Ask((0,))]
    assert machine.step(Granted(((0, item(3)),)), 10.0) == [Begin(0, item(3), False), Start(0, item(3), False)]
    assert not machine.may_read(0, 0)
    assert machine.step(StorePublished(0, 0, 0), 10.0) == []
    assert machine.may_read(0, 0)
    assert machine.step(StepFinished(0), 12.0) == [Ask((1,))]
    assert machine.step(Granted(((1, item(4)),)), 12.0) == [Wake(14.0)]
    assert machine.step(Tick(), 14.0) == [Ask((2,), copy=0)]
    assert machine.step(Granted(()), 14.0) == [Wake(16.0)]  # nothing to copy yet
    assert machine.step(Tick(), 16.0) == [Ask((3,), copy=0)]
    assert machine.step(Granted(((3, item(0, 1)),)), 16.0) == [Begin(1, item(0, 1), False), Start(1, item(0, 1), False)]
    machine.validate()
    actions = machine.step(Committed(0, copies=()), 17.0)  # the first grant of portion 0 was first
    assert actions == [Settle(item(3), "used"), Abandon(1), Settle(item(0, 1), "duplicate")]
    assert machine.should_abandon(1)
    assert machine.step(StepFinished(1), 17.5) == [Begin(2, item(4), False), Start(2, item(4), False)]


def test_a_copy_that_comes_first_counts_and_a_portion_that_others_did_is_not_begun() -> None:
    machine = replica(after=0.0)
    machine.step(Started())
    machine.step(Granted(((0, item(1)),)))
    machine.step(StepFinished(0), 1.0)
    machine.step(Granted(((1, item(4)),)), 1.0)  # asks for a copy at once
    machine.step(Granted(((2, item(2, 1)),)), 1.0)
    assert machine.step(Committed(0, copies=((2, 1),)), 2.0) == [Settle(item(1), "used"), Settle(item(2, 1), "used")]
    assert not machine.should_abandon(1)
    assert machine.step(Committed(1, copies=((0, 1),)), 3.0) == [Settle(item(4), "duplicate")]
    assert machine.step(StepFinished(1), 4.0) == [Retire()]


def test_a_stage_that_hears_of_the_commit_first_runs_only_a_step_that_counts() -> None:
    machine = replica(stage=1)
    machine.step(Committed(0, copies=((3, 1),)))
    assert machine.step(BeginReceived(0, item(3))) == [Abandon(0)]
    assert machine.step(BeginReceived(1, item(3, 1))) == [Start(1, item(3, 1), False)]
    assert machine.step(LeaderRetired()) == []
    assert machine.step(StepFinished(1)) == [Retire()]
    with pytest.raises(ProtocolError, match="begins step 1 after step 1"):
        machine.step(BeginReceived(1, item(5)))


# Whole runs.


def check(run: World) -> Summary:
    """Each version of each store is one batch, every portion of it once; every grant is settled once."""
    members = run.terms.members
    for versions in run.applied.values():
        assert len(versions) == run.terms.total_clocks
        for batch, version in enumerate(versions):
            portions = [(portion, batch, 16 ** (batch * members + portion)) for portion in range(members)]
            assert [entry[:3] for entry in version] == portions
    summary = run.driver.machine.ledger.summary()
    assert run.driver.machine.over
    assert (summary.used, summary.outstanding) == (run.terms.total_clocks * members, 0)
    assert summary.dropped == summary.folded == summary.requeued == 0
    assert len({(i.sequence, i.copy) for i in run.driver.duplicates}) == len(run.driver.duplicates)
    return summary


@pytest.mark.parametrize("stages", [1, 3])
def test_copies_shorten_the_wait_for_a_slow_replica(stages: int) -> None:
    times: dict[int, float] = {}
    for copies in (0, 1):
        rule = policies.speculate(1, copies=copies)
        run = make([rule] * 3, replicas=4, stages=stages, clocks=12, items=48, speeds=(1, 1, 1, 40), seed=5)
        run.go()
        times[copies] = run.clock.now
        assert (check(run).duplicate > 0) == (copies > 0)
    assert times[1] < times[0] / 2


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    replicas=st.integers(1, 5),
    stages=st.integers(1, 3),
    portions=st.integers(1, 3),
    copies=st.integers(0, 2),
    after=st.sampled_from([0.0, 0.3, 2.0]),
    speeds=st.lists(st.sampled_from([0.1, 1.0, 20.0]), min_size=1, max_size=5),
    lost=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_each_portion_counts_once_at_any_speeds(
    replicas: int, stages: int, portions: int, copies: int, after: float, speeds: list[float], lost: bool, seed: int
) -> None:
    rule = policies.speculate(portions, after=after, copies=copies)
    lost = lost and replicas > 2 and copies > 0
    run = make(
        [rule] * 3,
        replicas=replicas,
        stages=stages,
        clocks=4,
        items=16 * replicas,
        speeds=speeds,
        seed=seed,
        twice=0.2,
        homes_on=0,
    )
    if lost:
        run.lose(replicas - 1, seed % 17)
    run.go()
    summary = check(run)
    assert lost or summary.duplicate == len(run.driver.duplicates)
