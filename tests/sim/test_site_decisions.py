"""The leader of a site that decides which of its replicas count hears some decisions about all sites twice."""

from __future__ import annotations

from typing import Literal

import pytest

from flowml.policy import Hierarchy, ParameterServer, Policy, Quorum
from flowml_tools.faults.campaign import check_rest
from flowml_tools.faults.checker import check
from flowml_tools.faults.layout import make


@pytest.mark.parametrize("late", ["drop", "requeue", "fold"])
def test_a_decision_about_sites_that_comes_again_changes_nothing(late: Literal["drop", "requeue", "fold"]) -> None:
    """The sum of the clock had been told already, and the fit failed as if the site had never made it."""
    topology = Hierarchy(ParameterServer(), ParameterServer(), 2, quorum=Quorum(1, late=late))
    for seed in range(4):
        run = make([Policy(topology=topology)], replicas=4, stages=1, clocks=6, seed=seed, twice=0.5)
        run.go()
        check_rest(run)
        assert check(run.history) == []
