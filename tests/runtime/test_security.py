"""Who is kept out, and what hostile bytes can do: nothing."""

from __future__ import annotations

import io
import os
import pickle
import queue
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

import flowml
from flowml.errors import ClusterError
from flowml.plan import ArraySpec
from flowml_runtime import wire
from flowml_runtime.cluster import Cluster
from flowml_runtime.launch.launched import LaunchedCluster
from flowml_runtime.transport.framing import Assembler, FrameError, pack
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from flowml_runtime.transport.grpc_streams import METHOD, TOKEN_KEY
from flowml_runtime.transport.security import TLS, check_exposure, find_token, new_token, write_token
from flowml_runtime.worker.config import WorkerConfig

TOKEN = "the right token"
WAIT_S = 10.0
QUICK_S = 3.0
"""Most of it for a machine that is busy with other things."""
HELLO = wire.Hello(peer="b", incarnation=1, protocol=wire.PROTOCOL, version=flowml.__version__, to="a")


def framed(header: bytes, inline: bytes = b"") -> bytes:
    return struct.pack("<I", len(header)) + header + inline


def frame(message: wire.Wire) -> bytes:
    return framed(wire.encode(message))


@pytest.fixture
def listener() -> Iterator[GrpcEndpoint]:
    endpoint = GrpcEndpoint("a", TOKEN)
    endpoint.start(lambda *m: pytest.fail(f"taken in: {m}"), lambda *_: None)
    yield endpoint
    endpoint.close()


def push(endpoint: GrpcEndpoint, frames: list[bytes], token: str | None = TOKEN) -> tuple[grpc.StatusCode, str]:
    """What a peer gets that speaks gRPC itself."""
    metadata = () if token is None else ((TOKEN_KEY, token),)
    with grpc.insecure_channel(endpoint.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.stream_unary(METHOD).future(iter(frames), metadata=metadata, timeout=WAIT_S)
        return call.code(), call.details()


@pytest.mark.parametrize("token", [None, "", "the right tokem", "the right token "])
def test_without_the_token_a_stream_is_refused_before_its_body_is_read(
    listener: GrpcEndpoint, token: str | None
) -> None:
    code, _ = push(listener, [b"garbage"], token)
    assert code is grpc.StatusCode.UNAUTHENTICATED  # the same bytes with the token are INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        ([b"garbage"], "announces a header"),
        ([b""], "too short"),
        ([frame(wire.Leave(worker="b"))], "begins with Hello"),
        ([frame(msgspec.structs.replace(HELLO, protocol=99))], "protocol 99"),
        ([frame(msgspec.structs.replace(HELLO, version="0.0.7"))], "flowml 0.0.7"),
        ([frame(HELLO), framed(b"\x81\xa4type\xa5Spawn")], "no message of this version"),
        ([frame(HELLO), framed(wire.encode(wire.Leave(worker="b")), b"more")], "announces 0 bytes and holds 4"),
    ],
)
def test_what_no_flowml_sends_ends_the_stream_with_the_reason(
    listener: GrpcEndpoint, frames: list[bytes], said: str
) -> None:
    began = time.monotonic()
    code, details = push(listener, frames)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert said in details
    assert time.monotonic() - began < QUICK_S


def test_a_wrong_token_is_named_as_the_reason() -> None:
    launched = GrpcEndpoint("coordinator", TOKEN)
    launched.start(lambda *_: None, lambda *_: None)
    with pytest.raises(ClusterError, match="refuses the token"):
        Cluster.connect(launched.address, token="guess")
    launched.close()


SPECS = st.builds(
    lambda shape, dtype: {"shape": shape, "dtype": dtype},
    st.lists(st.integers(-5, 5) | st.sampled_from([2**40, 2**62, -(2**40)]), max_size=70),
    st.sampled_from(["float32", "uint8", "object", "O", "key<fry>", "key<x>", "V9", "U99", "f4,f4", "__doc__", ""]),
)
HOSTILE = st.one_of(
    st.builds(
        lambda specs, **fields: msgspec.msgpack.encode({"type": "Value", "specs": specs, **fields}),
        st.lists(SPECS, max_size=4),
        plan_id=st.just("p") | st.text(max_size=300),
        step=st.integers(-1, 2**63),
        kind=st.sampled_from(["edge", "x"]),
        index=st.just(0),
        device=st.just("d"),
    ),
    st.integers(1, 2000).map(lambda depth: b"\x91" * depth + b"\xc0"),
    st.binary(max_size=300),
    st.just(wire.encode(wire.Leave(worker="w", reason="r" * 100))),
)


