"""Splits a message with its arrays into frames, and assembles it again.

    first frame   u32 length of the header (+ 2^31 if sealed) | header (msgpack) | bytes of the small arrays | seal
    next frames   the large arrays in order, each cut into pieces of at most 1 MiB | seal

The header's specs alone determine which arrays are small. So the layout needs no further description, and the receiver
knows the length of every frame before it reads it. A large array is assembled in one aligned buffer. This module does
no I/O: it turns bytes into messages. All input is checked before use, and malformed input raises FrameError.

A *seal* is a u64 checksum (XXH3) at the end of each frame of a sealed message, which its first frame marks. The seed is
the frame's number in its stream, which both sides count, so the seal also detects lost, repeated and reordered frames.
If large arrays lie in shared memory, a message is one frame, whose seal covers them too.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash

from flowml.errors import FlowmlError
from flowml.plan import ArraySpec
from flowml_runtime import wire
from flowml_runtime.transport.arrays import (
    ALIGNMENT,
    Array,
    Buffer,
    aligned_empty,
    as_bytes,
    shaped,
    to_wire,
    wire_layout,
)
from flowml_runtime.transport.refusals import Refusal, encoded, salvage

PIECE_BYTES = 2**20
"""Large arrays are sent in pieces of this size. gRPC copies each piece several times on both sides, which is fastest
while the piece fits in a core's own cache. Smaller pieces cost more in calls than they save."""

SMALL_BYTES = 64 * 2**10
"""Arrays up to this size are sent in the first frame: another frame costs more than the copy."""

MAX_SMALL_BYTES = 2**20
"""Limit for the sum of a message's small arrays. Arrays beyond it are sent like large ones."""

MAX_FRAME_BYTES = 4 + wire.MAX_HEADER_BYTES + MAX_SMALL_BYTES + 8

TINY_BYTES = 4096
"""Small arrays up to this sum are not aligned: XLA copies them faster than we would align them."""

MAX_REMEMBERED = 64
"""Layouts of messages with at most this many arrays are cached."""

_LENGTH = struct.Struct("<I")
_SEAL = struct.Struct("<Q")
_SEALED = 2**31


Message = wire.Wire | Refusal
"""The content of a frame: a message, or one that could be read only far enough to refuse it."""


class FrameError(FlowmlError):
    """Bytes that flowml of this version does not send."""


class Outgoing(NamedTuple):
    """A message ready to send: its first frame, the large arrays that follow, and the total bytes."""

    first: bytes
    large: tuple[Buffer, ...]
    nbytes: int

    def frames(self, numbers: Iterator[int] | None = None) -> Iterator[bytes]:
        """The frames. They are sealed if their numbers in the stream are given."""
        yield self.first if numbers is None else _seal(_marked(self.first), next(numbers))
        for array in self.large:
            view = as_bytes(array).data
            for start in range(0, len(view), PIECE_BYTES):
                piece = view[start : start + PIECE_BYTES]
                yield bytes(piece) if numbers is None else _seal(piece, next(numbers))

    def sealed(self, number: int) -> bytes:
        """The single frame of a message whose large arrays lie in shared memory, with a seal that covers them."""
        return _seal(_marked(self.first), number, self.large)


def pack(message: wire.Wire, arrays: Sequence[Array] = ()) -> Outgoing:
    """Prepare `message` and its arrays for sending. Raises ValueError if the arrays do not match `specs`."""
    specs = message.specs
    if len(arrays) != len(specs):
        raise ValueError(f"{type(message).__name__} announces {len(specs)} arrays and has {len(arrays)}")
    header = encoded(message)
    if len(header) > wire.MAX_HEADER_BYTES:
        raise ValueError(f"{type(message).__name__} has a header of {len(header)} bytes, over {wire.MAX_HEADER_BYTES}")
    first = [_LENGTH.pack(len(header)), header]
    large: list[Buffer] = []
    for array, spec, small in zip(arrays, specs, _layout(specs).small, strict=True):
        buffer = to_wire(array, spec)
        if small:
            first.append(buffer.tobytes())
        else:
            large.append(buffer)
    frame = b"".join(first)
    return Outgoing(frame, tuple(large), len(frame) + (sum(b.nbytes for b in large) if large else 0))


