"""Items that are unsettled at a snapshot have fates for each layer when no machine goes on with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import flowml as fm
from flowml.policy import Fold, Policy, Quorum, Requeue
from flowml_runtime import wire
from flowml_runtime.protocol.training.closing import closed
from flowml_runtime.protocol.training.ledger import Asked, Ledger, Settled
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.summary import Summary, Tally
from flowml_runtime.protocol.training.terms import Terms
from flowml_runtime.protocol.training.work import Work

REPLICAS, CLOCKS, STAND = 3, 40, 7
"""Replicas stand before clock 7."""
SYNC, LOCAL = fm.Policy(), fm.policies.local_sgd(4)
Rows = dict[str, tuple[int, int, int]]


def after(*args: Any, **options: Any) -> Summary:
    """The summary of the ledger."""
    return closed_ledger(*args, **options).summary()


def closed_ledger(
    policies: tuple[Policy, ...],
    unsettled: Callable[[int, wire.Item], wire.Unsettled],
    *,
    replicas: tuple[int, ...] = (2,),
    goes_on: Callable[[int], bool] = lambda store: False,
    waiting: tuple[wire.Waiting, ...] = (),
    collective: frozenset[int] = frozenset(),
) -> Ledger:
    """The ledger when the items of replica 2 for clocks 4 to 6 were unsettled, and those before were used."""
    stores = tuple(StoreTerms((0,), policy, number in collective) for number, policy in enumerate(policies))
    terms = Terms(REPLICAS, 1, 1, stores, CLOCKS)
    work = Work(REPLICAS, 100, 8, CLOCKS, aligned=True, groups=tuple(f"{g.number}" for g in terms.groups))
    ledger, rows = Ledger(work), list[wire.Unsettled]()
    for clock in range(STAND):
        for replica in range(REPLICAS):
            ((_, item),) = ledger.step(Asked(replica, (clock,)))[0].items
            if replica == 2 and clock >= 4:
                rows.append(unsettled(clock, item))
            else:
                ledger.step(Settled(replica, ((item, "used"),)))
    clocks = (STAND,) * REPLICAS
    stages = wire.StageState(2, 0, STAND - 1, (STAND - 1,) * len(terms.groups), unsettled=tuple(rows))
    stopped = wire.Stopped(clocks, (stages,), (), (), waiting)
    found = Ledger(work)
    found.restore(closed(ledger.kept(clocks), work, terms, stopped, replicas, goes_on), clocks)
    found.validate()
    return found


def fates(tally: Tally | Summary) -> tuple[int, int, int]:
    return tally.used, tally.dropped, tally.folded


def rows(summary: Summary) -> Rows:
    return {name: fates(tally) for name, tally in (*summary.groups.items(), ("total", summary))}


def counted_in_first(clock: int, item: wire.Item) -> wire.Unsettled:
    return wire.Unsettled(clock, item, open=(1,), counted=(0,), left_out=0)


def test_a_lost_replica_keeps_what_a_layer_has_applied() -> None:
    found = after((SYNC, LOCAL), counted_in_first)
    assert rows(found) == {"0": (21, 0, 0), "1": (18, 3, 0), "total": (21, 0, 0)}
    assert [fates(tally) for tally in found.replicas] == [(7, 0, 0)] * 3


def test_what_no_layer_has_applied_is_dropped() -> None:
    found = after((LOCAL, fm.policies.local_sgd(8)), lambda c, i: wire.Unsettled(c, i, open=(0, 1), left_out=0))
    assert rows(found) == {"0": (18, 3, 0), "1": (18, 3, 0), "total": (18, 3, 0)}


def test_what_goes_on_in_the_next_run_counts() -> None:
    found = after((SYNC, LOCAL), counted_in_first, replicas=(0, 1, 2), goes_on=lambda store: True)
    assert rows(found) == {"0": (21, 0, 0), "1": (21, 0, 0), "total": (21, 0, 0)}


def test_a_layer_that_has_lost_an_item_does_not_count_it() -> None:
    def told(clock: int, item: wire.Item) -> wire.Unsettled:
        return wire.Unsettled(clock, item, open=(1,), lost=(0,), left_out=0)

    found = after((fm.policies.quorum(0.5), LOCAL), told, replicas=(0, 1, 2), goes_on=lambda store: True)
    assert rows(found) == {"0": (18, 3, 0), "1": (21, 0, 0), "total": (21, 0, 0)}


@pytest.mark.parametrize("goes_on", [False, True])
def test_what_waits_for_a_later_clock_is_left_out(goes_on: bool) -> None:
    folds = Policy(quorum=Quorum(2, late=Fold()))
    late = wire.Waiting(store=1, part=0, replica=2, clock=5, base_version=5, weight=1)
    found = after((SYNC, folds), counted_in_first, goes_on=lambda store: goes_on, waiting=(late,))
    lost = 1 if goes_on else 3
    assert rows(found) == {"0": (21, 0, 0), "1": (21 - lost, lost, 0), "total": (21, 0, 0)}


def test_a_layer_without_decisions_counts_what_it_has_the_push_with() -> None:
    def anyway(clock: int, item: wire.Item) -> wire.Unsettled:
        return wire.Unsettled(clock, item, open=(0,), counted=(-1,), left_out=0)

    found = after((LOCAL, fm.policies.all_reduce()), anyway, collective=frozenset({1}))
    assert rows(found) == {"0": (18, 3, 0), "total": (21, 0, 0)}
    found = after((LOCAL, fm.policies.asynchronous(every=6)), anyway)
    assert rows(found) == {"0": (18, 3, 0), "total": (20, 1, 0)}, "it has clocks 4 and 5, and not 6"


def test_an_item_that_the_late_rule_requeues_is_drawn_again() -> None:
    requeues = Policy(quorum=Quorum(2, late=Requeue()), every=4)
    drawn: list[wire.Item] = []

    def told(clock: int, item: wire.Item) -> wire.Unsettled:
        drawn.append(item)
        return wire.Unsettled(clock, item, open=(0,), left_out=0)

    ledger = closed_ledger((requeues,), told)
    found = ledger.summary()
    assert (found.used, found.dropped, found.requeued) == (18, 0, 3)
    asked = [ledger.step(Asked(replica, (STAND,)))[0].items[0][1] for replica in range(REPLICAS)]
    assert asked == drawn


def test_a_step_that_may_have_left_out_all_of_its_microbatches_is_dropped() -> None:
    found = after((SYNC, LOCAL), lambda c, i: wire.Unsettled(c, i, open=(1,), counted=(0,)))
    assert rows(found)["total"] == (18, 3, 0)
