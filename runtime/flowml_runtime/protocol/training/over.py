"""What became of the work items that do not come back, a byte each: a long fit on many replicas has many millions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Literal

State = Literal["waiting", "granted", "used", "dropped", "folded"]
"""Of a work item."""

_STATES: tuple[State | None, ...] = (None, "used", "dropped", "folded")
_CODES = {state: code for code, state in enumerate(_STATES)}


class ItemsOver:
    """Sequence number of an item -> its fate, for those that do not come back."""

    def __init__(self, runs: Iterable[tuple[int, int, State]] = ()) -> None:
        """`runs` as of `runs`."""
        self._codes = bytearray()
        self._count = 0
        for first, count, state in runs:
            self._reach(first + count)
            self._codes[first : first + count] = bytes((_CODES[state],)) * count
            self._count += count

    def __len__(self) -> int:
        return self._count

    def __contains__(self, sequence: int) -> bool:
        return self.get(sequence) is not None

    def __setitem__(self, sequence: int, state: State) -> None:
        if sequence >= len(self._codes):
            self._reach(sequence + 1)
        self._count += not self._codes[sequence]
        self._codes[sequence] = _CODES[state]

    def __delitem__(self, sequence: int) -> None:
        self._count -= bool(self._codes[sequence])
        self._codes[sequence] = 0

    def get(self, sequence: int) -> State | None:
        """The fate of an item; None if it may still come back."""
        return _STATES[self._codes[sequence]] if sequence < len(self._codes) else None

    def within(self, first: int, end: int) -> int:
        """How many of the items from `first` until before `end` are over."""
        end = min(end, len(self._codes))
        return max(end - first, 0) - self._codes.count(0, first, end)

    def runs(self) -> Iterator[tuple[int, int, State]]:
        """All of them in order, as runs of items with one fate: (first, number, fate)."""
        first = 0
        for code, group in groupby(self._codes):
            count, state = sum(1 for _ in group), _STATES[code]
            if state is not None:
                yield first, count, state
            first += count

    def _reach(self, length: int) -> None:
        """Make room for so many items."""
        if length > len(self._codes):
            self._codes.extend(bytes(max(length - len(self._codes), 1024)))
