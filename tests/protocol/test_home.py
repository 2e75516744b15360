"""The rules of a home, one by one: what it applies, what it lets go, and what it tells."""

from __future__ import annotations

import pytest

from flowml.policy import UNBOUNDED, AllReduce, Policy, Quorum
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.home import (
    Apply,
    Finished,
    Home,
    Publish,
    Release,
    SendApplied,
    SendArrived,
    StageRetired,
    StoreLoaded,
)
from flowml_runtime.protocol.training.store import ContributionReceived
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import RETIRED, Committed, ReplicaLost, Terms


def home(*stores: StoreTerms, replicas: int = 2, stages: int = 2, clocks: int = 4) -> Home:
    machine = Home(Terms(replicas, stages, 2, stores, clocks), range(len(stores)))
    for index in range(len(stores)):
        machine.step(StoreLoaded(index))
    return machine


def part(
    replica: int, clock: int, handle: int, *, store: int = 0, part: int = 0, life: int = 1, weight: int = 2
) -> ContributionReceived:
    return ContributionReceived(store, part, replica, life, clock, 0, weight, handle, weight == 0)


CLOCKED = StoreTerms((0,), Policy(quorum=Quorum(2)))
DROPPING = StoreTerms((0,), Policy(quorum=Quorum(1)))
SUMMED = StoreTerms((0, 1), Policy(AllReduce(), every=2), collective=True)
ARRIVING = StoreTerms((0, 1), Policy(staleness=3))


def test_loading_publishes_the_first_version() -> None:
    machine = Home(Terms(2, 1, 1, (CLOCKED,), 4), [0])
    assert machine.version(0) == -1
    assert machine.step(StoreLoaded(0, 5)) == [Publish(0, 5, 0)]
    with pytest.raises(ProtocolError, match="loaded twice"):
        machine.step(StoreLoaded(0))


def test_a_commit_applies_the_replicas_in_order_whatever_the_order_of_arrival() -> None:
    machine = home(CLOCKED)
    assert machine.step(part(1, 0, handle=10)) == [SendArrived(0, 1, 0, 2)]
    assert machine.step(part(0, 0, handle=11)) == [SendArrived(0, 0, 0, 2)]
    applied = Apply(0, 1, (((11,), 0.25), ((10,), 0.25)))
    assert machine.step(Committed(0)) == [applied, Publish(0, 1, 1)]
    assert machine.step(Committed(0)) == []
    machine.validate()


def test_a_contribution_is_complete_with_all_its_parts() -> None:
    machine = home(StoreTerms((0, 1), Policy(quorum=Quorum(1))))
    assert machine.step(part(0, 0, handle=1, part=1)) == []
    assert machine.step(part(0, 0, handle=2, part=0)) == [SendArrived(0, 0, 0, 2)]
    assert machine.step(Committed(0, (1,)))[0] == Apply(0, 1, (((2, 1), 0.5),))


def test_late_work_is_released_before_and_after_the_commit_and_never_applied() -> None:
    machine = home(DROPPING)
    machine.step(part(0, 0, handle=1))
    machine.step(part(1, 0, handle=2))
    actions = machine.step(Committed(0, (0,)))
    assert actions == [Apply(0, 1, (((2,), 0.5),)), Publish(0, 1, 1), Release(1)]
    assert machine.step(part(0, 0, handle=3)) == [Release(3)]
    machine.validate()


def test_the_weights_make_the_mean_unbiased() -> None:
    machine = home(StoreTerms((0,), Policy(quorum=Quorum(2), every=2)))
    machine.step(part(0, 1, handle=1, weight=4))
    machine.step(part(1, 1, handle=2, weight=2))
    assert machine.step(Committed(1))[0] == Apply(0, 1, (((1,), 1 / 6), ((2,), 1 / 6)))


