"""The errors that state machines raise, most of them for events that break the protocol."""

from __future__ import annotations

from flowml.errors import DeadlineError, FlowmlError


class ProtocolError(FlowmlError):
    """An event breaks the protocol. This is a fault of the program, not of the user, except for a QuorumError."""


class InvariantError(ProtocolError):
    """An invariant of a machine does not hold. Raised by `validate`."""


class EarlyLimitError(ProtocolError):
    """Peers sent more for a run that has not begun here than a worker can keep."""


class QuorumError(ProtocolError, DeadlineError):
    """A clock cannot be completed by the replicas that are left, or has waited for them too long."""


class InboxLimitError(ProtocolError):
    """Peers sent more than the training thread of a worker has taken in, up to a limit."""


def ensure(condition: object, what: str) -> None:
    """Raise InvariantError unless `condition` holds, also under `python -O`."""
    if not condition:
        raise InvariantError(f"a rule of the protocol does not hold: {what}; this is a fault of flowml")
