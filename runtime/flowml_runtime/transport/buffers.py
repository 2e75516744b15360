"""Memory for large arrays that are received or added up, used again when the last view of what was in it is gone.

Memory that a process touches for the first time is handed out by the kernel page by page, which costs more than to
copy an array into it. Small blocks are used again by the C library, and here it can be told to keep them; blocks over
32 MiB it always gives back.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import deque

import numpy as np

from flowml_runtime.transport.arrays import Buffer, aligned_empty

POOLED_BYTES = 64 * 2**10
"""Smaller memory is allocated faster than it is kept."""

NEVER_KEPT_BYTES = 32 * 2**20 - 2**16
"""Blocks from here on glibc gives back to the kernel however it is set (its limit for MMAP_THRESHOLD)."""

MAX_IDLE_BYTES = 256 * 2**20


class BufferPool:
    """Aligned memory that comes back by itself when the last view of it is gone. Safe to use from any thread."""

    def __init__(self, least_bytes: int = POOLED_BYTES, max_idle_bytes: int = MAX_IDLE_BYTES) -> None:
        """Blocks of fewer than `least_bytes` are not kept, and no more than `max_idle_bytes` wait to be used again."""
        self._least_bytes = least_bytes
        self._max_idle_bytes = max_idle_bytes
        self._returned: deque[Buffer] = deque()
        """What has come back. A view may die in the middle of anything, so nothing is locked then."""
        self._lock = threading.Lock()
        self._idle: list[Buffer] = []

    def take(self, nbytes: int) -> Buffer:
        """Uninitialised bytes. Raises MemoryError."""
        if nbytes < self._least_bytes:
            return aligned_empty(nbytes)
        with self._lock:
            while self._returned:
                self._idle.append(self._returned.popleft())
            found = next((i for i, memory in enumerate(self._idle) if memory.nbytes == nbytes), None)
            memory = self._idle.pop(found) if found is not None else None
            while self._idle and sum(m.nbytes for m in self._idle) > self._max_idle_bytes:
                self._idle.pop(0)
        if memory is None:
            memory = aligned_empty(nbytes)
        whole = np.frombuffer(memory.data, np.uint8)  # views of it keep it alive, and not only the memory
        weakref.finalize(whole, self._give_back, memory).atexit = False
        return whole

    def _give_back(self, memory: Buffer) -> None:
        if sum(m.nbytes for m in tuple(self._returned)) + memory.nbytes <= self._max_idle_bytes:
            self._returned.append(memory)


@functools.cache
def keep_freed_memory() -> None:
    """Have the C library use the memory of pieces again instead of giving it back to the kernel after each.

    glibc gives back what is freed beyond a threshold of twice the largest block that it has seen come and go, if that
    was under 32 MiB. Pieces of 1 MiB would leave it at 2 MiB, and every piece would have new pages at several times
    the cost of its copies. A block just under that size, never touched, sets the threshold to its highest. Only for
    processes that large arrays leave or reach by gRPC: it may hold up to 64 MiB for each thread that allocates.
    """
    np.empty(NEVER_KEPT_BYTES, np.uint8)
