"""Snapshots of which workers have copies: where these are, when a snapshot is complete, and what a worker may drop."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from flowml.policy import UNBOUNDED, Policy
from flowml_runtime import wire
from flowml_runtime.protocol.training.actions import Received, Send
from flowml_runtime.protocol.training.driver import Begin, Pause, TrainingDriver
from flowml_runtime.protocol.training.kept_fits import Claim, Completed, DriverLost, Exported, KeptFits
from flowml_runtime.protocol.training.ledger import Work
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.ring import Ring
from flowml_runtime.protocol.training.snapshot import Rhythm, Save
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Terms

IDS: dict[str, Any] = {"plan_id": "p", "run": 100}
WORKERS = ("a", "b")
CLOCKS = 20
OWNERS = [f"home/{layer}/values" for layer in range(300)]


def machine(policy: Policy, rhythm: Rhythm) -> TrainingDriver:
    ids: dict[str, Any] = {**IDS, "seed": 0, "shuffle": False, "examples": 1, "source": "fed"}
    terms = Terms(2, 1, 1, (StoreTerms((0,), policy, policy.collective),), CLOCKS)
    start, work = wire.StartTraining(**ids, total_clocks=CLOCKS), Work(2, 2 * CLOCKS, 8, CLOCKS, aligned=terms.aligned)
    driver = TrainingDriver(start, terms, work, Places((("a",), ("b",)), (("a",),), ({},)), rhythm)
    driver.step(Begin())
    return driver


def stopped(driver: TrainingDriver, number: int, clock: int) -> wire.Export:
    """All replicas stop; what the workers are asked for."""
    told = [wire.Paused(**IDS, replica=r, hold=driver.hold, clock=clock, number=number) for r in range(2)]
    actions = [a for w, message in zip(WORKERS, told, strict=True) for a in driver.step(Received(w, message))]
    (export,) = [a.message for a in actions if isinstance(a, Send)]
    assert isinstance(export, wire.Export)
    return export


def exported(driver: TrainingDriver, number: int) -> list[Any]:
    """Each worker keeps the buffers of one owner."""
    told = wire.Exported(**IDS, stages=(), stores=(), buffers=1, number=number)
    return [a for worker in WORKERS for a in driver.step(Received(worker, told))]


def copied(driver: TrainingDriver, number: int, of: str, peer: str) -> list[Any]:
    told = wire.Copied(**IDS, owner=f"home/{of}/values", worker=of, names=("w",), number=number)
    return driver.step(Received(peer, told))


def test_the_driver_gets_buffers_only_where_it_wants_them() -> None:
    driver = machine(Policy(), Rhythm(3, 0, 1))
    for replica, worker in enumerate(WORKERS):
        driver.step(Received(worker, wire.Ask(**IDS, replica=replica, clocks=tuple(range(8)))))
    whole: list[bool] = []
    for clock in range(1, 7):
        export = stopped(driver, clock - 1, clock)
        assert (export.number, export.copied) == (clock - 1, True)
        assert export.complete == (clock - 2 if clock > 1 else None)
        whole.append(export.whole)
        made = exported(driver, export.number)
        for worker in WORKERS:
            assert not any(isinstance(a, Save) for a in made), "copies are missing"
            made = copied(driver, export.number, worker, "b" if worker == "a" else "a")
        if export.whole:
            assert not any(isinstance(a, Save) for a in made), "buffers are missing"
            told = wire.Buffers(**IDS, owner="x", names=("w",), number=export.number)
            made = [a for handle, worker in enumerate(WORKERS, 5) for a in driver.step(Received(worker, told, handle))]
        (save,) = [a for a in made if isinstance(a, Save)]
        (hold,) = [a.message for a in made if isinstance(a, Send)]
        assert isinstance(hold, wire.Hold)
        assert (save.whole, save.copied, save.number) == (export.whole, True, export.number)
        assert [handle for *_, handle in save.buffers] == ([5, 6] if export.whole else [None, None])
        assert hold.clock == clock + 1
        if clock == 4:
            assert driver.step(Pause()) == [], "the next one is soon enough"
    assert whole == [False, False, True, False, True, True], "those that are due, and the one that was asked for"


def test_a_copy_that_is_told_again_or_late_counts_once() -> None:
    driver = machine(Policy(), Rhythm(0, 0, 1))
    stopped(driver, 0, 1)
    exported(driver, 0)
    assert copied(driver, 0, "a", "b") == copied(driver, 0, "a", "b") == []
    assert any(isinstance(a, Save) for a in copied(driver, 0, "b", "a"))
    assert copied(driver, 0, "b", "a") == []


def test_where_replicas_do_not_wait_copies_come_with_the_buffers() -> None:
    driver = machine(Policy(staleness=UNBOUNDED), Rhythm(0, 0, 1))
    driver.step(Pause())
    export = stopped(driver, 1, 1)
    assert export.whole
    assert export.copied


def test_a_worker_keeps_the_complete_snapshot_until_it_hears_of_the_next() -> None:
    kept = KeptFits(10.0)
    kept.step(Claim("driver", "f", 1, lasts=False), 0.0)
    for number, complete, there in ((0, "", ["0"]), (1, "0", ["0", "1"]), (3, "0", ["0", "3"]), (4, "3", ["3", "4"])):
        kept.step(Exported("driver", "f", str(number), complete), 0.0)
        assert kept.keys("f")[1] == there
    kept.step(Completed("driver", "f", "4"), 0.0)
    assert kept.keys("f") == ("4", ["4"])
    kept.step(DriverLost("driver"), 0.0)
    assert kept.keys("f") == ("", []), "it does not outlive its driver"


@pytest.mark.parametrize("count", [1, 2, 4])
def test_copies_are_on_other_workers_and_always_the_same(count: int) -> None:
    memory = dict.fromkeys((f"worker:{i}" for i in range(4)), 1)
    ring, again = Ring("worker:1", memory, count), Ring("worker:1", dict(reversed(memory.items())), count)
    for owner in OWNERS:
        chain = ring.chain(owner, 100)
        assert len(set(chain)) == len(chain) == min(count, 3)
        assert "worker:1" not in chain
        assert chain == again.chain(owner, 100) == ring.chain(owner, 100)
    assert Ring("alone", {"alone": 1}, 1).chain("x", 1) == ()


def test_copies_are_spread_by_memory() -> None:
    ring = Ring("me", {"me": 8, "small": 8, "large": 24}, 1)
    found = Counter(ring.chain(owner, 100)[0] for owner in OWNERS)
    assert 0.7 < found["large"] / len(OWNERS) < 0.8, "three times the memory, three times the copies"


def test_a_worker_that_leaves_moves_few_copies() -> None:
    memory = dict.fromkeys((f"worker:{i}" for i in range(9)), 1)
    before = Ring("worker:0", memory, 1)
    del memory["worker:8"]
    after = Ring("worker:0", memory, 1)
    moved = [o for o in OWNERS if (at := before.chain(o, 1)) != after.chain(o, 1) and at != ("worker:8",)]
    assert len(moved) < len(OWNERS) / 4
