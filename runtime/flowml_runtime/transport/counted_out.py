"""What an endpoint says to a peer that it counts as lost, and how that peer finds it out.

A peer that was suspended or cut off sees only that its connections broke. A new connection is refused with the reason.
"""

from __future__ import annotations

from queue import Empty, SimpleQueue

from flowml_runtime.transport.grpc_streams import Stream
from flowml_runtime.transport.local_stream import UnixStream

ANSWER_S = 1.0
"""How long a peer may take to refuse a connection."""

_COUNTS, _REMEDY = " counts as lost here", "; start it again"


def counts_as_lost(peer: str, why: str = "") -> str:
    """The refusal of a peer."""
    return f"{peer}{_COUNTS}{': ' * bool(why)}{why}{_REMEDY}"


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
