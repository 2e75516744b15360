"""Checks messages before they are sent, and refuses received ones that cannot be decoded.

A sender checks messages against the types that the receiver decodes them with, so that an invalid field raises where it
was given. If a receiver cannot decode a message, but can read which work it belongs to and which arrays follow, it
refuses only that message: its answer fails the step, run or plan, and the connection continues.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from flowml.errors import FlowmlError
from flowml_runtime import wire
from flowml_runtime.service import sendable

_FREQUENT = (
    wire.Value,
    wire.Taken,
    wire.Heartbeat,
    wire.Batch,
    wire.Ask,
    wire.Grant,
    wire.Begin,
    wire.Contribution,
    wire.Arrived,
    wire.Commit,
    wire.Computed,
    wire.Halt,
    wire.Published,
    wire.Collective,
    wire.Settled,
    wire.Report,
)
"""Messages that senders do not check: they are frequent, and the runtime itself computes their fields."""

checks_all = False
"""Whether senders check the frequent messages too. For tests."""


class UnsendableError(FlowmlError, ValueError):
    """A message has a field that receivers refuse. The text names the message and the field."""


class Refusal(msgspec.Struct, frozen=True):
    """The readable part of a message that could not be decoded."""

    kind: str
    """The name of the message."""
    plan_id: str
    step: int | None
    """The step, or the first step of the run; None if the message concerns the whole plan."""
    specs: wire.Specs
    reason: str

    def answer(self, receiver: str) -> wire.StepFailed | wire.Failed:
        """The message that tells its sender."""
        text = f"{receiver} refuses a {self.kind}: {self.reason}"
        if self.step is None:
            return wire.Failed(plan_id=self.plan_id, worker=receiver, node=self.kind, error=text)
        return wire.StepFailed(
            plan_id=self.plan_id, step=self.step, worker=receiver, node=self.kind, kind="error", error=text
        )


class _Readable(msgspec.Struct, frozen=True):
    """The fields of a message that a refusal needs. Other fields are ignored."""

    type: Annotated[str, msgspec.Meta(max_length=64)]
    plan_id: wire.Name
    step: wire.Count | None = None
    run: wire.Count | None = None
    specs: wire.Specs = ()


_decoder = msgspec.msgpack.Decoder(_Readable)


_ERRORS = (msgspec.MsgspecError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
"""Errors of the codec, and of the lookup of an unknown dtype."""


def encoded(message: wire.Wire) -> bytes:
    """The bytes of a message. Raises UnsendableError if it cannot be encoded, or a receiver would refuse it."""
    header = b""
    try:
        header = wire.encode(message)
        if checks_all or not isinstance(message, _FREQUENT):
            wire.decode(header)
    except _ERRORS as error:
        where = "" if header else _culprit(message)  # the decoder's error names the field
        raise UnsendableError(f"{type(message).__name__} cannot be sent: {error}{where}") from None
    return header


def check(message: wire.Wire) -> None:
    """For messages passed by reference: raises UnsendableError if the message could not be sent."""
    if checks_all or not isinstance(message, _FREQUENT):
        encoded(message)


def _culprit(message: wire.Wire) -> str:
    """Where the message cannot be encoded, for an error: its first such field."""
    for field in message.__struct_fields__:
        try:
            msgspec.msgpack.encode(getattr(message, field))
        except _ERRORS:
            return f" - at `$.{field}`"
    return ""


def salvage(header: memoryview, reason: Exception) -> Refusal | None:
    """The readable part of a message that could not be decoded for `reason`; None if that is too little."""
    try:
        read = _decoder.decode(header)
        if sum(s.nbytes for s in read.specs) > wire.MAX_PAYLOAD_BYTES:
            return None
    except _ERRORS:
        return None
    step = read.step if read.step is not None else read.run
    return Refusal(sendable(read.type), read.plan_id, step, read.specs, sendable(str(reason))[:1024])
