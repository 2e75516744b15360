"""A coordinator that ends and is started again with its log: members come back, and what was lost stays lost."""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

import flowml as fm
from flowml.errors import ClusterError
from flowml_runtime import wire
from flowml_runtime.launch.launched import LaunchedCluster
from flowml_runtime.membership import log as logs
from flowml_runtime.membership.coordinator import CoordinatorHost
from flowml_runtime.membership.log import RosterLog
from flowml_runtime.membership.member import Membership, passing_name
from flowml_runtime.protocol.membership import COORDINATOR
from flowml_runtime.protocol.roster import Joined, Left, Record
from flowml_runtime.transport.endpoint import OnLost, OnMessage
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from tests.conftest import wait_until

TOKEN = "t"
CPU = wire.DeviceInfo(name="cpu:0", platform="cpu", memory_bytes=1, cores=1.0)


def member(number: int, incarnation: int = 1) -> wire.Member:
    return wire.Member(worker=f"worker:{number}", address=f"h:{number}", incarnation=incarnation, devices=(CPU,))


def test_a_log_gives_the_same_roster_again(tmp_path: Path) -> None:
    process = wire.Process("machine", 42)
    records: list[Record] = [Joined(member(0), process), Joined(member(1)), Left(("worker:0",))]
    with closing(RosterLog(tmp_path)) as log:
        log.append(records[:2])
        log.append(records[2:])
    with closing(RosterLog(tmp_path)) as log:
        assert log.roster.epoch == 3
        assert list(log.roster.members) == ["worker:1"]
        assert log.roster.lives == {"worker:0": 1, "worker:1": 1}


def test_a_long_log_is_replaced_by_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_RECORDS", 10)
    with closing(RosterLog(tmp_path)) as log:
        for life in range(11):
            log.append([Joined(member(0, life))])
    for _ in range(2):
        with closing(RosterLog(tmp_path)) as log:
            assert (log.roster.epoch, log.roster.lives) == (11, {"worker:0": 10})
    with closing(sqlite3.connect(tmp_path / "coordinator.sqlite")) as database:
        assert database.execute("SELECT count(*) FROM records").fetchone() == (1,)


def test_incarnations_of_coordinators_grow_if_the_clock_goes_back(tmp_path: Path) -> None:
    with closing(RosterLog(tmp_path)) as log:
        assert log.next_incarnation(1000) == 1000
    with closing(RosterLog(tmp_path)) as log:
        assert log.next_incarnation(7) == 1001


def test_one_process_has_the_log(tmp_path: Path) -> None:
    with closing(RosterLog(tmp_path)), pytest.raises(ClusterError, match="another coordinator uses it; stop that one"):
        RosterLog(tmp_path)


def test_a_log_that_cannot_be_used_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ClusterError, match=r"cannot be used: (File exists|Not a directory)"):
        RosterLog(tmp_path / "file")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "coordinator.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(ClusterError, match=r"damaged: .* remove it"):
        RosterLog(damaged)
    with closing(RosterLog(tmp_path / "newer")) as log:
        log.note("format", "2")
    with pytest.raises(ClusterError, match="has format 2, and this flowml reads format 1"):
        RosterLog(tmp_path / "newer")
    with closing(RosterLog(tmp_path / "records")) as log:
        log.append([Joined(member(0))])
        log._db.execute("UPDATE records SET record = '{}'")  # pyright: ignore
    with pytest.raises(ClusterError, match="damaged"):
        RosterLog(tmp_path / "records")


class Peer:
    """A member, and what it hears."""

    def __init__(self, address: str, stack: ExitStack, kind: type[GrpcEndpoint] = GrpcEndpoint) -> None:
        self.ended: list[str] = []
        self.lost: list[tuple[str, str]] = []
        self.endpoint = kind(passing_name(), TOKEN)
        self.membership = Membership(
            self.endpoint,
            address,
            lambda *_: None,
            lambda peer, reason: self.lost.append((peer, reason)),
            on_end=self.ended.append,
        )
        stack.callback(self.endpoint.close)
        stack.callback(self.membership.leave)

    @property
    def members(self) -> list[str]:
        return [m.worker for m in self.membership.members]


