"""When to stop so that as few local steps as can be are lost."""

from __future__ import annotations

from itertools import product

import pytest

from flowml.policy import Every
from flowml.policy.rhythm import Once
from flowml_runtime.protocol.training.clocks import after_push


def stop(*rhythms: Every, clock: int, within: int = 100) -> int:
    return after_push(rhythms, clock, within)


def test_layers_that_push_at_each_step_wait_for_nothing() -> None:
    assert stop(Every(), clock=57) == 57
    assert stop(Every(), Every(8), clock=57) == 64, "and hold no others up"


@pytest.mark.parametrize("rhythms", [*product([1, 2, 6, 8, 9], [4, 6, 9], [3, 4, 5, 12])], ids=str)
def test_the_first_clock_at_which_all_push(rhythms: tuple[int, ...]) -> None:
    for offset, clock in product((0, 1), (40, 57, 72)):
        every = [Every(push, offset=offset if push > 1 else 0) for push in rhythms]
        together = (c for c in range(clock, clock + 400) if all((c - e.offset) % e.push == 0 for e in every))
        assert stop(*every, clock=clock, within=400) == next(together)


def test_if_that_is_too_far_those_that_push_least_often_do() -> None:
    assert stop(Every(8), Every(500), clock=450) == 500, "all would push at 1000"
    assert stop(Every(8), Every(500), clock=350) == 352, "500 is too far"
    assert stop(Every(8), Every(500), clock=450, within=600) == 1000
    assert stop(Every(8), Every(500), clock=345, within=5) == 345
    assert stop(Every(8), Once(), clock=50) == 56


def test_fragments_never_push_together() -> None:
    every = Every(12, fragments=3)
    fragments = [every.fragment(number) for number in range(3)]
    assert stop(*fragments, clock=50) in {50 + ahead for ahead in range(12)}
