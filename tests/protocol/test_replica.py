"""The rules of a replica: which clock is next, what is in vain, and what becomes of its items."""

from __future__ import annotations

import pytest

from flowml.policy import UNBOUNDED, Policy, Quorum
from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.accounts import Settle
from flowml_runtime.protocol.training.replica import Replica
from flowml_runtime.protocol.training.stage import (
    Abandon,
    Applied,
    Ask,
    Begin,
    BeginReceived,
    Count,
    Granted,
    LeaderRetired,
    Retire,
    Start,
    Started,
    StepFinished,
    StorePublished,
)
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Committed, Terms

SYNC = StoreTerms((0,), Policy(quorum=Quorum(4)))
QUORUM = StoreTerms((0,), Policy(quorum=Quorum(3)))
QUORUM_EVERY = StoreTerms((0,), Policy(quorum=Quorum(3), every=4))
ARRIVING = StoreTerms((0,), Policy(staleness=2))


def item(number: int) -> wire.Item:
    return wire.Item(sequence=number, epoch=0, start=8 * number, size=8)


def counted(clock: int, *, counts: bool, store: int = 0) -> Count:
    """Whether the gradients of a clock count for the only store that gathers several steps."""
    return Count(clock, counts, (store,))


def leader(*stores: StoreTerms, clocks: int = 20, replicas: int = 4) -> Replica:
    """A first stage that holds items 0 and 1 for clocks 0 and 1, and runs clock 0."""
    machine = Replica(Terms(replicas, 2, 1, stores, clocks), 0, 0)
    assert machine.step(Started()) == [Ask((0, 1))]
    begun = machine.step(Granted(((0, item(0)), (1, item(1)))))
    assert begun == [Begin(0, item(0), False), Start(0, item(0), False), Ask((2,))]
    return machine


def follower(*stores: StoreTerms, clocks: int = 20) -> Replica:
    return Replica(Terms(4, 2, 1, stores, clocks), 0, 1)


def test_work_is_asked_for_ahead_of_need() -> None:
    machine = leader(SYNC)
    assert machine.step(Granted(((2, item(2)),))) == []
    assert machine.step(StepFinished(0)) == [Begin(1, item(1), False), Start(1, item(1), False), Ask((3,))]
    machine.validate()


def test_a_replica_that_was_silent_looks_once_at_each_clock_that_was_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks, seen, look = 300, list[int](), Terms.may_skip
    machine = leader(QUORUM, clocks=clocks + 10)
    monkeypatch.setattr(Terms, "may_skip", lambda terms, clock: (seen.append(clock), look(terms, clock))[1])
    for clock in range(2):
        machine.step(StepFinished(clock))
    for clock in range(clocks):
        machine.step(Committed(clock, (0,), 0))  # it has no item meanwhile
    assert len(seen) < 3 * clocks
    machine.validate()


def test_without_clocks_a_step_is_begun_when_it_is_known_whether_it_is_the_last() -> None:
    machine = leader(ARRIVING)
    assert machine.step(StepFinished(0)) == [Settle(item(0), "used")]
    begun = [Begin(1, item(1), True), Start(1, item(1), True)]
    assert machine.step(Granted((), exhausted=True)) == begun
    assert machine.pushes(0, 1)
    assert machine.step(StepFinished(1)) == [Settle(item(1), "used"), Retire()]
    assert machine.retired


def test_a_replica_without_any_work_retires_at_once() -> None:
    machine = Replica(Terms(4, 2, 1, (ARRIVING,), 20), 0, 0)
    machine.step(Started())
    assert machine.step(Granted((), exhausted=True)) == [Retire()]


def test_reads_wait_for_the_publication_that_the_policy_wants() -> None:
    machine = leader(ARRIVING, StoreTerms((0,), Policy(every=4, staleness=3)))
    for store, clock in ((0, 2), (1, 7)):
        machine.step(Applied(store, clock, 0))  # what this replica has pushed is not what it waits for here
    assert not machine.may_read(0, 0)
    machine.step(StorePublished(0, 0, 0))
    assert machine.may_read(0, 2)
    assert not machine.may_read(0, 3)
    machine.step(StorePublished(0, 3, 1))
    assert machine.may_read(0, 3)
    machine.step(StorePublished(1, 0, 4))
    assert machine.may_read(1, 7)
    assert not machine.may_read(1, 8)


