"""The rules of the driver's machine: who gets work, which values count, and when a fit is over."""

from __future__ import annotations

from typing import Any

import pytest

from flowml.policy import AllReduce, Policy, Quorum
from flowml.policy.waits import Waits
from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.actions import Received, Release, Send
from flowml_runtime.protocol.training.driver import (
    Begin,
    Fail,
    Feed,
    Keep,
    Note,
    NoteCommit,
    NoteFates,
    NoteWaits,
    Over,
    SendSource,
    SendStore,
    StepFailed,
    Stop,
    TrainingDriver,
    WorkerLost,
)
from flowml_runtime.protocol.training.ledger import Work
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import ReplicaLost, Terms

RUN = 10
IDS: dict[str, Any] = {"plan_id": "p", "run": RUN}
PLACES = Places((("a0", "a1"), ("b0", "b1")), (("a0", "b0"), ("a1",)), ({}, {}))
EVERYONE = ("a0", "a1", "b0", "b1")


MIXED = (StoreTerms((0,), Policy(AllReduce()), collective=True), StoreTerms((1,), Policy(quorum=Quorum(2))))


def driver(source: str = "fed", clocks: int = 2, stores: tuple[StoreTerms, ...] = MIXED) -> TrainingDriver:
    ids: dict[str, Any] = {**IDS, "seed": 0, "shuffle": False, "examples": 1, "source": source}
    start = wire.StartTraining(**ids, total_clocks=clocks)
    return TrainingDriver(start, Terms(2, 2, 1, stores, clocks), Work(2, 4, 8, clocks, aligned=True), PLACES)


def retired(replica: int, stage: int) -> Received:
    return Received(PLACES.stages[replica][stage], wire.Retired(**IDS, replica=replica, stage=stage))


def value(store: int, home: str, handle: int | None = None, version: int = 2) -> Received:
    return Received(home, wire.StoreValue(**IDS, store=store, version=version), handle)


def test_a_fit_begins_with_the_workers_then_the_stores_then_the_source() -> None:
    sent, *stores, source = driver("shipped").step(Begin())
    assert isinstance(sent, Send)
    assert (sent.to, type(sent.message)) == (EVERYONE, wire.StartTraining)
    assert stores == [SendStore(0, ("a0", "b0"), 1), SendStore(1, ("a1",), 1)]
    assert source == SendSource(1)
    assert not any(isinstance(a, SendSource) for a in driver("fed").step(Begin()))


@pytest.mark.parametrize("source", ["fed", "shipped"])
def test_work_is_granted_to_the_first_stage_and_its_data_goes_first(source: str) -> None:
    machine = driver(source)
    *fed, granted = machine.step(Received("b0", wire.Ask(**IDS, replica=1, clocks=(0, 1))))
    items = [wire.Item(sequence=n, epoch=0, start=8 * n, size=8) for n in (1, 3)]
    assert granted == Send(("b0",), wire.Grant(**IDS, cause=1, replica=1, items=((0, items[0]), (1, items[1]))))
    assert fed == ([Feed(1, item, 1) for item in items] if source == "fed" else [])
    fates: tuple[tuple[wire.Item, Any], ...] = ((items[0], "used"),)
    assert machine.step(Received("b0", wire.Settled(**IDS, replica=1, fates=fates))) == [NoteFates(fates, (), (), 2)]
    assert machine.ledger.outstanding == 1


def test_the_fit_is_over_when_all_have_retired_and_all_homes_have_finished_in_any_order() -> None:
    machine = driver()
    assert machine.step(value(0, "b0")) == []
    assert machine.step(value(1, "a1", 5)) == [Keep(1, 5, 2)]
    for replica, stage in ((1, 1), (0, 0), (0, 1), (0, 1), (1, 0)):
        assert machine.step(retired(replica, stage)) == []
    assert not machine.over
    assert machine.step(value(0, "a0", 6)) == [Keep(0, 6, 8), Over(8)]
    assert machine.over
    machine.validate()


def test_a_value_counts_once_and_only_from_the_first_home() -> None:
    machine = driver()
    assert machine.step(value(0, "b0", 1)) == [Release(1, 1)]
    assert machine.step(value(0, "a0", 2)) == [Keep(0, 2, 2)]
    assert machine.step(value(0, "a0", 3)) == [Release(3, 3)]
    machine.step(value(1, "a1", 4, version=7))
    assert machine.final_order() == [0, 1]
    assert machine.versions == {0: 2, 1: 7}


