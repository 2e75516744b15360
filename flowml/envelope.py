"""Adds a header to serialised bytes, with a mark, a format number and a checksum, and checks it.

The mark, the number and the checksum of the body together detect every changed bit and every missing byte.
"""

from __future__ import annotations

import hashlib

from flowml.errors import PlanError

_MARK = b"flowml-plan\x00"
_CHECKSUM_AT = len(_MARK) + 4
_BODY_AT = _CHECKSUM_AT + 16
_MAX_FORMAT = 2**16
"""A larger value is not a format number: format 1 has none, so its body begins at this position."""


def seal(body: bytes, version: int) -> bytes:
    """The body preceded by its mark, format number and checksum."""
    return b"".join((_MARK, version.to_bytes(4, "big"), _checksum(body), body))


def unseal(data: bytes, version: int, origin: str) -> memoryview:
    """The body, without a copy. Raises PlanError, which names `origin`, if `seal` did not make these bytes."""
    if not data.startswith(_MARK):
        found = f"it begins with {bytes(data[:8])!r}" if data else "it is empty"
        raise PlanError(f"{origin} is not a flowml plan: {found}; write one with plan.save()")
    number = int.from_bytes(data[len(_MARK) : _CHECKSUM_AT], "big")
    if number != version and len(data) >= _CHECKSUM_AT:
        found = 1 if number > _MAX_FORMAT else number
        raise PlanError(f"{origin} has plan format {found}, this flowml reads {version}; compile it again")
    body = memoryview(data)[_BODY_AT:]
    if data[_CHECKSUM_AT:_BODY_AT] != _checksum(body):
        raise PlanError(
            f"{origin} is damaged or cut short: its {len(data):,} bytes do not match their checksum; "
            "write it again with plan.save()"
        )
    return body


def _checksum(body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=_BODY_AT - _CHECKSUM_AT).digest()
