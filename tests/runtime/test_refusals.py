"""Messages with a bad field: their sender is told which, and if they are sent all the same, they fail and nothing else.

Every type of the wire is tried with every kind of bad value in every field, on real connections.
"""

from __future__ import annotations

import functools
import queue
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, settings
from msgspec import inspect

import flowml as fm
from flowml.errors import WorkerError
from flowml_runtime import wire
from flowml_runtime.transport.endpoint import ThreadHub
from flowml_runtime.transport.framing import FrameError, Outgoing, pack, unpack
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from flowml_runtime.transport.refusals import Refusal, UnsendableError

TOKEN = "t" * 32
WAIT_S = 30.0
X = np.arange(4, dtype=np.float32)
TYPES = {type_.__name__: type_ for type_ in wire.Wire.__args__}


def sample(info: inspect.Type) -> Any:
    """A value of a type, as small as can be."""
    match info:
        case inspect.StructType():
            return {f.encode_name: sample(f.type) for f in info.fields if f.required}
        case inspect.IntType() | inspect.FloatType():
            return 1
        case inspect.StrType():
            return "worker:0"
        case inspect.BoolType():
            return False
        case inspect.LiteralType():
            return info.values[0]
        case inspect.UnionType():
            return sample(info.types[0])
        case inspect.VarTupleType():
            return [sample(info.item_type)] if not isinstance(info.item_type, inspect.IntType) else []
        case inspect.TupleType():
            return [sample(t) for t in info.item_types]
        case _:
            raise NotImplementedError(info)


@functools.cache
def fields_of(name: str) -> dict[str, Any]:
    info = inspect.type_info(TYPES[name])
    assert isinstance(info, inspect.StructType)
    return {"type": name, **sample(info)}


BAD = st.sampled_from(
    [
        -1,
        2**53,
        2**63,
        1.5,
        float("nan"),
        float("inf"),
        None,
        True,
        "",
        "x" * 300,
        b"\xff",
        [],
        [[]],
        {},
        {"a": 1},
        [{"shape": [-1], "dtype": "float32"}],
        [{"shape": [2**40, 2**40], "dtype": "float32"}],
        [{"shape": [1], "dtype": "object"}],
        functools.reduce(lambda inner, _: [inner], range(500), []),
    ]
)


@st.composite
def bad_messages(draw: st.DrawFn) -> tuple[str, str, bytes]:
    """Type, field and encoding of a message that is wrong in that field."""
    name = draw(st.sampled_from(sorted(TYPES)))
    field = draw(st.sampled_from([f.encode_name for f in inspect.type_info(TYPES[name]).fields]))  # type: ignore[union-attr]
    header = msgspec.msgpack.encode({**fields_of(name), field: draw(BAD)})
    try:
        wire.decode(header)
    except (msgspec.ValidationError, ValueError, TypeError, KeyError, AttributeError):
        return name, field, header
    assume(False)
    raise AssertionError


def test_every_sample_is_a_message() -> None:
    for name in TYPES:
        assert type(wire.decode(msgspec.msgpack.encode(fields_of(name)))).__name__ == name


@settings(max_examples=400)
@given(bad=bad_messages())
def test_a_bad_field_is_refused_and_named(bad: tuple[str, str, bytes]) -> None:
    name, field, header = bad
    frame = struct.pack("<I", len(header)) + header
    try:
        refusal, _ = unpack(frame, None)
    except FrameError as error:
        assert field in ("specs", "plan_id", "step", "run") or "plan_id" not in fields_of(name), error
        return
    assert isinstance(refusal, Refusal)
    answer = refusal.answer("worker:1")
    assert f"worker:1 refuses a {name}: " in answer.error
    assert f"$.{field}" in answer.error
    assert answer.plan_id == "worker:0"
    assert wire.decode(wire.encode(answer)) == answer


class Inbox:
    def __init__(self, name: str, **options: Any) -> None:
        self.messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.losses: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.endpoint = GrpcEndpoint(name, TOKEN, **options)
        self.endpoint.start(lambda _, message, __: self.messages.put(message), lambda *lost: self.losses.put(str(lost)))


