"""What waits for the thread of a fit: messages of workers, and the news that one is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Entry:
    """A message, and the time at which it arrived."""

    peer: str
    message: Any
    arrays: Sequence[Any]
    at: float


@dataclass(frozen=True)
class Lost:
    """A worker of the plan is lost."""

    reason: str
