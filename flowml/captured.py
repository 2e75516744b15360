"""Keeps out of plans what functions close over: large arrays, and the functions in Python that a task calls.

A plan names such an array by a digest of its bytes. The bytes go once to each device that reads them, and stay there
while a program uses them. A program for another shape, and another function that closes over the same array, send
nothing.

Workers of other processes get a copy of what a task calls. A worker in the process that has compiled the plan calls the
functions themselves, as jit does.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import xxhash

from flowml.arrays import ArraySpec
from flowml.callers import warn

LARGE_BYTES = 2**20
"""An array from this size on is not part of the plan."""

WARN_BYTES = 64 * 10**6

_MAX_DIGEST = 64


class Captured:
    """The bytes of a large array. A plan that was saved or sent has only their digest."""

    __slots__ = ("__weakref__", "data", "digest")

    def __init__(self, digest: str, data: np.ndarray[Any, Any] | None = None) -> None:
        self.digest = digest
        self.data = data

    @staticmethod
    def of(data: np.ndarray[Any, Any], *, copy: bool) -> Captured:
        """The capture of bytes, with a `copy` of them if their owner may change them. Equal ones are copied once."""
        digest = xxhash.xxh3_128_hexdigest(cast(Any, data))
        with _lock:
            found = _alive.get(digest)
            if found is None:
                found = _alive[digest] = Captured(digest, data.copy() if copy else data)
            return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Captured) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Captured({self.digest!r})"


class OwnCall:
    """What a task calls in Python, in the process that compiled it. A plan that was saved or sent has nothing here."""

    __slots__ = ("call",)

    def __init__(self, call: Any = None) -> None:
        self.call = call
        """A `Recipe`, or None."""

    def __eq__(self, other: object) -> bool:
        """Plans are equal if they say the same, and the pickled form of the call is part of what they say."""
        return isinstance(other, OwnCall)

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "OwnCall()"


_alive: weakref.WeakValueDictionary[str, Captured] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def to_plan(value: Any) -> str | None:
    """What msgspec writes for a value of a type that it does not know."""
    if isinstance(value, OwnCall):
        return None
    if not isinstance(value, Captured):
        raise NotImplementedError(f"a plan holds no {type(value).__name__}")
    return value.digest


def from_plan(kind: type, value: Any) -> Captured | OwnCall:
    """What msgspec has read for a type that it does not know."""
    if kind is OwnCall:
        if value is not None:
            raise ValueError("a plan holds no functions of a process")
        return OwnCall()
    if kind is not Captured or not isinstance(value, str) or len(value) > _MAX_DIGEST:
        raise ValueError("a closed-over array is named by a digest")
    return Captured(value)


def warn_of_size(name: str, captured: Iterable[ArraySpec]) -> None:
    """Warn if the large arrays that a function closes over are as large as those of which JAX's users should know."""
    specs = sorted(captured, key=lambda s: s.nbytes, reverse=True)
    total = sum(s.nbytes for s in specs)
    if total >= WARN_BYTES:
        first = specs[0]
        warn(
            f"{name} closes over {total:,} bytes of arrays (the largest: {first.dtype}{list(first.shape)}): each goes "
            "to the devices that read it, and stays there while the program lives; pass it as an argument if you do "
            "not want that"
        )
