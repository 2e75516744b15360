"""A connection that does not come about, or that ends, has its cause named, and advice that helps."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme

import flowml as fm
from flowml.errors import ClusterError, WorkerLostError
from flowml_runtime import wire
from flowml_runtime.cluster import Cluster
from flowml_runtime.launch.launched import LaunchedCluster
from flowml_runtime.membership.coordinator import CoordinatorHost
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from flowml_runtime.transport.security import TLS, write_token
from tests.conftest import wait_until

TOKEN = "t" * 32
WAIT_S = 30.0
LONG_AGO = datetime.datetime(2020, 1, 1)


class Files:
    """Certificates of two authorities, sound and otherwise."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._authorities = {"ours": trustme.CA(), "theirs": trustme.CA()}
        for name, authority in self._authorities.items():
            authority.cert_pem.write_to_path(str(folder / f"{name}.pem"))
        self.good = self.issue("good")
        self.expired = self.issue("expired", not_before=LONG_AGO, not_after=LONG_AGO + datetime.timedelta(days=1))
        self.elsewhere = self.issue("elsewhere", host="192.0.2.1")
        self.foreign = self.issue("foreign", authority="theirs")
        self.foreigner = replace(self.foreign, ca=self.good.ca)
        """Trusts our authority, and is vouched for by the other."""

    def issue(self, name: str, *, host: str = "127.0.0.1", authority: str = "ours", **dates: Any) -> TLS:
        issued = self._authorities[authority].issue_cert(host, **dates)
        key, cert = self._folder / f"{name}.key", self._folder / f"{name}.crt"
        issued.private_key_pem.write_to_path(str(key))
        cert.write_bytes(b"".join(p.bytes() for p in issued.cert_chain_pems))
        return TLS(cert, key, self._folder / f"{authority}.pem")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize(
    ("server", "client", "cause"),
    [
        ("expired", "good", r"its certificate is not accepted: certificate has expired"),
        ("elsewhere", "good", r"its certificate is not accepted: .*not valid for '127\.0\.0\.1'"),
        ("good", "foreign", r"its certificate is not accepted: it was not signed by the authority in .*theirs\.pem"),
        ("good", "foreigner", r"it refuses our certificate .*foreign\.crt: it was not signed by the authority in "),
        ("good", "expired", r"it refuses our certificate .*expired\.crt: certificate has expired"),
        ("good", None, r"it speaks TLS and we do not; give tls="),
        (None, "good", r"it does not speak TLS and we do; start it with tls= too, or leave tls= out"),
    ],
)
def test_a_certificate_that_one_side_refuses_is_the_reason(
    server: str | None, client: str | None, cause: str, files: Files
) -> None:
    endpoint = GrpcEndpoint("coordinator", TOKEN, tls=server and getattr(files, server))
    endpoint.start(lambda *_: None, lambda *_: None)
    with pytest.raises(ClusterError, match=rf"cannot be joined: it cannot be reached: {cause}"):
        Cluster.connect(endpoint.address, token=TOKEN, tls=client and getattr(files, client), timeout_s=WAIT_S)
    endpoint.close()


def test_files_that_are_no_certificate_are_named(files: Files, tmp_path: Path) -> None:
    (tmp_path / "text.pem").write_text("not a certificate")
    for wrong, named in (
        (replace(files.good, cert=tmp_path / "text.pem"), "text.pem"),
        (replace(files.good, key=files.foreign.key), "foreign.key"),
        (replace(files.good, ca=tmp_path / "text.pem"), "text.pem"),
    ):
        with pytest.raises(ClusterError, match=rf"TLS files? .*{named}.* (are not a|an authority's) certificate"):
            GrpcEndpoint("a", TOKEN, tls=wrong)


