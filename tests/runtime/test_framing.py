"""Seals: whatever happens to the frames of a sealed stream, only messages that are what was sent are handed on."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import jax
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowml.plan import ArraySpec
from flowml_runtime import wire
from flowml_runtime.transport.arrays import Buffer, aligned_empty
from flowml_runtime.transport.buffers import NEVER_KEPT_BYTES, BufferPool
from flowml_runtime.transport.framing import (
    MAX_FRAME_BYTES,
    PIECE_BYTES,
    SMALL_BYTES,
    Assembler,
    FrameError,
    Outgoing,
    pack,
    padded,
    unpack,
)

Sent = tuple[wire.Wire, list[Buffer]]


def value(step: int, arrays: Sequence[Buffer]) -> wire.Value:
    specs = tuple(ArraySpec(a.shape, str(a.dtype)) for a in arrays)
    return wire.Value(plan_id="p", step=step, kind="edge", index=3, device="worker:1/cpu:0", specs=specs)


def ramp(nbytes: int) -> Buffer:
    return (np.arange(nbytes) % 251).astype(np.uint8)


def messages() -> list[Sent]:
    """Of every make: without arrays, with small ones, with large ones in one piece and in two."""
    arrays = [[ramp(12)], [ramp(SMALL_BYTES + 8), ramp(5)], [ramp(PIECE_BYTES + 12)], [ramp(12)]]
    sent: list[Sent] = [(wire.Leave(worker="w"), [])]
    sent += [(value(step, of_step), of_step) for step, of_step in enumerate(arrays)]
    return sent


SENT = messages()
PACKED = [pack(message, arrays) for message, arrays in SENT]


def sealed_frames() -> list[bytes]:
    numbers = itertools.count()
    return [frame for message in PACKED for frame in message.frames(numbers)]


def plain_frames() -> list[bytes]:
    return [frame for message in PACKED for frame in message.frames()]


Record = tuple[bytes, Buffer | None]


def in_room(message: Outgoing) -> Buffer | None:
    """What shared memory holds of a message."""
    if not message.large:
        return None
    room = aligned_empty(sum(padded(a.nbytes) for a in message.large))
    room[:] = 0
    at = 0
    for array in message.large:
        room[at : at + array.nbytes] = array.view(np.uint8)
        at += padded(array.nbytes)
    return room


def sealed_records() -> list[Record]:
    return [(message.sealed(number), in_room(message)) for number, message in enumerate(PACKED)]


def plain_records() -> list[Record]:
    return [(message.first, in_room(message)) for message in PACKED]


def assembled(frames: Sequence[bytes]) -> Iterator[Sent]:
    assembler = Assembler()
    for frame in frames:
        if assembler.feed(frame):
            yield assembler.take()


def unpacked(records: Sequence[Record]) -> Iterator[Sent]:
    for number, (frame, room) in enumerate(records):
        yield unpack(frame, room, number)


def same(a: Sent, b: Sent) -> bool:
    return a[0] == b[0] and all(np.array_equal(x, y) for x, y in zip(a[1], b[1], strict=True))


def taken_in(received: Iterator[Sent]) -> tuple[list[Sent], str]:
    """What was handed on, and the error that ended it. Nothing else than FrameError may."""
    got: list[Sent] = []
    try:
        while (message := next(received, None)) is not None:
            got.append(message)
    except FrameError as error:
        return got, str(error)
    return got, ""


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("make", [sealed_frames, plain_frames, sealed_records, plain_records])
def test_what_nothing_happens_to_arrives(make: Callable[[], Any]) -> None:
    sent = make()
    got, error = taken_in(assembled(sent) if isinstance(sent[0], bytes) else unpacked(sent))
    assert error == ""
    assert all(same(a, b) for a, b in zip(got, SENT, strict=True))


@st.composite
def damage(draw: st.DrawFn, frames: int) -> Callable[[list[Any], Callable[[Any, float], Any]], list[Any]]:
    """Something that happens to a stream of so many frames; `hurt(frame, where)` damages one."""
    kind = draw(st.sampled_from(["flip", "drop", "repeat", "swap", "late"]))
    at = draw(st.integers(0, frames - 1))
    other = draw(st.integers(0, frames - 1).filter(lambda n: n != at))
    where = draw(st.floats(0, 1, exclude_max=True))

    def apply(sent: list[Any], hurt: Callable[[Any, float], Any]) -> list[Any]:
        if kind == "flip":
            return [*sent[:at], hurt(sent[at], where), *sent[at + 1 :]]
        if kind == "drop":
            return [*sent[:at], *sent[at + 1 :]]
        if kind == "repeat":
            return [*sent[: at + 1], *sent[at:]]
        if kind == "late":
            return [*sent[:at], *sent[at + 1 :], sent[at]]
        swapped = list(sent)
        swapped[at], swapped[other] = sent[other], sent[at]
        return swapped

    return apply


def check(sent: list[Any], changed: list[Any], received: Iterator[Sent]) -> None:
    """Only what was sent was handed on, in order, and a change that the receiver can see was refused."""
    got, error = taken_in(received)
    assert all(same(a, b) for a, b in zip(got, SENT, strict=False))
    assert len(got) <= len(SENT)
    assert error or changed == sent[: len(changed)]  # only the end is missing, which the end of the stream tells


FRAMES = sealed_frames()
RECORDS = sealed_records()


@given(damage=damage(len(FRAMES)), truncate=st.booleans())
def test_no_damage_to_a_sealed_stream_gets_past_the_assembler(damage: Any, truncate: bool) -> None:
    def hurt(frame: bytes, where: float) -> bytes:
        return frame[: int(where * len(frame))] if truncate else flipped(frame, int(where * 8 * len(frame)))

    changed = damage(FRAMES, hurt)
    check(FRAMES, changed, assembled(changed))


@given(damage=damage(len(RECORDS)), truncate=st.booleans(), in_memory=st.booleans())
def test_no_damage_to_sealed_records_gets_past_unpack(damage: Any, truncate: bool, in_memory: bool) -> None:
    def hurt(record: Record, where: float) -> Record:
        frame, room = record
        if room is not None and in_memory:
            message, _ = unpack(frame, room, RECORDS.index(record))
            large = [s.nbytes for s in message.specs if s.nbytes > SMALL_BYTES]  # the first lies at the beginning
            room = room.copy()
            room[int(where * large[0])] ^= 1
            return frame, room
        return (frame[: int(where * len(frame))] if truncate else flipped(frame, int(where * 8 * len(frame)))), room

    positions = damage(list(range(len(RECORDS))), lambda n, where: (n, where))
    changed = [hurt(RECORDS[p[0]], p[1]) if isinstance(p, tuple) else RECORDS[p] for p in positions]
    got, error = taken_in(unpacked(changed))
    assert all(same(a, b) for a, b in zip(got, SENT, strict=False))
    assert error or positions == list(range(len(positions)))


def test_every_flipped_bit_of_a_sealed_message_is_refused() -> None:
    arrays = [np.arange(3, dtype=np.float32), ramp(7)]
    packed = pack(value(0, arrays), arrays)
    first = next(packed.frames(itertools.count()))
    assert first == packed.sealed(0)
    for bit in range(8 * len(first)):
        with pytest.raises(FrameError):
            Assembler().feed(flipped(first, bit))
        with pytest.raises(FrameError):
            unpack(flipped(first, bit), None)


@given(damage=damage(len(FRAMES)), truncate=st.booleans())
def test_damage_to_a_stream_without_seals_is_an_error_or_goes_unnoticed(damage: Any, truncate: bool) -> None:
    def hurt(frame: bytes, where: float) -> bytes:
        return frame[: int(where * len(frame))] if truncate else flipped(frame, int(where * 8 * len(frame)))

    taken_in(assembled(damage(plain_frames(), hurt)))
    for frame, room in plain_records():
        with suppress(FrameError):
            unpack(hurt(frame, 0.1), room)


def test_an_error_names_the_message_and_its_edge() -> None:
    arrays = [ramp(PIECE_BYTES + 12)]
    first, piece, rest = pack(value(7, arrays), arrays).frames(itertools.count())
    named = r"Value \(edge 3 for worker:1/cpu:0, step 7\)"
    assembler = Assembler()
    assembler.feed(first)
    assert assembler.is_partial
    with pytest.raises(FrameError, match=rf"checksum of frame 1 is wrong, of {named}"):
        assembler.feed(flipped(piece, 1000))
    with pytest.raises(FrameError, match=rf"checksum of frame 0 is wrong, of {named}"):
        Assembler().feed(flipped(first, 8 * len(first) - 1))
    with pytest.raises(FrameError, match="checksum of frame 0 is wrong, of a message"):
        Assembler().feed(flipped(first, 40))
    assembler = Assembler()
    assembler.feed(pack(value(7, arrays), arrays).first)
    with pytest.raises(FrameError, match=rf"20 bytes came instead of one of {PIECE_BYTES}, of {named}"):
        assembler.feed(rest)
    with pytest.raises(FrameError, match="checksum of frame 1 is wrong, of Leave"):
        unpack(pack(wire.Leave(worker="w")).sealed(0), None, 1)


def test_a_sealed_first_frame_is_within_the_limit() -> None:
    assert max(map(len, FRAMES)) <= MAX_FRAME_BYTES


MAX_KEPT = 4
ROOM_BYTES = NEVER_KEPT_BYTES + 2**20
"""What the C library gives back to the kernel at once."""


def test_memory_comes_back_when_its_last_view_is_gone_and_not_before() -> None:
    buffers = BufferPool()
    first = buffers.take(ROOM_BYTES)
    address = first.ctypes.data
    assert address % 64 == 0
    first[:] = 7
    in_jax = jax.device_put(first)  # XLA takes it as it is
    assert in_jax.unsafe_buffer_pointer() == address
    view = first[100:200].view(np.uint32)
    del first
    second = buffers.take(ROOM_BYTES)
    assert second.ctypes.data != address
    second[:] = 0
    assert view[0] == 0x07070707
    del view
    gc.collect()
    assert buffers.take(ROOM_BYTES).ctypes.data != address
    assert int(in_jax[0]) == 7
    in_jax.delete()
    del in_jax
    gc.collect()
    again = {buffers.take(ROOM_BYTES).ctypes.data for _ in range(MAX_KEPT)}
    assert address in again


def test_little_memory_is_kept() -> None:
    before = psutil.Process().memory_info().rss
    buffers = BufferPool(max_idle_bytes=MAX_KEPT * ROOM_BYTES)
    many = [buffers.take(ROOM_BYTES) for _ in range(2 * MAX_KEPT)]
    for n in range(len(many)):
        many[n][:] = 1
    many.clear()
    gc.collect()
    kept = psutil.Process().memory_info().rss - before
    assert kept <= (MAX_KEPT + 1) * ROOM_BYTES
    with pytest.raises(MemoryError):
        buffers.take(2**60)


PIECES = """
import resource
from flowml_runtime.transport.buffers import keep_freed_memory
from flowml_runtime.transport.framing import PIECE_BYTES

keep_freed_memory()
pieces = memoryview(bytearray(8 * PIECE_BYTES))

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [bytes(pieces[start : start + PIECE_BYTES]) for start in range(0, len(pieces), PIECE_BYTES)]
    assert len(held) == 8
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(min(faults() for _ in range(5)), len(pieces) // resource.getpagesize())
"""


def test_pieces_do_not_fault_in_new_pages() -> None:
    """In a process of its own: where the C library has memory to spare depends on all that went before."""
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, "-c", PIECES], env=environment, capture_output=True, text=True, check=True)
    faults, pages = map(int, done.stdout.split())
    assert faults < pages // 8
