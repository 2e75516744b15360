"""A parent in a tree with a code at each parent adds up its own gradient and those of enough children, once a clock."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest

from flowml.policy import Coded, Policy
from flowml.policy.codes import TreeCode
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.branch import Action, Add, Branch
from flowml_runtime.protocol.training.home import Release
from flowml_runtime.protocol.training.site import Forward
from flowml_runtime.protocol.training.store import ContributionReceived
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Committed, Terms

PAIRS = Coded(1, "tree", children=2, levels=2)
"""Replicas 0 and 1, and 2 … 5 below them. One child of each parent is enough."""
CYCLIC = Coded(1, "tree", children=3, levels=2)


def parent(code: Coded = PAIRS, number: int = 0, stores: int = 1, stages: Sequence[int] = (0,)) -> Branch:
    tree = code.tree
    assert tree is not None
    rules = tuple(StoreTerms(tuple(stages), Policy(quorum=code)) for _ in range(stores))
    terms = Terms(tree.workers, len(stages), 2, rules, 10)
    return Branch(terms, terms.groups[0], number)


def part(replica: int, handle: int, clock: int = 0, **about: object) -> ContributionReceived:
    given = {"store": 0, "part": 0, "weight": 2, "terms": (), **about}
    store, number, weight, terms = given["store"], given["part"], given["weight"], given["terms"]
    return ContributionReceived(store, number, replica, 0, clock, 7, weight, handle, not weight, 0, terms)  # pyright: ignore


def told(machine: Branch, *events: ContributionReceived | Committed) -> list[Action]:
    found = [action for event in events for action in machine.step(event, 0.0)]
    machine.validate()
    return found


def test_it_adds_up_itself_and_the_first_child_that_is_enough() -> None:
    machine = parent()
    assert told(machine, part(2, 12)) == []
    made = Forward(0, 0, 4, 7, (((10,), 1.0), ((12,), 1.0)))
    assert told(machine, part(0, 10)) == [Add(made, ((0, 1.0), (2, 1.0)))]
    assert told(machine, part(3, 13)) == [Release(13)], "the other child computes the same"


def test_a_child_that_is_in_time_and_not_needed_has_no_coefficient() -> None:
    machine = parent()
    made = Forward(0, 0, 4, 7, (((10,), 1.0), ((12,), 1.0)))
    assert told(machine, part(2, 12), part(3, 13), part(0, 10)) == [
        Add(made, ((0, 1.0), (2, 1.0), (3, 0.0))),
        Release(13),
    ]


def test_nothing_is_sent_without_its_own_gradient_or_enough_children() -> None:
    assert told(parent(), part(2, 12), part(3, 13)) == []
    assert told(parent(CYCLIC), part(0, 10), part(3, 13)) == []


def test_the_terms_of_a_child_are_multiplied_down() -> None:
    code = Coded(1, "tree", children=3, levels=3)
    machine = parent(code)
    below = {child: ((child, 1.0), (3 * child + 3, 0.5)) for child in (3, 4)}
    found = told(machine, part(0, 10), *(part(c, 10 + c, terms=terms) for c, terms in below.items()))
    (added,) = found
    assert isinstance(added, Add)
    factors = dict(zip((0, 3, 4), (a for _, a in added.sum.contributions), strict=True))
    assert dict(added.terms) == {0: 1.0, 3: factors[3], 12: 0.5 * factors[3], 4: factors[4], 15: 0.5 * factors[4]}


def test_all_stores_and_all_parts_are_waited_for() -> None:
    machine = parent(stores=2, stages=(0, 1))
    handles = itertools.count(1)
    every = [part(r, next(handles), store=s, part=p) for r in (0, 2) for s in (0, 1) for p in (0, 1)]
    assert told(machine, *every[:-1]) == []
    assert told(machine, every[-1]) == [
        Add(Forward(0, 0, 4, 7, (((1, 2), 1.0), ((5, 6), 1.0))), ((0, 1.0), (2, 1.0))),
        Add(Forward(1, 0, 4, 7, (((3, 4), 1.0), ((7, 8), 1.0))), ((0, 1.0), (2, 1.0))),
    ]


def test_an_empty_contribution_makes_the_sum_empty() -> None:
    machine = parent()
    assert told(machine, part(0, 10), part(2, 0, weight=0)) == [
        Add(Forward(0, 0, 0, 0, ()), ((0, 1.0), (2, 1.0))),
        Release(10),
    ]


def test_a_commit_drops_what_is_not_added_up_yet() -> None:
    machine = parent()
    assert told(machine, part(2, 12), part(2, 22, clock=1), part(0, 20, clock=1)) == []
    found = told(machine, Committed(0, (0, 2, 3)))
    assert found == [Release(12), Add(Forward(0, 1, 4, 7, (((20,), 1.0), ((22,), 1.0))), ((0, 1.0), (2, 1.0)))]
    assert told(machine, part(0, 10)) == [Release(10)]
    assert told(machine, Committed(0, (0, 2, 3))) == [], "it comes again"


def test_a_repeated_part_is_released() -> None:
    machine = parent()
    assert told(machine, part(2, 12), part(2, 13)) == [Release(13)]


@pytest.mark.parametrize("wrong", [part(1, 1), part(4, 1), part(2, 1, part=1)])
def test_what_is_not_for_it_is_refused(wrong: ContributionReceived) -> None:
    with pytest.raises(ProtocolError, match="is not for its parent 0"):
        parent().step(wrong, 0.0)


@pytest.mark.parametrize("shape", [(2, 3, 1), (3, 2, 1), (4, 2, 2), (3, 3, 2)])
def test_sums_on_the_way_up_are_what_the_whole_tree_decodes_to(shape: tuple[int, int, int]) -> None:
    """Joined machines, whose messages come in any order and of which some never come, against the code's rows."""
    children, levels, stragglers = shape
    code = Coded(stragglers, "tree", children=children, levels=levels)
    tree = TreeCode(children, levels, stragglers)
    rng = random.Random(7)
    for _ in range(20):
        dead = {r for p in range(-1, tree.parents) for r in rng.sample([*tree.children_of(p)], stragglers)}
        found = gathered(code, tree, dead, rng)
        assert found is not None
        np.testing.assert_allclose(found, 1.0, atol=1e-9)


