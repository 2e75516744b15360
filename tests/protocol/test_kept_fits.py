"""What workers keep of fits whose driver may die, and which driver goes on with one."""

from __future__ import annotations

import random

from flowml_runtime.protocol.training.kept_fits import (
    AGAIN_S,
    MOST_FORGOTTEN,
    MOST_ORPHANS,
    Action,
    Answer,
    Claim,
    Completed,
    DriverLost,
    Drop,
    Event,
    Exported,
    KeptFits,
    Leave,
    Released,
    Tick,
    Wake,
    Write,
    Written,
)


class Worker:
    """A machine, and the snapshots of which its host has a part."""

    def __init__(self, orphan_s: float = 10.0) -> None:
        self.machine = KeptFits(orphan_s)
        self.parts: set[tuple[str, str]] = set()

    def step(self, event: Event, now: float = 0.0) -> list[Action]:
        if isinstance(event, Exported | Completed):
            self.parts.add((event.fit, event.key))
        actions = self.machine.step(event, now)
        self.parts -= {(a.fit, a.key) for a in actions if isinstance(a, Drop)}
        self.machine.validate()
        return actions

    def owner(self, driver: str, fit: str = "fit") -> str:
        (answer,) = self.step(Claim(driver, fit, 1))
        assert isinstance(answer, Answer)
        return answer.owner


def test_a_fit_has_one_driver_until_that_is_lost() -> None:
    worker = Worker()
    assert worker.owner("a") == ""
    assert worker.owner("b") == "a"
    assert worker.owner("a") == "", "a repeated claim changes nothing"
    worker.step(Exported("a", "fit", "1"))
    worker.step(DriverLost("a"))
    assert worker.owner("b") == ""
    worker.step(Exported("a", "fit", "2"))
    worker.step(Completed("a", "fit", "2"))
    assert worker.parts == {("fit", "1")}, "what the first driver still sends changes nothing"
    assert worker.step(Released("a", "fit", over=True)) == []
    assert worker.owner("a") == "b"
    assert worker.step(Claim("b", "fit", 7)) == [Answer("b", "fit", 7, "", ("a",))]


def test_a_lost_driver_of_whose_fit_nothing_is_kept_is_known() -> None:
    """It may be suspended, and have the directory of the fit."""
    worker = Worker()
    worker.owner("a", "early")
    worker.step(DriverLost("a"))
    assert worker.step(Claim("b", "early", 3)) == [Answer("b", "early", 3, "", ("a",))]
    worker.step(Released("b", "early", over=False))
    assert worker.step(Claim("c", "early", 4)) == [Answer("c", "early", 4, "", ("a",))]
    worker.step(Released("c", "early", over=True))
    assert worker.step(Claim("d", "early", 5)) == [Answer("d", "early", 5, "", ())]
    for number in range(MOST_FORGOTTEN + 1):
        worker.owner(f"d{number}", f"f{number}")
        worker.step(DriverLost(f"d{number}"))
    assert worker.step(Claim("e", "f0", 6)) == [Answer("e", "f0", 6, "", ())]
    assert worker.step(Claim("e", "f1", 7)) == [Answer("e", "f1", 7, "", ("d1",))]


def test_a_part_stays_until_a_later_snapshot_is_complete() -> None:
    worker = Worker()
    worker.owner("a")
    worker.step(Exported("a", "fit", "1"))
    worker.step(Completed("a", "fit", "1"))
    worker.step(Exported("a", "fit", "2"))
    assert worker.parts == {("fit", "1"), ("fit", "2")}
    worker.step(Exported("a", "fit", "again 1"))
    assert worker.parts == {("fit", "1"), ("fit", "again 1")}, "the run of 2 has ended without it"
    worker.step(Completed("a", "fit", "again 1"))
    assert worker.parts == {("fit", "again 1")}


def test_a_fit_without_a_driver_is_kept_for_a_while() -> None:
    worker = Worker(orphan_s=10.0)
    worker.owner("a")
    worker.step(Completed("a", "fit", "1"))
    assert worker.step(DriverLost("a"), 5.0) == [Wake(15.0)]
    assert worker.step(Tick(), 14.0) == [Wake(15.0)]
    assert worker.step(Tick(), 15.0) == [Drop("fit", "1")]
    at_once = Worker(orphan_s=0.0)
    at_once.owner("a")
    at_once.step(Completed("a", "fit", "1"))
    at_once.step(DriverLost("a"))
    assert not at_once.parts