def program(*arguments: str, stdin: int | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


def test_a_worker_without_its_coordinator_ends_with_a_status_and_one_line(tmp_path: Path) -> None:
    launched = LaunchedCluster(workers=1)
    write_token(tmp_path / "token", launched.token)
    command = ("-m", "flowml_tools.main", "worker", launched.address, "--token-file", str(tmp_path / "token"))
    with program(*command) as worker:
        assert worker.stdout is not None and worker.stderr is not None
        assert worker.stdout.readline().startswith("joined as worker:1")
        launched.close()
        assert worker.wait(WAIT_S) == 1
        lines = [line for line in worker.stderr.read().splitlines() if line.startswith("flowml:")]
        assert lines == ["flowml: worker:1 ends: its coordinator was lost: it closed the connection"]


def test_a_worker_that_is_started_before_its_coordinator_says_so_and_joins(tmp_path: Path) -> None:
    """As while a coordinator is started again: its members wait for it, and so does a newcomer."""
    write_token(tmp_path / "token", TOKEN)
    with closing(socket.socket()) as kept:
        kept.bind(("127.0.0.1", 0))  # nobody listens, and nobody else takes the port
        address = f"127.0.0.1:{kept.getsockname()[1]}"
        command = ("-m", "flowml_tools.main", "worker", address, "--token-file", str(tmp_path / "token"))
        worker = program(*command)
        assert worker.stdout is not None and worker.stderr is not None
        said = worker.stderr.readline()
    assert said == (
        f"flowml: the coordinator at {address} cannot be reached: Connection refused; trying again for up to 10 s\n"
    )
    with worker, closing(CoordinatorHost(address, TOKEN, works=lambda _: False)):
        assert worker.stdout.readline().startswith("joined as worker:0")
        worker.terminate()
        assert worker.wait(WAIT_S) == 0


LAUNCHER = """
import sys
from flowml_runtime.launch.launched import LaunchedCluster
cluster = LaunchedCluster(workers=2)
print(cluster.address, cluster.token, flush=True)
sys.stdin.readline()
"""


def across(x: Any) -> Any:
    with fm.layer("a"):
        h = x * 2
    with fm.layer("b"):
        return h + 1


def test_a_lost_coordinator_is_started_again_and_not_its_workers() -> None:
    with program("-c", LAUNCHER, stdin=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        address, token = launcher.stdout.readline().split()
        with Cluster.connect(address, token) as cluster:
            f = fm.dataflow(across, cluster=cluster, placement={"a": "worker:0", "b": "worker:1"})
            x = np.ones(3, np.float32)
            handle = cluster.session.load(f.plan(x))
            launcher.send_signal(signal.SIGKILL)
            wait_until(lambda: cluster.devices == (), "the coordinator is lost", WAIT_S)
            with pytest.raises(
                WorkerLostError,
                match=r"(the coordinator|worker:\d) was lost.*; start the cluster again with `flowml launch`",
            ):
                while True:  # workers end a moment after their coordinator
                    cluster.session.submit(handle, [x]).result(WAIT_S)


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "grpc"])
def test_whoever_counts_as_lost_is_told(shared: bool, no_leaks: Callable[[], Any]) -> None:
    """Of two living peers never only one goes on: also the one that has nothing to send learns that it is over."""
    with no_leaks():
        losses: dict[str, list[str]] = {"a": [], "b": []}
        a, b = (GrpcEndpoint(n, TOKEN, shared_memory=shared) for n in ("a", "b"))
        a.start(lambda *_: None, lambda _, reason: losses["a"].append(reason))
        arrived: list[wire.Wire] = []
        b.start(lambda _, message, __: arrived.append(message), lambda _, reason: losses["b"].append(reason))
        a.know({"b": b.address})
        b.know({"a": a.address})
        a.send("b", wire.Leave(worker="a"))
        wait_until(lambda: arrived, "the first message is there")
        b.lose("a", "it was silent")
        wait_until(lambda: losses["a"], "a knows that b takes it for lost")
        assert losses["b"] == ["it was silent"]
        assert shared is False or "a counts as lost here: it was silent" in losses["a"][0]
        a.close()
        b.close()


LIMITED = """
import resource
import flowml as fm
from flowml_runtime.launch import local
started = local.LocalWorkers.start
def start(self, *arguments):
    # no more descriptors than the zygote has: there is none for the handle of a worker
    while not self._ready:
        self._watcher.join(0.01)
    resource.prlimit(self._zygote.pid, resource.RLIMIT_NOFILE, (3, 3))
    started(self, *arguments)
local.LocalWorkers.start = start
try:
    fm.Cluster.local(workers=1, start_timeout_s=20)
except fm.ClusterError as error:
    print(error)
"""


def test_a_worker_that_the_system_does_not_allow_is_named_and_not_all() -> None:
    with program("-c", LIMITED) as owner:
        out, err = owner.communicate(timeout=2 * WAIT_S)
        assert out == "worker:0 did not start: its process cannot be started: Too many open files\n", err
