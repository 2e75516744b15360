"""Sites whose leader gathers what its replicas push: a rank that has only to send may be done first."""

from __future__ import annotations

import optax
import pytest

import flowml as fm
from tests.training.test_observations import PARAMS, SOURCE, loss

SITES = fm.Hierarchy(fm.ParameterServer(), fm.ParameterServer(), sites=((0,), (1, 2, 3)))


@pytest.mark.parametrize("late", range(4))
def test_a_site_gathers_whoever_is_late(late: int) -> None:
    """Without arithmetic a fit ended with a KeyError if the leader pushed last."""
    policy = fm.Policy(topology=SITES, quorum=fm.Quorum(0.5, late="fold"), payload=fm.Delta(), every=2)
    machines = fm.sim.Straggler(fm.sim.ShiftedExponential(0.02, 0.1), 5, workers=(late,))
    results = [
        fm.Trainer(
            loss,
            optax.sgd(0.05),
            cluster=fm.SimulatedCluster(4, machines, fm.sim.Network(1e-2, 1e6), arithmetic=arithmetic),
            replicas=4,
            policies=policy,
        ).fit(PARAMS, SOURCE, batch_size=16, steps=9, progress=False)
        for arithmetic in (False, True)
    ]
    without, computed = results
    assert [r["step"] for r in without.history] == list(range(9))
    assert without.traffic == computed.traffic
    assert without.virtual_seconds == computed.virtual_seconds