@settings(max_examples=300)
@given(
    header=HOSTILE,
    inline=st.binary(max_size=64),
    claimed=st.none() | st.integers(0, 2**32 - 1),
    cut=st.none() | st.integers(0, 200),
    pieces=st.lists(st.binary(max_size=64), max_size=3),
)
def test_no_bytes_get_past_the_assembler(
    header: bytes, inline: bytes, claimed: int | None, cut: int | None, pieces: list[bytes]
) -> None:
    whole = framed(header, inline)
    if claimed is not None:
        whole = struct.pack("<I", claimed) + whole[4:]
    assembler = Assembler()
    began = time.monotonic()
    with suppress(FrameError):
        for piece in [whole[:cut], *pieces]:
            assembler.feed(piece)
    assert time.monotonic() - began < QUICK_S


@settings(max_examples=200)
@given(data=st.data())
def test_flipped_and_missing_bytes_of_a_true_message_do_no_harm(data: st.DataObject) -> None:
    message = wire.LoadPlan(plan_id="p", peers=("worker:0",), specs=(ArraySpec((3,), "uint8"),))
    true = bytearray(next(pack(message, [np.arange(3, dtype=np.uint8)]).frames()))
    position = data.draw(st.integers(0, len(true) - 1))
    true[position] ^= data.draw(st.integers(1, 255))
    with suppress(FrameError):
        Assembler().feed(bytes(true[: data.draw(st.integers(0, len(true)))]))


class Canary:
    """Does something that can be seen, when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, int]]:
        return os.open, (self.path, os.O_CREAT)


def test_a_pickle_in_any_place_is_not_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Canary(str(canary)))
    os.close(pickle.load(io.BytesIO(bomb)))
    assert canary.exists()  # so the pickle works
    canary.unlink()

    taken: queue.SimpleQueue[Any] = queue.SimpleQueue()
    endpoint = GrpcEndpoint("a", TOKEN)
    endpoint.start(lambda *m: taken.put(m), lambda *_: None)
    as_array = wire.LoadPlan(plan_id="p", specs=(ArraySpec((len(bomb),), "uint8"),))
    code, _ = push(endpoint, [frame(HELLO), framed(wire.encode(as_array), bomb)])
    assert code is grpc.StatusCode.OK
    assert taken.get(timeout=WAIT_S)[2][0].tobytes() == bomb
    as_object = msgspec.msgpack.encode({"type": "LoadPlan", "plan_id": "p", "specs": [{"shape": [1], "dtype": "O"}]})
    for frames in ([bomb], [frame(HELLO), bomb], [frame(HELLO), framed(bomb)], [frame(HELLO), framed(as_object, bomb)]):
        assert push(endpoint, frames)[0] is grpc.StatusCode.INVALID_ARGUMENT
    endpoint.close()
    assert not canary.exists()


@pytest.mark.parametrize("bind", ["0.0.0.0:0", "10.1.2.3:80", "[::]:0", "example.org:1"])
def test_nothing_listens_or_connects_beyond_the_machine_without_tls(bind: str) -> None:
    with pytest.raises(ClusterError, match=r"refusing to listen on .* without TLS"):
        GrpcEndpoint("a", TOKEN, bind=bind)
    with pytest.raises(ClusterError, match=r"refusing to listen on .* without TLS"):
        LaunchedCluster(bind=bind, token=TOKEN)
    with pytest.raises(ClusterError, match=r"refusing to connect to .* without TLS"):
        Cluster.connect(bind, token=TOKEN)
    with pytest.raises(ClusterError, match="without a token"):
        GrpcEndpoint("a", "")
    check_exposure("127.0.0.1:0", None, TOKEN, "listen on")
    check_exposure("[::1]:0", None, TOKEN, "listen on")


class Authority:
    """A certificate authority with files for the peers that it vouches for."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._ca = trustme.CA()
        self._ca.cert_pem.write_to_path(str(folder / "ca.pem"))

    def files(self, host: str = "127.0.0.1") -> TLS:
        issued = self._ca.issue_cert(host)
        key, cert = self._folder / f"{host}.key", self._folder / f"{host}.pem"
        issued.private_key_pem.write_to_path(str(key))
        cert.write_bytes(b"".join(p.bytes() for p in issued.cert_chain_pems))
        return TLS(cert, key, self._folder / "ca.pem")


