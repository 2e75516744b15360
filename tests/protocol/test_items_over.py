"""The fates of work items, a byte each, beside a dict of them."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from flowml_runtime.protocol.training.over import ItemsOver, State

FATES: list[State] = ["used", "dropped", "folded"]


@given(st.dictionaries(st.integers(0, 3000), st.sampled_from(FATES)), st.integers(0, 4000), st.integers(0, 4000))
def test_items_are_over_as_in_a_dict(fates: dict[int, State], first: int, end: int) -> None:
    over = ItemsOver()
    for sequence, fate in fates.items():
        over[sequence] = fate
    assert len(over) == len(fates)
    assert all((over.get(n), n in over) == (fates.get(n), n in fates) for n in range(3100))
    assert over.within(first, end) == sum(first <= sequence < end for sequence in fates)
    runs = list(over.runs())
    assert {begin + i: fate for begin, count, fate in runs for i in range(count)} == fates
    assert all(
        (begin + count, fate) != (after, next_fate) for (begin, count, fate), (after, _, next_fate) in pairwise(runs)
    ), "runs are as long as they can be"
    assert list(ItemsOver(runs).runs()) == runs and len(ItemsOver(runs)) == len(over)


def test_a_fate_may_be_given_twice() -> None:
    over = ItemsOver()
    over[5] = cast(State, "dropped")
    over[5] = "used"
    assert (len(over), over.get(5), over.get(4)) == (1, "used", None)
