"""A copy that a lost replica had counts for nothing: the portion may be copied again."""

from __future__ import annotations

from flowml_runtime import wire
from flowml_runtime.protocol.training.ledger import Asked, Ledger, Work
from flowml_runtime.protocol.training.terms import ReplicaLost

WORK = Work(3, 6, item_size=4, total_clocks=2, aligned=True, portions=1, copies=1)


def granted(ledger: Ledger, replica: int, clock: int, copy: int | None = None) -> wire.Item | None:
    (grant,) = ledger.step(Asked(replica, (clock,), copy=copy))
    return grant.items[0][1] if grant.items else None


def test_a_portion_whose_copy_is_lost_is_copied_again() -> None:
    ledger = Ledger(WORK)
    for replica in range(3):
        assert granted(ledger, replica, 0) == wire.Item(replica, 0, replica * 4, 4)
    assert granted(ledger, 2, 1) == wire.Item(3, 0, 12, 4)
    assert granted(ledger, 2, 2, copy=0) == wire.Item(0, 0, 0, 4, 1)
    assert granted(ledger, 1, 1) == wire.Item(4, 0, 16, 4)
    assert granted(ledger, 1, 2, copy=0) is None, "one copy is enough"
    ledger.step(ReplicaLost(2))
    assert granted(ledger, 1, 3, copy=0) == wire.Item(2, 0, 8, 4, 1), "only the lost one had it"
    assert granted(ledger, 1, 4, copy=0) == wire.Item(0, 0, 0, 4, 2)
    assert granted(ledger, 1, 5, copy=0) is None
    ledger.validate()
