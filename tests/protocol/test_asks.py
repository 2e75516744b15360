"""A replica of a long run asks for several items at once, and tells their fates when it asks next."""

from __future__ import annotations

from typing import Any

import pytest

from flowml import policies
from flowml.policy import Fold, Policy, Quorum, Requeue
from flowml_runtime import wire
from flowml_runtime.protocol.training.accounts import Settle
from flowml_runtime.protocol.training.items import LOOK_AHEAD, MOST_AHEAD, batch
from flowml_runtime.protocol.training.replica import Replica
from flowml_runtime.protocol.training.stage import Ask, Granted, Started, StepFinished
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Committed, Terms
from flowml_tools.faults.layout import make
from tests.protocol.test_training_sim import check_all

LONG = 100


def terms(policy: Policy, clocks: int = LONG) -> Terms:
    return Terms(4, 1, 1, (StoreTerms((0,), policy),), clocks)


def item(number: int) -> wire.Item:
    return wire.Item(sequence=number, epoch=0, start=8 * number, size=8)


def test_items_that_are_costly_to_hold_are_asked_for_one_at_a_time() -> None:
    shared = terms(Policy(quorum=Quorum(3)))
    assert batch(shared, fed=False) == MOST_AHEAD
    assert batch(shared, fed=True) == LOOK_AHEAD
    assert batch(terms(Policy(quorum=Quorum(3)), clocks=8), fed=False) == LOOK_AHEAD
    assert batch(terms(Policy(quorum=Quorum(3)), clocks=10), fed=False) == 4, (
        "it asks three times, and tells fates then"
    )
    assert batch(terms(Policy(quorum=Quorum(3, late=Requeue()))), fed=False) == LOOK_AHEAD
    assert batch(terms(Policy(staleness=2)), fed=False) == LOOK_AHEAD


def test_a_replica_asks_again_and_tells_fates_when_it_has_only_two_items() -> None:
    machine = Replica(terms(Policy(quorum=Quorum(4))), 0, 0, ahead=4)
    assert machine.step(Started()) == [Ask((0, 1, 2, 3))]
    machine.step(Granted(tuple((c, item(c)) for c in range(4))))
    told: list[Any] = []
    for clock in range(4):
        told.append([a for a in machine.step(StepFinished(clock)) if isinstance(a, Settle | Ask)])
        told.append(machine.step(Committed(clock)))
        machine.validate()
        if clock == 1:
            machine.step(Granted(tuple((c, item(c)) for c in range(4, 7))))
    assert told == [[], [], [Settle(item(0), "used"), Ask((4, 5, 6))], [], [], [], [], []]


@pytest.mark.parametrize(
    "policy",
    [policies.synchronous(), policies.quorum(2), Policy(quorum=Quorum(2, late=Fold(0.5))), policies.quorum(2, every=3)],
    ids=lambda p: p.describe(),
)
def test_a_long_run_accounts_for_every_item(policy: Policy) -> None:
    for seed in range(3):
        run = make([policy], replicas=3, stages=2, clocks=40, items=120, speeds=(1, 4, 2), seed=seed, source="shipped")
        summary = check_all(run)
        assert summary.used + summary.folded + summary.dropped + summary.unseen == 120