def gathered(code: Coded, tree: TreeCode, dead: set[int], rng: random.Random) -> np.ndarray | None:
    """The sum that the home decodes: the coefficient of each partition."""
    machines = {p: parent(code, p) for p in range(tree.parents) if p not in dead}
    values: dict[int, np.ndarray] = {}
    at_home: dict[int, np.ndarray] = {}
    waiting: list[tuple[int | None, ContributionReceived, np.ndarray]] = []
    for replica in range(tree.workers):
        if replica not in dead:
            row = np.zeros(tree.partitions)
            for partition, coefficient in tree.row(replica):
                row[partition] = coefficient
            waiting.append((tree.adder_of(replica, summed=False), part(replica, 0), row))
    while waiting:
        to, message, value = waiting.pop(rng.randrange(len(waiting)))
        if to is None:
            at_home[message.replica] = value
            continue
        if to not in machines:
            continue
        handle = len(values) + 1
        values[handle] = value
        arrived = part(message.replica, handle, terms=message.terms)
        for action in machines[to].step(arrived, 0.0):
            if isinstance(action, Add):
                total = sum((a * values[h[0]] for h, a in action.sum.contributions), np.zeros(tree.partitions))
                waiting.append((machines[to].above, part(to, 0, terms=action.terms), total))
    heard = [i for i, child in enumerate(tree.children_of(-1)) if child in at_home]
    found = tree.code.decode(heard)
    return None if found is None else sum((a * at_home[i] for i, a in found.items()), np.zeros(tree.partitions))
