"""Six methods under three models of slow machines: a simulated fit has the parameters, fates and bytes of a real one.

The real workers pause for the delays that the simulator adds. What is compared does not depend on what else the machine
does: of the methods that wait for all replicas everything, of a code what is decoded, and of backup workers a replica
that is always far behind. Time is only bounded from below, because other programs make real time longer. `flowml bench
fidelity` compares step times, with the goal of 10 %.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import optax
import pytest

import flowml as fm
from flowml_runtime.protocol.training.summary import Summary
from tests.training.reference import BATCH, assert_same, data, mlp, mlp_loss

REPLICAS, STEPS = 4, 6
FAST_S, SLOW_S = 0.01, 0.15


def machines(*slow: tuple[int, int], slow_s: float = SLOW_S) -> fm.sim.Recorded:
    """Delays of which these are the slow ones, of (replica, step)."""
    return fm.sim.Recorded([[slow_s if (r, s) in slow else FAST_S for s in range(STEPS)] for r in range(REPLICAS)])


ALWAYS = [(3, step) for step in range(STEPS)]
MACHINES = {
    "one always slow": machines(*ALWAYS),
    "slow in turn": machines((1, 1), (3, 2), (0, 4)),
    "a heavy tail": fm.sim.Recorded([[FAST_S * 3 ** (r * s % 4) for s in range(STEPS)] for r in range(REPLICAS)]),
}
METHODS = {
    "synchronous": fm.policies.synchronous(),
    "DiLoCo": fm.policies.diloco(3),
    "D-PSGD": fm.policies.gossip("ring"),
    "top-k": fm.policies.synchronous(filters=(fm.filters.top_k(0.1).with_error_feedback(),)),
    "ring": fm.policies.ring(),
    "gradient coding": fm.policies.coded(1),
}


def fit(cluster: Any, policy: fm.Policy, delays: fm.sim.Recorded) -> fm.TrainingResult:
    trainer = fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=cluster, replicas=REPLICAS, policies=policy, delays=delays)
    return trainer.fit(mlp(), data(), batch_size=BATCH, steps=STEPS, seed=3, progress=False)


def simulated(policy: fm.Policy, delays: fm.sim.Recorded) -> fm.TrainingResult:
    return fit(fm.SimulatedCluster(REPLICAS, fm.sim.Constant(0.0), fm.sim.Network(0.0, float("inf"))), policy, delays)


@pytest.mark.parametrize("model", MACHINES)
@pytest.mark.parametrize("method", METHODS)
def test_a_simulated_fit_does_what_a_real_one_does(threads_cluster: fm.Cluster, method: str, model: str) -> None:
    policy, delays = METHODS[method], MACHINES[model]
    real, virtual = fit(threads_cluster, policy, delays), simulated(policy, delays)
    assert_same((real.params, real.opt_state), (virtual.params, virtual.opt_state))
    same_ledgers(real.ledger, virtual.ledger)
    if method == "gradient coding":  # whether a late replica is told in time not to push is left to the machine
        assert published(real) == published(virtual)
        return
    assert real.traffic == virtual.traffic
    assert real.staleness == virtual.staleness
    assert virtual.virtual_seconds is not None
    assert real.seconds >= virtual.virtual_seconds * 0.999, "no real pause is shorter than its delay"


def same_ledgers(real: Summary, virtual: Summary) -> None:
    """Equal; what error feedback kept is added up in the order of arrival, so to rounding."""
    assert real.kept == pytest.approx(virtual.kept, rel=1e-6)
    assert replace(real, kept={}) == replace(virtual, kept={})


def published(result: fm.TrainingResult) -> dict[str, int]:
    return {layer: sent["published_wire_bytes"] for layer, sent in result.traffic.items()}


def test_backup_workers_leave_out_the_same_replica(threads_cluster: fm.Cluster) -> None:
    """It is in its first step when the others have done all."""
    policy, delays = fm.policies.backup_workers(3), machines(*ALWAYS, slow_s=6.0)
    real, virtual = fit(threads_cluster, policy, delays), simulated(policy, delays)
    assert_same(real.params, virtual.params)
    assert [tally.used for tally in real.ledger.replicas] == [STEPS, STEPS, STEPS, 0]
    same_ledgers(real.ledger, virtual.ledger)
