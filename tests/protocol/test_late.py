"""What becomes of late work: when a clock is decided, and what is applied later."""

from __future__ import annotations

import math

import pytest

from flowml.policy import Arrivals, Deadline, Decide, Fold, Policy, Quorum, Requeue, Spread, Wait
from flowml_runtime import wire
from flowml_runtime.protocol.training.accounts import Accounts, Settle
from flowml_runtime.protocol.training.decision import Arrived, Decision, Wake
from flowml_runtime.protocol.training.home import (
    Action,
    Apply,
    Home,
    Publish,
    Release,
    SendApplied,
    SendArrived,
    StoreLoaded,
)
from flowml_runtime.protocol.training.store import ContributionReceived
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Committed, ReplicaLost, Terms, Tick


def terms(*policies: Policy, replicas: int = 2, clocks: int = 4) -> Terms:
    return Terms(replicas, 1, 2, tuple(StoreTerms((0,), p) for p in policies), clocks, rows=4)


def decision(policy: Policy, replicas: int = 4, clocks: int = 6) -> Decision:
    rules = terms(policy, replicas=replicas, clocks=clocks)
    return Decision(rules, rules.groups[0])


def item(number: int) -> wire.Item:
    return wire.Item(sequence=number, epoch=0, start=8 * number, size=8)


def test_a_deadline_waits_for_the_grace_time_and_not_longer() -> None:
    machine = decision(Policy(quorum=Deadline(0.5, grace=2.0)))
    assert machine.step(Arrived(0, 0, 0), now=1.0) == []
    assert machine.step(Arrived(0, 1, 0), now=3.0) == [Wake(5.0)]
    assert machine.step(Arrived(0, 2, 0), now=4.0) == []
    assert machine.step(Tick(), now=5.0) == [Committed(0, (3,))]
    assert machine.step(Tick(), now=6.0) == []


def test_a_deadline_does_not_wait_when_all_are_there() -> None:
    machine = decision(Policy(quorum=Deadline(0.5, grace=100.0)))
    for replica in range(3):
        machine.step(Arrived(0, replica, 0), now=float(replica))
    assert machine.step(ReplicaLost(3), now=3.0) == [Committed(0, (3,))]


def test_a_time_limit_ends_a_clock_with_what_there_is() -> None:
    machine = decision(Policy(quorum=Deadline(1.0, limit_s=10.0)))
    assert machine.step(Arrived(0, 2, 0), now=4.0) == [Wake(10.0)]
    assert machine.step(Tick(), now=10.0) == [Committed(0, (0, 1, 3)), Wake(20.0)], "the next one has its own limit"
    assert machine.step(Arrived(0, 2, 1), now=11.0) == []


def test_the_grace_time_is_learnt_from_the_quorum_and_not_from_the_straggler() -> None:
    spread = Spread()
    for _ in range(50):
        spread.add(1.0)
    assert spread.window_s == pytest.approx(1.0, abs=1e-3)
    rule = Deadline(0.75)
    late = Arrivals(4, 2, 4, began=0.0, window_s=spread.window_s, hopeful=1, times={0: 5.0, 1: 5.5, 2: 6.0})
    assert rule.decide(late, 6.0) == Wait(pytest.approx(7.0, abs=1e-3))
    assert rule.decide(late, 7.1) == Decide()


def test_a_quorum_of_samples_counts_examples() -> None:
    rule = Quorum(0.5, of="samples")
    half = Arrivals(4, 2, 4, began=0.0, hopeful=2, weight=4, times={0: 0.0, 3: 0.0})
    assert rule.decide(half, 0.0) == Decide()
    half.weight = 3  # one replica lacks a microbatch
    assert rule.decide(half, 0.0) == Wait()
    assert Quorum(16, of="samples").decide(half, 0.0) == Wait()
    assert Quorum(12, of="samples").decide(half, 0.0) == Decide()
    assert Wait().until == math.inf


def part(replica: int, clock: int, handle: int) -> ContributionReceived:
    return ContributionReceived(0, 0, replica, 0, clock, 0, 2, handle)


def home(policy: Policy, **settings: int) -> Home:
    machine = Home(terms(policy, **settings), [0])
    machine.step(StoreLoaded(0))
    return machine


def applied(actions: list[Action]) -> list[tuple[int, float]]:
    """(handle, coefficient) of what is applied."""
    (apply,) = (a for a in actions if isinstance(a, Apply))
    return [(handles[0], factor) for handles, factor in apply.contributions]


