"""In a tree with a code at each parent, parents add up: a worker gets at most one message of each of its children."""

from __future__ import annotations

from collections import Counter

import pytest

from flowml.policy import Coded, Policy
from flowml_runtime import wire
from flowml_runtime.protocol.training import actions
from flowml_tools.faults.campaign import check_rest
from flowml_tools.faults.checker import check
from flowml_tools.faults.history import Turn
from flowml_tools.faults.layout import make
from flowml_tools.faults.world import World

CLOCKS = 3
TREES = {"6": (2, 2, 1), "14": (2, 3, 1), "12": (3, 2, 1), "39": (3, 3, 2), "84": (4, 3, 1), "156": (12, 2, 3)}


def trained(shape: tuple[int, int, int], seed: int, lost: tuple[int, ...] = ()) -> World:
    """A run with real machines and a matrix for each gradient, which says whose examples it has."""
    children, levels, stragglers = shape
    quorum = Coded(stragglers, "tree", children=children, levels=levels)
    replicas = quorum.tree.workers if quorum.tree else children
    run = make([Policy(quorum=quorum)], replicas=replicas, stages=1, clocks=CLOCKS, seed=seed, homes_on=0)
    for replica in lost:
        run.lose(replica, 0.3)
    run.go()
    check_rest(run)
    assert check(run.history) == [], "each version is the mean over one batch, each partition of it once"
    return run


def received(run: World) -> Counter[tuple[str, int, bool]]:
    """(worker, clock, whether it is for the home) -> the contributions that have arrived."""
    tree = run.terms.stores[0].tree
    assert tree is not None
    found: Counter[tuple[str, int, bool]] = Counter()
    for fact in run.history.facts:
        event = fact.event if isinstance(fact, Turn) else None
        if isinstance(event, actions.Received) and isinstance(event.message, wire.Contribution):
            told = event.message
            found[fact.who, told.clock, tree.adder_of(told.replica, summed=told.of_site) is None] += 1  # pyright: ignore
    return found


@pytest.mark.parametrize("shape", TREES.values(), ids=TREES)
def test_each_parent_gets_one_message_of_each_child(shape: tuple[int, int, int]) -> None:
    run = trained(shape, seed=1)
    for (_, _, home), number in received(run).items():
        assert number <= shape[0] + (not home), "a parent gets its own gradient besides"
    assert sum(n for (*_, home), n in received(run).items() if home) <= CLOCKS * shape[0]
    assert run.history.summary is not None
    assert run.history.summary.dropped == 0


@pytest.mark.parametrize("name", ["6", "14", "12", "39"])
@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_messages_does_not_matter(name: str, seed: int) -> None:
    trained(TREES[name], seed)


@pytest.mark.parametrize("seed", range(4))
def test_batches_are_decoded_without_replicas_of_every_level(seed: int) -> None:
    """Of each parent one child is lost, also a parent whose children then compute in vain."""
    trained((3, 3, 1), seed, lost=(1, 4, 7 + seed % 2, 12, 17))
