"""What a slow replica costs where layers have rules of their own: the fit waits for whichever takes longest.

Each home sees only what it waits for itself. The sum or the largest of what homes say was up to five times wrong.
"""

from __future__ import annotations

from typing import Any

import optax
import pytest

import flowml as fm
from tests.training.test_observations import PARAMS, SOURCE, loss

named = fm.policies
RULES = {
    "sync": fm.Policy(),
    "quorum": named.quorum(0.75),
    "folding quorum": named.compensate(0.75),
    "deadline": named.deadline(0.75),
    "ssp": named.asynchronous(2),
    "no bound": named.downpour(2, 2),
    "every 5": named.every(5),
    "local": named.local_sgd(4),
    "quorum every 4": fm.Policy(quorum=fm.Quorum(0.75), every=4),
    "sums": named.all_reduce(),
    "gossip": named.gossip("ring"),
    "stale": named.double_buffer(),
    "sites": fm.Policy(topology=fm.Hierarchy(fm.AllReduce(), fm.ParameterServer(), sites=2)),
    "quorum in sites": fm.Policy(
        topology=fm.Hierarchy(fm.ParameterServer(), fm.ParameterServer(), 2, quorum=fm.Quorum(0.5))
    ),
}
MIXES = [
    ("quorum", "ssp"),
    ("quorum", "every 5"),
    ("quorum", "local"),
    ("quorum", "sums"),
    ("quorum", "gossip"),
    ("quorum", "stale"),
    ("quorum", "quorum every 4"),
    ("folding quorum", "quorum"),
    ("folding quorum", "every 5"),
    ("deadline", "ssp"),
    ("deadline", "sync"),
    ("ssp", "every 5"),
    ("ssp", "local"),
    ("ssp", "quorum every 4"),
    ("every 5", "local"),
    ("every 5", "sums"),
    ("local", "sites"),
    ("local", "quorum every 4"),
    ("quorum in sites", "ssp"),
    ("quorum in sites", "sync"),
    ("sync", "no bound"),
]
STEADY = fm.sim.Constant(0.1)
VARIED = fm.sim.LogNormal(0.1, 0.2)
MACHINES: dict[str, tuple[Any, Any, float]] = {
    "three times slower": (fm.sim.Straggler(STEADY, 3, workers=(3,)), STEADY, 0.15),
    "half as fast again": (fm.sim.Straggler(STEADY, 1.5, workers=(3,)), STEADY, 0.15),
    "now and then": (fm.sim.Straggler(STEADY, 5, workers=(3,), probability=0.2), STEADY, 0.15),
    "steps that vary": (fm.sim.Straggler(VARIED, 3, workers=(3,)), VARIED, 0.2),
}


def _fitted(mix: tuple[str, str], machines: Any) -> fm.TrainingResult:
    cluster = fm.SimulatedCluster(4, machines, fm.sim.Network(1e-4, 1e9), arithmetic=False)
    policies = dict(zip(("w", "b"), map(RULES.__getitem__, mix), strict=True))
    trainer = fm.Trainer(loss, optax.sgd(0.05), cluster=cluster, replicas=4, policies=policies)
    return trainer.fit(PARAMS, SOURCE, batch_size=16, steps=30, progress=False)


@pytest.mark.parametrize("machines", MACHINES)
@pytest.mark.parametrize("mix", MIXES, ids=" and ".join)
def test_the_cost_is_what_a_fit_without_the_straggler_saves(mix: tuple[str, str], machines: str) -> None:
    slow, ideal, tolerance = MACHINES[machines]
    late, good = _fitted(mix, slow), _fitted(mix, ideal)
    worst, *others = late.stragglers()
    saved = late.virtual_seconds - good.virtual_seconds
    assert worst.replica == 3
    assert worst.cost_s == pytest.approx(saved, rel=tolerance, abs=0.05 * late.virtual_seconds)
    assert sum(other.cost_s for other in others) < 0.15 * late.virtual_seconds
    assert worst.late <= late.stragglers().steps


def test_equal_replicas_cost_nothing_in_any_mix() -> None:
    for mix in MIXES:
        result = _fitted(mix, STEADY)
        assert result.stragglers().cost_s < 0.02 * result.virtual_seconds, mix


def test_a_mix_that_is_not_modelled_says_so() -> None:
    policies = {"w": fm.Policy(quorum=fm.Quorum(0.75, of="samples")), "b": named.asynchronous(2)}
    machines = fm.sim.Straggler(STEADY, 3, workers=(3,))
    cluster = fm.SimulatedCluster(4, machines, fm.sim.Network(1e-4, 1e9), arithmetic=False)
    trainer = fm.Trainer(loss, optax.sgd(0.05), cluster=cluster, replicas=4, policies=policies)
    found = trainer.fit(PARAMS, SOURCE, batch_size=16, steps=10, progress=False).stragglers()
    assert found.rough and "so these costs are rough" in str(found)
    assert not _fitted(MIXES[0], machines).stragglers().rough
