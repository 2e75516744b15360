"""What a replica has left waiting for a quorum when it retires is applied before readers go on past it."""

from __future__ import annotations

from flowml.policy import UNBOUNDED, Policy, Quorum
from flowml_runtime.protocol.training.home import Apply, Home, Publish, StageRetired, StoreLoaded
from flowml_runtime.protocol.training.store import ContributionReceived
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Terms
from flowml_tools.faults.checker import check
from flowml_tools.faults.layout import make


def test_the_floor_does_not_pass_a_contribution_that_waits() -> None:
    policy = Policy(staleness=4, quorum=Quorum(3, late="fold"))
    home = Home(Terms(3, 1, 1, (StoreTerms((0,), policy),), 8), [0])
    home.step(StoreLoaded(0))
    for handle, (replica, clock) in enumerate([(0, 0), (2, 0), (0, 1)], 1):
        home.step(ContributionReceived(0, 0, replica, 0, clock, 0, 1, handle))
    assert home.version(0) == 1
    assert not [a for a in home.step(ContributionReceived(0, 0, 1, 0, 0, 0, 1, 9)) if isinstance(a, Apply)]
    wanted = home.step(StageRetired(1, 0))
    home.validate()
    assert [a.contributions for a in wanted if isinstance(a, Apply)] == [(((9,), 1 / 3),)]
    assert [(a.version, a.floor) for a in wanted if isinstance(a, Publish)] == [(2, 1)]


def test_no_reader_misses_what_a_retired_replica_had_sent() -> None:
    """Replicas share the items, so that the slow one retires while the others have some clocks to go."""
    policies = [Policy(staleness=2, quorum=Quorum(0.75, late="fold")), Policy(staleness=UNBOUNDED)]
    for seed in range(30):
        run = make(policies, replicas=3, stages=2, clocks=7, items=6, speeds=(1, 1, 6), seed=seed)
        run.go()
        assert check(run.history) == []
