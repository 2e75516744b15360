"""The membership machine: who is admitted, who is lost, that all members are told, and what its log gives again."""

from __future__ import annotations

import pytest

from flowml_runtime import wire
from flowml_runtime.protocol.membership import (
    Action,
    Append,
    Close,
    ConnectionLost,
    Coordinator,
    Event,
    Forget,
    Know,
    Look,
    ProcessExited,
    Received,
    Rename,
    Restart,
    Send,
    Tick,
    Working,
)
from flowml_runtime.protocol.roster import Joined, Left, Record, Roster

VERSION, PROTOCOL = "1.0", 7
PROCESS = wire.Process("machine", 42)
CPU = wire.DeviceInfo(name="cpu:0", platform="cpu", memory_bytes=10, cores=1.0)


def join(name: str = "", life: int = 1, at: str = "h:1", **changes: object) -> wire.Join:
    fields = {"worker": name, "address": at, "incarnation": life, "protocol": PROTOCOL, "version": VERSION}
    fields["process"] = PROCESS
    return wire.Join(**{**fields, "devices": () if name.startswith(("driver", "spare")) else (CPU,), **changes})  # type: ignore[arg-type]


def cluster(**options: object) -> Coordinator:
    machine = Coordinator(VERSION, PROTOCOL, **options)  # type: ignore[arg-type]
    machine.step(Tick(0.0))
    return machine


def admitted(machine: Coordinator, *names: str) -> Coordinator:
    for number, name in enumerate(names):
        machine.step(Received(f"joining-{number}", join(name, at=f"h:{number}")))
    assert [m.worker for m in machine.members] == list(names)
    return machine


def refusal(actions: list[Action]) -> str:
    know, send, forget = actions
    assert isinstance(know, Know)
    assert isinstance(send, Send)
    assert isinstance(send.message, wire.Refused)
    assert forget == Forget(know.peer)
    return send.message.reason


def views(actions: list[Action]) -> dict[str, wire.Members]:
    return {a.peer: a.message for a in actions if isinstance(a, Send) and isinstance(a.message, wire.Members)}


def names(view: wire.Members) -> list[str]:
    return [m.worker for m in view.members]


def test_a_worker_is_named_welcomed_and_announced() -> None:
    machine = admitted(cluster(), "driver", "worker:0")
    actions = machine.step(Received("joining-9", join(at="h:9")))
    assert actions[:4] == [
        Append(Joined(machine.members[-1], PROCESS)),
        Know("joining-9", "h:9"),
        Rename("joining-9", "worker:1"),
        Send("worker:1", wire.Welcome(worker="worker:1", heartbeat_s=0.5, incarnation=1)),
    ]
    assert set(views(actions)) == {"driver", "worker:0", "worker:1"}
    view = views(actions)["driver"]
    assert names(view) == ["driver", "worker:0", "worker:1"]
    assert view.members[2].devices[0].name == "worker:1/cpu:0"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": "0.9"}, ["flowml 0.9", "flowml 1.0", "install flowml 1.0"]),
        ({"protocol": 8}, ["protocol 8", "protocol 7", "install"]),
        ({"name": "tuesday"}, ["'tuesday'", "not a valid name for a worker"]),
        ({"name": "driver", "devices": (CPU,)}, ["'driver'", "not a valid name for a worker"]),
        ({"devices": ()}, ["not a valid name for a driver"]),
        ({"devices": (CPU, CPU)}, ["cpu:0", "name each once"]),
        ({"at": "h:0"}, ["h:0", "worker:0"]),
        ({"name": "worker:0"}, ["incarnation 1 of worker:0 is not later than 1"]),
    ],
)
def test_who_does_not_fit_is_refused_with_the_reason(changes: dict[str, object], said: list[str]) -> None:
    machine = admitted(cluster(), "worker:0")
    asked = join(**{"name": "worker:5", "at": "h:9", **changes})  # type: ignore[arg-type]
    reason = refusal(machine.step(Received("joining-9", asked)))
    assert [s for s in said if s not in reason] == []
    assert [m.worker for m in machine.members] == ["worker:0"]


