"""A suspended worker is late at first, then lost; when it wakes up, nothing that it still sends changes anything."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import flowml as fm
from flowml.errors import ClusterError
from flowml_runtime.launch.launched import LaunchedCluster
from tests.conftest import wait_until
from tests.training.reference import assert_same
from tests.training.test_lost_and_replaced import EXACT, REPLICAS, STEPS, fit

HOME, NO_HOME = "worker:1", "worker:3"
"""The model has three layers, so three workers hold one each."""
LOST_AFTER_S = 1.0
LATE_S = 3.0
LONG = 400
"""The steps of a fit that is longer than that."""
SUSPENDED_AT, WOKEN_AT = 10, 25

Callback = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def cluster() -> Iterator[fm.Cluster]:
    with closing(fm.Cluster.local(workers=REPLICAS, lost_after_s=LOST_AFTER_S)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def patient() -> Iterator[fm.Cluster]:
    """One that waits long for a suspended worker."""
    with closing(fm.Cluster.local(workers=REPLICAS, lost_after_s=60)) as cluster:
        yield cluster


@contextmanager
def suspending(pid: int, *, wakes: bool = True) -> Generator[Callback]:
    """A callback that suspends a process at one step, and at a later one wakes it and waits for its end."""
    process = psutil.Process(pid)

    def callback(record: dict[str, Any]) -> None:
        if record["step"] == SUSPENDED_AT:
            process.suspend()
        elif record["step"] == WOKEN_AT and wakes:
            assert _runs(process), "it was not ended meanwhile"
            process.resume()
            wait_until(lambda: not _runs(process), "the worker that woke up has ended by itself")

    try:
        yield callback
    finally:
        if _runs(process):
            process.resume()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("policy", "snapshots"),
    [("quorum", "none"), ("quorum", "in memory"), ("quorum", "written"), ("asynchronous", "written")],
)
def test_others_go_on_without_a_late_one(patient: fm.Cluster, policy: str, snapshots: str, tmp_path: Path) -> None:
    """Also if a snapshot falls due meanwhile, which is withdrawn after a second."""
    times: list[float] = []
    woken: list[float] = []
    options: dict[str, Any] = {"on_loss": "replace"} if snapshots == "in memory" else {}
    pid = patient.pids[NO_HOME]

    def wake() -> None:
        woken.append(time.monotonic())
        os.kill(pid, signal.SIGCONT)

    waking = threading.Timer(LATE_S, wake)

    def callback(record: dict[str, Any]) -> None:
        times.append(time.monotonic())
        if record["step"] == SUSPENDED_AT:
            os.kill(pid, signal.SIGSTOP)
            waking.start()
        if not woken:
            time.sleep(0.01)  # else the fit would end before the process goes on

    path = tmp_path if snapshots == "written" else None
    found = fit(patient, policy, path, callbacks=[callback], steps=LONG, **options)
    assert found.losses == ()
    assert times[-1] > woken[0]
    meanwhile = sum(woken[0] - LATE_S < t < woken[0] for t in times)
    assert meanwhile > 20, "the others went on"
    ledger = found.ledger
    if policy == "quorum":
        assert ledger.replicas[3].used <= LONG - meanwhile + 2, "it had begun two steps at most"
    assert ledger.used + ledger.dropped + ledger.folded + ledger.unseen == LONG * REPLICAS
    if path is not None:
        newest = sorted(int(p.name.removeprefix("step-")) for p in path.iterdir() if p.name.startswith("step-"))
        assert newest[-1] == LONG
        assert len(newest) == 3, "snapshots were taken again when it went on"


@pytest.mark.parametrize(
    ("policy", "victim"),
    [("synchronous", HOME), ("synchronous", NO_HOME), ("quorum", HOME), ("asynchronous", HOME), ("DiLoCo", HOME)],
)
def test_after_too_long_it_is_replaced(cluster: fm.Cluster, policy: str, victim: str) -> None:
    pid = cluster.pids[victim]
    with suspending(pid, wakes=False) as callback, pytest.warns(fm.FlowmlWarning, match="no heartbeat for 1 s"):
        found = fit(cluster, policy, callbacks=[callback], on_loss="replace")
    assert [loss.workers for loss in found.losses] == [(victim,)]
    assert cluster.pids[victim] != pid
    assert found.ledger.outstanding == 0
    if policy in EXACT:
        whole = fit(cluster, policy)
        assert_same((found.params, found.opt_state), (whole.params, whole.opt_state))
        assert found.ledger == whole.ledger


@pytest.mark.parametrize("policy", ["synchronous", "asynchronous"])
def test_a_replica_that_is_left_out_changes_nothing_when_it_wakes_up(cluster: fm.Cluster, policy: str) -> None:
    try:
        with suspending(cluster.pids[HOME]) as callback, pytest.warns(fm.FlowmlWarning, match="was left out"):
            found = fit(cluster, policy, callbacks=[callback], on_loss="shrink")
    finally:
        cluster.bring_back(cluster.lost)
    [loss] = found.losses
    left = STEPS - loss.resumed_at
    assert found.ledger.outstanding == 0
    if policy == "synchronous":
        assert found.ledger.used == REPLICAS * loss.resumed_at + (REPLICAS - 1) * left
        assert {record["replicas"] for record in found.history[loss.resumed_at :]} == {REPLICAS - 1}
    else:
        assert found.ledger.used == REPLICAS * STEPS


@pytest.mark.parametrize("transport", ["auto", "grpc"])
def test_two_processes_of_one_name(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others start a worker again whose first process is only suspended. Both run until the end of the fit."""
    monkeypatch.setattr(LaunchedCluster, "_on_restart", lambda *_: None)  # the launcher, which would kill the first
    with (
        closing(LaunchedCluster(workers=REPLICAS, lost_after_s=LOST_AFTER_S, transport=transport)) as launched,
        fm.Cluster.connect(launched.address, launched.token, transport=transport) as cluster,
    ):
        whole = fit(cluster, "synchronous")
        old = launched.pids[HOME]

        def supervise() -> None:
            wait_until(lambda: HOME not in {d.worker for d in cluster.devices}, "the loss is known", 60)
            launched.start_worker(HOME)

        supervisor = threading.Thread(target=supervise)
        supervisor.start()
        with suspending(old) as callback, pytest.warns(fm.FlowmlWarning, match="no heartbeat for 1 s"):
            found = fit(cluster, "synchronous", callbacks=[callback], on_loss="replace")
        supervisor.join(60)
        assert [loss.workers for loss in found.losses] == [(HOME,)]
        assert launched.pids[HOME] != old, "the end of the old process is not that of the new one"
        assert_same((found.params, found.opt_state), (whole.params, whole.opt_state))
        assert found.ledger == whole.ledger


def test_a_time_that_cannot_be() -> None:
    with pytest.raises(ClusterError, match="lost_after_s=0"):
        fm.Cluster.local(workers=1, lost_after_s=0)
    with pytest.raises(ClusterError, match=r"lost_after_s=1e-06: .* give at least 0.1 seconds"):
        fm.Cluster.local(workers=1, lost_after_s=1e-6)
