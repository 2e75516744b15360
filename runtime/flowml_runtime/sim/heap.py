"""The virtual clock of a simulation: events in the order of their times, and of their scheduling where times are equal.

An event is a function call. Its *label* is a number that says what happens where. The trace hash covers the time and
the label of every event, so two runs with one hash did the same things at the same times. It is a sum over events, so
that several processes can each hash their own.

Few events wait in a heap. A heap of many reaches for memory all over. So `_Queue` then keeps only the next ones in a
heap, and the others by spans of time, each of which it sorts when its turn comes.

A clock stops at the end of its *window*, `until`, and then calls `meet`, which may move that end. So several clocks
agree (`parallel`). If others are not `ready` for that, its owner may do something else. A clock that is alone has a
window without end.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from heapq import heappop, heappush
from operator import length_hint
from typing import Any, Final

from flowml.sim.draws import hashed

Act = Callable[..., None]
_Event = tuple[int, Act, tuple[Any, ...]]
"""The label, the function and its arguments."""
_Group = list[_Event]
"""Events of one time, in order. A broadcast is one entry of the queue."""
_Entry = tuple[float, int, _Group]
"""The time of a group, its number, and its events."""

_FLUSH = 8192
"""Events that are gathered before they are hashed."""
_WORD = 2**64 - 1
_MANY: Final = 4096
"""So many entries are divided among spans. With fewer a heap is as fast."""
_SPAN: Final = 512
"""About the entries of a span: so many that the span itself costs little, so few that a cache of memory holds them."""
_LAST: Final = 2.0**52
"""The number of the span of all that is very late. A float holds each number up to it."""


class _Queue:
    """Entries in the order of their times, and of their numbers where times are equal."""

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        """Entries that came for a time before `_edge`."""
        self._sorted: list[_Entry] = []
        """What is left of the span before `_edge`. The next entry is the last."""
        self._rate = 0.0
        """The spans of a second; 0 while all is in the heap."""
        self._edge = 1.0
        """The number of the first span that is not sorted yet."""
        self._spans: dict[float, list[_Entry]] = {}
        """The entries of these spans, by number."""
        self._numbers: list[float] = []
        """The numbers of these spans, as a heap."""
        self._most = _MANY
        """If more entries are in the heap, or in a span, spans of another length may be better."""
        self._most_spans = _MANY
        """The same if there are more of them."""

    def put(self, entry: _Entry) -> None:
        place = entry[0] * self._rate
        if place < self._edge:
            heappush(self._heap, entry)
            if len(self._heap) > self._most:
                self._divide()
            return
        number = place // 1.0 if place < _LAST else _LAST
        span = self._spans.get(number)
        if span is not None:
            span.append(entry)
            return
        self._spans[number] = [entry]
        heappush(self._numbers, number)
        if len(self._numbers) > self._most_spans:
            self._divide()

    @property
    def head(self) -> float:
        """The time of the next entry; infinite if there is none."""
        while not self._heap and not self._sorted:
            if not self._numbers:
                return math.inf
            self._sort_next()
        if not self._sorted:
            return self._heap[0][0]
        when = self._sorted[-1][0]
        return min(when, self._heap[0][0]) if self._heap else when

    def take(self) -> _Entry:
        """Remove the next entry. `head` has said that there is one."""
        heap, ordered = self._heap, self._sorted
        if heap and ordered:
            when, number, _ = heap[0]
            other, its_number, _ = ordered[-1]
            return ordered.pop() if other < when or (other == when and its_number < number) else heappop(heap)
        return ordered.pop() if ordered else heappop(heap)

    def clear(self) -> None:
        for entries in (self._heap, self._sorted, self._numbers, self._spans):
            entries.clear()
        self._rate, self._edge, self._most, self._most_spans = 0.0, 1.0, _MANY, _MANY

    def _sort_next(self) -> None:
        number = heappop(self._numbers)
        self._sorted = span = self._spans.pop(number)
        span.sort(reverse=True)
        self._edge = number + 1.0 if number < _LAST else math.inf
        if not self._numbers and len(span) < _SPAN:  # few are left
            self._heap, self._sorted = span[::-1], []
            self._rate, self._edge, self._most, self._most_spans = 0.0, 1.0, _MANY, _MANY
        elif len(span) > self._most:
            self._divide()

    def _divide(self) -> None:
        """Choose the length of spans by the entries there are, and divide these among them."""
        entries = [*self._heap, *self._sorted, *(entry for span in self._spans.values() for entry in span)]
        self.clear()
        entries.sort()
        count = len(entries)
        times = [entry[0] for entry in entries[:: count // 1024] if entry[0] < math.inf]
        first, last = (times[0], times[-1]) if times else (0.0, 0.0)
        half = times[len(times) * 3 // 4] - times[len(times) // 4] if times else 0.0
        length = max(half * 2 * _SPAN, (last - first) * 8) / count  # few far entries do not make all spans long
        if last < length * _LAST:
            self._rate = 1 / length
            self._edge = first * self._rate // 1.0 + 1.0
        self._most = self._most_spans = count
        for entry in entries:
            self.put(entry)
        longest = max([len(self._heap), *map(len, self._spans.values())])
        self._most = max(_MANY, count // 32, longest * 2)  # what cannot be divided is not tried again and again
        self._most_spans = max(_MANY, len(self._numbers) * 2)


class Clock:
    """Virtual time. Not thread-safe."""

    def __init__(self) -> None:
        self.now = 0.0
        """The time of the event that happens now, in seconds."""
        self.until = math.inf
        """The end of the window. Events at this time or later wait."""
        self.meet: Callable[[], bool] = lambda: False
        """Called at the end of the window. Returns whether there is another one."""
        self.ready: Callable[[], bool] = lambda: True
        """Whether to call it, and not to let `go_on` return before."""
        self.tidy: Callable[[], None] = lambda: None
        """Called after many events."""
        self._queue = _Queue()
        self._scheduled = 0
        self._last = -1.0
        self._open: _Group = []
        """The group that was scheduled last, for the time `_last`. A next event of that time joins it."""
        self._group: _Group = []
        """The group that happens now."""
        self._rest = iter(self._group)
        """The events of it that have not happened. A group may grow meanwhile, and they with it."""
        self._labels: list[int] = []
        """The labels of the events that are not hashed yet."""
        self._times: list[float] = []
        """The times of these events, each once for all events of its group."""
        self._numbers: list[int] = []
        """The numbers of these groups."""
        self._firsts: list[int] = []
        """The place in `_labels` of the first event of each of these times."""
        self._most: float = _FLUSH
        """How many events are gathered within a window."""
        self._hashed = 0
        self._sums = [0, 0]

    @property
    def events(self) -> int:
        """The number of events so far."""
        return self._hashed + len(self._labels)

    def at(self, when: float, label: int, act: Act, *args: Any) -> None:
        """Call `act(*args)` at the time `when`, which is not before now."""
        self.put(when, label, act, args)

    def put(self, when: float, label: int, act: Act, args: tuple[Any, ...]) -> None:
        """As `at`, with the arguments in a tuple."""
        if when == self._last:
            self._open.append((label, act, args))
            return
        if not when >= self.now:
            raise ValueError(f"an event at {when} s is scheduled at {self.now} s; a delay is at least 0 and no NaN")
        self._last = when
        self._open = group = [(label, act, args)]
        self._scheduled = number = self._scheduled + 1
        self._queue.put((when, number, group))

    def numbered(self) -> int:
        """The next number, for an event that another clock has. No later event joins a group that is before it."""
        self._last = -1.0
        self._scheduled = number = self._scheduled + 1
        return number

    def put_all(self, when: float, number: int, group: _Group) -> None:
        """Let a group of events happen at the time `when`. Those of one time happen in the order of their numbers."""
        self._queue.put((when, number, group))

    @property
    def place(self) -> tuple[float, int]:
        """The time of the event that happens now, and the number of its group."""
        return self.now, self._numbers[-1] if self._numbers else 0

    def clear(self) -> None:
        """Forget all that has not happened."""
        self._queue.clear()
        self._open, self._rest = [], iter(())

    @property
    def head(self) -> float:
        """The time of the next event; infinite if there is none."""
        return self._queue.head

    def open(self, until: float, number: int) -> None:
        """Begin the next window, which ends at `until`. What is scheduled in it gets numbers from `number` on."""
        if len(self._labels) >= _FLUSH:
            self._flush()
        self._most = math.inf  # a part of a window may have to be forgotten
        self.until, self._scheduled, self._last = until, number, -1.0

    def after(self, delay: float, label: int, act: Act, *args: Any) -> None:
        """Call `act(*args)` in `delay` seconds."""
        self.put(self.now + delay, label, act, args)

    def go_on(self, idle: Callable[[], bool]) -> bool:
        """Let events happen as long as `idle` and, at the end of a window, `ready` return True. Returns False if there
        are no more events before."""
        if not idle():
            return True
        labels, queue = self._labels, self._queue
        while True:
            for label, act, args in self._rest:
                labels.append(label)
                act(*args)
                if not idle():
                    return True
            if self._open is self._group:
                self._last = -1.0  # none joins a group whose end has come
            if queue.head >= self.until:
                if not self.ready():
                    return True
                if not self.meet():
                    return False
                continue
            if len(labels) >= self._most:
                self._flush()
            self.now, number, self._group = queue.take()
            self._rest = iter(self._group)
            self._times.append(self.now)
            self._numbers.append(number)
            self._firsts.append(len(labels))

    def run(self, limit: int) -> None:
        """Let all events happen. Raises RuntimeError if they do not end after `limit` events."""
        most = self.events + limit
        if self.go_on(lambda: self.events < most) and (self.head < math.inf or length_hint(self._rest)):
            raise RuntimeError(f"the simulation does not end: {limit} events have happened by {self.now} s")

    @property
    def trace_hash(self) -> str:
        """A hash of the time and label of every event so far."""
        self._flush()
        return "".join(f"{part:016x}" for part in self._sums)

    def counted(self, last: float, number: int) -> tuple[int, tuple[int, int]]:
        """The number of events until the `place` of another clock, and what the hash has of them. Later ones are
        forgotten. They are all of the newest window."""
        kept = bisect_right(self._times, last)
        while kept and self._times[kept - 1] == last and self._numbers[kept - 1] > number:
            kept -= 1
        if kept < len(self._times):
            del self._labels[self._firsts[kept] :], self._times[kept:], self._firsts[kept:], self._numbers[kept:]
        self._flush()
        first, second = self._sums
        return self._hashed, (first, second)

    def add(self, events: int, sums: tuple[int, int]) -> None:
        """Count the events of another clock as well."""
        self._hashed += events
        self._sums = [(a + b) & _WORD for a, b in zip(self._sums, sums, strict=True)]

    def _flush(self) -> None:
        count = len(self._labels)
        if not count:
            return
        found = hashed(self._times, [*self._firsts, count], self._labels)
        self._sums = [(a + b) & _WORD for a, b in zip(self._sums, found, strict=True)]
        self._hashed += count
        self._labels.clear()
        self._times, self._firsts = self._times[-1:], [0] * bool(self._times)
        self._numbers = self._numbers[-1:]
        self.tidy()
