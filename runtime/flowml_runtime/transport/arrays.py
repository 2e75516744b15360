"""Converts arrays to and from wire buffers, which XLA can use without a copy.

A wire buffer is a C-ordered NumPy array of the spec's shape and dtype, except that a typed PRNG key is sent as its
uint32 key data and `float0` as bool. Only the dtypes listed here can be sent: NumPy would accept any dtype string from
the wire, including object dtypes.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import ml_dtypes
import numpy as np

from flowml.arrays import KEY_WORDS, ArraySpec

Array = Any
"""np.ndarray or jax.Array"""

Buffer = np.ndarray[Any, Any]

ALIGNMENT = 64
"""Bytes. XLA uses a CPU buffer of this alignment without a copy and copies any other."""

_NUMPY = (
    "bool",
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
_ML_DTYPES = (
    *("bfloat16", "int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz"),
    *("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)

_DTYPES: dict[str, np.dtype[Any]] = {
    **{name: np.dtype(name) for name in _NUMPY},
    **{name: np.dtype(getattr(ml_dtypes, name)) for name in _ML_DTYPES},
    "float0": np.dtype(np.bool_),
}


@functools.lru_cache(maxsize=4096)
def wire_layout(spec: ArraySpec) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """(shape, dtype, bytes) of the buffer for `spec`. Raises ValueError for a dtype that cannot be sent."""
    shape, name = spec.shape, spec.dtype
    if name.startswith("key<") and name[4:-1] in KEY_WORDS:
        shape, name = (*shape, KEY_WORDS[name[4:-1]]), "uint32"
    dtype = _DTYPES.get(name)
    if dtype is None:
        raise ValueError(f"arrays of dtype {spec.dtype!r} cannot be sent; use {', '.join(_DTYPES)} or keys")
    return shape, dtype, math.prod(shape) * dtype.itemsize


def aligned_empty(nbytes: int) -> Buffer:
    """Uninitialised bytes that begin at a multiple of 64."""
    room = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + nbytes]


def own_copy(array: Array, dtype: Any) -> Buffer:
    """A C-ordered buffer with the values of `array`. It shares no memory with `array`, which its owner may change."""
    buffer = np.asarray(array, dtype, order="C")
    if not np.may_share_memory(buffer, np.asarray(array)):
        return buffer
    copy = aligned_empty(buffer.nbytes).view(buffer.dtype).reshape(buffer.shape)
    copy[...] = buffer
    return copy


def to_wire(array: Array, spec: ArraySpec) -> Buffer:
    """The buffer to send for `array`: a view if its memory is C-ordered, else a copy.

    Waits until a `jax.Array` is computed. Raises ValueError if the array does not match `spec`.
    """
    shape, dtype, _ = wire_layout(spec)
    if spec.dtype.startswith("key<") and str(getattr(array, "dtype", "")).startswith("key<"):
        import jax

        array = jax.random.key_data(array)
    buffer = np.asarray(array)
    if spec.dtype == "float0":
        buffer = np.zeros(buffer.shape, np.bool_)
    if buffer.shape != shape or buffer.dtype != dtype:
        found = f"{buffer.dtype.name}{list(buffer.shape)}"
        raise ValueError(f"an array {found} cannot be sent as {spec.dtype}{list(spec.shape)}")
    return buffer if buffer.flags.c_contiguous else np.ascontiguousarray(buffer)


def as_bytes(buffer: Buffer) -> Buffer:
    """A C-ordered buffer's bytes, without a copy."""
    return buffer.reshape(-1).view(np.uint8)


def shaped(data: Buffer, spec: ArraySpec) -> Buffer:
    """A view of bytes as the wire buffer of `spec`, without a copy."""
    shape, dtype, _ = wire_layout(spec)
    return data.view(dtype).reshape(shape)