def test_empty_contributions_arrive_but_weigh_nothing() -> None:
    machine = home(CLOCKED)
    assert machine.step(part(0, 0, handle=0, weight=0)) == [SendArrived(0, 0, 0, 0)]
    machine.step(part(1, 0, handle=7))
    assert machine.step(Committed(0)) == [Apply(0, 1, (((7,), 0.5),)), Publish(0, 1, 1)]
    machine.step(part(0, 1, handle=0, weight=0))
    machine.step(part(1, 1, handle=0, weight=0))
    assert machine.step(Committed(1)) == [Publish(0, 1, 2, value=False)]


def test_a_commit_leaves_stores_alone_that_are_not_due() -> None:
    machine = home(CLOCKED, StoreTerms((0,), Policy(quorum=Quorum(2), every=3)))
    for replica in range(2):
        machine.step(part(replica, 0, handle=replica))
    assert {a.store for a in machine.step(Committed(0)) if isinstance(a, Publish)} == {0}
    with pytest.raises(ProtocolError, match="nothing is due"):
        machine.step(part(0, 1, handle=9, store=1))


def test_on_arrival_each_contribution_is_a_version_of_its_own() -> None:
    machine = home(ARRIVING)
    assert machine.step(part(1, 0, handle=1)) == []
    applied = [Apply(0, 1, (((1, 2), 0.5),)), Publish(0, 1, 0), SendApplied(0, 1, 0, 1)]
    assert machine.step(part(1, 0, handle=2, part=1)) == applied
    machine.step(part(1, 1, handle=3))
    applied = [Apply(0, 2, (((3, 4), 0.5),)), Publish(0, 2, 0), SendApplied(0, 1, 1, 2)]
    assert machine.step(part(1, 1, handle=4, part=1)) == applied
    machine.step(part(0, 0, handle=5))
    assert machine.step(part(0, 0, handle=6, part=1))[1] == Publish(0, 3, 1)  # the floor follows the last of all
    machine.validate()


@pytest.mark.parametrize("terms", [DROPPING, ARRIVING])
def test_a_part_that_comes_again_changes_nothing(terms: StoreTerms) -> None:
    machine = home(terms)
    machine.step(part(0, 0, handle=1))
    assert machine.step(part(0, 0, handle=2)) == [Release(2)]
    machine.validate()


def test_what_was_applied_on_arrival_is_not_applied_again_by_a_restarted_replica() -> None:
    machine = home(ARRIVING)
    for index in (0, 1):
        machine.step(part(0, 0, handle=index, part=index))
    assert machine.step(part(0, 0, handle=8, life=2)) == [Release(8)]
    assert machine.version(0) == 1


def test_parts_of_two_lives_are_never_mixed() -> None:
    machine = home(ARRIVING)
    machine.step(part(0, 0, handle=1, life=1))
    assert machine.step(part(0, 0, handle=2, part=1, life=2)) == [Release(1)]
    assert machine.step(part(0, 0, handle=3, life=1)) == [Release(3)]
    assert machine.step(part(0, 0, handle=4, life=2))[0] == Apply(0, 1, (((4, 2), 0.5),))


def test_a_replica_retires_from_a_store_when_all_its_stages_there_have() -> None:
    machine = home(ARRIVING, StoreTerms((1,), Policy(staleness=UNBOUNDED)))
    assert machine.step(StageRetired(0, 1)) == [Publish(1, 0, 0, value=False)]
    assert machine.step(StageRetired(0, 0)) == [Publish(0, 0, 0, value=False)]
    machine.step(StageRetired(1, 0))
    last = machine.step(StageRetired(1, 1))
    assert last == [
        *(Publish(0, 0, RETIRED, value=False), Finished(0)),
        *(Publish(1, 0, RETIRED, value=False), Finished(1)),
    ]
    machine.validate()


def test_a_contribution_still_under_way_counts_after_another_stage_has_retired() -> None:
    machine = home(ARRIVING, replicas=1)
    machine.step(part(0, 0, handle=1))
    assert machine.step(StageRetired(0, 0)) == []
    assert machine.step(part(0, 0, handle=2, part=1))[0] == Apply(0, 1, (((1, 2), 0.5),))
    assert machine.step(StageRetired(0, 1))[-1] == Finished(0)


