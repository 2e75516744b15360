"""A replica whose filters keep what they lose knows the fate of a push before it starts the next one."""

from __future__ import annotations

import pytest

from flowml.policy import UNBOUNDED, Policy, Quorum
from flowml.policy.filters import quantise, significance, top_k
from flowml_runtime import wire
from flowml_runtime.protocol.training.accounts import Settle
from flowml_runtime.protocol.training.replica import Replica
from flowml_runtime.protocol.training.stage import (
    Abandon,
    Action,
    Ask,
    Begin,
    Count,
    Granted,
    Start,
    Started,
    StepFinished,
)
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Committed, Terms

FEEDBACK = (top_k(0.1).with_error_feedback(),)


def item(number: int) -> wire.Item:
    return wire.Item(sequence=number, epoch=0, start=8 * number, size=8)


def finished(policy: Policy) -> tuple[Replica, list[Action]]:
    """A replica of four that has finished clock 0, and what it then does."""
    machine = Replica(Terms(4, 1, 1, (StoreTerms((0,), policy),), 20), 0, 0)
    machine.step(Started())
    machine.step(Granted(((0, item(0)), (1, item(1)))))
    return machine, machine.step(StepFinished(0))


def starts(actions: list[Action]) -> list[int]:
    return [a.clock for a in actions if isinstance(a, Start)]


@pytest.mark.parametrize("filters", [FEEDBACK, (significance(0.1),)], ids=str)
def test_a_step_waits_for_the_fate_of_a_push_that_may_be_dropped(filters: tuple[object, ...]) -> None:
    policy = Policy(quorum=Quorum(0.75), staleness=1, filters=filters)
    for excluded, counts, settled in (((), True, "used"), ((0,), False, "dropped")):
        machine, after = finished(policy)
        assert starts(after) == []
        decided = machine.step(Committed(0, excluded))
        assert decided[: 3 if excluded else 2] == [
            *([Abandon(0)] if excluded else []),
            Settle(item(0), settled),
            Count(0, counts, (0,)),
        ]
        assert decided[-2 if isinstance(decided[-1], Ask) else -1] == Start(1, item(1), False)
        assert Begin(1, item(1), False) in decided


@pytest.mark.parametrize(
    "policy",
    [
        Policy(quorum=Quorum(0.75), staleness=1),
        Policy(quorum=Quorum(0.75), staleness=1, filters=(top_k(0.1), quantise(4))),
        Policy(quorum=Quorum(1.0), staleness=1, filters=FEEDBACK),
        Policy(staleness=UNBOUNDED, filters=FEEDBACK),
    ],
    ids=Policy.describe,
)
def test_nothing_waits_where_nothing_is_kept_or_dropped(policy: Policy) -> None:
    _, after = finished(policy)
    assert starts(after) == [1] or policy.staleness == UNBOUNDED
