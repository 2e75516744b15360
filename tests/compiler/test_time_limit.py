"""A time limit ends the search of `AutoPlacement`, which then uses the best alternative so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import flowml as fm

X = jnp.ones((4, 8))
PARAMS = {f"l{i}": {"w": jnp.ones((8, 8))} for i in range(6)}
BYTES = 6 * 8 * 8 * 4
FOUR = [f"worker:{i}" for i in range(4)]
ALL = ["one device (worker:0/cpu:0)", *(f"pipeline of {n} stages" for n in (2, 3, 4))]


def layers(params: Any, x: jax.Array) -> jax.Array:
    for layer in params.values():
        x = jnp.tanh(x @ layer["w"])
    return x


def ticking(step_s: float) -> Callable[[], float]:
    """A clock that goes on by `step_s` each time that it is read."""
    reads = iter(range(1000))
    return lambda: next(reads) * step_s


def plan(time_limit_s: float | None, *, memory_bytes: int | None = None) -> fm.Plan:
    """The clock is read when the search begins and after each alternative."""
    placement = fm.AutoPlacement("latency", memory_bytes, time_limit_s, now_s=ticking(1.0))
    return fm.compile(layers, PARAMS, X, devices=FOUR, placement=placement)


@pytest.mark.parametrize(("limit_s", "compared"), [(0.5, 1), (1.0, 1), (1.5, 2), (3.0, 3)])
def test_the_search_ends_with_its_time_and_says_so(limit_s: float, compared: int) -> None:
    cut = plan(limit_s)
    assert [c.name for c in cut.choices] == ALL[:compared]
    assert cut.notes[0] == (
        f"the search stopped at time_limit_s after {compared} of 4 alternatives, and the best so far is used; "
        "raise it to compare all."
    )
    assert cut.notes[0] in cut.explain()
    assert ("any pipeline compared so far" in " ".join(cut.notes)) == (compared > 1)
    assert not any("any pipeline here" in note for note in cut.notes)


@pytest.mark.parametrize("limit_s", [4.0, 4.5, None])
def test_a_search_that_ends_in_time_compares_all_and_says_nothing_of_it(limit_s: float | None) -> None:
    whole = plan(limit_s)
    assert [c.name for c in whole.choices] == ALL
    assert not any("time_limit_s" in note for note in whole.notes)


def test_the_best_so_far_is_used_where_a_later_one_would_be_chosen() -> None:
    bound = BYTES - 100  # not on one device, and so in two stages or more
    cut = plan(1.5, memory_bytes=bound)
    assert [c.name for c in cut.choices if c.chosen] == ["pipeline of 2 stages"]
    assert len(cut.partitions) == 2
    assert "2 of 4 alternatives" in cut.notes[0]


def test_a_search_that_ends_before_anything_fits_says_what_to_do() -> None:
    with pytest.raises(
        fm.PlacementError, match=r"stopped at time_limit_s after 1 of 4 .* none so far fits.*raise time_limit"
    ):
        plan(0.5, memory_bytes=BYTES - 100)


def test_the_clock_is_no_part_of_what_is_asked_for() -> None:
    asked = fm.AutoPlacement(time_limit_s=2.0, now_s=ticking(1.0))
    assert asked == fm.AutoPlacement(time_limit_s=2.0)
    assert "now_s" not in repr(asked)
