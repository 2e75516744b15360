"""The mathematics of the policies, against the definitions written out dumbly."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowml.policy import UNBOUNDED, Mean, Quorum, Sum, can_read, coefficients, due


@pytest.mark.parametrize(
    ("share", "members", "need"),
    [
        (0.75, 4, 3),
        (0.75, 3, 3),
        (0.75, 2, 2),
        (0.1, 30, 3),
        (0.1, 1, 1),
        (1 - 1 / 3, 3, 2),
        (0.55, 100, 55),
        (1.0, 7, 7),
    ],
)
def test_a_share_is_rounded_up_and_binary_fractions_do_not_show(share: float, members: int, need: int) -> None:
    assert Quorum(share).need(members) == need
    assert Quorum(share).never_drops(members) == (need == members)


@given(st.integers(1, 99), st.integers(1, 1000))
def test_need_is_the_ceiling_of_the_exact_product(percent: int, members: int) -> None:
    assert Quorum(percent / 100).need(members) == math.ceil(Fraction(percent, 100) * members)


@given(st.integers(1, 50), st.integers(1, 50))
def test_a_count_needs_no_more_than_there_are(count: int, members: int) -> None:
    assert Quorum(count).need(members) == min(count, members)


@given(st.integers(0, 40), st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(0, 9))
def test_reading_every_clock_is_the_textbook_gate(clock: int, clocks: list[int], staleness: int) -> None:
    assert can_read(clock, clocks, staleness, 1) == all(c >= clock - staleness for c in clocks)
    assert can_read(clock, clocks, UNBOUNDED, 1)


@given(st.integers(0, 60), st.integers(1, 7))
def test_a_synchronous_read_needs_exactly_the_pushes_before_its_window(clock: int, every: int) -> None:
    pushed = [c + 1 for c in range(clock) if due(c, every, last_clock=1000)]
    newest = max(pushed, default=0)
    assert can_read(clock, [newest], 0, every)
    assert newest == 0 or not can_read(clock, [newest - 1], 0, every)


def test_the_last_step_pushes_whatever_the_rhythm() -> None:
    assert [c for c in range(10) if due(c, 4, last_clock=9)] == [3, 7, 9]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(1, 8))
def test_the_mean_is_over_all_gradients_that_take_part(weights: list[int], microbatches: int) -> None:
    mean = coefficients(Mean(), weights, microbatches)
    assert sum(w * c for w, c in zip(weights, mean, strict=True)) == pytest.approx(1.0 if sum(weights) else 0.0)
    assert all(c == 0 for w, c in zip(weights, mean, strict=True) if w == 0)
    assert len({c for c in mean if c}) <= 1


def test_the_sum_adds_the_mean_gradient_of_each_step() -> None:
    assert coefficients(Sum(), [8, 4, 0], microbatches=4) == (0.25, 0.25, 0.0)


def test_negative_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="count gradients"):
        coefficients(Mean(), [1, -1], 1)
