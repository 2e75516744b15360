"""A snapshot that late replicas hold up is withdrawn once, and what they still tell of it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest

from flowml.policy import UNBOUNDED, AllReduce, Policy, Quorum, Speculate
from flowml_runtime import wire
from flowml_runtime.protocol.training.actions import Received, Release, Send
from flowml_runtime.protocol.training.driver import Begin, Pause, TrainingDriver, Withdraw
from flowml_runtime.protocol.training.ledger import Work
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.snapshot import AT_END, Rhythm, Save
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import ReplicaLost, Terms

IDS: dict[str, Any] = {"plan_id": "p", "run": 100}
WORKERS = ("a", "b", "c")
PLACES = Places((("a",), ("b",), ("c",)), (("a",),), ({},))
CLOCKS, EVERY = 20, 4
QUORUM, ASYNC = Policy(quorum=Quorum(2)), Policy(staleness=UNBOUNDED)


def machine(policy: Policy = QUORUM, every: int = EVERY) -> TrainingDriver:
    ids: dict[str, Any] = {**IDS, "seed": 0, "shuffle": False, "examples": 1, "source": "fed"}
    terms = Terms(3, 1, 1, (StoreTerms((0,), policy, policy.collective),), CLOCKS)
    start, work = wire.StartTraining(**ids, total_clocks=CLOCKS), Work(3, 3 * CLOCKS, 8, CLOCKS, aligned=terms.aligned)
    driver = TrainingDriver(start, terms, work, PLACES, Rhythm(every))
    driver.step(Begin())
    return driver


def paused(driver: TrainingDriver, replica: int, clock: int, number: int) -> list[Any]:
    told = wire.Paused(**IDS, replica=replica, hold=driver.hold, clock=clock, number=number)
    return driver.step(Received(WORKERS[replica], told))


def ask(driver: TrainingDriver, replica: int, *clocks: int) -> list[Any]:
    return driver.step(Received(WORKERS[replica], wire.Ask(**IDS, replica=replica, clocks=clocks)))


def holds(actions: list[Any]) -> list[tuple[int, int]]:
    """The clock and the number of each Hold."""
    told = [a.message for a in actions if isinstance(a, Send)]
    return [(m.clock, m.number) for m in told if isinstance(m, wire.Hold)]


def test_those_that_stand_go_on_until_the_late_ones_are_heard_of() -> None:
    driver = machine()
    for replica in (0, 1):
        paused(driver, replica, EVERY, 0)
    assert driver.heard
    assert holds(driver.step(Withdraw())) == [(CLOCKS, 1)]
    assert not driver.heard
    assert driver.step(Withdraw()) == [], "it is withdrawn once"
    assert holds(driver.step(Pause())) == [], "none is taken without the late one"
    assert holds(ask(driver, 0, 4, 5)) == []
    assert holds(ask(driver, 2, 4, 5)) == [(2 * EVERY, 2)], "the next that is due, after the clocks that are granted"
    assert holds(driver.step(Pause())) == [(6, 3)]


def test_a_late_answer_is_none_to_a_later_hold() -> None:
    driver = machine()
    for replica in (0, 1):
        ask(driver, replica, EVERY - 1, EVERY)
        paused(driver, replica, EVERY, 0)
    driver.step(Withdraw())
    assert holds(paused(driver, 2, EVERY, 0)) == [(2 * EVERY, 2)], "it says that the replica runs"
    for replica in (0, 1):
        assert paused(driver, replica, 2 * EVERY, 2) == []
    assert paused(driver, 2, EVERY, 0) == [], "it comes again"
    (export,) = paused(driver, 2, 2 * EVERY, 2)
    assert isinstance(export.message, wire.Export)


def test_what_came_of_an_export_is_freed() -> None:
    driver = machine(ASYNC, every=0)
    driver.step(Pause())
    for replica in range(3):
        paused(driver, replica, 1, 1)
    told = wire.Exported(**IDS, stages=(), stores=(), buffers=1, number=1)
    buffers = wire.Buffers(**IDS, owner="home/0/values", names=("w",), number=1)
    first = driver.heard
    for worker, handle in (("a", 5), ("b", 6)):
        driver.step(Received(worker, told))
        driver.step(Received(worker, buffers, handle))
    driver.step(Received("c", told))
    assert driver.heard == first + 5
    *freed, hold = driver.step(Withdraw())
    assert freed == [Release(5, driver.number), Release(6, driver.number)]
    assert holds([hold]) == [(AT_END, 2)]
    assert driver.snapshots.misses, "the worker whose buffers are missing"
    assert driver.step(Received("c", buffers, 7)) == [Release(7, driver.number)]
    assert not any(isinstance(a, Save) for a in driver.step(Received("c", told)))
    ask(driver, 2, 0)
    assert not driver.snapshots.misses
    assert holds(driver.step(Pause())) == [(0, 3)]


@pytest.mark.parametrize("policy", [Policy(), Policy(every=4), Policy(AllReduce())])
def test_where_all_wait_for_a_late_one_the_snapshot_waits_too(policy: Policy) -> None:
    driver = machine(policy)
    for replica in (0, 1):
        paused(driver, replica, EVERY, 0)
    assert not driver.heard
    assert driver.step(Withdraw()) == []


@pytest.mark.parametrize("policy", [QUORUM, ASYNC, Policy(staleness=2), Policy(quorum=Speculate())])
def test_where_others_go_on_it_is_withdrawn_and_the_last_one_waits(policy: Policy) -> None:
    driver = machine(policy)
    driver.step(Pause())
    number = 0 if holds(driver.step(Pause())) or driver.hold == EVERY else 1
    paused(driver, 0, 1, number)
    assert holds(driver.step(Withdraw()))
    number += 1
    paused(driver, 0, CLOCKS, number)
    assert driver.step(Withdraw()) == []


def test_after_a_loss_nothing_is_withdrawn_or_missed() -> None:
    driver = machine()
    for replica in (0, 1):
        paused(driver, replica, EVERY, 0)
    driver.step(Withdraw())
    driver.step(ReplicaLost(2))
    assert not driver.snapshots.misses
    assert driver.step(Withdraw()) == []


def without_silent(places: Places, *, copied: int = 0) -> tuple[TrainingDriver, wire.Export | None, tuple[str, ...]]:
    """Replica 2 is silent, all others stand: what workers are asked for without it, and which ones."""
    ids: dict[str, Any] = {**IDS, "seed": 0, "shuffle": False, "examples": 1, "source": "fed"}
    replicas = len(places.stages)
    terms = Terms(replicas, 1, 1, (StoreTerms((0,), Policy(quorum=Quorum(1))),), CLOCKS)
    start, work = wire.StartTraining(**ids, total_clocks=CLOCKS), Work(replicas, 99, 8, CLOCKS, aligned=True)
    driver = TrainingDriver(start, terms, work, places, Rhythm(0, 0, copied, partial=True))
    driver.step(Begin())
    actions = driver.step(Pause())
    for _ in range(2):
        number, told = holds(actions)[-1][1], list[Any]()
        for replica in (r for r in range(replicas) if r != 2):
            stands = wire.Paused(**IDS, replica=replica, hold=driver.hold, clock=0, number=number)
            told += driver.step(Received(places.stages[replica][0], stands))
        for action in told:
            if isinstance(action, Send) and isinstance(action.message, wire.Export):
                return driver, action.message, tuple(action.to)
        driver.step(Withdraw())
        actions = driver.step(Pause())
        if not holds(actions):
            break
    return driver, None, ()


def test_a_replica_beside_a_silent_one_is_left_out_too() -> None:
    """If the worker of both is lost, both are."""
    places = Places((("a",), ("b",), ("c",), ("c",)), (("a",),), ({},))
    driver, export, asked = without_silent(places)
    assert export is not None
    assert asked == ("a", "b")
    assert {replica for replica, *_ in export.pushed} <= {0, 1}
    for worker in asked:
        made = driver.step(
            Received(worker, wire.Exported(**IDS, stages=(), stores=(), buffers=0, number=export.number))
        )
    (save,) = [action for action in made if isinstance(action, Save)]
    assert save.without == (2, 3)


def test_where_a_silent_one_is_beside_all_others_or_a_home_no_snapshot_is_taken() -> None:
    assert without_silent(Places((("a",), ("b", "c"), ("c",)), (("d",),), ({},)))[1] is not None
    assert without_silent(Places((("c",), ("c",), ("c",)), (("d",),), ({},)))[1] is None
    assert without_silent(Places((("a",), ("b",), ("c",)), (("c",),), ({},)))[1] is None


def test_without_a_silent_one_there_are_no_copies_but_the_buffers() -> None:
    """A copy may be on its way through the silent worker. The newest copies stay those of the snapshot before."""
    _, export, _ = without_silent(PLACES, copied=1)
    assert export is not None
    assert (export.copied, export.whole, export.complete) == (False, True, None)


def test_one_that_is_heard_of_meanwhile_is_not_in_the_snapshot() -> None:
    """Homes have told what they keep without waiting for what it has sent."""
    driver, export, asked = without_silent(PLACES)
    assert export is not None
    assert asked == ("a", "b")
    told = wire.Exported(**IDS, stages=(), stores=(), buffers=0, number=export.number)
    driver.step(Received("a", told))
    assert not any(isinstance(action, Send) for action in paused(driver, 2, 0, export.number))
    (save,) = [action for action in driver.step(Received("b", told)) if isinstance(action, Save)]
    assert save.without == (2,)


def of_two_stages() -> TrainingDriver:
    """Replica 1 has its first stage on c, and its second on d. The homes are on a and b."""
    ids: dict[str, Any] = {**IDS, "seed": 0, "shuffle": False, "examples": 1, "source": "fed"}
    stores = tuple(StoreTerms((stage,), Policy(quorum=Quorum(1)), False) for stage in (0, 1))
    start, work = wire.StartTraining(**ids, total_clocks=CLOCKS), Work(2, 2 * CLOCKS, 8, CLOCKS, aligned=True)
    places = Places((("a", "b"), ("c", "d")), (("a",), ("b",)), ({}, {}))
    driver = TrainingDriver(start, Terms(2, 2, 1, stores, CLOCKS), work, places, Rhythm(EVERY, partial=True))
    driver.step(Begin())
    for replica, worker in enumerate("ac"):
        driver.step(Received(worker, wire.Ask(**IDS, replica=replica, clocks=(0, 1, 2, 3))))
    stop(driver, 0)
    for worker in "abc":
        driver.step(Received(worker, wire.Exported(**IDS, stages=(), stores=(), buffers=0, number=0)))
    driver.step(Withdraw())
    assert driver.snapshots.silent == {1: {"d"}}
    return driver


def stop(driver: TrainingDriver, number: int, clock: int = EVERY) -> list[Any]:
    """Both replicas stop. Returns what the second one makes the driver do."""
    told = {r: wire.Paused(**IDS, replica=r, hold=driver.hold, clock=clock, number=number) for r in range(2)}
    driver.step(Received("a", told[0]))
    return driver.step(Received("c", told[1]))


def test_a_later_stage_is_silent_although_the_first_one_goes_on() -> None:
    driver = of_two_stages()
    driver.step(Received("c", wire.Ask(**IDS, replica=1, clocks=(4, 5))))
    item = wire.Item(1, 0, 8, 8)
    driver.step(Received("c", wire.Settled(**IDS, replica=1, fates=((item, "dropped"),))))
    assert driver.snapshots.silent, "its first stage says nothing about the second"
    assert not driver.snapshots.misses, "snapshots are taken of the others"
    [(clock, number)] = holds(driver.step(Pause()))
    driver.step(Received("a", wire.Paused(**IDS, replica=0, hold=driver.hold, clock=clock, number=number)))
    asked = driver.step(Received("c", wire.Paused(**IDS, replica=1, hold=driver.hold, clock=clock, number=number)))
    assert asked == [], "the others have been asked already, and nothing waits for the silent replica"
    assert driver.snapshots.under_way
    for worker in "ab":
        actions = driver.step(Received(worker, wire.Exported(**IDS, stages=(), stores=(), buffers=0, number=number)))
    [saved] = [action for action in actions if isinstance(action, Save)]
    assert saved.without == (1,)


def test_the_second_to_stop_may_be_the_first_stage_of_a_silent_replica() -> None:
    driver = of_two_stages()
    [(clock, number)] = holds(driver.step(Pause()))
    driver.step(Received("c", wire.Paused(**IDS, replica=1, hold=driver.hold, clock=clock, number=number)))
    assert not driver.snapshots.under_way
    told = wire.Paused(**IDS, replica=0, hold=driver.hold, clock=clock, number=number)
    (export,) = driver.step(Received("a", told))
    assert isinstance(export.message, wire.Export)
    assert export.to == ("a", "b"), "no worker of the silent replica is asked"
    driver.step(Received("a", wire.Exported(**IDS, stages=(), stores=(), buffers=0, number=number)))
    driver.step(Withdraw())
    assert driver.snapshots.silent == {0: {"b"}, 1: {"d"}}, "now another one is late too"


def test_a_later_stage_is_heard_of_by_its_worker_or_by_a_step_that_counts() -> None:
    driver, item = of_two_stages(), wire.Item(1, 0, 8, 8)
    report = wire.Report(**IDS, replica=1, clock=3, item=item, slots=(), seconds=0.1)
    assert holds(driver.step(Received("d", report))) == [(EVERY, 2)]
    driver = of_two_stages()
    assert holds(driver.step(Received("c", wire.Settled(**IDS, replica=1, fates=((item, "used"),))))) == [(EVERY, 2)]
