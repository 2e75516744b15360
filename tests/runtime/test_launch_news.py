"""A launched cluster says in one line each what happens to its workers."""

from __future__ import annotations

import re

import flowml as fm
from flowml_runtime.launch.launched import LaunchedCluster
from flowml_runtime.launch.news import News
from flowml_runtime.wire import DeviceInfo, Member
from flowml_runtime.worker.leaving import HANDED_OVER
from tests.conftest import wait_until

DEVICES = (DeviceInfo(name="cpu:0", platform="cpu", memory_bytes=1, cores=1.0),)


def worker(name: str, life: int, *, leaving: bool = False, at: str = "") -> Member:
    return Member(worker=name, address=at or f"{name}/{life}", incarnation=life, devices=DEVICES, leaving=leaving)


def test_what_happens_is_told_once_and_with_its_reason() -> None:
    lines: list[str] = []
    news = News()
    spare, driver = (Member(worker=n, address=n, incarnation=1, devices=()) for n in ("spare-a", "driver-b"))
    news.on_members((worker("worker:0", 1),))
    news.tell(lines.append)
    news.on_members((worker("worker:0", 1), worker("worker:1", 1), spare, driver))
    news.on_losses({"driver-b": "it left"})
    news.on_losses({"worker:0": "its process 7 was killed by SIGKILL"})
    news.on_losses({"worker:0": "no heartbeat for 5 s"})
    news.on_losses({"spare-a": "it took the place of worker:0"})
    news.on_members((worker("worker:0", 2, at="spare-a"), worker("worker:1", 1, leaving=True)))
    news.on_losses({"worker:1": HANDED_OVER})
    news.on_members((worker("worker:0", 2, at="spare-a"),))
    news.on_losses({"worker:0": "no heartbeat for 5 s"})
    news.on_members((worker("worker:0", 3),))
    news.on_members((worker("worker:0", 3), worker("worker:1", 2)))
    assert lines == [
        "worker:1 has joined",
        "spare worker spare-a has joined and waits",
        "worker:0 is lost: its process 7 was killed by SIGKILL",
        "worker:0 is replaced by spare-a",
        "worker:1 has been given notice: it hands over, and leaves",
        "worker:1 has left",
        "worker:0 is lost: no heartbeat for 5 s",
        "worker:0 is replaced: another has joined under its name",
        "worker:1 has joined",
    ]


def test_a_launched_cluster_tells_of_lost_and_replaced_workers_and_of_its_coordinator() -> None:
    lines: list[str] = []

    def told(pattern: str) -> None:
        wait_until(lambda: any(re.match(pattern, line) for line in lines), f"{pattern!r} is told", 30)

    launched = LaunchedCluster(workers=1, spares=1, state="")
    try:
        launched.news.tell(lines.append)
        with fm.Cluster.connect(launched.address, launched.token) as cluster:
            launched.end_worker("worker:0")
            told("worker:0 is lost: .+")  # its process was killed, or its connection ended: whatever is heard first
            wait_until(lambda: not cluster.devices, "the driver knows of the loss")
            cluster.bring_back(["worker:0"])
            told(r"worker:0 is replaced by spare-\w+")
            told(r"spare worker spare-\w+ has joined and waits")
            cluster.end_worker("worker:0", notice=True)
            told("worker:0 has been given notice")
            told("worker:0 has left")
        launched.end_coordinator()
        told(r"the coordinator is lost, and another is started: its process \d+ was killed")
    finally:
        launched.close()
