"""A peer may come before the coordinator's word of it: what it asks is answered all the same."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from flowml.errors import WorkerLostError
from flowml_runtime import wire
from flowml_runtime.transport import grpc_endpoint
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from tests.conftest import wait_until
from tests.runtime.test_transport import TOKEN, WAIT_S, Peer


@pytest.fixture
def unknown() -> Iterator[tuple[Peer, Peer]]:
    """A peer, and one that it has a message from before it knows where that one is."""
    with ExitStack() as stack:
        ours, theirs = (Peer(GrpcEndpoint(name, TOKEN)) for name in "ab")
        for peer in (ours, theirs):
            stack.callback(peer.endpoint.close)
            peer.start()
        theirs.endpoint.know({"a": ours.endpoint.address})
        theirs.endpoint.send("a", wire.Released(plan_id="p", over=True))
        assert ours.received()[0] == "b"
        yield ours, theirs


def answering(ours: Peer) -> queue.SimpleQueue[str]:
    """Answer from another thread. Returns, when that waits, a queue that gets "" or the reason of a failure."""
    outcome: queue.SimpleQueue[str] = queue.SimpleQueue()

    def answer() -> None:
        try:
            ours.endpoint.send("b", wire.Released(plan_id="answer", over=True))
        except WorkerLostError as error:
            outcome.put(str(error))
        else:
            outcome.put("")

    threading.Thread(target=answer, daemon=True).start()
    connecting = ours.endpoint._peers["b"].connecting  # type: ignore[attr-defined]
    wait_until(lambda: connecting.locked() or not outcome.empty(), "it waits")
    return outcome


def test_an_answer_waits_until_the_place_of_its_peer_is_known(unknown: tuple[Peer, Peer]) -> None:
    ours, theirs = unknown
    outcome = answering(ours)
    assert outcome.empty()
    ours.endpoint.know({"b": theirs.endpoint.address})
    assert theirs.received()[1].plan_id == "answer"
    assert outcome.get(timeout=WAIT_S) == ""


def test_an_answer_to_a_peer_that_ends_waits_no_longer(unknown: tuple[Peer, Peer]) -> None:
    ours, theirs = unknown
    outcome = answering(ours)
    assert outcome.empty()
    theirs.endpoint.close()
    assert outcome.get(timeout=grpc_endpoint.INTRODUCED_S / 2) == "cannot send to b: it closed the connection"


def test_a_peer_of_which_nobody_tells_is_not_reachable(
    unknown: tuple[Peer, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_endpoint, "INTRODUCED_S", 0.01)
    assert "it has not joined, or has left" in answering(unknown[0]).get(timeout=WAIT_S)