class Assembler:
    """Assembles messages from the frames of one stream. After a FrameError the stream cannot be used."""

    def __init__(self, allocate: Callable[[int], Buffer] = aligned_empty) -> None:
        """`allocate` returns memory for a large array: the given number of bytes, aligned to 64."""
        self._allocate = allocate
        self._number = 0
        """Number of the next frame in the stream."""
        self._message: Message | None = None
        self._sealed = False
        self._arrays: list[Buffer] = []
        self._missing: list[Buffer] = []
        """The unfilled rest of each large array. The one that is filled next is last."""

    def feed(self, frame: bytes) -> bool:
        """Process one frame. True if it completes a message, which `take` returns. Raises FrameError."""
        number, self._number = self._number, self._number + 1
        if self._message is None or not self._missing:
            self._sealed = _is_sealed(frame)
            content = _unsealed(frame, number) if self._sealed else memoryview(frame)
            self._message, self._arrays = _open(content, self._expect)
            self._missing.reverse()
        elif self._sealed:
            self._fill(_unsealed(frame, number, self._message))
        else:
            self._fill(memoryview(frame))
        return not self._missing

    @property
    def is_partial(self) -> bool:
        """Whether frames of the current message are still to come."""
        return bool(self._missing)

    def take(self) -> tuple[Message, list[Buffer]]:
        """The complete message and its arrays. No reference to them is kept here."""
        message, arrays = self._message, self._arrays
        assert message is not None
        self._message, self._arrays = None, []
        return message, arrays

    def _expect(self, nbytes: int, spec: ArraySpec) -> Buffer:
        try:
            data = self._allocate(nbytes)
        except MemoryError:
            raise FrameError(f"no memory for an array of {nbytes} bytes, {spec.dtype}{list(spec.shape)}") from None
        self._missing.append(data)
        return data

    def _fill(self, piece: memoryview) -> None:
        rest = self._missing[-1]
        due = min(PIECE_BYTES, len(rest))
        if len(piece) != due:
            raise FrameError(f"a piece of {len(piece)} bytes came instead of one of {due}, of {_called(self._message)}")
        rest.data[:due] = piece
        self._missing[-1] = rest[due:]
        if not len(self._missing[-1]):
            self._missing.pop()


def unpack(frame: bytes | memoryview, room: Buffer | None, number: int = 0) -> tuple[Message, list[Buffer]]:
    """A message whose large arrays lie in `room`, one after the other at multiples of 64. Raises FrameError.

    `number` is the message's number in its stream. It is used only if the message is sealed.
    """
    at = 0
    large: list[Buffer] = []

    def place(nbytes: int, spec: ArraySpec) -> Buffer:
        nonlocal at
        if room is None or at + nbytes > len(room):
            raise FrameError(f"{spec.dtype}{list(spec.shape)} of {nbytes} bytes is not within its shared memory")
        start, at = at, at + padded(nbytes)
        large.append(room[start : start + nbytes])
        return large[-1]

    if not _is_sealed(frame):
        return _open(memoryview(frame), place)
    opened = _open(memoryview(frame)[: -_SEAL.size], place)  # the seal covers the arrays, so their place must be known
    _unsealed(frame, number, opened[0], large)
    return opened


def _marked(first: bytes) -> bytes:
    """The first frame, marked as sealed."""
    (length,) = _LENGTH.unpack_from(first)
    return _LENGTH.pack(length | _SEALED) + first[_LENGTH.size :]


def _is_sealed(first: bytes | memoryview) -> bool:
    return len(first) >= _LENGTH.size and bool(_LENGTH.unpack_from(first)[0] & _SEALED)


def _seal(content: bytes | memoryview, number: int, more: Sequence[Buffer] = ()) -> bytes:
    return b"".join((content, _SEAL.pack(_checksum(content, number, more))))


def _checksum(content: bytes | memoryview, number: int, more: Sequence[Buffer] = ()) -> int:
    if not more:
        return xxhash.xxh3_64_intdigest(content, seed=number)
    checksum = xxhash.xxh3_64(content, seed=number)
    for array in more:
        checksum.update(as_bytes(array).data)
    return checksum.intdigest()


def _unsealed(
    frame: bytes | memoryview, number: int, message: Message | None = None, more: Sequence[Buffer] = ()
) -> memoryview:
    """A frame's content. Raises FrameError if its seal is wrong, naming the message if it is known."""
    content = memoryview(frame)[: max(0, len(frame) - _SEAL.size)]
    if len(frame) < _SEAL.size or _SEAL.unpack_from(frame, len(content))[0] != _checksum(content, number, more):
        raise FrameError(
            f"the checksum of frame {number} is wrong, of {_called(message or _guessed(content))}: bytes changed on "
            "the way, or a frame was lost, repeated or reordered; check the network between the two"
        )
    return content


def _guessed(content: memoryview) -> Message | None:
    """The apparent message of a first frame with a wrong seal, used only to name it in an error."""
    try:
        return _header(content)[0]
    except FrameError:
        return None


