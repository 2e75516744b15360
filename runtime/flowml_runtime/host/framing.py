"""A message with its arrays as a sequence of frames, and back.

    first frame   u32 length of the header | header (msgpack) | bytes of the small arrays
    next frames   the large arrays in order, each cut into pieces of at most 4 MiB

Which arrays are small follows from the header's specs alone, so nothing else has to be said about layout, and the
receiver knows the length of every frame before it takes it. A large array is assembled in one aligned buffer. Sans-IO:
bytes in, messages out; whatever is not well-formed raises FrameError, and nothing is trusted before it is checked.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from flowml.errors import FlowmlError
from flowml.plan import ArraySpec
from flowml_runtime import messages
from flowml_runtime.host.arrays import ALIGNMENT, Array, Buffer, aligned_empty, as_bytes, shaped, to_wire, wire_layout
from flowml_runtime.messages import MAX_HEADER_BYTES, Wire

PIECE_BYTES = 4 * 2**20
"""A large array goes in pieces of this size: the fastest for gRPC, which is several times slower with 64 KiB."""

SMALL_BYTES = 64 * 2**10
"""Up to here an array travels in the first frame: a frame costs more than copying this much."""

MAX_SMALL_BYTES = 2**20
"""Small arrays beyond this sum are sent like large ones."""

MAX_FRAME_BYTES = 4 + MAX_HEADER_BYTES + MAX_SMALL_BYTES

_LENGTH = struct.Struct("<I")
_NOTHING = aligned_empty(0)


class FrameError(FlowmlError):
    """Bytes that no flowml of this version sends."""


@dataclass(frozen=True)
class Outgoing:
    """A message ready to be sent: its first frame, the large arrays that follow, and the bytes of all."""

    first: bytes
    large: tuple[Buffer, ...]
    nbytes: int

    def frames(self) -> Iterator[bytes]:
        yield self.first
        for array in self.large:
            view = as_bytes(array).data
            for start in range(0, len(view), PIECE_BYTES):
                yield bytes(view[start : start + PIECE_BYTES])


def pack(message: Wire, arrays: Sequence[Array] = ()) -> Outgoing:
    """Make `message` and its arrays ready to be sent. Raises ValueError if they are not what `specs` announces."""
    specs = message.specs
    if len(arrays) != len(specs):
        raise ValueError(f"{type(message).__name__} announces {len(specs)} arrays and has {len(arrays)}")
    header = messages.encode(message)
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(f"{type(message).__name__} has a header of {len(header)} bytes, over {MAX_HEADER_BYTES}")
    buffers = [to_wire(a, s) for a, s in zip(arrays, specs, strict=True)]
    small = _small(specs)
    first = b"".join(
        [_LENGTH.pack(len(header)), header, *(as_bytes(b).data for b, s in zip(buffers, small, strict=True) if s)]
    )
    large = tuple(b for b, s in zip(buffers, small, strict=True) if not s)
    return Outgoing(first, large, len(first) + sum(b.nbytes for b in large))


class Assembler:
    """Turns the frames of one stream back into messages. After a FrameError the stream is of no more use."""

    def __init__(self) -> None:
        self._message: Wire | None = None
        self._arrays: list[Buffer] = []
        self._missing: list[Buffer] = []
        """Bytes still to come: of the large arrays, the unfilled rest of each; the next one is last."""

    def feed(self, frame: bytes) -> bool:
        """Take one frame in; True if that completes a message, to be had by `take`. Raises FrameError."""
        if self._message is None or not self._missing:
            self._message, self._arrays = _open(frame, self._expect)
            self._missing.reverse()
        else:
            self._fill(frame)
        return not self._missing

    def take(self) -> tuple[Wire, list[Buffer]]:
        """The complete message and its arrays, of which nothing is kept here."""
        message, arrays = self._message, self._arrays
        assert message is not None
        self._message, self._arrays = None, []
        return message, arrays

    def _expect(self, nbytes: int, spec: ArraySpec) -> Buffer:
        data = _allocate(nbytes, spec)
        self._missing.append(data)
        return data

    def _fill(self, frame: bytes) -> None:
        rest = self._missing[-1]
        if len(frame) != min(PIECE_BYTES, len(rest)):
            raise FrameError(f"a piece of {len(frame)} bytes came where {min(PIECE_BYTES, len(rest))} were due")
        rest.data[: len(frame)] = frame
        self._missing[-1] = rest[len(frame) :]
        if not len(self._missing[-1]):
            self._missing.pop()


def unpack(frame: bytes | memoryview, room: Buffer | None) -> tuple[Wire, list[Buffer]]:
    """A message whose large arrays lie in `room`, one after the other at multiples of 64. Raises FrameError."""
    at = 0

    def place(nbytes: int, spec: ArraySpec) -> Buffer:
        nonlocal at
        if room is None or at + nbytes > len(room):
            raise FrameError(f"{spec.dtype}{list(spec.shape)} of {nbytes} bytes is not within its shared memory")
        start, at = at, at + padded(nbytes)
        return room[start : start + nbytes]

    return _open(frame, place)


def _open(frame: bytes | memoryview, place: Callable[[int, ArraySpec], Buffer]) -> tuple[Wire, list[Buffer]]:
    """The message in a first frame. Its small arrays come along; a large one lies where `place` says."""
    message, inline = _header(frame)
    specs = message.specs
    small = _small(specs)
    sizes = [_size(s) for s in specs]
    announced = sum(n for n, s in zip(sizes, small, strict=True) if s)
    if len(inline) != announced:
        raise FrameError(f"a {type(message).__name__} announces {announced} bytes and brings {len(inline)}")
    room = aligned_empty(sum(padded(n) for n, s in zip(sizes, small, strict=True) if s)) if announced else _NOTHING
    arrays: list[Buffer] = []
    taken = at = 0
    for spec, nbytes, is_small in zip(specs, sizes, small, strict=True):
        if is_small:
            data = room[at : at + nbytes]
            data.data[:] = inline[taken : taken + nbytes]
            taken, at = taken + nbytes, at + padded(nbytes)
        else:
            data = place(nbytes, spec)
        arrays.append(shaped(data, spec))
    return message, arrays


def _header(frame: bytes | memoryview) -> tuple[Wire, memoryview]:
    """The message in a first frame, and the bytes of its small arrays."""
    if len(frame) < _LENGTH.size:
        raise FrameError(f"a frame of {len(frame)} bytes is too short for a message")
    (length,) = _LENGTH.unpack_from(frame)
    body = memoryview(frame)[_LENGTH.size :]
    if length > min(len(body), MAX_HEADER_BYTES):
        raise FrameError(f"a frame of {len(frame)} bytes announces a header of {length}")
    try:
        message = messages.decode(body[:length])
    except (msgspec.DecodeError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        # The decoder's own errors, and what looking up an unknown dtype raises.
        raise FrameError(f"a frame holds no message of this version: {type(error).__name__}: {error}") from None
    return message, body[length:]


def _small(specs: Sequence[ArraySpec]) -> list[bool]:
    """Which arrays travel in the first frame; empty ones always do, since they have no frame of their own."""
    room = MAX_SMALL_BYTES
    small: list[bool] = []
    for spec in specs:
        nbytes = _size(spec)
        fits = nbytes <= min(SMALL_BYTES, room)
        room -= nbytes if fits else 0
        small.append(fits)
    return small


def _size(spec: ArraySpec) -> int:
    try:
        return wire_layout(spec)[2]
    except ValueError as error:
        raise FrameError(str(error)) from None


def _allocate(nbytes: int, spec: ArraySpec) -> Buffer:
    try:
        return aligned_empty(nbytes)
    except MemoryError:
        raise FrameError(f"no memory for an array of {nbytes} bytes, {spec.dtype}{list(spec.shape)}") from None


def padded(nbytes: int) -> int:
    """Where the next array may begin, after one of `nbytes`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
