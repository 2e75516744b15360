"""Who completes a clock."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowml.policy import Policy, Quorum
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.decision import Arrived, Decision, Event, ReplicaRetired
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Committed, ReplicaLost, Terms


def decision(*stores: StoreTerms, replicas: int = 4, clocks: int = 6) -> Decision:
    terms = Terms(replicas, 1, 1, stores, clocks)
    return Decision(terms, terms.groups[0])


def clocked(need: float, every: int = 1) -> StoreTerms:
    return StoreTerms((0,), Policy(quorum=Quorum(need), every=every))


def test_the_clock_is_complete_with_the_quorum_and_ignores_who_comes_later() -> None:
    machine = decision(clocked(3))
    assert machine.step(Arrived(0, 3, 0)) == []
    assert machine.step(Arrived(0, 0, 0)) == []
    assert machine.step(Arrived(0, 1, 0)) == [Committed(0, (2,))]
    assert machine.step(Arrived(0, 2, 0)) == []
    machine.validate()


def test_a_replica_is_complete_with_all_stores_of_the_group() -> None:
    machine = decision(clocked(1), clocked(1), clocked(1, every=2))
    assert machine.step(Arrived(0, 2, 0)) == []
    assert machine.step(Arrived(1, 3, 0)) == []
    assert machine.step(Arrived(1, 2, 0)) == [Committed(0, (0, 1, 3))]
    with pytest.raises(ProtocolError, match="store 2 at clock 1, where it is not due"):
        machine.step(Arrived(2, 2, 1))


def test_stores_with_another_quorum_or_rhythm_are_decided_alone() -> None:
    terms = Terms(4, 1, 1, (clocked(1), clocked(4), clocked(1, every=2), clocked(1)), 6)
    assert [group.stores for group in terms.groups] == [(0, 3), (1,), (2,)]
    assert [group.drops for group in terms.groups] == [True, False, True]
    strict = Decision(terms, terms.groups[1])
    assert [a for r in range(3) for a in strict.step(Arrived(1, r, 0))] == []
    assert strict.step(Arrived(1, 3, 0)) == [Committed(0, (), group=1)]
    rare = Decision(terms, terms.groups[2])
    with pytest.raises(ProtocolError, match="at clock 2, at which nothing is due"):
        rare.step(Arrived(2, 0, 2))
    assert rare.step(Arrived(2, 0, 1)) == [Committed(1, (1, 2, 3), group=2)]


def test_clocks_without_a_due_store_have_no_decision_and_the_last_always_has() -> None:
    machine = decision(clocked(1, every=4), replicas=1)
    assert [machine.clock, machine.step(Arrived(0, 0, 3)), machine.clock] == [3, [Committed(3)], 5]
    assert machine.step(Arrived(0, 0, 5)) == [Committed(5)]
    assert machine.clock == 6


def test_decisions_fall_in_the_order_of_clocks() -> None:
    machine = decision(clocked(2), replicas=2)
    for clock in (2, 1):
        for replica in range(2):
            assert machine.step(Arrived(0, replica, clock)) == []
    machine.step(Arrived(0, 0, 0))
    commits = machine.step(Arrived(0, 1, 0))
    assert [c.clock for c in commits if isinstance(c, Committed)] == [0, 1, 2]


def test_nobody_waits_for_the_retired_or_lost_but_what_they_completed_counts() -> None:
    machine = decision(clocked(1.0))
    machine.step(Arrived(0, 2, 0))
    machine.step(Arrived(0, 1, 0))
    assert machine.step(ReplicaRetired(2)) == []
    assert machine.step(ReplicaLost(3)) == []
    assert machine.step(Arrived(0, 0, 0)) == [Committed(0, (3,))]
    machine.validate()


def test_the_loss_of_the_last_one_missing_completes_the_clock() -> None:
    machine = decision(clocked(1.0), replicas=2)
    machine.step(Arrived(0, 1, 0))
    assert machine.step(ReplicaLost(0)) == [Committed(0, (0,))]
    assert machine.step(ReplicaLost(1)) == []


@settings(deadline=None)
@given(st.integers(1, 4), st.randoms(use_true_random=False), st.sets(st.integers(0, 3)))
def test_every_clock_is_decided_once_with_enough_replicas(need: int, rng: random.Random, lost: set[int]) -> None:
    machine = decision(clocked(need / 4), clocked(need / 4))
    events: list[Event] = [Arrived(s, r, c) for r in range(4) for c in range(6) for s in (0, 1)]
    mixed = [*events, *map(ReplicaLost, sorted(lost))]
    rng.shuffle(mixed)
    commits: list[Committed] = []
    for event in mixed:
        commits += [a for a in machine.step(event) if isinstance(a, Committed)]
        machine.validate()
    assert [c.clock for c in commits] == list(range(6))
    assert all(4 - len(c.excluded) >= min(need, 4 - len(lost)) for c in commits)
