"""What has waited for the same is published together: no reader gets a version that has only a part of it."""

from __future__ import annotations

from flowml.policy import Consensus, Delta, Policy
from flowml_runtime.protocol.training.home import Action, Apply, Home, Publish, SendApplied, StoreLoaded
from flowml_runtime.protocol.training.store import ContributionReceived
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Terms


def home(policy: Policy, replicas: int) -> Home:
    machine = Home(Terms(replicas, 1, 1, (StoreTerms((0,), policy),), 9), [0])
    machine.step(StoreLoaded(0))
    return machine


def gives(machine: Home, replica: int, clock: int) -> list[Action]:
    return machine.step(ContributionReceived(0, 0, replica, 1, clock, 0, 1, 10 * replica + clock))


def test_the_first_consensus_that_is_published_has_all_reports_that_have_come() -> None:
    """Replica 0 has reported twice and was told that version 0 is all it may wait for. It would read version 1."""
    machine = home(Policy(staleness=4, every=3, payload=Delta(), apply=Consensus(0.1)), 3)
    for replica, clock in ((0, 2), (1, 2), (0, 5)):
        assert gives(machine, replica, clock) == [SendApplied(0, replica, clock, 0)]
    *made, published, told = gives(machine, 2, 2)
    assert [a.contributions[0][0] for a in made if isinstance(a, Apply)] == [(2,), (12,), (22,), (5,)]
    assert published == Publish(0, 4, 3)
    assert told == SendApplied(0, 2, 2, 4)
    machine.validate()
