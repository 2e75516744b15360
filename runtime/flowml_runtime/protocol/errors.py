"""What a machine raises when it is told something that the protocol rules out."""

from __future__ import annotations

from flowml.errors import FlowmlError


class ProtocolError(FlowmlError):
    """A machine was told something that the protocol rules out; always a fault of the program, not of the user."""
