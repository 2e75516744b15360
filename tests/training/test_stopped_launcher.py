"""A launcher is stopped or killed while its workers keep a fit without a driver: they write its last checkpoint first.

The disk is as slow as a test wants: workers complete a checkpoint under the lock of its directory, which the test has.
"""

from __future__ import annotations

import fcntl
import signal
import subprocess
import threading
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import flowml as fm
from flowml_runtime.driver.training.kept import KeptFit
from flowml_runtime.environment import checkpoints, locks
from flowml_runtime.environment.processes import saves
from flowml_runtime.launch import local
from flowml_runtime.launch.launched import LaunchedCluster
from tests.conftest import wait_until
from tests.training import test_killed_launcher
from tests.training.test_lost_and_replaced import REPLICAS, STEPS
from tests.training.test_orphans import command, lose_driver, written


@contextmanager
def held(directory: Path) -> Generator[None]:
    """No worker completes a checkpoint here meanwhile."""
    with (directory / locks.LOCK).open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)  # it names the lost driver, from which workers would take the lock
        yield


def orphan(launched: Any, path: Path) -> None:
    """Have a fit without a driver, as all workers know when this returns."""
    lose_driver(launched, "synchronous", path)
    with closing(fm.Cluster.connect(launched.address, launched.token)) as cluster:
        workers = [device.worker for device in cluster.devices]
        fit = checkpoints.identity(path, anew=False)
        KeptFit(cluster.session, fit, workers, 30.0, checkpoint=fm.Checkpoint(path)).release(over=False)
        KeptFit(cluster.session, "another", workers, 0.0).release(over=True)  # answered after all that was told before


def test_workers_whose_launcher_stops_write_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_begun, asked_again = threading.Event(), threading.Event()

    def saves_now(pid: int) -> bool:
        """All workers have the time to begin."""
        if not all_begun.is_set():
            return True
        asked_again.set()
        return saves(pid)

    with closing(LaunchedCluster(workers=REPLICAS)) as launched:
        pids = [*launched.pids.values()]
        orphan(launched, tmp_path)
        monkeypatch.setattr(local, "END_S", 1e-3)
        monkeypatch.setattr(local, "saves", saves_now)
        stopping = threading.Thread(target=launched.close)
        with held(tmp_path):
            stopping.start()
            wait_until(lambda: any(map(saves, pids)), "one writes", 30)
            wait_until(lambda: all(saves(pid) or not psutil.pid_exists(pid) for pid in pids), "all have begun", 30)
            all_begun.set()
            assert asked_again.wait(30), "the launcher waits for longer than for other workers"
        stopping.join(60)
        assert not any(map(psutil.pid_exists, pids))
    assert 0 < written(tmp_path) < STEPS


def test_workers_whose_launcher_is_killed_write_the_last_checkpoint(tmp_path: Path) -> None:
    with test_killed_launcher.launched(tmp_path) as (launcher, address):
        fit = tmp_path / "fit"
        about: Any = SimpleNamespace(address=address, token=(tmp_path / "token").read_text())
        processes = psutil.Process(launcher.pid).children(recursive=True)
        orphan(about, fit)
        with held(fit):
            launcher.send_signal(signal.SIGKILL)
            wait_until(lambda: any(saves(process.pid) for process in processes), "one writes", 30)
        assert psutil.wait_procs(processes, 30)[1] == [], "all processes end with their launcher"
    assert 0 < written(fit) < STEPS


@pytest.mark.parametrize("first", ["launcher", "driver"])
def test_workers_whose_launcher_and_driver_are_killed_at_once_write_the_last_checkpoint(
    tmp_path: Path, first: str
) -> None:
    with test_killed_launcher.launched(tmp_path) as (launcher, address):
        fit = tmp_path / "fit"
        about: Any = SimpleNamespace(address=address, token=(tmp_path / "token").read_text())
        processes = psutil.Process(launcher.pid).children(recursive=True)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(**command(about, "synchronous", fit), **pipes) as driver:
            assert driver.stdout is not None
            assert driver.stdout.readline() == b"is here\n"
            for process in (launcher, driver) if first == "launcher" else (driver, launcher):
                process.send_signal(signal.SIGKILL)
        assert psutil.wait_procs(processes, 30)[1] == [], "all processes end with their launcher"
    assert 0 < written(fit) < STEPS


def test_a_process_that_does_not_go_on_saves_nothing() -> None:
    assert not saves(psutil.Process().pid)
    assert not saves(2**22 + 1)
