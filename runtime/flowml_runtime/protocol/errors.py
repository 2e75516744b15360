"""What a machine raises when it is told something that the protocol rules out."""

from __future__ import annotations

from flowml.errors import FlowmlError


class ProtocolError(FlowmlError):
    """A machine was told something that the protocol rules out; always a fault of the program, not of the user."""


class InvariantError(ProtocolError):
    """What must always hold of a machine does not. Raised by `validate`."""


class EarlyLimitError(ProtocolError):
    """Peers sent more for a run that has not begun here than a worker keeps."""


def ensure(condition: object, what: str) -> None:
    """An invariant of a machine. Raises InvariantError, also under `python -O`."""
    if not condition:
        raise InvariantError(f"a rule of the protocol does not hold: {what}; this is a fault of flowml")