def test_a_replica_reads_its_own_writes() -> None:
    machine = leader(StoreTerms((0,), Policy(every=2, staleness=UNBOUNDED)))
    machine.step(Granted(((2, item(2)),)))
    for clock in range(2):
        machine.step(StepFinished(clock))
    machine.step(StorePublished(0, 0, 0))
    assert machine.may_read(0, 1)
    assert not machine.may_read(0, 2)  # it pushed at clock 1
    machine.step(Applied(0, 1, 5))
    machine.step(StorePublished(0, 4, 0))
    assert not machine.may_read(0, 2)  # version 5 holds it
    machine.step(StorePublished(0, 5, 0))
    assert machine.may_read(0, 3)
    assert machine.version(0) == 5


def test_a_version_never_goes_back() -> None:
    machine = leader(ARRIVING)
    machine.step(StorePublished(0, 3, 1))
    with pytest.raises(ProtocolError, match="went back"):
        machine.step(StorePublished(0, 2, 1))


def test_a_commit_without_us_makes_the_step_in_vain_and_we_join_the_current_clock() -> None:
    machine = leader(QUORUM)
    machine.step(Granted(((2, item(2)),)))
    assert machine.step(Committed(0, (0,))) == [Abandon(0), Settle(item(0), "dropped")]
    assert machine.should_abandon(0)
    assert machine.step(Committed(1, (0,))) == []
    joined = machine.step(StepFinished(0))
    assert joined == [Begin(2, item(2), False), Start(2, item(2), False), Ask((3, 4), (item(1),))]
    assert not machine.should_abandon(2)
    machine.validate()


def test_a_step_that_finished_before_it_was_decided_can_still_be_late() -> None:
    machine = leader(QUORUM)
    machine.step(StepFinished(0))
    assert machine.step(Committed(0, (0,))) == [Abandon(0), Settle(item(0), "dropped")]
    assert not machine.should_abandon(1)


def test_a_step_may_be_committed_before_this_stage_has_finished_it() -> None:
    machine = leader(QUORUM)
    assert machine.step(Committed(0, (3,))) == [Settle(item(0), "used")]
    mixed = leader(QUORUM, QUORUM_EVERY)
    assert mixed.step(Committed(0, (3,))) == []  # the push of clock 3 may still leave its gradient out
    assert mixed.step(StepFinished(0))[0] == counted(0, counts=True, store=1)


def test_a_decision_that_needs_everybody_leaves_nobody_out() -> None:
    machine = leader(SYNC, StoreTerms((0,), Policy(quorum=Quorum(4), every=3)))
    actions = machine.step(StepFinished(0))
    assert actions[0] == counted(0, counts=True, store=1)
    assert machine.step(Committed(0)) == []
    machine.step(Granted(((2, item(2)),)))
    machine.step(StepFinished(1))
    assert machine.step(Committed(2, group=1)) == [Settle(item(0), "used")]


def test_a_step_without_a_decision_is_finished_though_the_others_are_ahead() -> None:
    machine = leader(QUORUM_EVERY)
    machine.step(Granted(((2, item(2)),)))
    assert machine.step(Committed(3, (0,))) == []
    assert not machine.should_abandon(0)
    actions = machine.step(StepFinished(0))
    assert actions == [counted(0, counts=True), Ask((4, 5), (item(1), item(2)))]
    joined = machine.step(Granted(((4, item(4)), (5, item(5)))))
    assert joined[0] == Begin(4, item(4), False)
    machine.validate()


def test_items_are_settled_by_the_first_commit_that_carries_them() -> None:
    machine = leader(QUORUM_EVERY)
    for clock in range(3):
        machine.step(Granted(((clock + 2, item(clock + 2)),)))
        assert not [a for a in machine.step(StepFinished(clock)) if isinstance(a, Settle)]
    assert machine.step(Committed(3, (3,))) == [Settle(item(c), "used") for c in range(4)]


def test_a_late_push_loses_its_own_item_and_keeps_what_was_gathered() -> None:
    machine = leader(QUORUM_EVERY)
    for clock in range(4):
        machine.step(Granted(((clock + 2, item(clock + 2)),)))
        machine.step(StepFinished(clock))
    late = machine.step(Committed(3, (0,)))
    assert late == [Abandon(3), Settle(item(3), "dropped"), counted(3, counts=False)]
    for clock in range(4, 8):
        machine.step(Granted(((clock + 2, item(clock + 2)),)))
        machine.step(StepFinished(clock))
    carried = machine.step(Committed(7, (3,)))
    assert carried == [*(Settle(item(c), "used") for c in (0, 1, 2, 4, 5, 6, 7)), counted(7, counts=True)]


def leader_of(store: StoreTerms, clocks: int = 2) -> Replica:
    """A first stage that runs clock 0 and holds work up to the end."""
    machine = Replica(Terms(4, 2, 1, (store,), clocks), 0, 0)
    machine.step(Started())
    machine.step(Granted(((0, item(0)), (1, item(1)))))
    return machine


