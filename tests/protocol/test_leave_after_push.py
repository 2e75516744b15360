"""Where replicas wait for nobody, those that are to leave stop after a push of their own, and the others after them."""

from __future__ import annotations

from typing import Any

import pytest

from flowml.policy import UNBOUNDED, Policy
from flowml_runtime import wire
from flowml_runtime.protocol.training.actions import Received, Send
from flowml_runtime.protocol.training.driver import Pause, TrainingDriver
from flowml_runtime.protocol.training.items import NO_HOLD, Items
from flowml_runtime.protocol.training.snapshot import Save
from flowml_runtime.protocol.training.terms import ReplicaLost
from tests.protocol.test_withdrawn_snapshots import ASYNC, CLOCKS, IDS, WORKERS, ask, holds, machine, paused

WITHIN = 5


def told(actions: list[Any]) -> list[wire.Hold]:
    return [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, wire.Hold)]


def stands(driver: TrainingDriver, replica: int, clock: int, number: int) -> list[Any]:
    paused = wire.Paused(**IDS, replica=replica, hold=clock, clock=clock, number=number)
    return driver.step(Received(WORKERS[replica], paused))


def test_the_others_stop_when_it_has_stopped() -> None:
    driver = machine(ASYNC, every=0)
    (first,) = told(driver.step(Pause(WITHIN, (1,))))
    assert (first.replica, first.within, first.number) == (1, WITHIN, 1)
    assert driver.step(Pause(WITHIN, (1,))) == [], "it is on its way"
    assert driver.step(Pause()) == []
    (all_,) = told(stands(driver, 1, 4, 1))
    assert (all_.replica, all_.clock, all_.within, all_.number) == (None, 0, 0, 2)
    assert stands(driver, 1, 4, 1) == [], "it comes again"
    asked = [action for at in ((1, 4), (0, 7), (2, 9)) for action in stands(driver, *at, 2)]
    ((export,), workers) = [a.message for a in asked], asked[0].to
    assert isinstance(export, wire.Export)
    assert export.clocks == (7, 4, 9)
    done = list[Any]()
    for worker in workers:
        done += driver.step(Received(worker, wire.Exported(**IDS, stages=(), stores=(), buffers=0, number=2)))
    (save,) = [action for action in done if isinstance(action, Save)]
    assert save.after_push
    assert holds(driver.step(Pause())) == [(0, 4)], "the next one is asked for as before"


def test_two_that_leave_are_waited_for() -> None:
    driver = machine(ASYNC, every=0)
    assert [(h.replica, h.number) for h in told(driver.step(Pause(WITHIN, (2, 0))))] == [(0, 1), (2, 2)]
    assert stands(driver, 2, 3, 2) == []
    assert holds(stands(driver, 0, 3, 1)) == [(0, 3)]


def test_the_others_do_not_wait_for_one_that_is_late() -> None:
    driver = machine(ASYNC, every=0)
    ask(driver, 0, 0, 1)
    driver.step(Pause(WITHIN, (1,)))
    ask(driver, 0, *range(2, 2 + 2 * WITHIN))
    assert driver.step(Pause(WITHIN, (1,))) == []
    ask(driver, 0, 2 + 2 * WITHIN)
    assert holds(driver.step(Pause(WITHIN, (1,)))) == [(0, 2)]
    assert stands(driver, 1, 3, 1) == [], "of the earlier hold"


def test_the_last_snapshot_is_taken_when_all_have_come_to_the_end_meanwhile() -> None:
    """The run stood still when those that were to leave said later that they had stopped for that."""
    driver = machine(ASYNC, every=0)
    for replica in (0, 1):
        paused(driver, replica, 5, 0)
    assert [hold.replica for hold in told(driver.step(Pause(WITHIN, (1, 2))))] == [1, 2]
    asked = paused(driver, 2, 5, 0)
    assert any(isinstance(action.message, wire.Export) for action in asked)
    assert stands(driver, 1, 5, 1) == stands(driver, 2, 5, 2) == []
    done = list[Any]()
    for worker in WORKERS:
        done += driver.step(Received(worker, wire.Exported(**IDS, stages=(), stores=(), buffers=0)))
    (save,) = [action for action in done if isinstance(action, Save)]
    assert save.last
    assert holds(done) == [(NO_HOLD, 3)]


@pytest.mark.parametrize("leaving", [(), (1,)])
def test_when_a_replica_is_lost_those_that_have_stopped_go_on(leaving: tuple[int, ...]) -> None:
    driver = machine(ASYNC, every=0)
    driver.step(Pause(WITHIN, (*leaving, 2)))
    if leaving:
        stands(driver, 1, 4, 1)
    assert holds(driver.step(ReplicaLost(2))) == [(NO_HOLD, 2 + len(leaving))]


@pytest.mark.parametrize("policy", [Policy(staleness=2, every=4), Policy(every=4)])
def test_where_replicas_wait_for_others_all_stop_after_the_same_push(policy: Policy) -> None:
    driver = machine(policy, every=0)
    ask(driver, 0, 0, 1)
    (hold,) = told(driver.step(Pause(WITHIN, (1,))))
    assert (hold.replica, hold.clock, hold.within) == (None, 4, 0)


def test_without_a_push_that_is_near_it_stops_at_once() -> None:
    terms = machine(Policy(staleness=UNBOUNDED, every=4), every=0).snapshots._terms  # pyright: ignore[reportPrivateUsage]
    for at, within, clock in ((5, 3, 8), (8, 3, 8), (5, 2, 5), (0, CLOCKS, 0)):
        items = Items(terms, 2, at)
        items.hold_before(0, within)
        assert items.hold == clock
