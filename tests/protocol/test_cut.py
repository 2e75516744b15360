"""How many microbatches a step computes, and how the ledger accounts for the others."""

from __future__ import annotations

import pytest

from flowml.policy import Deadline, Policy
from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.accounts import Settle
from flowml_runtime.protocol.training.cut import Cut
from flowml_runtime.protocol.training.ledger import Asked, Ledger, Settled, Work
from flowml_runtime.protocol.training.replica import Replica
from flowml_runtime.protocol.training.stage import Granted, Started, StepFinished
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Committed, Terms

CUTTING = Policy(quorum=Deadline(limit_s=1.0, of="microbatches"))
TERMS = Terms(2, 2, 4, (StoreTerms((0,), CUTTING),), 3)
ITEM = wire.Item(sequence=0, epoch=0, start=0, size=8)


def test_the_stage_that_decides_asks_once_before_each_microbatch() -> None:
    cut = Cut(TERMS, 0)
    cut.begin()
    assert not cut.leaves_out(0, 9.0), "the first microbatch is always computed"
    assert not cut.leaves_out(1, 0.9)
    assert not cut.leaves_out(1, 1.5), "it has begun"
    assert cut.leaves_out(2, 1.5)
    assert cut.leaves_out(3, 1.5)
    assert not cut.leaves_out(1, 1.5)
    assert (cut.used, cut.left_out) == (2, 2)
    cut.begin()
    assert (cut.used, cut.left_out) == (4, 0)


def test_other_stages_are_told() -> None:
    cut = Cut(TERMS, 1)
    cut.begin()
    assert not cut.leaves_out(3, 99.0)
    cut.lacks(3)
    cut.lacks(2)  # messages of several microbatches may come in any order
    cut.lacks(3)
    assert [cut.leaves_out(m, 0.0) for m in range(4)] == [False, False, True, True]


@pytest.mark.parametrize("committed_first", [False, True])
def test_an_item_is_settled_when_its_step_has_finished_and_is_decided(committed_first: bool) -> None:
    """A commit may overtake the end of the step, before which it is not known how much was left out."""
    machine = Replica(TERMS, 0, 0)
    machine.step(Started())
    machine.step(Granted(((0, ITEM),)))
    machine.cut.leaves_out(3, 2.0)
    events = [Committed(0), StepFinished(0)] if committed_first else [StepFinished(0), Committed(0)]
    assert not [a for a in machine.step(events[0]) if isinstance(a, Settle)]
    assert [a for a in machine.step(events[1]) if isinstance(a, Settle)] == [Settle(ITEM, "used", (), 1)]


def test_the_ledger_counts_examples_that_were_left_out_of_used_items() -> None:
    ledger = Ledger(Work(2, 4, item_size=8, total_clocks=2, aligned=True, microbatches=4))
    items = [ledger.step(Asked(r, (0,)))[0].items[0][1] for r in range(2)]
    ledger.step(Settled(0, ((items[0], "used"),), left_out=3))
    ledger.step(Settled(1, ((items[1], "used"),)))
    ledger.validate()
    found = ledger.summary(lambda epoch: range(32))
    assert (found.used, found.left_out, found.examples) == (2, 6, 10)
    assert [t.left_out for t in found.replicas] == [6, 0]
    assert [t.left_out for t in found.epochs] == [6]
    assert found.seen == ((0, 22), (1, 10))
    assert "left out between microbatches: replica 0 × 6" in str(found)


def test_an_item_that_was_dropped_or_has_nothing_left_is_no_partial_one() -> None:
    for fate, left_out in (("dropped", 1), ("used", 4)):
        ledger = Ledger(Work(2, 4, item_size=8, total_clocks=2, aligned=True, microbatches=4))
        item = ledger.step(Asked(0, (0,)))[0].items[0][1]
        with pytest.raises(ProtocolError, match="microbatches out of item 0"):
            ledger.step(Settled(0, ((item, fate),), left_out=left_out))  # pyright: ignore[reportArgumentType]
