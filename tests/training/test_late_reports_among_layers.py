"""What replicas waited for, where one of them reports clocks that went on without it."""

from __future__ import annotations

from collections.abc import Iterable

from flowml.policy import named
from flowml_runtime import wire
from flowml_runtime.driver.training.history import MAX_AHEAD
from flowml_runtime.driver.training.waiting import Among
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Terms

CLOCKS = 4 * MAX_AHEAD
TERMS = Terms(3, 1, 1, (StoreTerms((0,), named.quorum(2)), StoreTerms((0,), named.quorum(2, every=3))), CLOCKS)


def report(replica: int, clock: int) -> wire.Report:
    item = wire.Item(sequence=clock, epoch=0, start=0, size=1)
    ids = {"plan_id": "p", "run": 0, "cause": 0}
    return wire.Report(**ids, replica=replica, clock=clock, item=item, seconds=0.1, slots=())


def told(among: Among, replica: int, clocks: Iterable[int]) -> list[int]:
    return [clock for c in clocks for clock, _ in among.reported(report(replica, c), 0.1 * c)]


def test_late_reports_hold_nothing_up_and_the_fit_ends() -> None:
    """Each of them was kept for ever, and more than a few were gone through without end."""
    among = Among(TERMS, [0, 1], 0.0)
    assert among.skips
    found = told(among, 0, range(CLOCKS))
    found += told(among, 1, range(CLOCKS))
    assert found, "clocks go on without replica 2"
    assert told(among, 2, range(CLOCKS - MAX_AHEAD)) == []
    found += told(among, 2, range(CLOCKS - MAX_AHEAD, CLOCKS))
    found += [clock for clock, _ in among.rest()]
    assert found == sorted(set(found))
