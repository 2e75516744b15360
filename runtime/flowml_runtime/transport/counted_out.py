"""Why an endpoint refuses a stream: it counts the peer as lost, or cannot understand it, or is not whom the peer means.

A peer that was suspended or cut off sees only that its connections broke. A new connection is refused with the reason.

A coordinator may be away, and meanwhile another process of the cluster may listen at its port. That one would take
requests and never answer them. So a stream says whom it is meant for. Other names than the coordinator's are not
compared: a peer may be called by a new name before it knows of it.
"""

from __future__ import annotations

from queue import Empty, SimpleQueue

import flowml
from flowml_runtime import wire
from flowml_runtime.protocol.membership import COORDINATOR
from flowml_runtime.transport.grpc_streams import Stream
from flowml_runtime.transport.local_stream import UnixStream

ANSWER_S = 3.0
"""How long a peer may take to refuse a connection. It is asked only after this process was suspended or cut off."""

_COUNTS, _REMEDY = " counts as lost here", "; start it again"


def counts_as_lost(peer: str, why: str = "") -> str:
    """The refusal of a peer."""
    return f"{peer}{_COUNTS}{': ' * bool(why)}{why}{_REMEDY}"


NOT_HERE = "listens at this address, not"
"""What a refusal says if the stream is meant for another."""


def why_not_taken(hello: wire.Hello, own: str) -> str:
    """Why the endpoint `own` takes no stream that begins with this, or ""."""
    if (hello.protocol, hello.version) != (wire.PROTOCOL, flowml.__version__):
        return (
            f"{hello.peer} runs flowml {hello.version} (protocol {hello.protocol}) and {own} flowml "
            f"{flowml.__version__} (protocol {wire.PROTOCOL}); install the same version on both"
        )
    return f"{own} {NOT_HERE} {hello.to}" if COORDINATOR in (hello.to, own) and hello.to != own else ""


def why_refused(stream: Stream | UnixStream, own: str) -> str:
    """Why the receiver of a new connection counts this end as lost, whose name is `own`; "" if it does not say so."""
    reasons: SimpleQueue[str] = SimpleQueue()
    stream.start(lambda _, reason: reasons.put(reason))
    try:
        refusal = reasons.get(timeout=ANSWER_S)
    except Empty:
        stream.abort()
        return ""
    return refusal.partition(f"{own}{_COUNTS}: ")[2].removesuffix(_REMEDY)
