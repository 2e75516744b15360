"""Items that are unsettled at a snapshot have fates for each layer when no machine goes on with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import flowml as fm
from flowml.policy import Fold, Policy, Quorum, Requeue
from flowml_runtime import wire
from flowml_runtime.protocol.training.accounts import Accounts
from flowml_runtime.protocol.training.closing import closed
from flowml_runtime.protocol.training.ledger import Asked, Ledger, Settled
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.summary import Summary, Tally
from flowml_runtime.protocol.training.terms import Committed, Terms
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
    homes: tuple[wire.StoreState, ...] = (),
    collective: frozenset[int] = frozenset(),
) -> Ledger:
    """The ledger when the items of replica 2 for clocks 4 to 6 were unsettled, and those before were used."""
    stores = tuple(StoreTerms((0,), policy, number in collective) for number, policy in enumerate(policies))
    terms = Terms(REPLICAS, 1, 1, stores, CLOCKS)
    groups = tuple(f"{g.number}" for g in terms.groups)
    alone = tuple((n, f"layer {n}") for n in range(len(stores)) if n not in terms.group_of)
    work = Work(REPLICAS, 100, 8, CLOCKS, aligned=True, groups=groups, ungrouped=alone)
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
    stopped = wire.Stopped(clocks, (stages,), homes, (), waiting)
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
    assert found.partly == 3
    found = after((LOCAL, fm.policies.asynchronous(every=6)), anyway)
    assert rows(found) == {"0": (18, 3, 0), "total": (20, 1, 0)}, "it has clocks 4 and 5, and not 6"
    assert found.partly == 2, "no layer has clock 6"


def counted_anyway(clock: int, item: wire.Item) -> wire.Unsettled:
    return wire.Unsettled(clock, item, open=(), counted=(-1, 0), left_out=0)


@pytest.mark.parametrize("summed", [False, True])
def test_a_layer_without_decisions_has_a_row_of_what_it_has_lost(summed: bool) -> None:
    policy = fm.policies.all_reduce(every=6) if summed else fm.policies.asynchronous(every=6)
    collective = frozenset({1} if summed else ())
    found = after((SYNC, policy), counted_anyway, collective=collective)
    assert rows(found) == {"0": (21, 0, 0), "layer 1": (20, 1, 0), "total": (21, 0, 0)}
    assert found.partly == 1, "it lacks clock 6, which the other layer has"
    assert [fates(tally) for tally in found.replicas] == [(7, 0, 0)] * 3
    stays = after((SYNC, policy), counted_anyway, collective=collective, goes_on=lambda store: True)
    assert rows(stays) == {"0": (21, 0, 0), "total": (21, 0, 0)}
    assert not stays.partly


def test_the_rows_of_several_lost_replicas_and_layers_are_added_up() -> None:
    policies = SYNC, fm.policies.asynchronous(every=6), fm.policies.downpour(4, 4)
    ledger = closed_ledger(policies, counted_anyway)
    assert rows(ledger.summary())["layer 1"] == (20, 1, 0)
    assert rows(ledger.summary())["layer 2"] == (18, 3, 0), "clocks 4 to 6 belong to its next push"
    assert ledger.summary().partly == 3
    ledger.note_partly((1,))
    assert rows(ledger.summary())["layer 1"] == (19, 2, 0)


def test_a_home_says_what_it_has_of_a_replica_that_has_left_out_a_push() -> None:
    home = wire.StoreState(1, 2, 4, clocks=(7, 7, 4))
    found = after((SYNC, fm.policies.asynchronous(every=2)), counted_anyway, homes=(home,))
    assert rows(found) == {"0": (21, 0, 0), "layer 1": (18, 3, 0), "total": (21, 0, 0)}


@pytest.mark.parametrize("goes_on", [False, True])
def test_what_waits_at_a_home_for_others_is_left_out(goes_on: bool) -> None:
    home = wire.StoreState(1, 2, 6, clocks=(7, 7, 6))
    waiting = wire.Waiting(store=1, part=0, replica=2, clock=6, base_version=2, weight=1)
    options: Any = {"homes": (home,), "waiting": (waiting,), "goes_on": lambda store: goes_on}
    found = after((SYNC, fm.policies.softsync(2)), counted_anyway, **options)
    assert rows(found) == {"0": (21, 0, 0), "layer 1": (20, 1, 0), "total": (21, 0, 0)}
    assert found.partly == 1


def test_an_item_is_unsettled_until_layers_without_decisions_have_it() -> None:
    every, waits = fm.policies.asynchronous(every=3), fm.policies.softsync(2)
    sent = {"every 3": (every, [2, 2, 2, 5, 5, 5, 7, 7]), "pushes may wait": (waits, [1, 2, 3, 4, 5, 6, 7, 7])}
    for policy, after_clock in sent.values():
        terms = Terms(4, 1, 1, (StoreTerms((0,), SYNC), StoreTerms((0,), policy)), 8)
        accounts, work, found = Accounts(terms, 0), Work(4, 100, 8, 8, aligned=True), dict[int, int]()
        for clock in range(8):
            accounts.open(clock, work.item(clock), (clock - 1,))
            told = [*accounts.finish(clock), *accounts.commit(Committed(clock, group=0))]
            assert all(one.fate == "used" for one in told)
            found |= {one.item.sequence: clock for one in told}
        assert [found[clock] for clock in range(8)] == after_clock


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
