"""Who counts as alive: a silent worker that is at work is waited for, one that is suspended or stuck is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from flowml.errors import ClusterError
from flowml_runtime import wire
from flowml_runtime.environment.processes import AtWork
from flowml_runtime.launch.local import LocalWorkers
from flowml_runtime.launch.starting import Starting
from flowml_runtime.membership.coordinator import CoordinatorHost
from flowml_runtime.membership.member import Membership, passing_name
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from tests.conftest import wait_until

TOKEN = "t"
CPU = wire.DeviceInfo(name="cpu:0", platform="cpu", memory_bytes=1, cores=1.0)


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        yield process
        process.kill()


def test_a_busy_process_works_and_a_suspended_or_sleeping_one_does_not(busy: subprocess.Popen[bytes]) -> None:
    works = AtWork()
    wait_until(lambda: works(busy.pid), "it works")
    busy.send_signal(signal.SIGSTOP)
    wait_until(lambda: not works(busy.pid), "it is suspended")
    busy.send_signal(signal.SIGCONT)
    wait_until(lambda: works(busy.pid), "it works again")
    with subprocess.Popen(["sleep", "60"]) as asleep:
        wait_until(lambda: not works(asleep.pid), "it sleeps")
        asleep.kill()
    assert not works(asleep.pid)


def test_a_silent_worker_is_lost_when_it_stops_working(monkeypatch: pytest.MonkeyPatch) -> None:
    at_work = [os.getpid()]
    starting = Starting()
    host = CoordinatorHost(
        "127.0.0.1:0",
        TOKEN,
        works=at_work.__contains__,
        heartbeat_s=0.1,
        timeout_s=0.5,
        on_members=starting.on_members,
    )
    endpoint = GrpcEndpoint(passing_name(), TOKEN)
    ended: list[str] = []
    monkeypatch.setattr(Membership, "_beat", lambda *_: None)
    silent = Membership(endpoint, host.address, lambda *_: None, lambda *_: None, on_end=ended.append)
    with closing(host), closing(endpoint):
        silent.join("worker:0", (CPU,))
        with pytest.raises(ClusterError, match="worker:1 did not start"):
            starting.wait_for(("worker:0", "worker:1"), 2.0, time.monotonic())  # four times the timeout: it stays
        assert ended == []
        at_work.clear()
        wait_until(lambda: ended, "it is lost")


def test_a_member_that_others_may_count_as_lost_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was suspended just before it sent a heartbeat is lost three heartbeats after that."""
    host = CoordinatorHost("127.0.0.1:0", TOKEN, timeout_s=1.0)
    endpoint = GrpcEndpoint(passing_name(), TOKEN)
    monkeypatch.setattr(Membership, "_beat", lambda *_: None)
    member = Membership(endpoint, host.address, lambda *_: None, lambda *_: None)
    assert not member.may_be_lost
    with closing(host), closing(endpoint):
        member.join("driver", ())
        now = time.monotonic()
        member._beaten_s = now
        assert not member.may_be_lost
        member._beaten_s = now - 0.75
        assert member.may_be_lost
        member.leave()


def test_workers_that_were_never_started_are_not_waited_for() -> None:
    workers = LocalWorkers(lambda *_: None)
    began = time.monotonic()
    workers.close()
    assert time.monotonic() - began < 3.0
