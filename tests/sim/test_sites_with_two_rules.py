"""Layers whose sites decide by different rules about the same steps: the ledger says for each which items it has."""

from __future__ import annotations

import pytest

from flowml.policy import Delta, Gossip, Hierarchy, ParameterServer, Policy, Quorum, Tree
from flowml_tools.faults.campaign import check_rest
from flowml_tools.faults.checker import check
from flowml_tools.faults.layout import make


@pytest.mark.parametrize("remote", [ParameterServer(), Gossip("complete")])
def test_an_item_that_one_rule_drops_and_another_folds_in_counts(remote: Gossip | ParameterServer) -> None:
    """The layers had one decision about sites, and an item that was late for one of them was dropped for both."""
    rules = [
        Policy(topology=Hierarchy(ParameterServer(), remote, 1, quorum=Quorum(1, late="drop")), payload=Delta()),
        Policy(topology=Hierarchy(ParameterServer(), remote, 1, quorum=Quorum(1, late="fold")), payload=Delta()),
    ]
    for seed in range(3):
        run = make(rules, replicas=3, stages=1, clocks=6, seed=seed, speeds=(1, 1, 3))
        run.go()
        check_rest(run)
        assert check(run.history) == []


def test_a_leader_runs_the_steps_that_others_of_its_site_run_for_another_layer() -> None:
    """It left out steps of which its sites were late, and another replica of its site waited for its parameters there:
    for another layer that one was in a site of its own, which had not decided."""
    alone = ((0, 2, 4), (1, 3, 5)), ((0,), (1, 2), (3,), (4, 5))
    server = ParameterServer()
    rules = [
        Policy(
            topology=Hierarchy(server, server, alone[0], quorum=Quorum(0.5)),
            payload=Delta(),
            every=5,
            quorum=Quorum(0.5),
        ),
        Policy(topology=Hierarchy(server, Tree(2), alone[1], quorum=Quorum(0.5))),
    ]
    for seed in range(12):
        run = make(rules, replicas=6, stages=1, clocks=6, seed=seed, speeds=(1, 6, 1, 2, 1, 6))
        run.go()
        check_rest(run)
        assert check(run.history) == []


def test_a_late_gradient_joins_a_step_of_each_of_its_sites() -> None:
    """Where it joined different steps for two layers, the fate of both was taken from the push after the later step."""
    server, sites = ParameterServer(), (((0, 4), (1, 2, 3)), ((0, 4), (1, 2), (3,)))
    rules = [
        Policy(
            topology=Hierarchy(server, server, found, quorum=Quorum(0.5, late="fold")),
            payload=Delta(),
            every=3,
            quorum=Quorum(share, late="fold"),
        )
        for found, share in zip(sites, (1, 0.5), strict=True)
    ]
    for seed in range(20):
        run = make(rules, replicas=5, stages=1, clocks=16, seed=seed, speeds=(1, 1, 2, 8, 1))
        run.go()
        check_rest(run)
        assert check(run.history) == []
