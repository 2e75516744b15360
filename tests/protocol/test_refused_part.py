"""A contribution of which a part is empty counts nothing, whatever its other parts hold, and is not waited for."""

from __future__ import annotations

import itertools

import pytest

from flowml.policy import Policy, Quorum
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.home import Apply, Home, Publish, Release, SendArrived, StoreLoaded
from flowml_runtime.protocol.training.store import ContributionReceived
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Committed, Terms


def part(number: int, replica: int, weight: int, handle: int) -> ContributionReceived:
    return ContributionReceived(0, number, replica, 0, 0, 0, weight, handle, weight == 0)


def home(terms: StoreTerms) -> Home:
    machine = Home(Terms(2, 2, 1, (terms,), 4), [0])
    machine.step(StoreLoaded(0))
    return machine


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_others_are_applied(order: tuple[int, ...]) -> None:
    machine = home(StoreTerms((0, 1), Policy(quorum=Quorum(2))))
    parts = [part(0, 0, 4, 1), part(1, 0, 4, 2), part(0, 1, 4, 3), part(1, 1, 0, 0)]
    told = [action for i in order for action in machine.step(parts[i])]
    machine.validate()
    assert sorted(told, key=str) == [SendArrived(0, 0, 0, 4), SendArrived(0, 1, 0, 0)]
    released, applied, published = machine.step(Committed(0, ()))
    assert released == Release(3)
    assert applied == Apply(0, 1, (((1, 2), 0.25),))
    assert published == Publish(0, 1, 1)


def test_nothing_is_left_of_the_clock_but_its_floor() -> None:
    machine = home(StoreTerms((0, 1), Policy(quorum=Quorum(2))))
    for replica in range(2):
        machine.step(part(0, replica, 4, replica + 1))
        machine.step(part(1, replica, 0, 0))
    assert machine.step(Committed(0, ())) == [Release(1), Release(2), Publish(0, 0, 1, value=False)]


def test_full_parts_still_agree_on_their_weight() -> None:
    machine = home(StoreTerms((0, 1, 1), Policy(quorum=Quorum(2))))
    machine.step(part(0, 0, 4, 1))
    machine.step(part(1, 0, 0, 0))
    with pytest.raises(ProtocolError, match="has weight 3, another part of it 4"):
        machine.step(part(2, 0, 3, 2))