def coordinator(folder: Path, bind: str = "127.0.0.1:0", *, beat_s: float = 0.1) -> CoordinatorHost:
    log, times = RosterLog(folder), {"heartbeat_s": beat_s, "timeout_s": 10 * beat_s}
    return CoordinatorHost(bind, TOKEN, log=log, works=lambda _: False, **times)


def test_members_come_back_and_one_that_does_not_is_lost(tmp_path: Path) -> None:
    first = coordinator(tmp_path)
    with ExitStack() as stack:
        driver, one, two = (Peer(first.address, stack) for _ in range(3))
        driver.membership.join("driver")
        assert [p.membership.join("", (CPU,)) for p in (one, two)] == ["worker:0", "worker:1"]
        wait_until(lambda: len(driver.members) == 3, "all have joined")
        epoch = driver.membership._epoch  # pyright: ignore
        first.close()
        with pytest.raises(ClusterError, match="cannot be reached"):
            Peer(first.address, stack).membership.join("worker:9", (CPU,))
        two.membership.leave()
        two.endpoint.close()
        second = coordinator(tmp_path, first.address)
        stack.callback(second.close)
        there = ["driver", "worker:0"]
        wait_until(lambda: driver.members == one.members == there, "the one that did not come back is lost")
        assert driver.membership._epoch == epoch + 1  # pyright: ignore
        assert (driver.ended, one.ended) == ([], [])
        lost = [("worker:1", "no heartbeat for 1 s")]
        wait_until(lambda: driver.lost == one.lost == lost, "both are told why")
        newcomer = Peer(first.address, stack)
        assert newcomer.membership.join("", (CPU,)) == "worker:1"
        wait_until(lambda: len(one.members) == 3, "a newcomer is announced")


def test_a_member_whose_coordinator_was_away_was_not_suspended_itself(tmp_path: Path) -> None:
    """A driver believed of itself that it was lost, when a worker that had been suspended said so."""
    first = coordinator(tmp_path, beat_s=0.5)
    with ExitStack() as stack:
        driver = Peer(first.address, stack)
        driver.membership.join("driver")
        first.close()
        wait_until(lambda: driver.membership.may_be_lost, "it may be cut off while it does not reach the coordinator")
        stack.callback(coordinator(tmp_path, first.address, beat_s=0.5).close)
        wait_until(lambda: not driver.membership.may_be_lost, "the coordinator is back, and takes it")


class SlowReports(GrpcEndpoint):
    """An endpoint whose thread is slow to report that the coordinator's connection has ended."""

    def start(self, on_message: OnMessage, on_lost: OnLost) -> None:
        self.held: list[tuple[str, str]] = []
        self.report = on_lost

        def hold(peer: str, reason: str) -> None:
            if peer == COORDINATOR:
                self.held.append((peer, reason))
            else:
                on_lost(peer, reason)

        super().start(on_message, hold)


def test_a_late_report_of_the_old_connection_does_not_end_the_new_one(tmp_path: Path) -> None:
    """The driver gave its new connection up, at which the coordinator lost it, and all workers with that."""
    first = coordinator(tmp_path)
    with ExitStack() as stack:
        driver, worker = Peer(first.address, stack, SlowReports), Peer(first.address, stack)
        driver.membership.join("driver")
        worker.membership.join("", (CPU,))
        wait_until(lambda: len(driver.members) == 2, "both have joined")
        first.close()
        second = coordinator(tmp_path, first.address)
        stack.callback(second.close)
        Peer(first.address, stack).membership.join("", (CPU,))
        wait_until(lambda: len(driver.members) == 3, "the driver has come back")
        endpoint = driver.endpoint
        assert isinstance(endpoint, SlowReports) and endpoint.held
        endpoint.report(*endpoint.held[0])
        Peer(first.address, stack).membership.join("", (CPU,))
        wait_until(lambda: len(worker.members) == 4, "the driver is still a member")
        assert (worker.lost, driver.lost, driver.ended) == ([], [], [])