def _called(message: Message | None) -> str:
    """How an error names a message: its type, and for a plan's value its edge and step."""
    if isinstance(message, wire.Value):
        return f"Value ({message.kind} {message.index} for {message.device}, step {message.step})"
    return "a message" if message is None else type(message).__name__


def _open(frame: memoryview, place: Callable[[int, ArraySpec], Buffer]) -> tuple[Message, list[Buffer]]:
    """The message in a first frame, and its arrays. The memory of a large array comes from `place`."""
    message, inline = _header(frame)
    layout = _layout(message.specs)
    if len(inline) != layout.inline:
        raise FrameError(f"a {type(message).__name__} announces {layout.inline} bytes and holds {len(inline)}")
    room = _room(inline, layout)
    arrays: list[Buffer] = []
    for spec, nbytes, small, at in zip(message.specs, layout.sizes, layout.small, layout.offsets, strict=True):
        if small:
            shape, dtype, _ = wire_layout(spec)
            arrays.append(np.ndarray(shape, dtype, room, at))
        else:
            arrays.append(shaped(place(nbytes, spec), spec))
    return message, arrays


def _room(inline: memoryview, layout: _Layout) -> bytes | Buffer:
    """A copy of the small arrays' bytes, each at its offset in `layout.offsets`."""
    if not layout.spread:
        return bytes(inline)
    room = aligned_empty(layout.spread)
    taken = 0
    for nbytes, small, at in zip(layout.sizes, layout.small, layout.offsets, strict=True):
        if small:
            room.data[at : at + nbytes] = inline[taken : taken + nbytes]
            taken += nbytes
    return room


def _header(frame: memoryview) -> tuple[Message, memoryview]:
    """The message in a first frame, and the bytes of its small arrays."""
    if len(frame) < _LENGTH.size:
        raise FrameError(f"a frame of {len(frame)} bytes is too short for a message")
    length = _LENGTH.unpack_from(frame)[0] & ~_SEALED
    body = frame[_LENGTH.size :]
    if length > min(len(body), wire.MAX_HEADER_BYTES):
        raise FrameError(f"a frame of {len(frame)} bytes announces a header of {length}")
    try:
        message: Message = wire.decode(body[:length])
    except (msgspec.DecodeError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        # Errors of the decoder, and of the lookup of an unknown dtype.
        refusal = salvage(body[:length], error)
        if refusal is None:
            raise FrameError(f"a frame holds no message of this version: {type(error).__name__}: {error}") from None
        message = refusal
    return message, body[length:]


def shared_bytes(specs: tuple[ArraySpec, ...]) -> int:
    """The bytes of shared memory that a message with these arrays needs."""
    layout = _layout(specs)
    return sum(padded(n) for n, small in zip(layout.sizes, layout.small, strict=True) if not small)


class _Layout(NamedTuple):
    """Where the arrays of a message lie, computed from its specs."""

    sizes: tuple[int, ...]
    small: tuple[bool, ...]
    """Whether each array is in the first frame. Empty arrays always are, because they fill no frame."""
    inline: int
    """Total bytes of the small arrays, which are contiguous in the first frame."""
    offsets: tuple[int, ...]
    """Offsets of the small arrays in the receiver's memory; 0 for large ones."""
    spread: int
    """Bytes of memory in which they begin at multiples of 64; 0 if they need no alignment."""


def _layout(specs: tuple[ArraySpec, ...]) -> _Layout:
    """Raises FrameError for a dtype that cannot be sent."""
    return _remembered_layout(specs) if len(specs) <= MAX_REMEMBERED else _new_layout(specs)


def _new_layout(specs: tuple[ArraySpec, ...]) -> _Layout:
    sizes = tuple(_size(s) for s in specs)
    left = MAX_SMALL_BYTES
    small: list[bool] = []
    for nbytes in sizes:
        small.append(nbytes <= min(SMALL_BYTES, left))
        left -= nbytes if small[-1] else 0
    inline = [n if s else 0 for n, s in zip(sizes, small, strict=True)]
    packed = tuple(accumulate(inline, initial=0))[:-1]
    natural = all(at % wire_layout(s)[1].itemsize == 0 for at, s in zip(packed, specs, strict=True))
    if sum(inline) <= TINY_BYTES and natural:
        return _Layout(sizes, tuple(small), sum(inline), packed, 0)
    ends = tuple(accumulate(map(padded, inline), initial=0))
    return _Layout(sizes, tuple(small), sum(inline), ends[:-1], ends[-1])


_remembered_layout = functools.lru_cache(maxsize=256)(_new_layout)


def _size(spec: ArraySpec) -> int:
    try:
        return wire_layout(spec)[2]
    except ValueError as error:
        raise FrameError(str(error)) from None


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment: the offset of the next array."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