def test_notice_is_logged_and_told_once_and_the_next_life_has_given_none() -> None:
    machine = admitted(cluster(), "driver", "worker:0", "worker:1")
    notice = Received("driver", wire.Notice(worker="worker:1"))
    first, *rest = machine.step(notice)
    assert first == Append(Joined(machine.members[-1], PROCESS))
    assert {p: [m.worker for m in v.members if m.leaving] for p, v in views(rest).items()} == {
        peer: ["worker:1"] for peer in ("driver", "worker:0", "worker:1")
    }
    assert machine.step(notice) == []
    for nobody in ("driver", "worker:7"):
        assert machine.step(Received("worker:0", wire.Notice(worker=nobody))) == []
    machine.step(Received("worker:1", wire.Leave(worker="worker:1")))
    machine.step(Received("joining-9", join("worker:1", life=2, at="h:9")))
    assert [m.worker for m in machine.members if m.leaving] == []


def test_a_full_cluster_refuses() -> None:
    machine = admitted(cluster(max_members=1), "worker:0")
    assert "full with 1" in refusal(machine.step(Received("joining-9", join(at="h:9"))))


def test_a_join_that_comes_twice_is_answered_twice_and_counted_once() -> None:
    machine = admitted(cluster(), "worker:0")
    again = machine.step(Received("worker:0", join("worker:0", at="h:0")))
    assert [type(a.message) for a in again if isinstance(a, Send)] == [wire.Welcome, wire.Members]
    assert len(machine.members) == 1


def test_a_join_that_comes_twice_on_one_connection_leaves_that_connection() -> None:
    machine = cluster()
    first, again = (machine.step(Received("joining-0", join("worker:0"))) for _ in range(2))
    assert Rename("joining-0", "worker:0") in first
    assert not [action for action in again if isinstance(action, Rename)], "it would replace the one that has the name"
    assert [action.peer for action in again if isinstance(action, Know | Send)] == ["worker:0"] * 3


def test_a_later_life_takes_the_place_and_an_earlier_one_cannot() -> None:
    machine = admitted(cluster(), "driver", "worker:0")
    view = views(machine.step(Received("joining-9", join("worker:0", life=2, at="h:9"))))["driver"]
    assert view.lost == (("worker:0", "a new worker:0 took its place"),)
    assert [(m.worker, m.address) for m in view.members] == [("driver", "h:0"), ("worker:0", "h:9")]
    machine.step(ProcessExited("worker:0", "killed"))
    for life in (1, 2):
        assert "not later than 2" in refusal(machine.step(Received("joining-8", join("worker:0", life, "h:8"))))


def test_a_free_name_is_given_again_to_a_later_life_only() -> None:
    machine = admitted(cluster(), "worker:0", "worker:1")
    machine.step(ConnectionLost("worker:0", "gone"))
    assert Rename("joining-8", "worker:2") in machine.step(Received("joining-8", join(life=1, at="h:8")))
    assert Rename("joining-9", "worker:0") in machine.step(Received("joining-9", join(life=2, at="h:9")))


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (ConnectionLost("worker:1", "its connection broke"), "its connection broke"),
        (ProcessExited("worker:1", "killed by SIGKILL"), "killed by SIGKILL"),
        (Received("worker:1", wire.Leave(worker="worker:1", reason="done")), "done"),
    ],
)
def test_a_loss_is_told_once_with_its_reason(event: Event, reason: str) -> None:
    machine = admitted(cluster(), "driver", "worker:0", "worker:1")
    actions = machine.step(event)
    assert actions[:2] == [Append(Left(("worker:1",), {"worker:1": reason})), Forget("worker:1")]
    assert {p: (names(v), v.lost) for p, v in views(actions).items()} == {
        peer: (["driver", "worker:0"], (("worker:1", reason),)) for peer in ("driver", "worker:0")
    }
    assert machine.step(event) == []


def test_the_end_of_a_process_is_no_loss_of_one_that_has_its_name_by_now() -> None:
    machine = admitted(cluster(), "worker:0")
    assert machine.step(ProcessExited("worker:0", "killed", wire.Process("machine", 41))) == []
    assert machine.step(ProcessExited("worker:0", "killed", wire.Process("another", 42))) == []
    assert machine.step(ProcessExited("worker:0", "killed", PROCESS)) == [
        Append(Left(("worker:0",), {"worker:0": "killed"})),
        Forget("worker:0"),
    ]


