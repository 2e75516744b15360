"""Snapshots that workers write: when the driver lets them, and when it wants the buffers."""

from __future__ import annotations

from typing import Any

import pytest

from flowml.policy import UNBOUNDED, Policy
from flowml_runtime import wire
from flowml_runtime.protocol.training.actions import Received
from flowml_runtime.protocol.training.driver import Pause, TrainingDriver
from flowml_runtime.protocol.training.snapshot import Offer, Rhythm, Save
from tests.protocol.test_copied_snapshots import CLOCKS, IDS, WORKERS, exported, machine, stopped

FOLDER = Offer("/there", "token")


def saved(driver: TrainingDriver, export: wire.Export) -> Save:
    """What the snapshot is when workers have told what they were asked for."""
    made = exported(driver, export.number)
    if export.whole:
        told = wire.Buffers(**IDS, owner="x", names=("w",), number=export.number)
        handles: list[Any] = [None, None] if export.folder else [5, 6]
        made = [a for w, h in zip(WORKERS, handles, strict=True) for a in driver.step(Received(w, told, h))]
    (save,) = [a for a in made if isinstance(a, Save)]
    return save


def test_each_folder_is_for_one_snapshot_and_there_is_none_while_the_driver_is_busy() -> None:
    driver = machine(Policy(), Rhythm(5))
    driver.step(FOLDER)
    export = stopped(driver, 0, 5)
    assert (export.folder, export.token, export.whole) == ("/there", "token", True)
    assert driver.snapshots.offer == Offer(busy=True)
    save = saved(driver, export)
    assert (save.folder, save.whole, [h for *_, h in save.buffers]) == ("/there", True, [None, None])
    export = stopped(driver, 1, 10)
    assert (export.folder, export.whole) == ("", False)
    save = saved(driver, export)
    assert (save.folder, save.whole, save.buffers) == ("", False, ())
    driver.step(Offer())
    export = stopped(driver, 2, 15)
    assert (export.folder, export.whole) == ("", True), "no folder can be made, so the driver writes"
    assert [h for *_, h in saved(driver, export).buffers] == [5, 6]
    driver.step(Offer(busy=True))
    export = stopped(driver, 3, CLOCKS + 1)
    assert (export.folder, export.whole, export.last) == ("", True, True), "the last one is never left out"


def test_the_driver_gets_the_buffers_that_it_reads() -> None:
    driver = machine(Policy(), Rhythm(5, also=10))
    for number, clock in enumerate((5, 10, 15)):
        driver.step(FOLDER)
        export = stopped(driver, number, clock)
        assert (export.folder != "", export.whole) == (clock != 10, True)
        assert saved(driver, export).folder == export.folder
    export = stopped(driver, 3, CLOCKS + 1)
    assert (export.folder, export.last) == ("", True)


@pytest.mark.parametrize("also", [0, 5])
def test_without_clocks_workers_write_what_was_asked_for(also: int) -> None:
    driver = machine(Policy(staleness=UNBOUNDED), Rhythm(5, also=also))
    driver.step(FOLDER)
    driver.step(Pause())
    export = stopped(driver, 1, 1)
    assert (export.folder, export.whole) == ("" if also else "/there", True)
