"""A member with which the connection broke is none for this peer, also while the coordinator is away."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from flowml_runtime import wire
from tests.conftest import wait_until
from tests.runtime.test_coordinator_restart import CPU, Peer, coordinator


def test_a_worker_that_dies_with_the_coordinator_is_lost_at_once_and_its_successor_is_there(tmp_path: Path) -> None:
    first = coordinator(tmp_path)
    with ExitStack() as stack:
        driver, one = Peer(first.address, stack), Peer(first.address, stack)
        driver.membership.join("driver")
        one.membership.join("worker:0", (CPU,))
        wait_until(lambda: driver.members == ["driver", "worker:0"], "it has joined")
        driver.endpoint.send("worker:0", wire.Leave(worker="worker:0"))
        first.close()
        one.endpoint.close()
        wait_until(lambda: driver.members == ["driver"], "it is lost, without a coordinator")
        assert [worker for worker, _ in driver.lost] == ["worker:0"]
        second = coordinator(tmp_path, first.address)
        stack.callback(second.close)
        successor = Peer(first.address, stack)
        successor.membership.join("worker:0", (CPU,))
        wait_until(lambda: driver.members == ["driver", "worker:0"], "another has its name")
        driver.endpoint.send("worker:0", wire.Leave(worker="worker:0"))
        assert [worker for worker, _ in driver.lost] == ["worker:0"]
        assert driver.ended == []


def test_a_loss_that_is_reported_late_is_not_that_of_the_successor(tmp_path: Path) -> None:
    host = coordinator(tmp_path)
    with ExitStack() as stack:
        stack.callback(host.close)
        driver, one = Peer(host.address, stack), Peer(host.address, stack)
        driver.membership.join("driver")
        one.membership.join("worker:0", (CPU,))
        one.membership.leave()
        Peer(host.address, stack).membership.join("worker:0", (CPU,))
        wait_until(lambda: driver.members == ["driver", "worker:0"], "another has its name")
        driver.membership._on_lost("worker:0", "its connection broke")  # pyright: ignore
        assert driver.members == ["driver", "worker:0"]