def test_workers_that_have_not_come_back_yet_stay_while_others_join() -> None:
    with closing(LaunchedCluster(workers=2, state="")) as launched:

        def devices() -> int:
            with closing(fm.Cluster.connect(launched.address, launched.token)) as cluster:
                return len(cluster.devices)

        def is_up() -> bool:
            try:
                return devices() == 2
            except ClusterError:
                return False

        for _ in range(4):
            launched.end_coordinator()
            wait_until(is_up, "it serves newcomers")
        assert devices() == 2


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "gRPC"])
@pytest.mark.parametrize("logged", [True, False])
def test_a_coordinator_that_ends_while_it_is_asked(logged: bool, shared: bool, tmp_path: Path) -> None:
    """It may have logged the newcomer, and its successor is asked."""
    asked, first = threading.Event(), GrpcEndpoint("coordinator", TOKEN, shared_memory=shared)
    newcomer = GrpcEndpoint(passing_name(), TOKEN, shared_memory=shared)
    membership = Membership(newcomer, first.address, lambda *_: None, lambda *_: None)
    first.start(lambda *_: asked.set(), lambda *_: None)
    names: list[str] = []
    joining = threading.Thread(target=lambda: names.append(membership.join("", (CPU,))))
    joining.start()
    try:
        assert asked.wait(10.0)
        if logged:
            here = wire.Member(
                worker="worker:7", address=newcomer.address, incarnation=newcomer.incarnation, devices=(CPU,)
            )
            with closing(RosterLog(tmp_path)) as log:
                log.append([Joined(here)])
        first.close()
        with closing(coordinator(tmp_path, first.address)):
            joining.join(10.0)
            assert names == ["worker:7" if logged else "worker:0"]
            membership.leave()
    finally:
        first.close()
        joining.join()
        newcomer.close()


def test_a_lost_member_stays_refused_after_a_restart(tmp_path: Path) -> None:
    first = coordinator(tmp_path)
    with ExitStack() as stack:
        driver, one = (Peer(first.address, stack) for _ in range(2))
        driver.membership.join("driver")
        one.membership.join("worker:0", (CPU,))
        first.process_exited("worker:0", os.getpid(), "it was killed")  # as if it were suspended, and cut off
        wait_until(lambda: driver.members == ["driver"], "it is lost")
        first.close()
        second = coordinator(tmp_path, first.address)
        stack.callback(second.close)
        wait_until(lambda: one.ended, "it has come back in vain")
        assert "is not later than" in one.ended[0]
        assert driver.members == ["driver"]
        assert driver.ended == []


def test_members_of_a_cluster_that_is_closed_end_at_once(tmp_path: Path) -> None:
    host = coordinator(tmp_path)
    with ExitStack() as stack:
        one = Peer(host.address, stack)
        one.membership.join("worker:0", (CPU,))
        host.close("the cluster was closed")
        wait_until(lambda: one.ended == ["the cluster was closed"], "it ends")


def test_a_coordinator_that_cannot_write_its_log_tells_nobody_and_fails(tmp_path: Path) -> None:
    log, failed = RosterLog(tmp_path), threading.Event()
    host = CoordinatorHost("127.0.0.1:0", TOKEN, log=log, on_failure=lambda _: failed.set())
    with closing(host), ExitStack() as stack:
        log._db.execute("PRAGMA max_page_count=1")  # pyright: ignore
        log._db.execute("DROP TABLE records")  # pyright: ignore
        with pytest.raises(ClusterError):
            Peer(host.address, stack).membership.join("worker:0", (CPU,), timeout_s=5.0)
        assert failed.wait(10)
