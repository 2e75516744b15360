"""Spare workers take the places of lost ones: at once, under their names, and others are started in their stead."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psutil
import pytest

import flowml as fm
from flowml.errors import ClusterError, WorkerLostError
from flowml_runtime.launch.launched import LaunchedCluster
from tests.conftest import wait_until
from tests.training.reference import assert_same
from tests.training.test_lost_and_replaced import REPLICAS, fit, killing

LOST = "ignore:worker.+ (was|were) lost"


@pytest.fixture(scope="module")
def cluster() -> Iterator[fm.Cluster]:
    with closing(fm.Cluster.local(workers=REPLICAS, spares=2)) as cluster:
        yield cluster


def spares_of(cluster: fm.Cluster) -> set[int]:
    return {pid for name, pid in cluster.pids.items() if name.startswith("spare")}


@pytest.mark.filterwarnings(LOST)
def test_a_spare_takes_the_place_of_a_lost_worker_and_another_is_started(cluster: fm.Cluster) -> None:
    wait_until(lambda: cluster.spares == 2, "they have joined")
    assert repr(cluster).endswith("worker:3/cpu:0 and 2 spare workers>")
    ready = spares_of(cluster)
    whole = fit(cluster, "synchronous")
    found = fit(
        cluster, "synchronous", callbacks=[killing(cluster, {12: "worker:0", 27: "worker:2"}, [])], on_loss="replace"
    )
    assert [loss.workers for loss in found.losses] == [("worker:0",), ("worker:2",)]
    assert_same((found.params, found.opt_state), (whole.params, whole.opt_state))
    assert found.ledger == whole.ledger
    assert cluster.pids["worker:0"] in ready
    wait_until(lambda: cluster.spares == 2, "others are ready", 30)
    assert spares_of(cluster).isdisjoint({*cluster.pids.values()} - spares_of(cluster))
    assert len(cluster.pids) == REPLICAS + 2


@pytest.mark.filterwarnings(LOST)
def test_a_spare_that_took_a_place_is_replaced_in_its_turn(cluster: fm.Cluster) -> None:
    kills = killing(cluster, {10: "worker:1", 20: "worker:1", 30: "worker:1"}, [])
    found = fit(cluster, "synchronous", callbacks=[kills], on_loss="replace")
    assert [loss.workers for loss in found.losses] == 3 * [("worker:1",)]
    assert_same(found.params, fit(cluster, "synchronous").params)


def test_a_spare_that_is_lost_is_replaced(cluster: fm.Cluster) -> None:
    wait_until(lambda: cluster.spares == 2, "they have joined", 30)
    before = spares_of(cluster)
    os.kill(min(before), signal.SIGKILL)
    wait_until(lambda: len(spares_of(cluster) - before) == 1 and cluster.spares == 2, "another is ready", 30)
    assert len(cluster.devices) == REPLICAS


@pytest.mark.filterwarnings(LOST)
def test_more_losses_than_spares_start_processes(cluster: fm.Cluster) -> None:
    wait_until(lambda: cluster.spares == 2, "they have joined", 30)

    def kill(record: dict[str, Any]) -> None:
        if record["step"] == 15:
            for worker in ("worker:0", "worker:1", "worker:3"):
                os.kill(cluster.pids[worker], signal.SIGKILL)

    found = fit(cluster, "synchronous", callbacks=[kill], on_loss="replace")
    assert sorted(worker for loss in found.losses for worker in loss.workers) == ["worker:0", "worker:1", "worker:3"]
    assert_same(found.params, fit(cluster, "synchronous").params)
    assert len(cluster.devices) == REPLICAS


@pytest.mark.filterwarnings(LOST)
@pytest.mark.parametrize("spares", [0, 1])
@pytest.mark.parametrize("state", [None, ""])
def test_the_launcher_replaces_workers_for_drivers_that_have_not_started_them(spares: int, state: str | None) -> None:
    with closing(LaunchedCluster(workers=REPLICAS, spares=spares, state=state)) as launched:
        with fm.Cluster.connect(launched.address, launched.token) as cluster:
            assert cluster.spares == spares
            whole = fit(cluster, "synchronous")

            def kill(record: dict[str, Any]) -> None:
                if record["step"] in (10, 25):
                    os.kill(launched.pids[f"worker:{record['step'] % 4}"], signal.SIGKILL)

            found = fit(cluster, "synchronous", callbacks=[kill], on_loss="replace")
        assert [loss.workers for loss in found.losses] == [("worker:2",), ("worker:1",)]
        assert_same(found.params, whole.params)
        launched.end_worker("worker:2")  # by its name, whichever process that is by now
        wait_until(lambda: "worker:2" not in launched.pids, "it has ended")


@pytest.mark.filterwarnings(LOST)
def test_a_suspended_worker_is_killed_when_another_takes_its_place() -> None:
    with closing(LaunchedCluster(workers=1, spares=1, lost_after_s=1.0)) as launched:
        old = launched.pids["worker:0"]
        with fm.Cluster.connect(launched.address, launched.token) as cluster:
            os.kill(old, signal.SIGSTOP)
            wait_until(lambda: not cluster.devices, "it is lost")
            cluster.bring_back(["worker:0"])
            wait_until(lambda: launched.pids.get("worker:0", old) != old, "the launcher knows")
            wait_until(lambda: not os.path.exists(f"/proc/{old}"), "it is killed")


def end_and_start(cluster: fm.Cluster) -> None:
    cluster.end_worker("worker:1")
    wait_until(lambda: len(cluster.devices) == REPLICAS - 1, "it is lost", 30)
    cluster.start_worker("worker:1")


@pytest.mark.filterwarnings(LOST)
@pytest.mark.parametrize(
    "again", [lambda c: c.bring_back("worker:1", timeout_s=30), end_and_start], ids=["back", "end"]
)
def test_a_spare_whose_new_name_the_launcher_learns_late_is_ended_all_the_same(
    cluster: fm.Cluster, monkeypatch: pytest.MonkeyPatch, again: Callable[[fm.Cluster], None]
) -> None:
    names = {*(f"worker:{i}" for i in range(REPLICAS))}
    wait_until(
        lambda: cluster.spares == 2 and names <= {*cluster.pids}, "they have joined, and it knows their names", 30
    )
    late: list[tuple[str, str]] = []
    processes = cluster.launched.processes
    rename, kill = processes.rename, processes.kill
    monkeypatch.setattr(processes, "rename", lambda *names: late.append(names))
    end_and_start(cluster)
    wait_until(lambda: len(cluster.devices) == REPLICAS and late, "a spare has its place", 30)

    def kill_before_it_is_known(worker: str) -> bool:
        killed = kill(worker)
        while late:
            rename(*late.pop())
        return killed

    monkeypatch.setattr(processes, "kill", kill_before_it_is_known)
    monkeypatch.setattr(processes, "rename", rename)
    (spare, _), *_ = late
    before = cluster.pids[spare]
    again(cluster)
    wait_until(lambda: cluster.pids.get("worker:1", before) != before, "another process has its name", 30)
    wait_until(lambda: len(cluster.devices) == REPLICAS, "it is back", 30)


def test_a_spare_takes_the_name_of_a_process_that_has_not_started_yet() -> None:
    with closing(LaunchedCluster(workers=2, spares=1)) as launched:
        processes = launched.processes
        (spare,) = (name for name in launched.pids if name.startswith("spare"))
        pid, zygote = launched.pids[spare], psutil.Process(os.getpid()).children()[-1]
        assert not processes.kill("worker:0", pid)
        assert all(processes.kill(f"worker:{i}", launched.pids[f"worker:{i}"]) for i in range(2))
        zygote.suspend()  # so that what it reports comes after both requests
        launched.start_worker("worker:0")
        processes.rename(spare, "worker:0")
        launched.start_worker("worker:1")
        zygote.resume()
        wait_until(lambda: "worker:1" in launched.pids, "all reports before it have come", 30)
        assert launched.pids["worker:0"] == pid
        assert launched.end_worker("worker:0")
        assert not psutil.pid_exists(pid)


def test_bad_numbers_of_spares() -> None:
    with pytest.raises(ClusterError, match="spares"):
        fm.Cluster.local(workers=1, spares=-1)
    with pytest.raises(ClusterError, match="spares"):
        fm.Cluster.local(workers=1, spares=1.5)  # type: ignore[arg-type]
    with pytest.raises(ClusterError, match=r"start at most|1000001 workers need"):
        fm.Cluster.local(workers=1, spares=1_000_000)


def test_a_worker_that_is_not_back_in_time_is_named(cluster: fm.Cluster) -> None:
    words = r"^worker:1 (was lost, and no other took its place|did not end) within 0\.001 s"
    with pytest.raises(WorkerLostError, match=words):
        cluster.bring_back("worker:1", timeout_s=0.001)
    cluster.bring_back("worker:1")
