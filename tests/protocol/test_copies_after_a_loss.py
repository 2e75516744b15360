"""A replica that was never the first with a portion takes those of a lost replica all the same."""

from __future__ import annotations

import pytest

from flowml import policies
from flowml_runtime import wire
from flowml_runtime.protocol.training.decision import Wake
from flowml_runtime.protocol.training.portions import PAUSE_S, Portions
from flowml_runtime.protocol.training.stage import Abandon, Ask, Begin, Granted, Start, Started, StepFinished
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Committed, ReplicaLost, Terms, Tick


def item(sequence: int, copy: int = 0) -> wire.Item:
    return wire.Item(sequence, 0, sequence * 4, 4, copy)


@pytest.mark.parametrize("copies", [0, 1])
@pytest.mark.parametrize("runs", [False, True], ids=["idle", "in a step that does not count"])
def test_it_asks_at_once_although_it_has_computed_no_portion_to_its_end(copies: int, runs: bool) -> None:
    policy = policies.speculate(1, copies=copies)
    machine = Portions(Terms(2, 1, 1, (StoreTerms((0,), policy),), 4), 0, 0)
    machine.step(Started())
    machine.step(Granted(((0, item(0)),)))
    assert Abandon(0) in machine.step(Committed(0, copies=((0, 1),)), 1.0)  # replica 1 was faster with a copy
    if runs:
        assert machine.step(ReplicaLost(1), 2.0) == []
    assert machine.step(StepFinished(0), 3.0) == [Ask((1,))]
    asked = machine.step(Granted(((1, item(4)),)), 3.0)  # for later: replica 1 has all of batch 1
    asked = asked if runs else machine.step(ReplicaLost(1), 3.0)
    assert asked == [Ask((2,), copy=1)]
    assert machine.step(Granted(()), 3.0) == [Wake(3.0 + PAUSE_S)]  # the driver has not heard of the loss
    assert machine.step(Tick(), 3.5) == [Ask((3,), copy=1)]
    assert machine.step(Granted(()), 3.5) == [Wake(4.0)], "it asks less often the longer it waits"
    assert machine.step(Tick(), 4.0) == [Ask((4,), copy=1)]
    copy = item(2, 1)
    assert machine.step(Granted(((4, copy),)), 4.0) == [Begin(1, copy, False), Start(1, copy, False)]
    machine.validate()