def test_stores_of_one_version_are_taken_in_reverse_so_that_the_first_has_the_last_word() -> None:
    machine = driver()
    machine.step(value(1, "a1", 1))
    machine.step(value(0, "a0", 2))
    assert machine.final_order() == [1, 0]


def test_messages_of_another_run_and_after_the_end_are_forgotten() -> None:
    machine = driver()
    earlier: dict[str, Any] = {"plan_id": "p", "run": RUN - 2}
    assert machine.step(Received("b0", wire.Ask(**earlier, replica=1, clocks=(0,)))) == []
    assert machine.step(Received("a0", wire.StoreValue(**earlier, store=0, version=0), 7)) == [Release(7, 2)]
    assert machine.step(Stop()) == [Send(EVERYONE, wire.StopTraining(**IDS, cause=3))]
    assert machine.step(value(0, "a0", 8)) == [Release(8, 4)]
    assert machine.step(Stop()) == []


def test_a_failure_is_of_this_fit_if_its_step_is() -> None:
    machine = driver()
    failed = [
        wire.StepFailed(plan_id="p", step=s, worker="a0", node="n", kind="error", error="e")
        for s in (RUN - 1, RUN + 1, RUN + 2)
    ]
    assert [machine.step(StepFailed(f)) for f in failed] == [[], [Fail(failed[1], 2)], []]
    lost = WorkerLost("a0", "it died")
    assert machine.step(lost) == [Fail(lost, 4)]


def test_a_replica_that_is_lost_need_not_retire() -> None:
    machine = driver()
    for store, home in ((0, "a0"), (0, "b0"), (1, "a1")):
        machine.step(value(store, home))
    machine.step(retired(0, 0))
    machine.step(retired(0, 1))
    assert machine.step(ReplicaLost(1)) == [Over(6)]


def test_reports_go_to_the_history_and_traffic_is_kept() -> None:
    machine = driver()
    item = wire.Item(sequence=0, epoch=0, start=0, size=8)
    report = wire.Report(**IDS, replica=0, clock=0, item=item, slots=(0,), seconds=0.1)
    assert machine.step(Received("a1", report, 3)) == [Note(report, 3, 1)]
    for count in (1, 2):
        machine.step(Received("a1", wire.Traffic(**IDS, worker="a1", stores=((0, count, 0, 0, 0, 0),))))
    assert machine.traffic["a1"].stores == ((0, 2, 0, 0, 0, 0),)


def test_a_worker_that_another_cannot_reach_is_lost() -> None:
    machine = driver()
    told = wire.StepFailed(plan_id="p", step=RUN, worker="b0", node="a0 -> b0", kind="lost", error="it broke")
    assert machine.step(StepFailed(told)) == [Fail(WorkerLost("b0", "it broke"), 1)]


def test_what_is_not_for_a_driver_is_refused() -> None:
    with pytest.raises(ProtocolError, match="no use for Published"):
        driver().step(Received("a0", wire.Published(**IDS, store=0, version=0, floor=0)))


def test_whose_work_counts_goes_to_the_history() -> None:
    machine = driver(stores=(StoreTerms((0,), Policy(quorum=Quorum(1))), StoreTerms((1,), Policy(quorum=Quorum(1)))))
    commit = wire.Commit(**IDS, clock=0, excluded=(1,))
    assert machine.step(Received("a0", commit)) == [NoteWaits(0, 0, Waits(), (1,), 1), NoteCommit(0, (1,), (), 1)]
    assert machine.step(Received("a0", commit)) == []


def test_work_counts_if_one_of_the_groups_uses_it() -> None:
    rules = Policy(quorum=Quorum(1)), Policy(quorum=Quorum(0.6)), Policy(quorum=Quorum(1), every=2)
    machine = driver(stores=tuple(StoreTerms((0,), rule) for rule in rules), clocks=3)

    def told(clock: int, group: int, *excluded: int) -> list[tuple[int, tuple[int, ...]]]:
        commit = wire.Commit(**IDS, clock=clock, group=group, excluded=excluded)
        found = machine.step(Received("a0", commit))
        return [(a.clock, a.excluded) for a in found if isinstance(a, NoteCommit)]

    assert told(0, 0, 1) == []
    assert told(1, 0, 0) == []
    assert told(0, 1) == [(0, ())]
    assert told(1, 1, 0) == []
    assert told(1, 2, 0) == [(1, (0,))]
