"""Manages shared memory between processes of one machine: the sender copies an array once, the receiver not at all.

A sender has a pool of slots. A slot is a memfd: memory with a descriptor and no name, sealed to its size. Both sides
map it once and use it for many messages. The receiver's arrays are views of the slot. When its last view is freed, the
receiver returns the slot's number, and the sender may fill the slot again. A slot in use takes no more memory than the
receiver's copy would. Since slots have no name, a killed process leaves none behind. Not thread-safe, except that a
view may be freed on any thread.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flowml.errors import FlowmlError
from flowml_runtime.transport.arrays import Buffer

MAX_IDLE_BYTES = 256 * 2**20
"""Unused slots beyond this sum are freed, the smallest first, because large ones cost the most to make."""

MAX_SLOT_BYTES = 2**40

_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_PAGE = mmap.PAGESIZE


class SlotError(FlowmlError):
    """Shared memory cannot be allocated, or a peer describes it wrongly."""


@dataclass(frozen=True)
class Slot:
    """Memory for one message. `number` identifies it on this connection, counted from 1."""

    number: int
    data: Buffer

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


class SlotPool:
    """The sender's slots."""

    def __init__(self, max_idle_bytes: int = MAX_IDLE_BYTES) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._idle: list[Slot] = []
        self._lent: dict[int, Slot] = {}
        self._made = 0
        self._unsent: dict[int, int] = {}
        """Descriptors of slots that the receiver does not know yet."""
        self._retired: list[int] = []

    def take(self, nbytes: int) -> tuple[Slot, int]:
        """A slot of at least `nbytes`, and its descriptor if it is new (the caller closes it), else -1.

        Raises SlotError if the machine has no memory for it.
        """
        fitting = [s for s in self._idle if nbytes <= s.nbytes <= 2 * nbytes + _PAGE]
        if fitting:
            slot = min(fitting, key=lambda s: (s.nbytes, s.number in self._unsent))
            self._idle.remove(slot)
        else:
            slot = self._make(nbytes)
        self._lent[slot.number] = slot
        return slot, self._unsent.pop(slot.number, -1)

    def reserve(self, nbytes: int) -> None:
        """Make a slot ahead of time, unless the limit for idle slots is reached. Raises SlotError."""
        if sum(s.nbytes for s in self._idle) + nbytes <= self._max_idle_bytes:
            self._idle.append(self._make(nbytes))

    def give_back(self, number: int) -> None:
        """The receiver no longer uses a slot. Raises SlotError if the slot is not lent."""
        slot = self._lent.pop(number, None)
        if slot is None:
            raise SlotError(f"shared memory slot {number} was given back, but is not lent")
        self._idle.append(slot)
        self._idle.sort(key=lambda s: s.nbytes)
        idle = sum(s.nbytes for s in self._idle)
        while idle > self._max_idle_bytes and len(self._idle) > 1:
            given_up = self._idle.pop(0)
            idle -= given_up.nbytes
            if given_up.number in self._unsent:
                os.close(self._unsent.pop(given_up.number))
            else:
                self._retired.append(given_up.number)

    def retired(self, most: int) -> tuple[int, ...]:
        """Numbers of freed slots for the receiver to unmap, at most `most`. Each number is returned once."""
        if not self._retired:
            return ()
        numbers, self._retired = tuple(self._retired[:most]), self._retired[most:]
        return numbers

    def close(self) -> None:
        self._idle.clear()
        self._lent.clear()
        while self._unsent:
            os.close(self._unsent.popitem()[1])

    @property
    def nbytes(self) -> int:
        """Total memory of the pool."""
        return sum(s.nbytes for s in (*self._idle, *self._lent.values()))

    def _make(self, nbytes: int) -> Slot:
        size = -(-nbytes // _PAGE) * _PAGE
        fd = -1
        try:
            if size > MAX_SLOT_BYTES:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            fd = os.memfd_create("flowml", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.posix_fallocate(fd, 0, size)  # a failure here raises an error; on first touch it would be a signal
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            memory = mmap.mmap(fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise SlotError(
                f"no shared memory for {nbytes} bytes: {error.strerror}; free memory, or send less at once"
            ) from None
        self._made += 1
        self._unsent[self._made] = fd
        return Slot(self._made, np.frombuffer(memory, np.uint8))


class SlotViews:
    """The receiver's side: the sender's slots by number. The thread that frees a view calls `release(number)`."""

    def __init__(self, release: Callable[[int], None]) -> None:
        self._release = release
        self._mapped: dict[int, mmap.mmap] = {}
        self._leases: dict[int, weakref.ref[Buffer]] = {}

    def map(self, number: int, fd: int) -> None:
        """Map a new slot and close its descriptor. Raises SlotError unless it is memory that cannot shrink."""
        try:
            if number in self._mapped or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise SlotError(f"shared memory slot {number} is known already, or not sealed")
            size = os.fstat(fd).st_size
            if not 0 < size <= MAX_SLOT_BYTES:
                raise SlotError(f"shared memory slot {number} has {size} bytes")
            self._mapped[number] = mmap.mmap(fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ)
        except OSError as error:
            raise SlotError(f"shared memory slot {number} cannot be mapped: {error.strerror}") from None
        finally:
            os.close(fd)

    def lease(self, number: int) -> Buffer:
        """The bytes of a filled slot, read-only. The slot is released when this array and all its views are freed."""
        memory = self._mapped.get(number)
        if memory is None or number in self._leases:
            raise SlotError(f"shared memory slot {number} is {'still in use' if memory is not None else 'unknown'}")
        whole = np.frombuffer(memory, np.uint8)
        self._leases[number] = weakref.ref(whole, lambda _: self._end(number))
        return whole

    def unmap(self, number: int) -> None:
        if number in self._leases or self._mapped.pop(number, None) is None:
            raise SlotError(f"shared memory slot {number} was given up while in use, or is unknown")

    def _end(self, number: int) -> None:
        self._leases.pop(number, None)
        self._release(number)
