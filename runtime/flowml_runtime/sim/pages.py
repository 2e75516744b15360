"""Puts the memory of a large simulation into huge pages.

Each event looks at a few lines of memory of another worker. With hundreds of thousands of workers the processor then
waits for the table of pages more than for the lines. Pages of 2 MiB need a table that is 512 times smaller.

Python maps its memory in pieces of 1 MiB, so the kernel gives them usual pages whatever is asked of it before. From
Linux 6.1 on a process can have pages that are in use collapsed (madvise(2), MADV_COLLAPSE).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

_HUGE = 2 * 2**20
_COLLAPSE = 25
"""MADV_COLLAPSE, which Python does not know."""
_LEAST = 2**28
"""So many bytes more are collapsed together. A process that takes less never looks."""
_GROWTH = 1.2
"""After what is there has grown so much."""
_FULL = 0.95
"""A piece of memory is collapsed if so much of it is in use: the rest will be as well."""

_Span = tuple[int, int]
"""The addresses of a piece of memory, from the first to the last and one."""


class HugePages:
    """Collapses what this process maps from now on. What it has now it may share with a process that it has forked."""

    def __init__(self) -> None:
        self._works = sys.platform == "linux" and "[never]" not in _read("/sys/kernel/mm/transparent_hugepage/enabled")
        self._works = self._works and os.path.exists("/proc/self/statm")
        lines = _read("/proc/self/maps").splitlines() if self._works else []  # `smaps` would take milliseconds
        self._before = sorted(span for line in lines if (span := _span(line)))
        self._next = self._size() + _LEAST

    def tidy(self) -> None:
        """Collapse what has come since the last time, if that is much. Costs little if it is not."""
        if self._works and self._size() >= self._next:
            spans = [part for span, full in _mapped() if full for part in without(span, self._before)]
            done = [_collapse(*span) for span in spans]
            self._works = any(done) or not done  # there are pages that cannot be collapsed
            size = self._size()
            self._next = max(size + _LEAST, int(size * _GROWTH))

    def _size(self) -> int:
        """The bytes of this process that are in memory."""
        return int(_read("/proc/self/statm").split()[1]) * os.sysconf("SC_PAGESIZE") if self._works else 0


def _collapse(first: int, last: int) -> bool:
    """Whether the kernel has collapsed all huge pages of a piece of memory, if there are any."""
    begin, end = -(-first // _HUGE) * _HUGE, last // _HUGE * _HUGE
    library = ctypes.CDLL(None)
    return begin < end and not library.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _COLLAPSE)


def without(span: _Span, others: list[_Span]) -> Iterator[_Span]:
    """The parts of a span that are in none of the others, which are in order."""
    first, last = span
    inside = [(max(a, first), min(b, last)) for a, b in others if a < last and b > first]
    for (_, begin), (end, _) in pairwise([(first, first), *inside, (last, last)]):
        if begin < end:
            yield begin, end


def _mapped() -> Iterator[tuple[_Span, bool]]:
    """The pieces of this process's own memory, and whether nearly all of a piece is in use."""
    span: _Span | None = None
    for line in _read("/proc/self/smaps").splitlines():
        head, *rest = line.split()
        if head[-1] != ":":
            span = _span(line)
        elif head == "Rss:" and span:
            yield span, int(rest[0]) * 1024 >= (span[1] - span[0]) * _FULL


def _span(line: str) -> _Span | None:
    """The piece of memory that a line of `maps` is about, if it is the process's own."""
    place, rights, *rest = line.split()
    if rights != "rw-p" or (len(rest) > 3 and rest[3] != "[heap]"):
        return None
    first, last = place.split("-")
    return int(first, 16), int(last, 16)


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text()
    return ""
