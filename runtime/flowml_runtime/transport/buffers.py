"""Reuses memory for large arrays that are received or summed, once the last view of the earlier array is gone.

The kernel allocates new memory page by page on first touch, which costs more than the copy of an array into it. The C
library reuses small blocks, and `keep_freed_memory` makes it keep larger ones. It always returns blocks over 32 MiB to
the kernel; `BufferPool` keeps those.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import deque

import numpy as np

from flowml_runtime.transport.arrays import Buffer, aligned_empty

POOLED_BYTES = 64 * 2**10
"""Allocating smaller memory is faster than keeping it."""

NEVER_KEPT_BYTES = 32 * 2**20 - 2**16
"""glibc returns blocks of at least this size to the kernel in every configuration (its limit for MMAP_THRESHOLD)."""

MAX_IDLE_BYTES = 256 * 2**20


class BufferPool:
    """Aligned memory that returns to the pool when its last view is gone. Safe to use from any thread."""

    def __init__(self, least_bytes: int = POOLED_BYTES, max_idle_bytes: int = MAX_IDLE_BYTES) -> None:
        """Blocks of fewer than `least_bytes` are not kept. At most `max_idle_bytes` of unused blocks are kept."""
        self._least_bytes = least_bytes
        self._max_idle_bytes = max_idle_bytes
        self._returned: deque[Buffer] = deque()
        """Returned blocks. A view may be collected at any point of a thread, so `_give_back` takes no lock."""
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
        whole = np.frombuffer(memory.data, np.uint8)  # views keep this array alive, not only its memory
        weakref.finalize(whole, self._give_back, memory).atexit = False
        return whole

    def _give_back(self, memory: Buffer) -> None:
        if sum(m.nbytes for m in tuple(self._returned)) + memory.nbytes <= self._max_idle_bytes:
            self._returned.append(memory)


@functools.cache
def keep_freed_memory() -> None:
    """Make the C library reuse the memory of pieces instead of returning it to the kernel after each.

    glibc returns freed memory beyond a threshold: twice the largest freed block that was under 32 MiB. With pieces of
    1 MiB the threshold would be 2 MiB, and every piece would get new pages, which cost several times its copies.
    Allocating and freeing one untouched block just under 32 MiB sets the threshold to its maximum. Call this only in
    processes that send or receive large arrays by gRPC: each thread that allocates may then keep up to 64 MiB.
    """
    np.empty(NEVER_KEPT_BYTES, np.uint8)
