"""Messages that are not what they should be, on either side.

A sender checks what it is about to send by the types that the receiver checks it with, so that what is wrong raises
where it was given. A receiver that cannot decode a message, but can read which work it belongs to and which arrays
follow, refuses that message alone: its answer fails that step, run or plan, and the connection goes on.
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
    wire.Published,
    wire.Collective,
    wire.Settled,
    wire.Report,
)
"""Many a second, and made of numbers that the runtime counts itself: their senders do not check them."""

checks_all = False
"""Whether senders check those too. For tests."""


class UnsendableError(FlowmlError, ValueError):
    """A message with a field that no receiver takes. Names the message and the field."""


class Refusal(msgspec.Struct, frozen=True):
    """Stands for a message that could not be decoded."""

    kind: str
    """The name of the message."""
    plan_id: str
    step: int | None
    """Of the step, or of the run's first one; None where the message is about the whole plan."""
    specs: wire.Specs
    reason: str

    def answer(self, receiver: str) -> wire.StepFailed | wire.Failed:
        """What tells its sender."""
        text = f"{receiver} refuses a {self.kind}: {self.reason}"
        if self.step is None:
            return wire.Failed(plan_id=self.plan_id, worker=receiver, node=self.kind, error=text)
        return wire.StepFailed(
            plan_id=self.plan_id, step=self.step, worker=receiver, node=self.kind, kind="error", error=text
        )


class _Readable(msgspec.Struct, frozen=True):
    """What a refusal needs to know of a message, whatever else is in it."""

    type: Annotated[str, msgspec.Meta(max_length=64)]
    plan_id: wire.Name
    step: wire.Count | None = None
    run: wire.Count | None = None
    specs: wire.Specs = ()


_decoder = msgspec.msgpack.Decoder(_Readable)


_ERRORS = (msgspec.MsgspecError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
"""The codec's own, and what looking up an unknown dtype raises."""


def encoded(message: wire.Wire) -> bytes:
    """The bytes of a message. Raises UnsendableError if it has none, or a receiver would refuse them."""
    header = b""
    try:
        header = wire.encode(message)
        if checks_all or not isinstance(message, _FREQUENT):
            wire.decode(header)
    except _ERRORS as error:
        where = "" if header else _culprit(message)  # the decoder says where by itself
        raise UnsendableError(f"{type(message).__name__} cannot be sent: {error}{where}") from None
    return header


def check(message: wire.Wire) -> None:
    """For a message that is handed over as it is: raises UnsendableError if it could not be sent."""
    if checks_all or not isinstance(message, _FREQUENT):
        encoded(message)


def _culprit(message: wire.Wire) -> str:
    """The first field that cannot be encoded."""
    for field in message.__struct_fields__:
        try:
            msgspec.msgpack.encode(getattr(message, field))
        except _ERRORS:
            return f" - at `$.{field}`"
    return ""


def salvage(header: memoryview, reason: Exception) -> Refusal | None:
    """What can be read of a message that could not be decoded for `reason`; None if that is too little."""
    try:
        read = _decoder.decode(header)
        if sum(s.nbytes for s in read.specs) > wire.MAX_PAYLOAD_BYTES:
            return None
    except _ERRORS:
        return None
    step = read.step if read.step is not None else read.run
    return Refusal(sendable(read.type), read.plan_id, step, read.specs, sendable(str(reason))[:1024])