def test_what_no_commit_carries_is_dropped_at_the_end() -> None:
    machine = leader_of(QUORUM_EVERY)
    assert machine.step(StepFinished(0))[0] == counted(0, counts=True)
    assert machine.step(Committed(1, (0,))) == [Abandon(1), Settle(item(1), "dropped")]
    assert machine.step(StepFinished(1)) == [counted(1, counts=False), Settle(item(0), "dropped"), Retire()]
    machine.validate()


def test_the_leader_retires_after_the_last_decision_and_not_before() -> None:
    machine = leader_of(QUORUM)
    machine.step(StepFinished(0))
    machine.step(Committed(0, (3,)))
    assert machine.step(StepFinished(1)) == []
    assert machine.step(Committed(1, (2,))) == [Settle(item(1), "used"), Retire()]


def test_work_for_clocks_that_are_over_is_given_back_before_retiring() -> None:
    machine = leader(QUORUM, clocks=3)
    for clock in range(3):
        machine.step(Committed(clock, (0,)))
    assert machine.step(StepFinished(0)) == []  # clock 2 was asked for; the answer is still to come
    assert machine.step(Granted(((2, item(2)),))) == [Ask((), (item(1), item(2))), Retire()]


def test_a_push_of_several_steps_waits_until_their_fates_are_known() -> None:
    stale = StoreTerms((0,), Policy(quorum=Quorum(3), staleness=3))
    machine = leader(stale, StoreTerms((0,), Policy(quorum=Quorum(3), every=2, staleness=3)))
    machine.step(Granted(((2, item(2)),)))
    assert machine.step(StepFinished(0)) == []
    released = machine.step(Committed(0, (3,)))
    assert released[:2] == [counted(0, counts=True, store=1), Begin(1, item(1), False)]


def test_the_other_stages_follow_in_order() -> None:
    machine = follower(QUORUM)
    assert machine.step(BeginReceived(0, item(0))) == [Start(0, item(0), False)]
    assert machine.step(BeginReceived(1, item(1))) == []
    assert machine.step(StepFinished(0)) == [Start(1, item(1), False)]
    with pytest.raises(ProtocolError, match="begins clock 1 after clock 1"):
        machine.step(BeginReceived(1, item(1)))


def test_a_commit_may_overtake_the_begin_of_its_clock() -> None:
    machine = follower(QUORUM)
    machine.step(Committed(0, (0,)))
    assert machine.step(BeginReceived(0, item(0))) == [Abandon(0)]
    machine.step(Committed(1, (3,)))
    machine.step(Committed(2, (0,)))
    assert machine.step(BeginReceived(1, item(1))) == [Start(1, item(1), False)]
    assert not machine.should_abandon(1)
    assert machine.step(BeginReceived(2, item(2))) == [Abandon(2)]
    assert machine.step(StepFinished(1)) == []
    machine.validate()


def test_a_step_that_waits_in_line_and_is_late_never_starts() -> None:
    machine = follower(QUORUM)
    for clock in range(3):
        machine.step(BeginReceived(clock, item(clock)))
    assert machine.step(Committed(0, (3,))) == []
    assert machine.step(Committed(1, (0,))) == [Abandon(1)]
    assert machine.step(StepFinished(0)) == [Start(2, item(2), False)]


def test_the_other_stages_retire_after_their_last_step() -> None:
    machine = follower(ARRIVING)
    machine.step(BeginReceived(0, item(0)))
    machine.step(BeginReceived(1, item(1), last=True))
    assert machine.step(LeaderRetired()) == []
    assert machine.step(StepFinished(0)) == [Start(1, item(1), True)]
    assert machine.step(StepFinished(1)) == [Retire()]


def test_pushes_follow_the_rhythm_and_the_last_step() -> None:
    machine = follower(StoreTerms((0,), Policy(every=2, staleness=UNBOUNDED)))
    pushes: list[bool] = []
    for clock in range(3):
        machine.step(BeginReceived(clock, item(clock), last=clock == 2))
        pushes.append(machine.pushes(0, clock))
        machine.step(StepFinished(clock))
    assert pushes == [False, True, True]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (StepFinished(5), "does not run"),
        (Granted(((2, item(2)), (9, item(9)))), r"asked for \(2,\)"),
        (Committed(5, (3,)), "has not begun it"),
    ],
)
def test_what_the_protocol_rules_out_is_refused(event: StepFinished | Granted | Committed, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        leader(QUORUM).step(event)
