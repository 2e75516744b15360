"""A coordinator whose log is in etcd: one holder at a time, fenced writes, and another that goes on elsewhere.

With a real etcd, which Debian's package brings: `apt-get install etcd-server`.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest

import flowml as fm
from flowml.errors import ClusterError
from flowml_runtime.launch.launched import LaunchedCluster
from flowml_runtime.membership import etcd_log
from flowml_runtime.membership.coordinator import CoordinatorHost
from flowml_runtime.membership.etcd import Etcd, Place
from flowml_runtime.membership.etcd_log import EtcdLog, address_of
from flowml_runtime.protocol.roster import Joined, Left, Record
from tests.conftest import wait_until
from tests.runtime.test_coordinator_restart import CPU, TOKEN, Peer, member
from tests.training.reference import BATCH, data, mlp, mlp_loss

PROGRAM = shutil.which("etcd")
LEASE_S = 1
needs_etcd = pytest.mark.skipif(PROGRAM is None, reason="etcd is not installed: apt-get install etcd-server")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A process of etcd, which can be suspended, killed and started again with what it has on disk."""

    def __init__(self, folder: Path, pems: Mapping[str, Path] | None = None) -> None:
        """With PEM files it is reached by TLS, and wants certificates of the same authority."""
        self._folder = folder
        self._pems = pems or {}
        client, peer = free_port(), free_port()
        self.host = f"127.0.0.1:{client}"
        self._urls = [f"http{'s' if pems else ''}://{self.host}", f"http://127.0.0.1:{peer}"]
        self.start()

    def start(self) -> None:
        client, peer = self._urls
        own = ["--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer]
        rest = ["--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}", "--unsafe-no-fsync"]
        if self._pems:
            ca, cert, key = (str(self._pems[name]) for name in ("ca", "cert", "key"))
            rest += ["--client-cert-auth", "--trusted-ca-file", ca, "--cert-file", cert, "--key-file", key]
        assert PROGRAM is not None
        with (self._folder / "log").open("ab") as log:
            where = ["--data-dir", str(self._folder / "data"), "--logger", "zap"]
            self._process = subprocess.Popen([PROGRAM, *where, *own, *rest], stdout=log, stderr=log)
        wait_until(self._answers, "etcd answers", 30)

    def _answers(self) -> bool:
        try:
            Etcd(Place.of(self._at("x"))).get("y")
        except ClusterError:
            return False
        return True

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def _at(self, prefix: str) -> str:
        files = "&".join(f"{name}={path}" for name, path in self._pems.items())
        return f"etcds://{self.host}/{prefix}?{files}" if files else f"etcd://{self.host}/{prefix}"

    def place(self) -> str:
        return self._at(f"flowml/{uuid.uuid4().hex}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("etcd"))
    yield server
    server.kill()


@needs_etcd
def test_a_log_in_etcd_gives_the_same_roster_again(server: Server) -> None:
    place = server.place()
    records: list[Record] = [Joined(member(0)), Joined(member(1)), Left(("worker:0",))]
    with closing(EtcdLog(place, LEASE_S)) as log:
        log.append(records[:2])
        log.append(records[2:])
        assert log.next_incarnation(1000) == 1000
    with closing(EtcdLog(place, LEASE_S)) as log:
        assert log.roster.epoch == 3
        assert list(log.roster.members) == ["worker:1"]
        assert log.roster.lives == {"worker:0": 1, "worker:1": 1}
        assert log.next_incarnation(7) == 1001
        log.note("format", "2")
    with pytest.raises(ClusterError, match="has format 2, and this flowml reads format 1"):
        EtcdLog(place, LEASE_S)


@needs_etcd
def test_a_long_log_in_etcd_is_replaced_by_one_record(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_log, "MOST_RECORDS", 10)
    place = server.place()
    with closing(EtcdLog(place, LEASE_S)) as log:
        log.append([Joined(member(0, life)) for life in range(120)])  # more than one transaction
    for _ in range(2):
        with closing(EtcdLog(place, LEASE_S)) as log:
            assert (log.roster.epoch, log.roster.lives) == (120, {"worker:0": 119})
    assert len(Etcd(Place.of(place)).read("records/", below=True)) == 1


@needs_etcd
def test_one_process_has_the_log_and_the_next_one_waits(server: Server) -> None:
    place, found = server.place(), list[EtcdLog]()
    first = EtcdLog(place, LEASE_S)
    waiting = threading.Thread(target=lambda: found.append(EtcdLog(place, LEASE_S)))
    waiting.start()
    waiting.join(3 * LEASE_S)
    assert found == [], "the lease is kept for as long as the first has the log"
    first.append([Joined(member(0))])
    first.close()
    waiting.join(30)
    with closing(found[0]) as second:
        assert list(second.roster.members) == ["worker:0"]


@needs_etcd
def test_a_holder_that_was_cut_off_can_write_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    place, lost = server.place(), list[str]()
    first = EtcdLog(place, LEASE_S)
    stuck, on = threading.Event(), threading.Event()

    def keep(lease: int) -> bool:
        """As in a process that is suspended, and wakes up when it is allowed to."""
        stuck.set()
        on.wait(60)
        return Etcd.keep(etcd, lease)

    etcd = first._etcd  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(etcd, "keep", keep)
    first.watch(lost.append)
    assert stuck.wait(30)
    with closing(EtcdLog(place, LEASE_S)) as second:
        for write in (lambda: first.append([Joined(member(0))]), lambda: first.note("address", "here")):
            with pytest.raises(ClusterError, match="belongs to another coordinator by now"):
                write()
        assert second.about("address") == ""
        on.set()
        wait_until(lambda: lost, "it hears that it has lost the log", 30)
        assert "lease in etcd is over" in lost[0]
        second.append([Joined(member(1))])
        first.close()
        second.note("address", "there")  # the first one has not removed what is not its own any more


@needs_etcd
def test_members_go_to_a_coordinator_elsewhere(server: Server) -> None:
    """The first coordinator is as if suspended: its connections are there, and its lease is over."""
    place = server.place()

    def coordinator() -> CoordinatorHost:
        log = EtcdLog(place, LEASE_S)
        host = CoordinatorHost("127.0.0.1:0", TOKEN, log=log, works=lambda _: False, heartbeat_s=0.1, timeout_s=2.0)
        log.note("at", host.address)
        return host

    first = coordinator()
    with ExitStack() as stack:
        driver, one = (Peer(place, stack) for _ in range(2))
        driver.membership.join("driver")
        assert one.membership.join("", (CPU,)) == "worker:0"
        wait_until(lambda: len(driver.members) == 2, "all have joined")
        assert address_of(place) == first.address
        log = first._log  # pyright: ignore[reportPrivateUsage]
        assert isinstance(log, EtcdLog)
        log._over.set()  # pyright: ignore[reportPrivateUsage]  # it keeps the lease no more
        second = coordinator()
        stack.callback(second.close)
        assert second.address != first.address
        newcomer = Peer(place, stack)
        assert newcomer.membership.join("", (CPU,)) == "worker:1"
        wait_until(lambda: len(driver.members) == len(one.members) == 3, "they have gone to the other one", 30)
        assert (driver.lost, one.lost, driver.ended, one.ended) == ([], [], [], [])
        first.close()


@needs_etcd
def test_a_fit_goes_on_while_coordinators_are_killed(server: Server) -> None:
    with closing(LaunchedCluster(workers=2, state=server.place())) as launched:
        with closing(fm.Cluster.connect(launched.address, launched.token)) as cluster:

            def kill(record: dict[str, int]) -> None:
                if record["step"] == 10:
                    pid = launched.processes.coordinator
                    os.kill(pid, signal.SIGKILL)
                    wait_until(lambda: launched.processes.coordinator not in (0, pid), "another is there", 30)

            trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=cluster, replicas=2)
            found = trainer.fit(mlp(), data(), batch_size=BATCH, steps=20, callbacks=[kill], progress=False)
            assert found.losses == ()
            assert jnp.isfinite(found.history[-1]["loss"])
        with closing(fm.Cluster.connect(launched.address, launched.token)) as again:
            assert len(again.devices) == 2


@needs_etcd
def test_an_etcd_that_is_away_for_longer_than_the_lease_ends_the_coordinator(tmp_path: Path) -> None:
    own = Server(tmp_path)
    try:
        lost: list[str] = []
        place = own.place()
        log = EtcdLog(place, LEASE_S)
        log.append([Joined(member(0))])
        log.watch(lost.append)
        own.kill()
        wait_until(lambda: lost, "it cannot know any more whether another has the log", 30)
        with pytest.raises(ClusterError, match=r"cannot be used: .*see whether it runs"):
            log.append([Joined(member(1))])
        own.start()
        log.close()
        with closing(EtcdLog(place, LEASE_S)) as after:
            assert list(after.roster.members) == ["worker:0"]
    finally:
        own.kill()


@needs_etcd
def test_the_next_host_is_asked_if_the_first_does_not_answer(server: Server) -> None:
    place = Place.of(f"etcd://127.0.0.1:{free_port()},{server.host}/x")
    etcd = Etcd(place)
    assert etcd.commit(("holder", 0), [("a", b"1")])
    assert etcd.get("a") == "1"


@needs_etcd
def test_the_command_takes_a_place_in_etcd(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flowml_tools.main", "coordinator", "--state", server.place()]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode != 0
    assert "etcd keeps no token; give --token-file" in told.stderr


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("etcd://127.0.0.1:2379", "is no place in etcd; give one such as etcd://127.0.0.1:2379/my-cluster"),
        ("etcd://127.0.0.1/x", "give HOST:PORT"),
        ("etcd://10.0.0.1:2379/x", "is reached without TLS; give etcds://"),
        ("etcds://10.0.0.1:2379/x?certificate=f", "'certificate' is no option; give ca, cert and key"),
        ("etcds://10.0.0.1:2379/x?ca=", "ca= is given without a file; give one file"),
        ("etcds://10.0.0.1:2379/x?ca=a&ca=b", "ca= is given 2 times; give one file"),
        ("etcds://10.0.0.1:2379/x?cert=a&ca=b", "a certificate and its key go together"),
        ("etcd://127.0.0.1:2379/x?ca=a", "etcd:// is without TLS, so ca= has no effect; write etcds://"),
    ],
)
def test_places_that_make_no_sense_are_refused(address: str, reason: str) -> None:
    with pytest.raises(ClusterError, match=re.escape(reason)):
        Place.of(address)


def test_without_the_client_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "etcd3gw.client", None)
    with pytest.raises(ClusterError, match=r"pip install 'flowml\[etcd\]'"):
        fm.Cluster.connect("etcd://127.0.0.1:2379/x", TOKEN)
