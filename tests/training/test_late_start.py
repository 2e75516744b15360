"""A replica that begins late reports to a consensus as one that begins with the others."""

from __future__ import annotations

import numpy as np

import flowml as fm
from tests.training.test_admm import EVERY, L1, RHO, fit, serial_lasso

LATE_S = 0.2
"""The others have done several rounds by then, if they do not wait for it."""


class Far(fm.sim.Network):
    """A network in which one worker is far from all others."""

    def link(self, a: int, b: int) -> fm.sim.Link:
        return fm.sim.Link(LATE_S, 1e9) if a != b and 2 in (a, b) else super().link(a, b)


def test_the_optimum_is_reached_although_a_replica_begins_late() -> None:
    """Its first report was the change since the version that it had read first, and not since that of the beginning."""
    policy = fm.policies.admm(RHO, 2, 3 * EVERY, EVERY, l1=L1)
    cluster = fm.SimulatedCluster(3, fm.sim.Constant(1e-3), Far(1e-4, 1e9))
    result = fit(cluster, policy, 40)
    np.testing.assert_allclose(result.params["x"], serial_lasso(), atol=5e-3)
