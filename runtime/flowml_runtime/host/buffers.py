"""Memory for large arrays that come in over a wire, used again when the last view of what was in it is gone.

Memory that a process touches for the first time is handed out by the kernel page by page, which costs more than to
copy an array into it. Small blocks are used again by the C library, and here it is told to keep them; blocks over
32 MiB it always gives back, so a few of them are kept here.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque

import numpy as np

from flowml_runtime.host.arrays import Buffer, aligned_empty

KEPT_FROM_BYTES = 32 * 2**20 - 2**16
"""Blocks from here on are kept by us: what glibc gives back to the kernel however it is set (`MMAP_THRESHOLD_MAX`)."""

KEPT_TO_BYTES = 64 * 2**20 + 2**16
MAX_KEPT = 4


class Buffers:
    """Aligned memory that comes back by itself, on whatever thread the last view of it dies. Safe on any thread."""

    def __init__(self) -> None:
        self._idle: deque[Buffer] = deque(maxlen=MAX_KEPT)
        """The longest idle first. Only calls that are atomic: a view may die in the middle of anything."""

    def take(self, nbytes: int) -> Buffer:
        """Uninitialised bytes. Raises MemoryError."""
        keep_freed_memory()
        if not KEPT_FROM_BYTES <= nbytes <= KEPT_TO_BYTES:
            return aligned_empty(nbytes)
        room = self._fitting(nbytes)
        if room is None:
            room = aligned_empty(nbytes)
        whole = np.frombuffer(room.data, np.uint8)  # views of it keep it alive, and not only the memory
        weakref.finalize(whole, self._idle.append, room).atexit = False
        return whole[:nbytes]

    def _fitting(self, nbytes: int) -> Buffer | None:
        for _ in range(len(self._idle)):
            try:
                room = self._idle.popleft()
            except IndexError:  # another thread took it
                return None
            if room.nbytes >= nbytes:
                return room
            self._idle.append(room)
        return None


@functools.cache
def keep_freed_memory() -> None:
    """Have the C library use the memory of pieces again instead of giving it back to the kernel after each.

    glibc gives back what is freed beyond a threshold of twice the largest block that it has seen come and go, if that
    was under 32 MiB. Pieces of 1 MiB would leave it at 2 MiB, and every piece would have new pages at several times
    the cost of its copies. A block just under that size, never touched, sets the threshold to its highest. Only for
    processes that large arrays leave or reach by gRPC: it may hold up to 64 MiB for each thread that allocates.
    """
    np.empty(KEPT_FROM_BYTES, np.uint8)
