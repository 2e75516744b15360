"""How stale each contribution is when a home applies it, for policies that ask."""

from __future__ import annotations

import pytest

from flowml.policy import AllReduce, Policy, Prox, Quorum, StalenessScaled
from flowml_runtime.protocol.training.home import Apply, Home, StoreLoaded
from flowml_runtime.protocol.training.store import ContributionReceived
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Committed, Terms


def home(policy: Policy, stages: int = 1) -> Home:
    terms = StoreTerms(tuple(range(stages)), policy, policy.collective)
    machine = Home(Terms(2, stages, 1, (terms,), 9), [0])
    machine.step(StoreLoaded(0))
    return machine


def applied(machine: Home, replica: int, clock: int, bases: tuple[int, ...]) -> Apply:
    """The apply that a contribution on arrival leads to, whose parts were read from the versions `bases`."""
    actions = []
    for part, base in enumerate(bases):
        handle = 100 * replica + 10 * clock + part
        actions = machine.step(ContributionReceived(0, part, replica, 1, clock, base, 1, handle))
    return next(a for a in actions if isinstance(a, Apply))


@pytest.mark.parametrize("kind", [StalenessScaled(), Prox(l1=0.1, after=StalenessScaled(0.5))])
def test_staleness_counts_the_versions_since_the_one_that_was_read(kind: StalenessScaled | Prox) -> None:
    machine = home(Policy(staleness=5, apply=kind))
    assert applied(machine, 0, 0, (0,)).staleness == (0,)  # version 1
    assert applied(machine, 1, 0, (0,)).staleness == (1,)  # version 2
    assert applied(machine, 0, 1, (1,)).staleness == (1,)  # version 3
    assert applied(machine, 1, 1, (0,)).staleness == (3,)  # version 4
    assert applied(machine, 0, 2, (4,)).staleness == (0,)


def test_the_oldest_version_that_a_stage_read_counts() -> None:
    machine = home(Policy(staleness=5, apply=StalenessScaled()), stages=2)
    assert applied(machine, 0, 0, (0, 0)).staleness == (0,)
    assert applied(machine, 1, 0, (1, 0)).staleness == (1,)


def test_a_clocked_store_with_stale_reads_scales_each_contribution_by_its_own() -> None:
    machine = home(Policy(staleness=1, quorum=Quorum(1.0), apply=StalenessScaled()))
    for clock, bases in enumerate([(0, 0), (0, 1)]):
        for replica in range(2):
            handle = 10 * clock + replica
            machine.step(ContributionReceived(0, 0, replica, 1, clock, bases[replica], 1, handle))
        (apply,) = [a for a in machine.step(Committed(clock)) if isinstance(a, Apply)]
        assert apply.staleness == ((0, 0) if clock == 0 else (1, 0))


@pytest.mark.parametrize("policy", [Policy(staleness=5), Policy(topology=AllReduce())])
def test_other_policies_do_not_ask(policy: Policy) -> None:
    assert applied(home(policy), 0, 0, (0,)).staleness == ()
