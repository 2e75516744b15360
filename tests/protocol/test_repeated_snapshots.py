"""Messages of a snapshot that come again, or after the snapshot is over, change nothing."""

from __future__ import annotations

from typing import Any

import pytest

from flowml_runtime import wire
from flowml_runtime.protocol.training.actions import Received, Release, Send
from flowml_runtime.protocol.training.driver import Begin, TrainingDriver
from flowml_runtime.protocol.training.items import NO_HOLD, Items
from flowml_runtime.protocol.training.ledger import Work
from flowml_runtime.protocol.training.replica import Replica
from flowml_runtime.protocol.training.snapshot import Rhythm, Save
from flowml_runtime.protocol.training.stage import Hold, Paused
from flowml_runtime.protocol.training.terms import Terms
from tests.protocol.test_driver import EVERYONE, IDS, MIXED, PLACES

CLOCKS = 6
LEADERS = ("a0", "b0")


def machine() -> TrainingDriver:
    ids: dict[str, Any] = {**IDS, "seed": 0, "shuffle": False, "examples": 1, "source": "fed"}
    start, terms = wire.StartTraining(**ids, total_clocks=CLOCKS), Terms(2, 2, 1, MIXED, CLOCKS)
    driver = TrainingDriver(start, terms, Work(2, 2 * CLOCKS, 8, CLOCKS, aligned=True), PLACES, Rhythm(2))
    driver.step(Begin())
    return driver


def paused(driver: TrainingDriver, clock: int, number: int) -> list[Any]:
    told = [wire.Paused(**IDS, replica=r, hold=clock, clock=clock, number=number) for r in range(2)]
    return [a for peer, message in zip(LEADERS, told, strict=True) for a in driver.step(Received(peer, message))]


def exported(driver: TrainingDriver, number: int, buffers: int = 0) -> list[Any]:
    told = wire.Exported(**IDS, stages=(), stores=(), buffers=buffers, number=number)
    return [action for worker in EVERYONE for action in driver.step(Received(worker, told))]


def sent(actions: list[Any], kind: type) -> list[Any]:
    return [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, kind)]


def test_each_hold_has_a_larger_number() -> None:
    driver = machine()
    numbers: list[int] = []
    for clock in (2, 4, 6):
        number = numbers[-1] if numbers else 0
        (export,) = sent(paused(driver, clock, number), wire.Export)
        assert export.number == number
        actions = exported(driver, number)
        assert [a.last for a in actions if isinstance(a, Save)] == [clock == CLOCKS]
        (hold,) = sent(actions, wire.Hold)
        numbers.append(hold.number)
    assert numbers == [1, 2, 3]


def test_replicas_that_have_stopped_for_an_earlier_hold_are_waited_for() -> None:
    """Both holds of the example stop before clocks that are the same for the replicas."""
    driver = machine()
    paused(driver, 2, 0)
    exported(driver, 0)
    assert paused(driver, 4, 0) == [], "they come again, and are of the hold before"
    assert exported(driver, 0) == []
    assert sent(paused(driver, 4, 1), wire.Export)
    assert paused(driver, 4, 1) == [], "the export is under way"


def test_buffers_that_come_again_count_once_and_are_freed() -> None:
    driver = machine()
    paused(driver, 2, 0)
    buffers = wire.Buffers(**IDS, owner="home/0/values", names=("w",), number=0)
    assert driver.step(Received("a0", buffers, 7)) == []
    (release,) = driver.step(Received("a0", buffers, 8))
    assert release == Release(8, driver.number)
    assert not any(isinstance(a, Save) for a in exported(driver, 0, buffers=1)), "the other workers have one each"
    given = [Received(worker, buffers, number) for number, worker in enumerate(EVERYONE[1:], 9)]
    (save,) = (a for event in given for a in driver.step(event) if isinstance(a, Save))
    assert [handle for *_, handle in save.buffers] == [7, 9, 10, 11]
    (late,) = driver.step(Received("a0", buffers, 12))
    assert late == Release(12, driver.number)


@pytest.mark.parametrize("again", [0, 1])
def test_a_replica_does_not_stop_for_a_hold_that_is_over(again: int) -> None:
    terms = Terms(2, 1, 1, MIXED[:1], CLOCKS)
    stage = Replica(terms, 0, 0, ahead=2)
    items: Items = stage._work  # pyright: ignore[reportPrivateUsage]
    for number, clock in enumerate((0, 4, NO_HOLD)):
        stage.step(Hold(clock, number))
    assert stage.step(Hold((0, 4)[again], again)) == []
    assert items.hold == NO_HOLD
    assert not any(isinstance(a, Paused) for a in stage.step(Hold(NO_HOLD, 2)))
