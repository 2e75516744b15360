"""What a slow replica costs by `result.stragglers()` is what a second fit without it saves."""

from __future__ import annotations

from typing import Any

import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.driver.training.paces import Paces
from flowml_runtime.driver.training.stragglers import free_costs
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Terms
from tests.training.test_observations import PARAMS, SOURCE, loss

named = fm.policies
SITES = fm.Hierarchy(fm.AllReduce(), fm.ParameterServer(), sites=2)

POLICIES = {
    "gossip": named.gossip("ring"),
    "gossip every 4": named.gossip("exponential", every=4),
    "gossip with an outer optimizer": named.no_loco(4),
    "gossip of deltas between sites": named.gaia(0.01, sites=2),
    "sums": named.all_reduce(),
    "sites that send to a home": fm.Policy(topology=SITES),
    "overlapping decisions": named.diloco(4, fragments=2, delay=1, alpha=0.5),
    "bounded staleness": named.asynchronous(2),
    "no bound": named.asynchronous(),
    "epochs that end early": fm.Policy(staleness=fm.UNBOUNDED, quorum=fm.Quorum(0.75, of="samples", over="epoch")),
    "one portion": named.speculate(1),
    "portions": named.speculate(4),
    "quorum": named.quorum(0.75),
}


def simulated(policy: Any, machines: Any, replicas: int, steps: int = 20) -> fm.TrainingResult:
    cluster = fm.SimulatedCluster(replicas, machines, fm.sim.Network(1e-4, 1e9), arithmetic=False)
    trainer = fm.Trainer(loss, optax.sgd(0.05), cluster=cluster, replicas=replicas, policies=policy)
    return trainer.fit(PARAMS, SOURCE, batch_size=4 * replicas, steps=steps, progress=False)


@pytest.mark.parametrize("name", POLICIES)
def test_the_cost_is_the_difference_of_two_fits(name: str) -> None:
    steady = fm.sim.Constant(0.1)
    slow = simulated(POLICIES[name], fm.sim.Straggler(steady, 5, workers=(3,)), 4)
    ideal = simulated(POLICIES[name], steady, 4)
    (found,) = slow.stragglers()
    assert found.replica == 3
    assert found.cost_s == pytest.approx(slow.virtual_seconds - ideal.virtual_seconds, rel=0.05)
    assert ideal.stragglers().cost_s < 0.01 * found.cost_s, "one of four equal replicas is left out of a quorum of 3"


@pytest.mark.parametrize("name", ["gossip", "sums", "sites that send to a home", "no bound", "one portion", "portions"])
def test_steps_that_vary_leave_the_cost_within_a_sixth(name: str) -> None:
    """Machines that are good on average are late now and then, and share what is charged."""
    varied = fm.sim.LogNormal(0.1, 0.2)
    slow = simulated(POLICIES[name], fm.sim.Straggler(varied, 3, workers=(7,)), 8, steps=40)
    ideal = simulated(POLICIES[name], varied, 8, steps=40)
    worst, *others = slow.stragglers()
    assert worst.replica == 7
    assert worst.cost_s == pytest.approx(slow.virtual_seconds - ideal.virtual_seconds, rel=1 / 6)
    assert sum(other.cost_s for other in others) < 0.2 * worst.cost_s


@pytest.mark.parametrize("first", ["bound", "none"])
def test_a_layer_that_leaves_early_in_a_step_does_not_hide_the_waits_for_it(first: str) -> None:
    """Others begin their steps before the slow replica reports its own."""
    rules = {"bound": named.asynchronous(5), "none": named.downpour(2, 2)}
    policies = {"w": rules[first], "b": rules["none" if first == "bound" else "bound"]}
    steady = fm.sim.Constant(0.1)
    slow = simulated(policies, fm.sim.Straggler(steady, 3, workers=(3,)), 4, steps=30)
    ideal = simulated(policies, steady, 4, steps=30)
    (found,) = slow.stragglers()
    assert found.replica == 3
    assert found.cost_s == pytest.approx(slow.virtual_seconds - ideal.virtual_seconds, rel=0.15)


def test_a_member_of_a_site_is_named_and_not_its_leader() -> None:
    slow = simulated(POLICIES["sites that send to a home"], fm.sim.Straggler(fm.sim.Constant(0.1), 3, workers=(3,)), 4)
    assert [s.replica for s in slow.stragglers()] == [3]


def test_with_portions_those_are_named_whose_portions_were_copied() -> None:
    machines = fm.sim.Straggler(fm.sim.Constant(0.1), 5, workers=(3,))
    result = simulated(named.speculate(1), machines, 4)
    (found,) = result.stragglers()
    assert found.items.copied == result.ledger.duplicate > 0, (
        "each copy is work that did not count, its own or the other"
    )
    assert f"others computed {found.items.copied} portions that it had begun" in str(result.stragglers())
    assert sum(epoch.copied for epoch in result.ledger.epochs) == found.items.copied


def test_paces_of_a_ring_are_those_of_a_naive_version() -> None:
    rng = np.random.default_rng(0)
    replicas, steps = 7, 30
    own = rng.exponential(1.0, (steps, replicas))
    ring = Terms(replicas, 1, 1, (StoreTerms((0,), named.gossip("ring")),), steps)
    paces = Paces(ring, [0], runs=1)
    began = np.zeros(replicas)
    for clock in range(steps):
        near = [max(began[(r + d) % replicas] for d in (-1, 0, 1)) for r in range(replicas)]
        began = np.array([max(began[r] + own[clock, r], near[r]) for r in range(replicas)])
        assert paces.step(clock, own[clock : clock + 1]).max() == pytest.approx(began.max())


def test_paces_of_stale_sums_are_those_of_a_naive_version() -> None:
    rng = np.random.default_rng(1)
    replicas, steps, staleness = 5, 30, 2
    own = rng.exponential(1.0, (steps, replicas))
    policy = fm.Policy(staleness=staleness, quorum=fm.Quorum(1.0))
    paces = Paces(Terms(replicas, 1, 1, (StoreTerms((0,), policy),), steps), [0], runs=1)
    began, ended = np.zeros(replicas), list[Any]()
    for clock in range(steps):
        ended.append(began + own[clock])
        waits = max(ended[clock - staleness]) if clock >= staleness else 0.0
        began = np.maximum(ended[clock], waits)
        assert paces.step(clock, own[clock : clock + 1]).max() == pytest.approx(began.max())


def test_free_replicas_that_lack_items_share_what_the_fit_took_longer() -> None:
    usual, costs = free_costs([30, 30, 10, 10], [3.0] * 4, 3.0, late=())
    assert usual == 30
    assert costs == pytest.approx({2: 0.5, 3: 0.5}), "80 items at 40 a second take 2 s"
    assert free_costs([20, 20, 19], [2.0, 2.0, 2.0], 2.0, late=())[1] == {}
    assert free_costs([0, 0], [1.0, 1.0], 1.0, late=())[1] == {}