def test_silence_is_a_loss_and_a_heartbeat_of_an_earlier_life_is_silence() -> None:
    machine = admitted(cluster(), "worker:0", "worker:1", "worker:2")
    lost: dict[str, str] = {}
    for tick in range(1, 30):
        machine.step(Received("worker:0", wire.Heartbeat(worker="worker:0", incarnation=1)))
        machine.step(Received("worker:1", wire.Heartbeat(worker="worker:1", incarnation=0)))
        for view in views(machine.step(Tick(tick / 4))).values():
            assert tick / 4 == pytest.approx(5.25)
            lost |= dict(view.lost)
    assert lost == dict.fromkeys(["worker:1", "worker:2"], "no heartbeat for 5 s")


def test_a_coordinator_that_was_suspended_blames_nobody() -> None:
    machine = admitted(cluster(), "worker:0")
    assert machine.step(Tick(1000.0)) == []
    later = [a for t in range(1, 18) for a in machine.step(Tick(1000 + t / 4))]
    assert set(later) == {Look("worker:0", PROCESS)}  # silent it is
    left = Left(("worker:0",), {"worker:0": "no heartbeat for 5 s"})
    assert machine.step(Tick(1005.5)) == [Append(left), Forget("worker:0")]


def test_a_silent_worker_that_is_seen_at_work_is_borne_with_for_a_while() -> None:
    machine = admitted(cluster(), "worker:0", "worker:1", "worker:2")
    lost: dict[str, str] = {}
    at: dict[str, float] = {}
    for tick in range(1, 160):
        now_s = tick / 4
        machine.step(Received("worker:2", wire.Heartbeat(worker="worker:2", incarnation=1)))
        actions = machine.step(Tick(now_s))
        for view in views(actions).values():
            lost |= dict(view.lost)
            at |= {name: now_s for name, _ in view.lost}
        for look in (a for a in actions if isinstance(a, Look)):
            works_on = look.worker == "worker:0" or now_s < 4
            assert machine.step(Working(look.worker)) == [] if works_on else True
    assert lost == {"worker:0": "no heartbeat for 30 s", "worker:1": "no heartbeat for 5 s"}
    assert at["worker:0"] == pytest.approx(30.25)
    assert 5 < at["worker:1"] < 10


def restarted(machine: Coordinator, log: list[Record], now_s: float) -> tuple[Coordinator, list[Action]]:
    """A coordinator with the log of another, and what it does first."""
    successor = Coordinator(VERSION, PROTOCOL, away_s=60.0, roster=Roster(log))
    assert successor.members == machine.members
    return successor, successor.step(Tick(now_s))


def logged(actions: list[Action]) -> list[Record]:
    return [a.record for a in actions if isinstance(a, Append)]


def test_a_newcomer_at_the_address_of_one_that_has_not_come_back() -> None:
    """It has ended while the coordinator was away, and the system has given its port to another process."""
    first, log = Coordinator(VERSION, PROTOCOL, away_s=60.0), list[Record]()
    first.step(Tick(0.0))
    for number, name in enumerate(("driver-a", "worker:0", "driver-b")):
        log += logged(first.step(Received(f"joining-{number}", join(name, at=f"h:{number}"))))
    machine, _ = restarted(first, log, 10.0)
    machine.step(Received("joining-2", join("driver-b", at="h:2")))
    actions = machine.step(Received("new", join("driver-c", 2, at="h:0")))
    machine.validate()
    assert logged(actions) == [Left(("driver-a",)), Joined(machine.members[-1], PROCESS)]
    assert Forget("driver-a") in actions
    views = {a.peer: a.message for a in actions if isinstance(a, Send) and isinstance(a.message, wire.Members)}
    assert views.keys() == {"driver-b", "driver-c"}
    assert views["driver-b"].lost == (("driver-a", "another process listens at its address"),)
    assert [m.worker for m in machine.members] == ["worker:0", "driver-b", "driver-c"]
    assert "each peer needs a different address" in refusal(
        machine.step(Received("newer", join("driver-d", 3, at="h:2")))
    ), "that one is there"


