"""Gathers gradients between pushes: the sum over several steps for one part of a store.

A step's gradient is kept separately at first, because it may not be known yet whether the step counts. The replica's
machine says for each clock, in order, whether it counts (`adopt`) or not (`discard`):

* A step that does not push leaves its gradient here. If adopted, it joins the sum. If discarded, it is dropped.
* A step that pushes takes the sum and its own gradient. If adopted, both have arrived. If discarded, the push
  was late: the step's own gradient is lost, and the earlier sum goes with the next push.

Values are opaque. `add` returns the sum of two and must not change either, because one may have to be restored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from flowml_runtime.protocol.errors import ProtocolError

V = TypeVar("V")


class Sum(msgspec.Struct, Generic[V], frozen=True):
    """A sum of gradients and the sum of their weights."""

    value: V
    weight: int


class _Tried(msgspec.Struct, Generic[V], frozen=True):
    own: Sum[V] | None  # joins the sum if it counts
    kept: Sum[V] | None  # returns to the sum if it does not


class Accumulator(Generic[V]):
    """The sum of one part of one store on one replica."""

    def __init__(self, add: Callable[[V, V], V]) -> None:
        self._add = add
        self._sum: Sum[V] | None = None
        self._tried: dict[int, _Tried[V]] = {}

    @property
    def weight(self) -> int:
        """The weight of the gradients that wait for a push."""
        return self._sum.weight if self._sum else 0

    def kept(self) -> Sum[V] | None:
        """The sum, for a snapshot. The fates of all steps must be known."""
        if self._tried:
            raise ProtocolError(f"the fate of clock {min(self._tried)} is unknown")
        return self._sum

    def restore(self, total: Sum[V]) -> None:
        """Go on with the sum of a snapshot."""
        self._sum = total

    def gather(self, clock: int, value: V, weight: int = 1) -> None:
        """Keep the gradient of a step that does not push."""
        self._try(clock, _Tried(own=Sum(value, weight), kept=None))

    def push(self, clock: int, value: V, weight: int = 1) -> Sum[V]:
        """The sum that a pushing step sends: its gradient and all gathered ones."""
        self._try(clock, _Tried(own=None, kept=self._sum))
        total = self._join(self._sum, Sum(value, weight))
        self._sum = None
        return total

    def adopt(self, clock: int) -> None:
        """The step counts. No effect if it left nothing here."""
        tried = self._tried.pop(clock, None)
        if tried is not None and tried.own is not None:
            self._sum = self._join(self._sum, tried.own)

    def discard(self, clock: int) -> None:
        """The step does not count. No effect if it left nothing here."""
        tried = self._tried.pop(clock, None)
        if tried is not None and tried.kept is not None:
            self._sum = tried.kept if self._sum is None else self._join(tried.kept, self._sum)

    def _try(self, clock: int, tried: _Tried[V]) -> None:
        newest = next(reversed(self._tried), -1)
        if clock <= newest:
            raise ProtocolError(f"a gradient of clock {clock} after one of clock {newest}")
        self._tried[clock] = tried

    def _join(self, first: Sum[V] | None, second: Sum[V]) -> Sum[V]:
        if first is None:
            return second
        return Sum(self._add(first.value, second.value), first.weight + second.weight)
