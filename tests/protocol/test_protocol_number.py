"""A change of the wire messages comes with another number of the protocol."""

from __future__ import annotations

import hashlib
import json

import msgspec

from flowml_runtime import wire
from flowml_runtime.wire.base import Message

KNOWN = (16, "33f2ecb900aa307a")
"""The number of the protocol, and the layout of the messages that it stands for."""


def layout() -> str:
    """A digest of the names, fields and types of all messages. The words about them are not in it."""
    kinds, waiting = set[type](), [Message]
    while waiting:
        kind = waiting.pop()
        kinds.add(kind)
        waiting += kind.__subclasses__()
    ours = sorted((k for k in kinds if k.__module__.startswith("flowml_runtime.wire")), key=lambda k: k.__qualname__)
    _, schemas = msgspec.json.schema_components([k for k in ours if k is not Message])
    return hashlib.sha256(json.dumps(_without_words(schemas), sort_keys=True).encode()).hexdigest()[:16]


def _without_words(schema: object) -> object:
    match schema:
        case dict():
            return {k: _without_words(v) for k, v in schema.items() if not (k == "description" and isinstance(v, str))}
        case list() | tuple():
            return [_without_words(v) for v in schema]
        case _:
            return schema


def test_other_messages_have_another_number() -> None:
    assert (wire.PROTOCOL, layout()) == KNOWN, "raise PROTOCOL in wire/base.py, and write both here"