def orphaned(orphan_s: float = 10.0) -> Worker:
    """One that keeps two snapshots of a fit without a driver, the first of which is complete."""
    worker = Worker(orphan_s)
    worker.step(Claim("a", "fit", 1, directory="/there", keep=3))
    worker.step(Completed("a", "fit", "1"))
    worker.step(Exported("a", "fit", "2"))
    worker.step(DriverLost("a"))
    return worker


def write(*, again: bool = False) -> Write:
    return Write("fit", ("1", "2"), "/there", 3, ("a",), again)


def test_what_no_driver_has_taken_is_written_and_then_dropped() -> None:
    worker = orphaned()
    assert worker.step(Tick(), 10.0) == [write()]
    assert worker.machine.writes
    assert worker.step(Tick(), 99.0) == []
    assert worker.step(Written("fit", whole=True), 99.0) == [Drop("fit", "1"), Drop("fit", "2")]
    assert not worker.machine.writes


def test_a_part_stays_until_the_others_have_written_theirs_but_not_for_ever() -> None:
    worker = orphaned()
    worker.step(Tick(), 10.0)
    assert worker.step(Written("fit", whole=False), 11.0) == [Wake(11.0 + AGAIN_S)]
    assert worker.parts == {("fit", "1"), ("fit", "2")}
    assert worker.step(Tick(), 11.0 + AGAIN_S) == [write(again=True)]
    worker.step(Written("fit", whole=False), 99.0)
    assert not worker.parts


def test_a_driver_that_comes_while_a_fit_is_written_has_it() -> None:
    worker = orphaned()
    worker.step(Tick(), 10.0)
    assert worker.owner("b") == ""
    assert worker.step(Written("fit", whole=True), 11.0) == []
    assert worker.parts == {("fit", "1"), ("fit", "2")}
    assert worker.step(DriverLost("b"), 12.0) == [Wake(22.0)], "a claim without a directory"
    worker.step(Tick(), 22.0)
    assert not worker.parts


def test_a_worker_that_leaves_writes_at_once() -> None:
    worker = orphaned(orphan_s=600.0)
    assert worker.step(Leave(), 1.0) == [write()]
    worker.step(Written("fit", whole=False), 2.0)
    assert not worker.parts, "it ends"
    late = Worker(600.0)
    late.step(Claim("a", "fit", 1, directory="/there"))
    late.step(Completed("a", "fit", "1"))
    assert late.step(Leave(), 1.0) == [], "it has a driver"
    assert late.step(Released("a", "fit", over=False), 2.0) == [Write("fit", ("1",), "/there", 1, (), again=False)]


def test_a_disk_that_hangs_bounds_what_is_kept() -> None:
    worker = Worker()
    for i in range(3 * MOST_ORPHANS):
        worker.step(Claim("a", f"fit {i}", 1, directory="/there"))
        worker.step(Completed("a", f"fit {i}", "1"))
        worker.step(Released("a", f"fit {i}", over=False), float(i))
    assert len(worker.parts) == 2 * MOST_ORPHANS


def test_few_fits_without_a_driver_are_kept() -> None:
    worker = Worker()
    for i in range(MOST_ORPHANS + 3):
        worker.owner(f"driver {i}", f"fit {i}")
        worker.step(Completed(f"driver {i}", f"fit {i}", "1"))
        worker.step(DriverLost(f"driver {i}"))
    assert worker.parts == {(f"fit {i}", "1") for i in range(3, MOST_ORPHANS + 3)}


def test_whenever_a_driver_dies_what_is_complete_somewhere_is_there_everywhere() -> None:
    for seed in range(300):
        draws, workers, done = random.Random(seed), [Worker() for _ in range(3)], 0
        ways: list[list[Event]] = [[Claim("a", "fit", 0)] for _ in workers]
        """What the driver has sent to each worker, and the worker has not taken."""
        exported = [0] * len(workers)
        complete: set[str] = set()
        for _ in range(draws.randrange(80)):
            number = draws.randrange(len(workers))
            if ways[number]:
                event = ways[number].pop(0)
                workers[number].step(event)
                complete |= {event.key} if isinstance(event, Completed) else set()
            elif exported[number] == done:  # it has taken all of the snapshot before
                exported[number] += 1
                workers[number].step(Exported("a", "fit", str(done)))
            if min(exported) == done + 1:
                for way in ways:
                    way.append(Completed("a", "fit", str(done)))
                done += 1
        for key in sorted(complete, key=int)[-1:]:
            assert all(("fit", key) in worker.parts for worker in workers), seed
