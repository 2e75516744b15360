"""Filters that send every element with fewer bits, or the factors of a matrix: quantisation, signs and low rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec
import numpy as np

from flowml.errors import PolicyError
from flowml.numbers import whole
from flowml.policy.filters.base import Array, Context, Filter, Form, Role, wide

BITS = (8, 4, 2, 1)
BLOCK = 256
"""Elements that share a scale. The scales add 32 / 256 bits to each element."""

_CODES = np.dtype(np.uint8)


class Quantise(Filter, frozen=True):
    """Sends each element as one of 2^bits - 1 equidistant levels (1 bit: of two), and a scale for each `block` of them
    (Alistarh et al., *QSGD*, 2017; with one bit Seide et al., 2014). A block of 0 is the whole array.

    The levels reach from minus to plus the largest magnitude of the block. Rounding is to the nearest level, or
    `stochastic`: up or down at random so that the expectation is the element. The two levels of one bit are the mean
    magnitude, which is nearest, or the largest if `stochastic`.
    """

    bits: int
    stochastic: bool = False
    block: int = BLOCK

    call: ClassVar[str] = "quantise"
    gives: ClassVar[frozenset[Role]] = frozenset({"codes"})

    def __post_init__(self) -> None:
        super().__post_init__()
        bits, block = whole(self.bits), whole(self.block)
        if bits not in BITS:
            raise PolicyError(f"quantise({self.bits!r}): give 8, 4, 2 or 1 bits")
        if block is None or block < 0:
            raise PolicyError(f"quantise(block={self.block!r}): give a number of elements, or 0 for the whole array")
        msgspec.structs.force_setattr(self, "bits", bits)
        msgspec.structs.force_setattr(self, "block", block)

    def layout(self, form: Form) -> tuple[Form, ...] | None:
        if not form.size:
            return None
        codes = Form((-(-form.size * self.bits // 8),), _CODES, "codes", form.exact)
        return codes, Form((_rows(form.size, self.block),), _wider(form.dtype), "codes", form.exact)

    def encode(self, value: Array, state: Array | None, context: Context) -> tuple[list[Array], Array | None]:
        flat = wide(value).reshape(-1)
        noise = context.rng().random(flat.size, np.float32) if self.stochastic else None
        with np.errstate(invalid="ignore"):  # a value that is not finite comes back as NaN
            codes, scales = quantised(flat, self.bits, self.block, noise)
        return [pack(codes, self.bits), scales], None

    def decode(self, parts: Sequence[Array], form: Form) -> Array:
        codes = unpack(parts[0], self.bits, form.size)
        values = dequantised(codes, parts[1], self.bits, self.block)
        return values.astype(form.dtype, copy=False).reshape(form.shape)


class LowRank(Filter, frozen=True):
    """Sends the factors of an approximation of rank `rank`, made by one power step from the last factors (Vogels et
    al., *PowerSGD*, 2019). An array is a matrix of all its dimensions by its last one.

    Arrays whose factors would not be smaller, vectors among them, pass unchanged.
    """

    rank: int

    call: ClassVar[str] = "low_rank"
    gives: ClassVar[frozenset[Role]] = frozenset({"values"})
    first: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        rank = whole(self.rank)
        if rank is None or rank < 1:
            raise PolicyError(f"low_rank({self.rank!r}): the rank is an int of at least 1")
        msgspec.structs.force_setattr(self, "rank", rank)

    def layout(self, form: Form) -> tuple[Form, ...] | None:
        rows, columns = _matrix(form.shape)
        if self.rank * (rows + columns) >= rows * columns:
            return None
        return Form((rows, self.rank), form.dtype), Form((columns, self.rank), form.dtype)

    def encode(self, value: Array, state: Array | None, context: Context) -> tuple[list[Array], Array | None]:
        rows, columns = _matrix(value.shape)
        matrix = wide(value).reshape(rows, columns)
        basis = context.rng().standard_normal((columns, self.rank)) if state is None else state
        left, right, after = power_step(matrix, basis.astype(matrix.dtype))
        return [left.astype(value.dtype, copy=False), right.astype(value.dtype, copy=False)], after

    def decode(self, parts: Sequence[Array], form: Form) -> Array:
        left, right = map(wide, parts)
        return (left @ right.T).astype(form.dtype, copy=False).reshape(form.shape)


def quantised(flat: Any, bits: int, block: int, noise: Any = None, xp: Any = np) -> tuple[Any, Any]:
    """A code below 2^bits for each element, and a scale for each block. `noise` in [0, 1) makes rounding stochastic.

    `xp` is the array namespace.
    """
    rows = _blocks(flat, block, xp)
    size = xp.abs(rows)
    largest = xp.max(size, axis=1)
    if bits == 1 and noise is None:
        count = _counts(flat.size, rows.shape, xp)
        scale = xp.sum(size, axis=1) / count
        codes = rows >= 0
    else:
        levels = max(2 ** (bits - 1) - 1, 1)
        scale = largest / levels
        steps = rows / xp.where(scale > 0, scale, 1)[:, None]
        if bits == 1:
            codes = _blocks(noise, block, xp) < (steps + 1) / 2
        else:
            steps = xp.rint(steps) if noise is None else xp.floor(steps + _blocks(noise, block, xp))
            codes = xp.clip(steps, -levels, levels) + levels
    return codes.reshape(-1)[: flat.size].astype(_CODES), xp.where(xp.isfinite(largest), scale, xp.nan).astype(
        flat.dtype
    )


def dequantised(codes: Any, scales: Any, bits: int, block: int, xp: Any = np) -> Any:
    """The values of codes."""
    levels = codes.astype(scales.dtype) * 2 - 1 if bits == 1 else codes.astype(scales.dtype) - (2 ** (bits - 1) - 1)
    return (_blocks(levels, block, xp) * scales[:, None]).reshape(-1)[: codes.size]


def pack(codes: Array, bits: int) -> Array:
    """Codes of `bits` bits, packed into bytes from the lowest bits up."""
    each = 8 // bits
    padded = codes if codes.size % each == 0 else np.pad(codes, (0, -codes.size % each))
    packed = padded[::each].copy()
    for i in range(1, each):
        packed |= padded[i::each] << np.uint8(bits * i)
    return packed


def unpack(packed: Array, bits: int, size: int) -> Array:
    each = 8 // bits
    codes = np.empty(packed.size * each, _CODES)
    for i in range(each):
        codes[i::each] = (packed >> np.uint8(bits * i)) & np.uint8(2**bits - 1)
    return codes[:size]


def power_step(matrix: Any, basis: Any, xp: Any = np) -> tuple[Any, Any, Any]:
    """Factors P and Q of the projection P Pᵀ M, where P spans M times the basis, and the basis for the next step.

    The next basis spans Q. Both are orthonormal also where M has a smaller rank, so no direction is lost for good.
    """
    left, _ = xp.linalg.qr(matrix @ basis)
    right = matrix.T @ left
    after, _ = xp.linalg.qr(right)
    return left, right, after


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _wider(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _rows(size: int, block: int) -> int:
    return -(-size // block) if block else 1


def _blocks(flat: Any, block: int, xp: Any) -> Any:
    """The elements as rows of one block each. The last row ends with zeros."""
    rows = _rows(flat.size, block)
    width = block or flat.size
    return xp.pad(flat, (0, rows * width - flat.size)).reshape(rows, width)


def _counts(size: int, shape: tuple[int, int], xp: Any) -> Any:
    """The number of elements in each row."""
    rows, width = shape
    return xp.minimum(xp.full(rows, width), size - xp.arange(rows) * width).astype(np.float32)