def test_a_restarted_coordinator_has_its_members_and_gives_them_time_to_come_back() -> None:
    machine, log = cluster(away_s=60.0), list[Record]()
    for number, name in enumerate(["driver", "worker:0", "worker:1"]):
        log += logged(machine.step(Received(f"joining-{number}", join(name, at=f"h:{number}"))))
    machine, first = restarted(machine, log, 1000.0)
    assert first == []
    for name, port in (("driver", 0), ("worker:0", 1)):
        know, welcome, view = machine.step(Received(name, join(name, at=f"h:{port}")))
        assert know == Know(name, f"h:{port}")
        assert isinstance(welcome, Send)
        assert welcome.message == wire.Welcome(worker=name, heartbeat_s=0.5, away_s=60.0, incarnation=1)
        assert isinstance(view, Send)
        assert isinstance(view.message, wire.Members)
        assert (view.message.epoch, view.message.lost) == (3, ())
    lost: dict[float, tuple[str, ...]] = {}
    for tick in range(1, 24):
        for name in ("driver", "worker:0"):
            machine.step(Received(name, wire.Heartbeat(worker=name, incarnation=1)))
        for record in logged(machine.step(Tick(1000 + tick / 4))):
            assert isinstance(record, Left)
            lost[tick / 4] = record.names
    assert lost == {5.25: ("worker:1",)}


def test_a_lost_incarnation_stays_refused_after_a_restart() -> None:
    machine, log = cluster(), list[Record]()
    log += logged(machine.step(Received("joining-0", join("worker:0", life=5))))
    log += logged(machine.step(ConnectionLost("worker:0", "gone")))
    machine, _ = restarted(machine, log, 0.0)
    assert "not later than 5" in refusal(machine.step(Received("joining-1", join("worker:0", life=5))))
    assert Rename("joining-2", "worker:0") in machine.step(Received("joining-2", join("worker:0", life=6)))


def test_a_member_that_is_not_back_is_sent_nothing() -> None:
    machine, log = cluster(away_s=60.0), list[Record]()
    for number, name in enumerate(["driver", "worker:0"]):
        log += logged(machine.step(Received(f"joining-{number}", join(name, at=f"h:{number}"))))
    machine, _ = restarted(machine, log, 0.0)
    assert set(views(machine.step(Received("joining-2", join("worker:1", at="h:2"))))) == {"worker:1"}
    assert set(views(machine.step(Received("driver", join("driver", at="h:0"))))) == {"driver"}
    assert set(views(machine.step(Received("joining-3", join("worker:2", at="h:3"))))) == {
        "driver",
        "worker:1",
        "worker:2",
    }


def test_a_worker_whose_name_was_logged_and_not_told_gets_the_same_name() -> None:
    machine = cluster()
    log = logged(machine.step(Received("joining-0", join())))
    machine, _ = restarted(machine, log, 0.0)
    actions = machine.step(Received("joining-0", join()))
    assert actions[:2] == [Know("joining-0", "h:1"), Rename("joining-0", "worker:0")]
    assert logged(actions) == []


def test_a_spare_takes_the_place_of_a_lost_worker() -> None:
    machine = admitted(cluster(), "driver", "worker:0", "spare-a", "spare-b")
    machine.step(ConnectionLost("worker:0", "gone"))
    asked = Received("driver", wire.Replace(worker="worker:0"))
    assert machine.step(asked) == [Send("spare-a", wire.Replace(worker="worker:0", after=1))]
    assert machine.step(asked) == [Send("spare-a", wire.Replace(worker="worker:0", after=1))], "it may not know"
    machine.step(ConnectionLost("spare-a", "gone"))
    assert machine.step(asked) == [Send("spare-b", wire.Replace(worker="worker:0", after=1))]
    actions = machine.step(Received("spare-b", join("worker:0", life=2, at="h:3")))
    assert logged(actions) == [Left(("spare-b",)), Joined(machine.members[-1], PROCESS)]
    assert Rename("spare-b", "worker:0") in actions
    assert views(actions)["driver"].lost == (("spare-b", "it took the place of worker:0"),)
    assert {m.worker: m.incarnation for m in machine.members} == {"driver": 1, "worker:0": 2}
    assert machine.step(asked) == [], "it is there"
    machine.validate()


