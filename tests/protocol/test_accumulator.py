"""Sums between pushes, against a dumb list of the steps that count."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.accumulator import Accumulator, Sum


def joined(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return a + b


def test_a_late_push_keeps_what_was_gathered_before_and_loses_its_own() -> None:
    sums = Accumulator(joined)
    for clock in (0, 1):
        sums.gather(clock, (clock,))
        sums.adopt(clock)
    assert sums.push(2, (2,)) == Sum((0, 1, 2), 3)
    sums.discard(2)
    assert sums.weight == 2
    assert sums.push(3, (3,)) == Sum((0, 1, 3), 3)
    sums.adopt(3)
    assert sums.push(4, (4,)) == Sum((4,), 1)


def test_a_step_that_left_nothing_may_be_settled() -> None:
    sums = Accumulator(joined)
    sums.adopt(0)
    sums.discard(1)
    assert sums.weight == 0


def test_clocks_do_not_go_back() -> None:
    sums = Accumulator(joined)
    sums.gather(3, (3,))
    with pytest.raises(ProtocolError, match="clock 3 after one of clock 3"):
        sums.push(3, (3,))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30))
def test_every_step_that_counts_arrives_once_and_in_order(steps: list[tuple[bool, bool]]) -> None:
    sums, waiting, arrived = Accumulator(joined), list[int](), list[int]()
    for clock, (pushes, counts) in enumerate(steps):
        if pushes:
            assert sums.push(clock, (clock,)) == Sum((*waiting, clock), len(waiting) + 1)
        else:
            sums.gather(clock, (clock,))
        (sums.adopt if counts else sums.discard)(clock)
        if counts and pushes:
            arrived += [*waiting, clock]
            waiting = []
        elif counts:
            waiting.append(clock)
        assert sums.weight == len(waiting)
    assert arrived + waiting == [c for c, (_, counts) in enumerate(steps) if counts]
