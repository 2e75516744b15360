"""What random runs with faults have found, each as the smallest run that shows it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flowml as fm
from flowml.policy import UNBOUNDED, Deadline, Delta, Gradient, ParameterServer, Policy, Quorum, SharedMemory, Speculate
from flowml_runtime.protocol.training.actions import Wake
from flowml_runtime.protocol.training.snapshot import Rhythm
from flowml_tools.faults.campaign import check_rest
from flowml_tools.faults.cases import Case
from flowml_tools.faults.checker import check
from flowml_tools.faults.draws import check_drawn
from flowml_tools.faults.history import Made, Turn
from flowml_tools.faults.layout import make
from flowml_tools.faults.rarer import rarer
from flowml_tools.faults.timeline import Timeline
from flowml_tools.faults.world import World


def check_all(run: World) -> None:
    run.go()
    check_rest(run)
    assert check(run.history) == []


@pytest.mark.parametrize("local", [fm.AllReduce(), fm.Ring(), ParameterServer()])
def test_a_replica_of_a_site_keeps_no_sums_and_counts_all_that_it_relays(local: fm.AllReduce) -> None:
    """Only the leader of a site used the sum of its gradients, so the others left before they had relayed it."""
    for seed in range(6):
        rule = Policy(topology=fm.Hierarchy(local, ParameterServer(), 2))
        check_all(make([rule], replicas=6, stages=2, clocks=4, seed=seed, speeds=(1, 3, 1, 0.5, 8, 2)))


def test_own_parameters_are_pushed_before_they_are_replaced() -> None:
    """A slow replica left out clocks that others had decided, among them that of its push to another layer."""
    rules = [Policy(quorum=Quorum(2)), Policy(payload=Delta(), every=4, staleness=UNBOUNDED, apply="sum")]
    for seed in range(6):
        check_all(make(rules, replicas=3, stages=1, clocks=24, seed=seed, speeds=(1, 1, 20), items=6))


@pytest.mark.parametrize("seed", range(6))
def test_the_portions_of_a_lost_replica_are_computed_again_if_there_are_no_copies(seed: int) -> None:
    rule = Policy(quorum=Speculate(2, copies=0))
    run = make([rule], replicas=3, stages=2, clocks=6, seed=seed, homes_on=0)
    run.lose(2, 2.0 + seed)
    check_all(run)


def test_a_step_that_outlives_its_run_updates_nothing_of_the_next() -> None:
    """A step that computed when its run ended updated layers in shared memory for the run that had begun meanwhile."""
    for seed in range(12):
        run = make([Policy(topology=SharedMemory())], replicas=3, stages=1, clocks=4, seed=seed, workers=1)
        run.interrupt(1.0 + seed / 4)
        check_all(run)


def test_no_snapshot_is_taken_after_the_last_one() -> None:
    """One that was asked for while the fit ended replaced the last one by one of a fit that seemed to go on."""
    for seed in range(12):
        pauses = [seed / 2 + n / 4 for n in range(40)]
        rule = Policy(staleness=1, quorum=Quorum(1), every=2)
        for policy in (rule, Policy(staleness=UNBOUNDED)):
            options: dict[str, Any] = {"rhythm": Rhythm(2), "pauses": pauses, "twice": 0.3}
            check_all(make([policy], replicas=2, stages=2, clocks=4, seed=seed, **options))


@pytest.mark.parametrize("lost_after", range(12, 22))
def test_a_lost_replica_may_be_late_in_one_layer_and_in_time_in_another(lost_after: int) -> None:
    """The driver did not tell for which layers the items of a lost replica were folded in."""
    rules = [Policy(quorum=Quorum(1, late="fold"), every=2), Policy(quorum=Quorum(0.6), every=3)]
    run = make(rules, replicas=2, stages=1, clocks=6, seed=1, speeds=(1, 1.3), homes_on=0)
    run.lose(1, lost_after + 0.5)
    check_all(run)


def _late_at_its_site() -> World:
    """Two replicas of a site go on by its deadline for about 36 clocks without the third, which is cut off."""
    topology = fm.Hierarchy(ParameterServer(), ParameterServer(), 1, Deadline(0.5, 0.3, late=fm.Fold(0.5)))
    return Case(
        seed=14228,
        policies=(Policy(topology=topology, every=3, apply=fm.Vote(1)),),
        replicas=3,
        stages=1,
        workers=2,
        clocks=48,
        items=9,
        compute=fm.sim.ShiftedExponential(0.1, 0.02),
        network=fm.sim.Network(0.0, 1e9),
        faults=(fm.sim.Partition((1,), 1.1123, 9.1123),),
        source="shipped",
        twice=0.3,
        rhythm=Rhythm(0),
        pauses=(6.7517, 6.9051, 7.8529, 8.0784),
        silent=True,
        patience_s=0.3,
    ).world()


def test_a_contribution_that_a_site_folds_in_very_late_is_in_the_store() -> None:
    """What its decay leaves of it, 3e-11, was taken for nothing, and the store for one that lacks its items."""
    run = _late_at_its_site()
    check_all(run)
    payloads = [payload for f in run.history.facts if isinstance(f, Made) for *_, payload in f.contributions]
    amounts = [float(x) for payload in payloads for x in np.ravel(payload) if x]
    assert 0 < min(amounts) < 1e-9 < max(amounts)


@pytest.mark.parametrize("payload", [Gradient(), Delta()])
def test_what_a_site_folds_in_very_late_counts_as_its_decay_says(payload: Gradient | Delta) -> None:
    """Also in the step of a site that has parameters of its own."""
    topology = fm.Hierarchy(ParameterServer(), ParameterServer(), 1, Quorum(2, late=fm.Fold(0.01)))
    for seed in range(1, 4):
        rule = Policy(topology=topology, payload=payload, every=2)
        run = make([rule], replicas=3, stages=1, clocks=16, items=6, seed=seed, speeds=(1, 1, 12))
        check_all(run)
        assert any(0 < decay < 1e-9 for decay in Timeline.of(run.history).decays_inside(0).values())


@pytest.mark.parametrize(("times", "text"), [(0.0, "lacks items"), (2.0, "times in store 0"), (0.999, "in place of")])
def test_a_very_late_contribution_that_is_not_as_large_as_its_decay_is_found(times: float, text: str) -> None:
    run = _late_at_its_site()
    run.go()

    def changed(payload: Any) -> Any:
        return np.where(np.abs(payload) < 1e-6, payload * times, payload)

    facts = run.history.facts
    for at, made in enumerate(facts):
        if isinstance(made, Made):
            contributions = tuple((r, c, changed(payload)) for r, c, payload in made.contributions)
            facts[at] = Made(made.home, made.store, made.version, contributions, made.value)
    assert any(text in broken for broken in check(run.history))


def test_sites_of_one_worker_do_not_wake_each_other_again_and_again() -> None:
    """Each wake-up of one made all others ask for theirs again, so that there were twice as many every time."""
    topology = fm.Hierarchy(ParameterServer(), ParameterServer(), 4, Deadline(0.5, 5.0, limit_s=20.0))
    run = make([Policy(topology=topology)], replicas=8, stages=1, clocks=24, workers=1, speeds=(1, 9))
    check_all(run)
    wakes = [action for turn in run.history.facts if isinstance(turn, Turn) for action in turn.wanted]
    assert sum(isinstance(action, Wake) for action in wakes) < 24 * 4 * 3


def test_what_a_site_sends_late_is_in_the_bytes_that_its_leader_tells() -> None:
    """A leader told its bytes when it retired, and its homes had sums left to add up and to send."""
    for seed in range(12):
        topology = fm.Hierarchy(ParameterServer(), ParameterServer(), 2, Quorum(1))
        rules = [Policy(topology=topology, quorum=Quorum(0.3)), Policy(quorum=Quorum(0.3))]
        homes = fm.sim.Homes(apply_s=0.5, bytes_per_s=100.0)
        check_all(make(rules, replicas=2, stages=1, clocks=1, items=2, seed=seed, speeds=(1, 1.2), homes=homes))


def test_an_apply_that_outlives_its_run_changes_nothing_of_the_next() -> None:
    """A home that had begun another fit made the versions that the fit before had left it."""
    for seed in range(12):
        homes = fm.sim.Homes(apply_s=1.0)
        run = make([Policy(staleness=UNBOUNDED)], replicas=3, stages=1, clocks=4, seed=seed, homes=homes)
        run.interrupt(1.0 + seed / 4)
        check_all(run)


@pytest.mark.parametrize("ended_s", [4.7, 4.72, 4.74, 4.76, 4.78, 4.8])
def test_a_worker_that_fails_while_its_fit_is_ended_fails_nothing_of_the_next(ended_s: float) -> None:
    """Its limit was over before it heard of the end, and the fit after that took its report for one of its own."""
    run = make(
        [Policy(quorum=Quorum(1.0, limit_s=0.3))],
        replicas=2,
        stages=1,
        clocks=4,
        speeds=(0.1, 50),  # a report of the limit that is over comes at 4.8 s
        network=fm.sim.Network(0.05, 1e9),
    )
    run.interrupt(ended_s)
    run.go()
    assert check(run.history) == []


def test_rarer_values_are_drawn_for_the_sites_that_there_are() -> None:
    """One site was to be two in turn, which ended a campaign in place of a seed."""
    rule = Policy(topology=fm.Hierarchy(ParameterServer(), fm.Gossip("torus"), 1))
    for seed in range(40):
        check_drawn(rarer((rule,), 6, seed), 6)


def test_rules_of_sites_are_drawn_for_the_sites_that_there_are() -> None:
    """A home that applies each half of a contribution of two sites ended a campaign in place of a seed."""
    topology = fm.Hierarchy(ParameterServer(), ParameterServer(), 2)
    rule = Policy(topology=topology, staleness=1, quorum=Quorum(0.25, late="fold"))
    with pytest.raises(fm.PolicyError, match="less than one"):
        check_drawn((rule,), 6)
