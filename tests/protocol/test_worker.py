"""The rules of a worker's machine: which messages are for which run, and who is told what in which order."""

from __future__ import annotations

from typing import Any

import pytest

from flowml.policy import AllReduce, Policy
from flowml_runtime import wire
from flowml_runtime.protocol.errors import EarlyLimitError, ProtocolError
from flowml_runtime.protocol.training import early as module
from flowml_runtime.protocol.training.actions import (
    Action,
    Apply,
    Close,
    Fail,
    Leave,
    Load,
    Open,
    Publish,
    Received,
    Release,
    Return,
    Send,
    Show,
    Start,
    StepFinished,
)
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import ReplicaLost, Terms
from flowml_runtime.protocol.training.worker import TrainingWorker

RUN = 10
IDS: dict[str, Any] = {"plan_id": "p", "run": RUN}
NAMES = (("a0", "a1"), ("b0", "b1"))
EVERYONE = ("a0", "a1", "b0", "b1")


def item(number: int) -> wire.Item:
    return wire.Item(sequence=number, epoch=0, start=8 * number, size=8)


def worker(me: str, *stores: StoreTerms, begun: bool = True) -> TrainingWorker:
    """Two replicas of two stages on four workers; every store lives at a0, a collective one at b0 too."""
    homes = tuple(("a0", "b0") if s.collective else ("a0",) for s in stores)
    readers = tuple(
        {"a0": ("a0",), "b0": ("b0",)} if s.collective else {"a0": tuple(w for r in NAMES for w in r)} for s in stores
    )
    machine = TrainingWorker(me, "driver", Terms(2, 2, 1, stores, 0), Places(NAMES, homes, readers))
    if begun:
        begin(machine)
    return machine


def begin(machine: TrainingWorker, run: int = RUN, clocks: int = 4) -> list[Action]:
    ids: dict[str, Any] = {"plan_id": "p", "run": run, "seed": 0, "shuffle": False, "examples": 1, "source": "fed"}
    return machine.step(Received("driver", wire.StartTraining(**ids, total_clocks=clocks)))


def contribution(replica: int, clock: int, *, run: int = RUN) -> wire.Contribution:
    ids: dict[str, Any] = {"plan_id": "p", "run": run, "store": 0, "part": 0, "incarnation": 0, "base_version": 0}
    return wire.Contribution(**ids, replica=replica, clock=clock, weight=1)


SYNC = StoreTerms((0,), Policy())
ARRIVING = StoreTerms((0,), Policy(staleness=2))
SUMMED = StoreTerms((0,), Policy(AllReduce()), collective=True)


def loaded(me: str, *stores: StoreTerms) -> TrainingWorker:
    machine = worker(me, *stores)
    for store in range(len(stores)):
        machine.step(Received("driver", wire.StoreValue(**IDS, store=store, version=0), handle=90 + store))
    return machine


def test_a_run_begins_with_its_machines_ready_and_the_first_stages_ask_for_work() -> None:
    opened, asked = begin(worker("b0", SYNC, begun=False))
    assert isinstance(opened, Open)
    assert asked == Send(("driver",), wire.Ask(**IDS, cause=1, replica=1, clocks=(0, 1)))
    assert [type(a) for a in begin(worker("b1", SYNC, begun=False))] == [Open]


def test_a_grant_begins_a_clock_on_all_stages_of_the_replica() -> None:
    first, second = worker("b0", SYNC), worker("b1", SYNC)
    granted = first.step(Received("driver", wire.Grant(**IDS, replica=1, items=((0, item(0)), (1, item(1))))))
    told = wire.Begin(**IDS, cause=2, replica=1, clock=0, item=item(0))
    assert granted[:2] == [Send(("b1",), told), Start(RUN, 1, 0, 0, item(0), 2)]
    assert second.step(Received("b0", told)) == [Start(RUN, 1, 1, 0, item(0), 2)]
    assert second.step(StepFinished(RUN, 1, 1, 0, 2)) == []
    assert second.step(StepFinished(RUN + 1, 1, 1, 0, 2)) == []  # of another run