def test_a_clocked_store_is_finished_by_the_last_commit() -> None:
    machine = home(DROPPING, clocks=2)
    machine.step(StageRetired(0, 0))
    for clock in range(2):
        machine.step(part(1, clock, handle=clock))
    assert Finished(0) not in machine.step(Committed(0, (0,)))
    assert not machine.finished(0)
    assert machine.step(Committed(1, (0,)))[-1] == Finished(0)
    assert machine.finished(0)


def test_a_lost_replica_is_not_waited_for_and_its_halves_are_let_go() -> None:
    machine = home(ARRIVING)
    machine.step(part(0, 0, handle=1))
    assert machine.step(ReplicaLost(0)) == [Release(1), Publish(0, 0, 0, value=False)]
    assert machine.step(part(0, 0, handle=2, part=1)) == [Release(2)]
    machine.validate()


def test_a_lost_replica_may_still_be_part_of_a_decision() -> None:
    machine = home(CLOCKED)
    machine.step(part(0, 0, handle=1))
    machine.step(ReplicaLost(0))
    machine.step(part(1, 0, handle=2))
    assert machine.step(Committed(0))[0] == Apply(0, 1, (((1,), 0.25), ((2,), 0.25)))


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (part(0, 0, handle=1, store=7), "not homed here"),
        (part(5, 0, handle=1), "does not exist"),
        (part(0, 0, handle=1, part=3), "does not exist"),
        (ContributionReceived(0, 0, 0, 1, 0, 0, 0, 1, empty=False), "exactly for an empty"),
        (ContributionReceived(0, 0, 0, 1, 0, 9, 2, 1), "based on version 9"),
        (Committed(0), "which store 0 lacks"),
    ],
)
def test_what_the_protocol_rules_out_is_refused(event: ContributionReceived | Committed, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        home(CLOCKED).step(event)


def test_parts_that_disagree_on_their_weight_are_refused() -> None:
    machine = home(ARRIVING)
    machine.step(part(0, 0, handle=1, weight=2))
    with pytest.raises(ProtocolError, match="has weight 4, another part of it 2"):
        machine.step(part(0, 0, handle=2, part=1, weight=4))


def test_a_sum_over_all_replicas_is_applied_when_it_is_complete_and_moves_all_clocks() -> None:
    machine = home(SUMMED, clocks=3)
    assert machine.step(part(0, 1, handle=1, weight=8)) == []
    applied = Apply(0, 1, (((1, 2), 1 / 8),))
    assert machine.step(part(0, 1, handle=2, part=1, weight=8)) == [applied, Publish(0, 1, 2)]
    assert machine.step(part(0, 1, handle=3, weight=8)) == [Release(3)]  # from another worker of the same replicas
    with pytest.raises(ProtocolError, match="nothing is due"):
        machine.step(part(0, 4, handle=4))
    machine.step(part(0, 2, handle=5, weight=4))
    assert machine.step(part(0, 2, handle=6, part=1, weight=4))[-1] == Finished(0)
    assert machine.step(StageRetired(0, 0)) == []
    machine.validate()


def test_a_store_that_is_decided_upon_does_not_hear_of_sums() -> None:
    machine = home(CLOCKED, StoreTerms((0,), Policy(AllReduce()), collective=True))
    assert machine.step(part(0, 0, handle=1)) == [SendArrived(0, 0, 0, 2)]
    assert machine.step(part(0, 0, handle=2, store=1)) == [Apply(1, 1, (((2,), 0.5),)), Publish(1, 1, 1)]
    machine.step(part(1, 0, handle=3))
    assert machine.step(Committed(0))[0] == Apply(0, 1, (((1,), 0.25), ((3,), 0.25)))
    machine.validate()
