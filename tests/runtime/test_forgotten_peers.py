"""What a peer sends after it was forgotten or lost is refused, although another has its name by then."""

from __future__ import annotations

import pytest

from flowml_runtime import wire
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from tests.runtime.test_transport import TOKEN, WAIT_S, Peer, try_send


@pytest.mark.parametrize("shared", [False, True], ids=["grpc", "shared memory"])
def test_a_forgotten_peer_that_still_speaks_is_not_taken_for_the_next_of_its_name(shared: bool) -> None:
    """The coordinator forgets a suspended worker, which may send when it goes on, before it notices anything."""
    endpoint = GrpcEndpoint("a", TOKEN, shared_memory=shared)
    first, second = (Peer(GrpcEndpoint(n, TOKEN, shared_memory=shared)).start() for n in ("b", "new"))
    a = Peer(endpoint).start()
    for peer in (first, second):
        peer.endpoint.know({"a": endpoint.address})
    first.endpoint.send("a", wire.Leave(worker="b"))
    assert a.received()[1].worker == "b"
    endpoint.forget("b")
    second.endpoint.send("a", wire.Leave(worker="new"))
    assert a.received()[0] == "new"
    endpoint.rename("new", "b")
    try_send(first.endpoint, "a", wire.Leave(worker="b", reason="it is the first that leaves"))
    assert "counts as lost here" in first.lost.get(timeout=WAIT_S)[1]
    second.endpoint.send("a", wire.Leave(worker="b", reason="it is the second"))
    assert a.received()[1].reason == "it is the second"
    assert a.lost.empty()
    for peer in (a, first, second):
        peer.endpoint.close()


def test_a_newcomer_refuses_the_earlier_life_of_a_member_that_it_never_knew() -> None:
    """A suspended worker that is lost and replaced goes on, and speaks first to one that has joined since."""
    older, a = Peer(GrpcEndpoint("b", TOKEN)).start(), Peer(GrpcEndpoint("a", TOKEN)).start()
    newer = Peer(GrpcEndpoint("b", TOKEN)).start()
    for peer in (older, newer):
        peer.endpoint.know({"a": a.endpoint.address})
    a.endpoint.know({"b": newer.endpoint.address}, {"b": newer.endpoint.incarnation})
    try_send(older.endpoint, "a", wire.Leave(worker="b", reason="it is the earlier"))
    assert "counts as lost here" in older.lost.get(timeout=WAIT_S)[1]
    newer.endpoint.send("a", wire.Leave(worker="b", reason="it is the later"))
    assert a.received()[1].reason == "it is the later"
    assert a.lost.empty()
    for peer in (a, older, newer):
        peer.endpoint.close()