def test_a_spare_that_comes_second_stays_a_spare() -> None:
    machine = admitted(cluster(), "driver", "worker:0", "spare-a")
    machine.step(ConnectionLost("worker:0", "gone"))
    machine.step(Received("driver", wire.Replace(worker="worker:0")))
    machine.step(Received("joining-9", join("worker:0", life=2, at="h:9")))
    actions = machine.step(Received("spare-a", join("worker:0", life=3, at="h:2")))
    assert [a.message.worker for a in actions if isinstance(a, Send) and isinstance(a.message, wire.Welcome)] == [
        "spare-a"
    ]
    assert sorted(m.worker for m in machine.members) == ["driver", "spare-a", "worker:0"]
    machine.step(ConnectionLost("worker:0", "gone"))
    assert machine.step(Received("driver", wire.Replace(worker="worker:0"))) == [
        Send("spare-a", wire.Replace(worker="worker:0", after=2))
    ]


def test_without_a_spare_a_launcher_or_the_owner_starts_another() -> None:
    machine = admitted(cluster(), "driver", "worker:0")
    asked = Received("driver", wire.Replace(worker="worker:0"))
    assert machine.step(asked) == [], "it is not lost"
    machine.step(ConnectionLost("worker:0", "gone"))
    assert machine.step(asked) == [Restart("worker:0")]
    machine.step(Received("joining-9", join("launcher-1", devices=(), at="h:9")))
    assert machine.step(asked) == [Send("launcher-1", wire.Replace(worker="worker:0", after=1))]
    assert machine.step(Received("driver", wire.Replace(worker="driver"))) == []


def test_a_restarted_coordinator_waits_for_its_spares() -> None:
    """The one before may have asked a spare, which is on its way: two would take one place."""
    machine, log = cluster(away_s=60.0), list[Record]()
    for number, name in enumerate(["driver", "worker:0", "spare-a"]):
        log += logged(machine.step(Received(f"joining-{number}", join(name, at=f"h:{number}"))))
    log += logged(machine.step(ConnectionLost("worker:0", "gone")))
    machine, _ = restarted(machine, log, 0.0)
    machine.step(Received("driver", join("driver", at="h:0")))
    asked = Received("driver", wire.Replace(worker="worker:0"))
    assert machine.step(asked) == []
    assert Rename("spare-a", "worker:0") in machine.step(Received("spare-a", join("worker:0", life=2, at="h:2")))


def test_a_full_cluster_lets_its_spares_take_places() -> None:
    machine = admitted(cluster(max_members=2), "worker:0", "spare-a")
    assert Rename("spare-a", "worker:1") in machine.step(Received("spare-a", join("worker:1", life=2, at="h:1")))


def test_members_are_told_that_the_cluster_ends() -> None:
    machine = admitted(cluster(), "driver", "worker:0")
    assert machine.step(Close("it was closed")) == [
        Send(name, wire.Refused(reason="it was closed")) for name in ("driver", "worker:0")
    ]


def test_a_driver_that_comes_later_is_told_who_is_gone_until_another_is_there() -> None:
    log: list[Record] = []
    machine = admitted(cluster(away_s=60.0), "worker:0", "worker:1", "spare-a")
    log.append(machine._roster.whole())
    log += logged(machine.step(ProcessExited("worker:1", "killed")))
    log += logged(machine.step(ConnectionLost("spare-a", "its connection broke")))
    machine, _ = restarted(machine, log, 100.0)
    came = machine.step(Received("joining-9", join("driver", at="h:9", devices=())))
    assert views(came)["driver"].gone == (("worker:1", "killed"),)
    assert views(came)["driver"].lost == ()
    back = machine.step(Received("joining-8", join("worker:1", life=2, at="h:8")))
    assert views(back)["driver"].gone == ()
