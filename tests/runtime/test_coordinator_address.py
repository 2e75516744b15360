"""The address of a coordinator that is away: no other process gets it, or answers there in its place."""

from __future__ import annotations

import socket
import threading
from contextlib import closing
from pathlib import Path

import pytest

import flowml as fm
from flowml.errors import ClusterError
from flowml_runtime.launch.coordinating import CoordinatorProcess
from flowml_runtime.launch.launched import LaunchedCluster
from flowml_runtime.membership.coordinator import CoordinatorHost
from flowml_runtime.membership.log import RosterLog
from flowml_runtime.membership.member import Membership, passing_name
from flowml_runtime.transport import grpc_streams
from flowml_runtime.transport.addresses import reserve
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from flowml_runtime.transport.grpc_streams import StreamServer
from flowml_runtime.transport.security import split_address
from tests.conftest import wait_until

TOKEN = "t"
SHARED = pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "gRPC"])


def can_bind(port: int) -> bool:
    """Whether another process could listen at a port."""
    with socket.socket() as other:
        try:
            other.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def refusal(endpoint: GrpcEndpoint, address: str) -> str:
    """Why an endpoint cannot join the coordinator at an address."""
    with pytest.raises(ClusterError) as refused:
        Membership(endpoint, address, lambda *_: None, lambda *_: None).join("driver", timeout_s=10.0)
    return str(refused.value)


@SHARED
def test_a_peer_at_the_address_says_that_it_is_no_coordinator(shared: bool) -> None:
    """Its endpoint would take the request, and nobody would answer."""
    lost: list[str] = []
    endpoints = [GrpcEndpoint(name, TOKEN, shared_memory=shared) for name in ("worker:0", passing_name())]
    there, newcomer = endpoints
    try:
        there.start(lambda *_: None, lambda peer, _: lost.append(peer))
        text = refusal(newcomer, there.address)
        assert "worker:0 listens at this address, not coordinator; see whether its address is right" in text
        assert not lost
    finally:
        for endpoint in endpoints:
            endpoint.close()


@SHARED
def test_an_endpoint_at_the_address_does_not_join_itself(shared: bool) -> None:
    with closing(GrpcEndpoint(passing_name(), TOKEN, shared_memory=shared)) as endpoint:
        assert "listens at this address, not coordinator" in refusal(endpoint, endpoint.address)


def test_what_is_meant_for_another_is_not_for_the_coordinator(tmp_path: Path) -> None:
    with closing(CoordinatorHost("127.0.0.1:0", TOKEN)) as host, closing(GrpcEndpoint("worker:0", TOKEN)) as peer:
        reasons: list[str] = []
        peer.start(lambda *_: None, lambda _, reason: reasons.append(reason))
        peer.know({"worker:1": host.address})
        peer.way("worker:1")
        wait_until(lambda: reasons, "it is refused")
        assert reasons == ["coordinator listens at this address, not worker:1"]


def test_an_endpoint_gets_another_port_than_the_coordinator_had(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, made = free_port(), list[StreamServer]()

    class Server(StreamServer):
        """The first gets the port that the coordinator had, as the system might choose it."""

        def __init__(self, bind: str, *others: object) -> None:
            super().__init__(bind if made else f"127.0.0.1:{taken}", *others)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(grpc_streams, "StreamServer", Server)
    with closing(GrpcEndpoint("a", TOKEN, apart_from=f"127.0.0.1:{taken}")) as endpoint:
        assert len(made) == 2
        assert split_address(endpoint.address)[1] not in (0, taken)
        wait_until(lambda: can_bind(taken), "the coordinator can have its port again")


def test_a_reserved_port_is_only_for_those_who_know_of_it() -> None:
    held = reserve("127.0.0.1:0")
    assert held is not None
    with held:
        port = held.getsockname()[1]
        for _ in range(2):
            assert not can_bind(port)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
            with closing(GrpcEndpoint("a", TOKEN, bind=f"127.0.0.1:{port}")) as endpoint:
                endpoint.start(lambda *_: None, lambda *_: None)
                socket.create_connection(("127.0.0.1", port)).close()
                assert reserve(f"127.0.0.1:{port}") is None, "a process listens there"
    assert can_bind(port)


@pytest.mark.parametrize("state", ["", "folder"])
def test_no_other_gets_the_port_while_the_coordinator_is_away(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away, go_on, start = threading.Event(), threading.Event(), CoordinatorProcess._start  # pyright: ignore

    def held_up(self: CoordinatorProcess, deadline_s: float) -> None:
        if self.address:
            away.set()
            assert go_on.wait(30.0)
        start(self, deadline_s)

    monkeypatch.setattr(CoordinatorProcess, "_start", held_up)
    folder = tmp_path if state else state
    with closing(LaunchedCluster(workers=1, state=folder)) as launched:
        address = launched.address
        launched.end_coordinator()
        assert away.wait(30.0)
        assert not can_bind(split_address(address)[1])
        go_on.set()

        def is_up() -> bool:
            try:
                with closing(fm.Cluster.connect(address, launched.token)) as cluster:
                    return len(cluster.devices) == 1
            except ClusterError:
                return False

        wait_until(is_up, "it is there again, at its address")
    if state:
        with closing(LaunchedCluster(workers=1, state=folder)) as again:
            assert again.address == address, "the log says where it was"
            away.clear()
            again.end_coordinator()
            assert away.wait(30.0)
            assert not can_bind(split_address(address)[1])


def test_a_coordinator_that_cannot_use_its_log_does_not_listen(tmp_path: Path) -> None:
    """What connects to an endpoint that is never started waits for it in vain."""
    log, port = RosterLog(tmp_path), free_port()
    with closing(log):
        log._db.execute("DROP TABLE about")  # pyright: ignore
        with pytest.raises(ClusterError, match="no such table"):
            CoordinatorHost(f"127.0.0.1:{port}", TOKEN, log=log)
    assert can_bind(port)