def test_what_comes_before_its_run_waits_for_it_in_order() -> None:
    machine = worker("b1", SYNC, begun=False)
    early = [wire.Begin(**IDS, replica=1, clock=c, item=item(c)) for c in range(2)]
    for message in early:
        assert machine.step(Received("b0", message)) == []
    opened, started = begin(machine)
    assert isinstance(opened, Open)
    assert started == Start(RUN, 1, 1, 0, item(0), 1)  # caused by the first of them
    machine.validate()


def test_what_comes_for_a_run_that_is_over_is_forgotten() -> None:
    machine = loaded("a0", SYNC)
    machine.step(Received("a0", contribution(0, 0), handle=1))
    assert machine.step(Received("driver", wire.StopTraining(**IDS))) == [Close(RUN, 4), Release(1, 4)]
    assert machine.step(Received("a0", contribution(1, 0), handle=2)) == [Release(2, 5)]
    assert begin(machine) == []  # it cannot begin again
    assert machine.step(Received("a0", contribution(1, 0, run=RUN + 4), handle=3)) == []
    assert machine.step(Received("driver", wire.StopTraining(plan_id="p", run=RUN + 4))) == [Release(3, 7)]
    machine.validate()


def test_only_the_driver_begins_and_ends_runs() -> None:
    machine = worker("a0", SYNC)
    (failed,) = machine.step(Received("b0", wire.StopTraining(**IDS)))
    assert isinstance(failed, Fail)
    assert "no use for StopTraining" in str(failed.error)


def test_a_run_that_begins_ends_the_one_before() -> None:
    actions = begin(worker("a0", SYNC), run=RUN + 4)
    assert [type(a) for a in actions[:2]] == [Close, Open]


def test_too_much_that_comes_early_is_a_typed_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_EARLY", 3)
    machine = worker("a0", SYNC, begun=False)
    for handle in range(3):
        assert machine.step(Received("a1", contribution(0, 0), handle)) == []
    failed, released = machine.step(Received("a1", contribution(0, 1), 3))
    assert isinstance(failed, Fail)
    assert isinstance(failed.error, EarlyLimitError)
    assert failed.run == RUN
    assert released == Release(3, 4)
    machine.validate()


def test_a_commit_reaches_everyone_and_the_stages_before_the_home() -> None:
    machine = loaded("a0", SYNC)
    machine.step(Received("driver", wire.Grant(**IDS, replica=0, items=((0, item(0)), (1, item(1))))))
    assert machine.step(Received("a0", contribution(0, 0), handle=1)) == []
    (sent,) = machine.step(Received("b0", contribution(1, 0), handle=2))
    number = machine.number
    commit = wire.Commit(**IDS, cause=number, clock=0)
    assert sent == Send((*EVERYONE, "driver"), commit)
    settled, applied, published = machine.step(Received("a0", commit))
    assert settled == Send(("driver",), wire.Settled(**IDS, cause=number + 1, replica=0, fates=((item(0), "used"),)))
    assert applied == Apply(0, 1, (((1,), 0.5), ((2,), 0.5)), number + 1)
    assert published == Publish(0, 1, 1, True, ("a0", "a1", "b0", "b1"), number + 1)
    machine.validate()


def test_a_replica_hears_which_version_holds_its_push() -> None:
    machine = loaded("a0", ARRIVING)
    actions = machine.step(Received("b0", contribution(1, 0), handle=1))
    applied = wire.Applied(**IDS, cause=machine.number, store=0, replica=1, clock=0, version=1)
    assert [type(a) for a in actions] == [Apply, Publish, Send]
    assert actions[2] == Send(("b0", "b1"), applied)


def test_a_copy_that_is_behind_another_is_ignored() -> None:
    machine = worker("a1", SUMMED)
    news = [wire.Published(**IDS, store=0, version=v, floor=v) for v in (1, 1, 2)]
    found = [machine.step(Received("a0", message, handle)) for handle, message in enumerate(news)]
    assert found == [[Show(0, 1, 0, 2)], [Release(1, 3)], [Show(0, 2, 2, 4)]]