def test_a_late_contribution_is_folded_in_with_its_decay_and_counts_once() -> None:
    """All replicas count alike: one of two is 1/4 a microbatch, on time or late."""
    machine = home(Policy(quorum=Quorum(1, late=Fold(0.5))))
    machine.step(part(0, 0, 1))
    assert applied(machine.step(Committed(0, (1,)))) == [(1, 0.25)]
    assert machine.step(part(1, 0, 2)) == [SendArrived(0, 1, 0, 2)]
    assert machine.step(part(1, 0, 3)) == [Release(3)], "a repetition"
    machine.validate()
    machine.step(part(0, 2, 4))
    machine.step(part(1, 2, 5))
    machine.step(part(0, 1, 6))
    assert applied(machine.step(Committed(1, (1,), folded=((1, 0),)))) == [(6, 0.25), (2, 0.125)]
    assert applied(machine.step(Committed(2))) == [(4, 0.25), (5, 0.25)]
    assert machine.step(part(1, 0, 7)) == [Release(7)]
    machine.validate()


def test_a_late_contribution_alone_does_not_count_for_all() -> None:
    """Those on time held NaN and came empty: the late one is still one of two."""
    machine = home(Policy(quorum=Quorum(1, late="fold")))
    machine.step(part(0, 0, 1))
    machine.step(Committed(0, (1,)))
    machine.step(part(1, 0, 2))
    for replica in range(2):
        machine.step(ContributionReceived(0, 0, replica, 0, 1, 0, 0, 0, empty=True))
    assert applied(machine.step(Committed(1, folded=((1, 0),)))) == [(2, 0.25)]


def test_the_leader_names_late_contributions_in_the_next_commit() -> None:
    machine = decision(Policy(quorum=Quorum(2, late="fold")), replicas=3)
    machine.step(Arrived(0, 0, 0))
    assert machine.step(Arrived(0, 1, 0)) == [Committed(0, (2,))]
    assert machine.step(Arrived(0, 2, 0)) == machine.step(Arrived(0, 2, 0)) == machine.step(Arrived(0, 1, 0)) == []
    machine.step(Arrived(0, 0, 1))
    assert machine.step(Arrived(0, 1, 1)) == [Committed(1, (2,), folded=((2, 0),))]
    machine.step(Arrived(0, 0, 2))
    assert machine.step(Arrived(0, 1, 2)) == [Committed(2, (2,))]


def test_without_clocks_a_home_applies_as_many_as_the_quorum_says() -> None:
    machine = home(Policy(staleness=100, quorum=Quorum(2, late="fold")), replicas=3)
    assert machine.step(part(1, 0, 1)) == [SendApplied(0, 1, 0, 0)]
    machine.validate()
    told = machine.step(part(0, 0, 2))
    assert told == [Apply(0, 1, (((2,), 0.25), ((1,), 0.25))), Publish(0, 1, 0), SendApplied(0, 0, 0, 1)]


def test_a_reader_at_its_bound_does_not_wait_for_a_quorum() -> None:
    machine = home(Policy(staleness=1, quorum=Quorum(2, late="fold")), replicas=2)
    assert applied(machine.step(part(0, 0, 1))) == [(1, 0.25)], "it counts as one of two"


def test_the_fate_of_an_item_is_that_of_all_its_groups() -> None:
    rules = terms(Policy(quorum=Quorum(1)), Policy(quorum=Quorum(1, late=Requeue())), replicas=2)
    accounts = Accounts(rules, 1)
    accounts.open(0, item(0), (-1, -1))
    assert accounts.commit(Committed(0, (1,))) == []
    assert accounts.commit(Committed(0, (0,), group=1)) == [Settle(item(0), "used", (0,))]
    accounts.open(1, item(1), (0, 0))
    assert accounts.commit(Committed(1, (1,), group=1)) == []
    assert accounts.commit(Committed(1, (1,))) == [Settle(item(1), "requeued")]


def test_an_item_that_is_folded_in_is_settled_then() -> None:
    accounts = Accounts(terms(Policy(quorum=Quorum(1, late="fold"))), 1)
    for clock in range(3):
        accounts.open(clock, item(clock), (-1,))
    assert accounts.commit(Committed(0, (1,))) == []
    assert accounts.commit(Committed(1)) == [Settle(item(1), "used")]
    assert accounts.commit(Committed(2, (1,), folded=((1, 0),))) == [Settle(item(0), "folded")]
    assert accounts.close() == [Settle(item(2), "dropped")]
