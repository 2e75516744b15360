"""What waits for the thread of a fit: messages of workers, and the news that one is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec


class Entry(msgspec.Struct, frozen=True):
    """A message, and the time at which it arrived."""

    peer: str
    message: Any
    arrays: Sequence[Any]
    at: float


class Lost(msgspec.Struct, frozen=True):
    """A worker of the plan is lost."""

    reason: str
