"""A replica that takes global parameters between its pushes sends no change twice, and none that was dropped."""

from __future__ import annotations

import pytest

from flowml.policy import Delta, Every, Fold, Policy, Quorum
from flowml_runtime.worker.training.own_values import OwnRhythm
from flowml_tools.faults.campaign import check_rest
from flowml_tools.faults.checker import check
from flowml_tools.faults.layout import make

RHYTHMS = [Every(2, pull=1), Every(3, pull=2), Every(2, pull=4)]


@pytest.mark.parametrize("late", ["drop", "requeue"])
@pytest.mark.parametrize("every", RHYTHMS, ids=Every.describe)
def test_the_steps_of_a_push_that_was_left_out_are_not_sent_with_the_next(every: Every, late: str) -> None:
    """A decision had come without a replica, and what its steps had changed stayed in what it sent later."""
    rule = Policy(payload=Delta(), every=every, quorum=Quorum(1, late=late), apply="sum", staleness=3)
    for seed in range(6):
        run = make([rule], replicas=3, stages=1, clocks=12, seed=seed, speeds=(1, 1, 1))
        run.go()
        check_rest(run)
        assert check(run.history) == []


def steps_sent(rule: Policy, begun: list[int]) -> int:
    """The steps that a push of the last of these sends, if none of the others has pushed."""
    rhythm = OwnRhythm(rule)
    for clock in begun:
        if rhythm.begin(clock):
            rhythm.took(clock)
        rhythm.steps += 1
    return rhythm.pushed()


def test_a_push_has_the_steps_of_its_own_window_where_decisions_may_drop() -> None:
    dropping = Policy(payload=Delta(), every=Every(3, pull=1), quorum=Quorum(1), staleness=3)
    assert steps_sent(dropping, [0, 1, 3, 4, 5]) == 3  # clock 2, which pushes, was left out
    assert steps_sent(dropping, [0, 1, 7, 8]) == 2
    folding = Policy(payload=Delta(), every=Every(3, pull=1), quorum=Quorum(1, late=Fold()), staleness=3)
    assert steps_sent(folding, [0, 1, 3, 4, 5]) == 5  # nothing is dropped
