"""What needs workers that keep values says so on a simulated cluster."""

from __future__ import annotations

import numpy as np
import pytest

import flowml as fm


def test_nothing_is_put_on_simulated_workers() -> None:
    cluster = fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9))
    with pytest.raises(fm.SimulationError, match=r"nothing can be put on them; give the arrays to fit\(\)"):
        fm.put({"w": np.ones(3)}, cluster)