@pytest.fixture(scope="module", params=[True, False], ids=["shared memory", "grpc"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Inbox, Inbox]]:
    a, b = (Inbox(n, shared_memory=request.param) for n in ("a", "b"))
    a.endpoint.know({"b": b.endpoint.address})
    b.endpoint.know({"a": a.endpoint.address})
    yield a, b
    assert a.losses.empty() and b.losses.empty()
    a.endpoint.close()
    b.endpoint.close()


def across(x: Any) -> Any:
    with fm.layer("a"):
        h = x * 2
    with fm.layer("b"):
        return h + 1


def push(endpoint: GrpcEndpoint, peer: str, header: bytes) -> None:
    """Send what no sender of ours would."""
    frame = struct.pack("<I", len(header)) + header
    assert endpoint._stream(peer).put(Outgoing(frame, (), len(frame)))


@settings(max_examples=60)
@given(bad=bad_messages())
def test_a_refused_message_leaves_its_connection_alone(bad: tuple[str, str, bytes], pair: tuple[Inbox, Inbox]) -> None:
    name, field, header = bad
    assume("plan_id" in fields_of(name) and field not in ("plan_id", "step", "run", "specs"))
    a, b = pair
    push(a.endpoint, "b", header)
    a.endpoint.send("b", wire.Leave(worker="w"))
    answer = a.messages.get(timeout=WAIT_S)
    assert isinstance(answer, wire.StepFailed | wire.Failed)
    assert f"$.{field}" in answer.error
    assert isinstance(b.messages.get(timeout=WAIT_S), wire.Leave)


@pytest.mark.parametrize("value", [-1, 1.5, None, 2**53, 2**70, "a"])
@pytest.mark.parametrize("threads", [True, False])
def test_a_sender_is_told_which_field_is_wrong(value: Any, threads: bool, pair: tuple[Inbox, Inbox]) -> None:
    message = wire.StartTraining(
        plan_id="p", run=0, total_clocks=1, seed=value, shuffle=False, examples=1, source="fed"
    )
    hub = ThreadHub()
    endpoint = hub.endpoint("a") if threads else pair[0].endpoint
    other = hub.endpoint("b")
    with pytest.raises(UnsendableError, match=r"StartTraining cannot be sent: .*\$\.seed"):
        endpoint.send("b", message)
    other.close()
    if threads:
        endpoint.close()
        return
    pair[0].endpoint.send("b", wire.Leave(worker="w"))
    assert isinstance(pair[1].messages.get(timeout=WAIT_S), wire.Leave)


@pytest.mark.parametrize("transport", ["auto", "grpc"])
def test_a_refused_message_fails_its_call_and_the_next_one_works(transport: str) -> None:
    with fm.Cluster.local(workers=2, transport=transport) as cluster:
        plan = fm.dataflow(across, cluster=cluster, placement={"a": "worker:0", "b": "worker:1"}).plan(X)
        handle = cluster.session.load(plan)
        assert cluster.session.submit(handle, [X]).exception(timeout=WAIT_S) is None
        future = handle.steps.future(lambda fetched: fetched)
        step = handle.steps.begin(future)
        bad = {"type": "Value", "plan_id": handle.plan_id, "step": step, "kind": "feed", "index": -1, "device": "d"}
        push(cluster.endpoint, "worker:0", msgspec.msgpack.encode(bad))  # type: ignore[arg-type]
        with pytest.raises(WorkerError, match=r"worker:0 refuses a Value: .*\$\.index") as caught:
            future.result(timeout=WAIT_S)
        assert (caught.value.worker, caught.value.step) == ("worker:0", step)
        assert cluster.session.submit(handle, [X]).exception(timeout=WAIT_S) is None
        assert len(cluster.devices) == 2


def test_what_a_stranger_sends_first_has_to_be_right(pair: tuple[Inbox, Inbox]) -> None:
    frame = pack(wire.Leave(worker="w")).first
    with grpc.insecure_channel(pair[0].endpoint.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        from flowml_runtime.transport.grpc_streams import METHOD, TOKEN_KEY

        header = msgspec.msgpack.encode({"type": "Unload", "plan_id": "p", "specs": [], "run": -1})
        for first in (frame, struct.pack("<I", len(header)) + header):
            call = channel.stream_unary(METHOD).future(iter([first]), metadata=((TOKEN_KEY, TOKEN),))
            assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
