"""Defines what all messages have in common: their base types, the types of their fields, and limits."""

from __future__ import annotations

from typing import Annotated

import msgspec

from flowml.arrays import ArraySpec
from flowml.numbers import MOST

PROTOCOL = 16
"""Version of these messages. Peers of another version are refused at their Hello."""

MAX_HEADER_BYTES = 16 * 2**20
MAX_ARRAYS = 65536
MAX_PAYLOAD_BYTES = 2**36
MAX_PROBE_BYTES = 16 * 2**20
DEADLINE_S = 300.0
"""How long a wait of one worker for another may last, unless the driver says otherwise."""
MAX_DEADLINE_S = 1e9
"""The longest deadline. The longest wait of a thread (`threading.TIMEOUT_MAX`) is not much longer."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=2**20)]
Count = Annotated[int, msgspec.Meta(ge=0, le=MOST)]
Specs = Annotated[tuple[ArraySpec, ...], msgspec.Meta(max_length=MAX_ARRAYS)]


class Part(msgspec.Struct, frozen=True):
    """An array in a file: where its bytes begin, and their checksum."""

    spec: ArraySpec
    offset: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    checksum: Name


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True, gc=False):
    """Base of the wire messages. `specs` describes the arrays that follow the header, in order.

    Messages are values, of which no cycle can be made, so the collector of cyclic garbage need not know them."""

    specs: Specs = ()


class PlanMessage(Message, frozen=True, kw_only=True):
    """Base of the messages about a loaded plan, or about the trace or the fit of that name."""

    plan_id: Name
