"""Filters that lose nothing: the key cache sends unchanged keys once, compress packs bytes."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from typing import ClassVar

import msgspec
import numpy as np

from flowml.errors import PolicyError
from flowml.numbers import whole
from flowml.policy.filters.base import Array, Context, EncodingError, Filter, Form, Role, Run, on_numpy

_DIGEST = np.dtype(np.uint64)
_BYTE = np.dtype(np.uint8)
_RAW, _PACKED = 0, 1


class KeyCache(Filter, frozen=True):
    """Sends a digest instead of keys that are those of the last push (Li et al., *Parameter Server*, OSDI 2014)."""

    call: ClassVar[str] = "key_cache"
    takes: ClassVar[Role | None] = "keys"
    gives: ClassVar[frozenset[Role]] = frozenset({"codes"})
    lossless: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    def layout(self, form: Form) -> tuple[Form, ...] | None:
        return Form((1,), _DIGEST, "codes"), Form(form.shape, form.dtype, "codes", exact=False)

    def encode(self, value: Array, state: Array | None, context: Context) -> tuple[list[Array], Array | None]:
        known = state is not None and np.array_equal(state, value)
        return [_digest(value), value[:0] if known else value], value

    def recall(
        self, parts: Sequence[Array], form: Form, memory: Array | None, run: Run = on_numpy
    ) -> tuple[Array, Array | None]:
        digest, keys = parts
        for candidate in (keys, memory):
            if candidate is not None and np.array_equal(_digest(candidate), digest):
                return candidate, candidate
        raise EncodingError("keys are named that have not been sent before")


class Compress(Filter, frozen=True):
    """Compresses the bytes of each array with zlib, the most significant bytes of all elements first.

    Bytes that do not become fewer are sent as they are. `level` is from 1, fast, to 9, small.
    """

    level: int = 1

    call: ClassVar[str] = "compress"
    takes: ClassVar[Role | None] = None
    gives: ClassVar[frozenset[Role]] = frozenset()
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        level = whole(self.level)
        if level is None or not 1 <= level <= 9:
            raise PolicyError(f"compress({self.level!r}): the level is an int from 1 to 9")
        msgspec.structs.force_setattr(self, "level", level)

    def layout(self, form: Form) -> tuple[Form, ...] | None:
        return (Form((form.nbytes + 1,), _BYTE, "codes", exact=False),) if form.size else None

    def encode(self, value: Array, state: Array | None, context: Context) -> tuple[list[Array], Array | None]:
        planes = np.ascontiguousarray(_bytes(value).reshape(-1, value.dtype.itemsize).T)
        packed = zlib.compress(planes.data, self.level)
        kind, body = (
            (_PACKED, np.frombuffer(packed, _BYTE)) if len(packed) < planes.size else (_RAW, planes.reshape(-1))
        )
        return [np.concatenate([np.array([kind], _BYTE), body])], None

    def decode(self, parts: Sequence[Array], form: Form, run: Run = on_numpy) -> Array:
        (sent,) = parts
        if not sent.size or sent[0] not in (_RAW, _PACKED):
            raise EncodingError("compressed bytes do not begin with their kind")
        planes = sent[1:] if sent[0] == _RAW else _decompressed(sent[1:], form.nbytes)
        width = form.dtype.itemsize
        if planes.size % width or planes.size > form.nbytes or (form.exact and planes.size != form.nbytes):
            raise EncodingError(f"{planes.size} bytes came for an array of {form.shape} {form.dtype}")
        flat = np.ascontiguousarray(planes.reshape(width, -1).T).reshape(-1).view(form.dtype)
        return flat.reshape(form.shape) if form.exact else flat


def _digest(keys: Array) -> Array:
    return np.frombuffer(hashlib.blake2b(np.ascontiguousarray(keys).data, digest_size=8).digest(), _DIGEST)


def _bytes(value: Array) -> Array:
    return np.ascontiguousarray(value).reshape(-1).view(_BYTE)


def _decompressed(packed: Array, most: int) -> Array:
    """The bytes, of which there may be at most `most`. Memory is bounded by `most` too."""
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(np.ascontiguousarray(packed).data, most + 1)
    except zlib.error as error:
        raise EncodingError(f"compressed bytes are damaged: {error}") from None
    if not stream.eof or stream.unused_data:
        raise EncodingError(f"compressed bytes do not end within {most} bytes")
    return np.frombuffer(data, _BYTE)
