"""A coordinator's log in etcd by TLS: both sides present certificates, and wrong files are refused in one line.

One test has a real etcd. The others have a server that answers as etcd's gateway does where nothing was written.
"""

from __future__ import annotations

import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import trustme

import flowml as fm
from flowml.errors import ClusterError
from flowml_runtime.launch.launched import LaunchedCluster
from flowml_runtime.membership.etcd import Etcd, Place
from flowml_runtime.transport.security import write_token
from tests.runtime.test_etcd import Server, needs_etcd

PEMS = ("ca", "cert", "key")


def files(folder: Path, authority: trustme.CA) -> dict[str, Path]:
    """PEM files of a certificate for this machine."""
    folder.mkdir()
    own, found = authority.issue_cert("127.0.0.1", "localhost"), {name: folder / f"{name}.pem" for name in PEMS}
    authority.cert_pem.write_to_path(found["ca"])
    own.cert_chain_pems[0].write_to_path(found["cert"])
    own.private_key_pem.write_to_path(found["key"])
    return found


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return files(tmp_path_factory.mktemp("tls") / "ours", trustme.CA())


class Empty(BaseHTTPRequestHandler):
    """Answers all that is asked."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def gateway(pems: Mapping[str, Path]) -> Iterator[str]:
    """The address of a server that wants a certificate of its authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pems["cert"], pems["key"])
    context.load_verify_locations(pems["ca"])
    context.verify_mode = ssl.CERT_REQUIRED

    class Quiet(HTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """A client that it refuses, or that refuses it, is not told of here."""

    with Quiet(("127.0.0.1", 0), Empty) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def place(host: str, pems: Mapping[str, Path], *names: str) -> Place:
    return Place.of(f"etcds://{host}/x?" + "&".join(f"{name}={pems[name]}" for name in names))


def test_both_sides_present_their_certificates(
    gateway: str, pems: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = files(tmp_path / "others", trustme.CA())
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(others["ca"]))  # for other connections
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    assert Etcd(place(gateway, pems, *PEMS)).get("y") == ""
    refused: list[tuple[Mapping[str, Path], tuple[str, ...]]] = [
        (others, PEMS),
        ({**pems, "ca": others["ca"]}, PEMS),
        ({**others, "ca": pems["ca"]}, PEMS),
        (pems, ("ca",)),
        (pems, ("cert", "key")),
    ]
    for given, names in refused:
        with pytest.raises(ClusterError, match=r"^etcd at etcds://\S+ cannot be used: [^\n]+; see whether it runs$"):
            Etcd(place(gateway, given, *names)).get("y")


def test_files_that_are_no_certificates_are_refused_before_anything_is_asked(
    pems: Mapping[str, Path], tmp_path: Path
) -> None:
    nothing, missing = tmp_path / "empty.pem", tmp_path / "missing.pem"
    nothing.touch()
    cases = {
        "ca": r"^TLS file \S+ does not hold an authority's certificate: [^\n]+$",
        "cert": r"^TLS files \S+ and \S+ are not a certificate and its key: [^\n]+$",
        "key": r"^TLS files \S+ and \S+ are not a certificate and its key: [^\n]+$",
    }
    for name, said in cases.items():
        with pytest.raises(ClusterError, match=said):
            Etcd(place("127.0.0.1:1", {**pems, name: nothing}, *PEMS))
        with pytest.raises(ClusterError, match=rf"^cannot read the TLS file {missing}: No such file or directory$"):
            Etcd(place("127.0.0.1:1", {**pems, name: missing}, *PEMS))
    with pytest.raises(ClusterError, match="are not a certificate and its key"):
        Etcd(place("127.0.0.1:1", {**pems, "key": files(tmp_path / "others", trustme.CA())["key"]}, *PEMS))


def test_the_command_refuses_them_in_one_line(tmp_path: Path) -> None:
    state = f"etcds://127.0.0.1:1/x?ca={tmp_path / 'missing.pem'}"
    write_token(tmp_path / "token", "token")
    command = [sys.executable, "-m", "flowml_tools.main", "coordinator", "--state", state]
    told = subprocess.run(
        [*command, "--token-file", str(tmp_path / "token")], capture_output=True, text=True, timeout=60, check=False
    )
    assert told.returncode != 0
    (line,) = told.stderr.strip().splitlines()
    assert line.endswith(f"cannot read the TLS file {tmp_path / 'missing.pem'}: No such file or directory")


@needs_etcd
def test_a_cluster_whose_log_is_in_an_etcd_that_wants_certificates(tmp_path: Path, pems: Mapping[str, Path]) -> None:
    with ExitStack() as stack:
        server = Server(tmp_path, pems)
        stack.callback(server.kill)
        launched = stack.enter_context(closing(LaunchedCluster(workers=2, state=server.place())))
        assert launched.address.startswith("etcds://")
        with closing(fm.Cluster.connect(launched.address, launched.token)) as cluster:
            assert len(cluster.devices) == 2
        with pytest.raises(ClusterError, match="cannot be used"):
            fm.Cluster.connect(launched.address.partition("&cert")[0], launched.token)