def meet(server: TLS, client: TLS | None) -> str:
    """What became of a peer's attempt to send to another: "arrived", or why not."""
    outcome: queue.SimpleQueue[str] = queue.SimpleQueue()
    a, b = GrpcEndpoint("a", TOKEN, tls=server), GrpcEndpoint("b", TOKEN, tls=client)
    a.start(lambda *_: outcome.put("arrived"), lambda *_: None)
    b.start(lambda *_: None, lambda _, reason: outcome.put(reason))
    b.know({"a": a.address})
    try:
        b.send("a", wire.Leave(worker="b"))
    except flowml.WorkerLostError as error:
        return str(error)
    finally:
        said = outcome.get(timeout=WAIT_S)
        a.close()
        b.close()
    return said


def test_tls_lets_in_those_of_one_authority_and_nobody_else(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    good = ours.files()
    assert meet(good, good) == "arrived"
    assert meet(good, theirs.files()) != "arrived"
    assert meet(good, None) != "arrived"
    assert meet(ours.files("localhost"), good) != "arrived"  # its certificate does not name the address
    with_their_ca = TLS(theirs.files().cert, theirs.files().key, good.ca)
    assert meet(good, with_their_ca) != "arrived"


def test_tls_without_a_certificate_of_ones_own_is_refused(tmp_path: Path) -> None:
    files = Authority(tmp_path / "ours").files()
    endpoint = GrpcEndpoint("a", TOKEN, tls=files)
    endpoint.start(lambda *m: pytest.fail(f"taken in: {m}"), lambda *_: None)
    credentials = grpc.ssl_channel_credentials(files.ca.read_bytes())
    with grpc.secure_channel(endpoint.address, credentials, options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.stream_unary(METHOD).future(iter([frame(HELLO)]), metadata=((TOKEN_KEY, TOKEN),))
        assert call.code() is grpc.StatusCode.UNAVAILABLE
    endpoint.close()


def test_tls_files_are_named_when_they_are_missing(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"nowhere\.pem"):
        GrpcEndpoint("a", TOKEN, tls=TLS(Path("nowhere.pem"), Path("k"), Path("c")))
    with pytest.raises(ClusterError, match="TLS takes cert, key and ca"):
        TLS.of({"cert": "c", "key": "k"})
    assert TLS.of({}) is None


def test_tokens_live_in_files_that_only_their_owner_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, token = tmp_path / "token", new_token()
    write_token(path, token)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ClusterError, match="exists already"):
        write_token(path, token)
    assert find_token(token) == find_token(path) == find_token(str(path)) == token
    with pytest.raises(ClusterError, match="FLOWML_TOKEN_FILE"):
        find_token(None)
    monkeypatch.setenv("FLOWML_TOKEN_FILE", str(path))
    assert find_token(None) == token
    path.chmod(0o644)
    with pytest.raises(ClusterError, match="chmod 600"):
        find_token(path)
    with pytest.raises(ClusterError, match="cannot read the token file"):
        find_token(tmp_path / "none")


def test_a_token_is_not_in_what_is_printed() -> None:
    assert "secret" not in repr(WorkerConfig(coordinator="127.0.0.1:1", token="secret"))


def test_who_cannot_be_reached_by_others_does_not_listen_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_route(*_: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", no_route)
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    with pytest.raises(ClusterError, match=r"cannot listen on .* is not known.* listen on the address itself"):
        LaunchedCluster(bind="0.0.0.0:0", tls=Authority(tmp_path / "ours").files(), token=TOKEN)
