"""A slow replica that decisions leave out still costs time if steps vary: one more good one would make them earlier."""

from __future__ import annotations

import numpy as np
import pytest

import flowml as fm
from flowml.policy.waits import Waits, side_by_side, waits
from tests.training.test_straggler_costs import simulated

SITES = fm.Hierarchy(fm.ParameterServer(), fm.ParameterServer(), 2, quorum=fm.Quorum(0.75))
POLICIES = {
    "quorum": fm.policies.quorum(0.75),
    "half": fm.policies.quorum(0.5),
    "quorums in sites": fm.Policy(topology=SITES),
}


@pytest.mark.parametrize("name", POLICIES)
def test_the_cost_is_near_what_a_second_fit_without_it_saves(name: str) -> None:
    """The replica cost nothing, and where sites decide side by side others were named before it."""
    varied = fm.sim.ShiftedExponential(0.05, 0.05)
    slow = simulated(POLICIES[name], fm.sim.Straggler(varied, 3, workers=(7,)), 8, steps=150)
    ideal = simulated(POLICIES[name], varied, 8, steps=150)
    worst, *others = slow.stragglers()
    assert worst.replica == 7
    assert worst.cost_s == pytest.approx(slow.virtual_seconds - ideal.virtual_seconds, rel=0.5)
    assert max(other.cost_s for other in others) < worst.cost_s / 2
    assert max(found.cost_s for found in ideal.stragglers()) < worst.cost_s / 3


@pytest.mark.parametrize("draw", ["exponential", "uniform"])
def test_one_more_good_replica_saves_what_order_statistics_say(draw: str) -> None:
    rng, need, members = np.random.default_rng(0), 6, 8
    rounds = getattr(rng, draw)(size=(4000, members))
    with_all = np.sort(rounds, axis=1)[:, need - 1].mean()
    estimates, times = [], []
    for row in np.sort(rounds[:, 1:], axis=1):
        first = dict(enumerate(row[:need].tolist()))
        found = waits(first, members, began=0, start=0, decided=first[need - 1], missing=[6, 7])
        estimates.append(found.spare_s)
        times.append(first[need - 1])
    assert np.mean(estimates) == pytest.approx(np.mean(times) - with_all, rel=0.2)


def test_a_site_for_which_no_other_waits_costs_nothing() -> None:
    quick, slow = Waits(1.0, 0.2, ((1, 0.4, 0.3),)), Waits(3.0, 0.1, ((2, 2.0, 1.5),), spare_s=0.5)
    found = side_by_side([quick, slow], None)
    assert found.late == ((2, 2.0, 1.5), (1, 0.4, 0.0))
    assert (found.waited_s, found.spare_s) == (3.0, 0.5)
    both = side_by_side([Waits(2.0, 0.1, ((1, 1.0, 1.0),)), Waits(2.0, 0.1, ((2, 1.0, 1.0),))], None)
    assert both.late == ((1, 1.0, 0.5), (2, 1.0, 0.5))
