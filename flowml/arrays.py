"""Defines the shape and element type of arrays, as plans and messages name them. Imports no JAX."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import numpy as np

Dimension = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
Index = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Shape = Annotated[tuple[Dimension, ...], msgspec.Meta(max_length=64)]
"""The rank is at most NumPy's. Without a bound, multiplying the dimensions of a hostile shape would take hours."""


class ArraySpec(msgspec.Struct, frozen=True):
    """Shape and element type of one array.

    `dtype` is a NumPy or ml_dtypes name (`"float32"`, `"bfloat16"`), or such as `"key<fry>"` for typed PRNG keys.
    The buffer of keys holds their uint32 key data; `shape` is the shape of the key array.
    """

    shape: Shape
    dtype: Annotated[str, msgspec.Meta(max_length=32)]
    weak_type: bool = False

    @property
    def nbytes(self) -> int:
        """Size in bytes of the array's buffer as it is sent."""
        return math.prod(self.shape) * _item_bytes(self.dtype)


TOKEN = ArraySpec((0,), "bool")
"""The type of a token: a value without content, which says that an effect has happened. A node with an effect makes
one. If the effect is ordered, the node also reads the token of the one before it."""

KEY_WORDS: Mapping[str, int] = {"fry": 2, "rbg": 4, "urbg": 4}
"""The number of uint32 words in a key of each PRNG implementation, by the short name in its dtype."""


@functools.lru_cache
def name_of(dtype: np.dtype[Any]) -> str:
    """The name of a dtype, which NumPy makes anew each time."""
    return dtype.name


def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype of NumPy or ml_dtypes with this name."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))


@functools.lru_cache(maxsize=256)
def _item_bytes(dtype: str) -> int:
    if dtype.startswith("key<"):
        return 4 * KEY_WORDS[dtype[4:-1]]
    if dtype == "float0":
        return 1
    return dtype_of(dtype).itemsize


def unheard() -> np.errstate:
    """NumPy is silent about infinity minus infinity in the block. Whether values are finite is asked where they are
    sent and applied, and not by warnings, which would come from a thread of the library."""
    return np.errstate(invalid="ignore")