def test_a_version_that_only_moves_the_floor_shows_nothing_new() -> None:
    machine = worker("a1", SYNC)
    machine.step(Received("a0", wire.Published(**IDS, store=0, version=0, floor=0), handle=1))
    assert not machine.stage((0, 1)).may_read(0, 1)
    assert machine.step(Received("a0", wire.Published(**IDS, store=0, version=0, floor=1))) == []
    assert machine.stage((0, 1)).may_read(0, 1)


def test_a_stage_retires_to_those_that_wait_for_it_and_the_driver_hears_of_traffic_first() -> None:
    machine = worker("b0", ARRIVING)
    retired = wire.Retired(**IDS, cause=2, replica=1, stage=0)
    assert machine.step(Received("driver", wire.Grant(**IDS, replica=1, items=(), exhausted=True))) == [
        Send(("a0", "b1"), retired),  # the home that applies on arrival, and the other stage
        Leave(("driver",), retired, 2),
    ]
    other = worker("b1", ARRIVING)
    (to_driver,) = other.step(Received("b0", retired))  # stage 1 sends nothing to this store
    assert isinstance(to_driver, Leave)
    assert to_driver.to == ("driver",)


def test_the_value_of_a_finished_store_comes_from_its_first_home_only() -> None:
    for name, value in (("a0", True), ("b0", False)):
        machine = worker(name, SUMMED)
        machine.step(Received("driver", wire.StoreValue(**IDS, store=0, version=0), handle=1))
        told = [Received(name, contribution(0, clock), handle=2 + clock) for clock in range(4)]
        assert [action for event in told for action in machine.step(event)][-1] == Return(0, 4, value, machine.number)


def test_a_store_is_held_before_it_is_published() -> None:
    machine = worker("a0", SYNC)
    actions = machine.step(Received("driver", wire.StoreValue(**IDS, store=0, version=0), handle=7))
    assert [type(a) for a in actions] == [Load, Publish]


def test_a_replica_that_is_lost_is_not_waited_for_also_by_a_run_that_begins_later() -> None:
    machine = worker("a0", SYNC, begun=False)
    assert machine.step(ReplicaLost(1)) == []
    begin(machine)
    machine.step(Received("driver", wire.StoreValue(**IDS, store=0, version=0), handle=7))
    (sent,) = machine.step(Received("a0", contribution(0, 0), handle=8))
    assert isinstance(sent, Send)
    assert isinstance(sent.message, wire.Commit)
    assert sent.message.excluded == (1,)


def test_a_contribution_goes_to_the_home_and_names_the_step_that_caused_it() -> None:
    machine = worker("b0", SYNC)
    sent = machine.contribution(Start(RUN, 1, 0, 3, item(3), 17), 0, 0, base_version=2, weight=4)
    message = wire.Contribution(
        **IDS, cause=17, store=0, part=0, replica=1, incarnation=0, clock=3, base_version=2, weight=4
    )
    assert sent == Send(("a0",), message)


def test_a_contribution_of_a_step_that_ends_after_its_run_belongs_to_that_run() -> None:
    machine = worker("b0", SYNC)
    begin(machine, RUN + 4)
    sent = machine.contribution(Start(RUN, 1, 0, 1, item(1), 17), 0, 0, base_version=1, weight=4)
    assert isinstance(sent.message, wire.Contribution)
    assert sent.message.run == RUN
    home = loaded("a0", SYNC)
    begin(home, RUN + 4)
    assert home.step(Received("b0", sent.message, handle=5)) == [Release(5, home.number)]


def test_what_the_protocol_rules_out_fails_the_run_and_keeps_nothing() -> None:
    machine = loaded("a0", SYNC)
    failed, released = machine.step(Received("b0", contribution(7, 0), handle=1))
    assert isinstance(failed, Fail)
    assert isinstance(failed.error, ProtocolError)
    assert "does not exist" in str(failed.error)
    assert released == Release(1, machine.number)
    (failed,) = machine.step(Received("driver", wire.Grant(**IDS, replica=1, items=())))
    assert isinstance(failed, Fail)
    assert "does not run here" in str(failed.error)
