"""Filters that send every element with fewer bits, or the factors of a matrix: quantisation, signs and low rank."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any, ClassVar

import msgspec
import numpy as np

from flowml.arguments import flag
from flowml.errors import PolicyError
from flowml.numbers import whole
from flowml.policy.filters.base import Added, Array, Context, Filter, Form, Role, Run, magnitudes, on_numpy, wide

BITS = (8, 4, 2, 1)
BLOCK = 256
"""Elements that share a scale. The scales add 32 / 256 bits to each element."""

_CODES = np.dtype(np.uint8)
_TINY = 2.0**-100
"""Arrays without larger magnitudes are zero, so that no distance between two levels is subnormal."""

_ONE = 2**16
"""The distance between two levels, where rounding is stochastic."""


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

    of_factors = True
    call: ClassVar[str] = "quantise"
    gives: ClassVar[frozenset[Role]] = frozenset({"codes"})

    def __post_init__(self) -> None:
        super().__post_init__()
        bits, block = whole(self.bits), whole(self.block)
        if bits not in BITS:
            raise PolicyError(f"quantise({self.bits!r}): give 8, 4, 2 or 1 bits")
        if block is None or block < 0:
            raise PolicyError(f"quantise(block={self.block!r}): give a number of elements, or 0 for the whole array")
        if block == 1:
            raise PolicyError(
                f"quantise({self.bits}, block=1): each element would have a scale of its own, so nothing is smaller; "
                f"leave block out, which is {BLOCK}, or give 0 for the whole array"
            )
        msgspec.structs.force_setattr(self, "stochastic", flag("stochastic", self.stochastic))
        msgspec.structs.force_setattr(self, "bits", bits)
        msgspec.structs.force_setattr(self, "block", block)

    def contracts(self) -> bool:
        return not self.stochastic or 0 < self.block < 4 * (2 ** (self.bits - 1) - 1) ** 2

    def layout(self, form: Form) -> tuple[Form, ...] | None:
        if not form.size:
            return None
        codes = Form((-(-form.size * self.bits // 8),), _CODES, "codes", form.exact)
        return codes, Form((_rows(form.size, self.block),), _wider(form.dtype), "codes", form.exact)

    def encode(self, value: Array, state: Array | None, context: Context) -> tuple[list[Array], Array | None]:
        flat = wide(value).reshape(-1)
        noise = context.rng().integers(0, _ONE, flat.size, np.uint16) if self.stochastic else None
        with np.errstate(invalid="ignore"):  # a value that is not finite comes back as NaN
            fitted = self.stochastic and context.feedback
            return list(context.run(quantised, flat, noise, bits=self.bits, block=self.block, fitted=fitted)), None

    def decode(self, parts: Sequence[Array], form: Form, run: Run = on_numpy) -> Array:
        values = run(dequantised, *parts, bits=self.bits, block=self.block, size=form.size)
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
    exact: ClassVar[bool] = False
    additive: ClassVar[bool] = True

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
        left, right, after = context.run(power_step, matrix, basis.astype(matrix.dtype), exact=False)
        return [left.astype(value.dtype, copy=False), right.astype(value.dtype, copy=False)], after

    def decode(self, parts: Sequence[Array], form: Form, run: Run = on_numpy) -> Array:
        return run(product, *map(wide, parts), exact=False).astype(form.dtype, copy=False).reshape(form.shape)

    def add_up(self, value: Array, state: Array | None, context: Context) -> Generator[Array, Array, Added]:
        matrix = wide(value).reshape(_matrix(value.shape))
        rows, columns = matrix.shape
        basis = orthonormal(context.uniform((columns, self.rank), matrix.dtype)) if state is None else state
        spare = partial(context.uniform, dtype=matrix.dtype)
        left = orthonormal(wide((yield (matrix @ basis).astype(value.dtype))), spare((rows, self.rank)))
        own = (matrix.T @ left).astype(value.dtype)
        right = yield own

        def decoded(right: Array) -> Array:
            return outer_product(left, wide(right)).astype(value.dtype, copy=False).reshape(value.shape)

        after = orthonormal(wide(right), spare((columns, self.rank)))
        return Added(partial(decoded, own), partial(decoded, right), after)


def quantised(flat: Any, noise: Any, *, bits: int, block: int, fitted: bool = False, xp: Any) -> tuple[Any, Any]:
    """The packed codes, of `bits` bits for each element, and a scale for each block.

    `noise`, a random number below 2^16 for each element, makes rounding stochastic; None: to the nearest level.
    `fitted` takes the scale with which these levels are nearest to the elements.
    """
    rows = _blocks(flat, block, xp)
    largest = xp.max(magnitudes(rows), axis=1).view(flat.dtype)
    finite = xp.isfinite(largest)
    if xp is not np or not finite.all():
        rows = xp.where(finite[:, None], rows, 0)  # no number is the code of NaN or infinity; the scale says NaN
    if bits == 1 and noise is None:
        counts = np.float32(1) / _counts(flat.size, rows.shape)
        codes, scale = ~xp.signbit(rows), _sums(xp.abs(rows), xp) * counts.astype(flat.dtype)
    else:
        levels = max(2 ** (bits - 1) - 1, 1)
        scale = largest * flat.dtype.type(1 / levels)
        steps = rows * (_ONE / xp.where(largest > _TINY, scale, 1))[:, None]  # 1 / scale may be subnormal
        codes = _levels(steps, None if noise is None else _blocks(noise, block, xp), bits, levels, xp)
        if fitted:
            signed = codes.astype(np.int32) * 2 - 1 if bits == 1 else codes.astype(np.int32) - levels
            inside = np.arange(rows.size).reshape(rows.shape) < flat.size
            scale = _nearest_scale(rows, xp.where(inside, signed, 0), scale, bits, xp)
    scale = xp.where(finite, xp.where(largest > _TINY, scale, 0), xp.nan).astype(flat.dtype)
    return pack(codes.reshape(-1)[: flat.size].astype(_CODES), bits, xp), scale


def _levels(steps: Any, noise: Any, bits: int, levels: int, xp: Any) -> Any:
    """The codes of the elements, which are given in 2^-16 of the distance between two levels."""
    if noise is None:
        return xp.clip(xp.rint(steps * (1 / _ONE)), -levels, levels) + levels
    steps = xp.rint(steps).astype(np.int32)
    if bits == 1:
        return 2 * noise.astype(np.int32) - _ONE < steps
    return xp.clip((steps + noise) >> 16, -levels, levels) + levels


def _nearest_scale(rows: Any, levels: Any, scale: Any, bits: int, xp: Any) -> Any:
    """The scale of each row with which its levels are nearest to it by least squares; `scale` if all levels are 0.

    What is lost is then never larger than the row itself. Products with 1 and with powers of 2 are exact, so NumPy and
    XLA, which may join a product and a sum, give the same bits.
    """
    signed, sizes = xp.where(levels < 0, -rows, rows), xp.abs(levels)
    common = sum(_sums(xp.where((sizes >> bit) & 1 == 1, signed, 0), xp) * 2**bit for bit in range(bits))
    squares = _sums((levels * levels).astype(rows.dtype), xp)
    fits = (squares > 0) & xp.isfinite(common)  # a sum of huge elements may overflow
    return xp.where(fits, common / xp.where(fits, squares, 1), scale)


def dequantised(packed: Any, scales: Any, *, bits: int, block: int, size: int, xp: Any) -> Any:
    """The values of packed codes."""
    codes = unpack(packed, bits, size, xp).astype(scales.dtype)
    levels = codes * 2 - 1 if bits == 1 else codes - (2 ** (bits - 1) - 1)
    return (_blocks(levels, block, xp) * scales[:, None]).reshape(-1)[:size]


def pack(codes: Any, bits: int, xp: Any = np) -> Any:
    """Codes of `bits` bits, packed into bytes from the lowest bits up."""
    each = 8 // bits
    rows = xp.pad(codes, (0, -codes.size % each)).reshape(-1, each) if codes.size % each else codes.reshape(-1, each)
    packed = rows[:, 0]
    for i in range(1, each):
        packed = packed | (rows[:, i] << np.uint8(bits * i))
    return packed


def unpack(packed: Any, bits: int, size: int, xp: Any = np) -> Any:
    """The first `size` codes of what `pack` has packed."""
    codes = [(packed >> np.uint8(bits * i)) & np.uint8(2**bits - 1) for i in range(8 // bits)]
    return xp.stack(codes, axis=1).reshape(-1)[:size] if bits < 8 else packed[:size]


def power_step(matrix: Any, basis: Any, *, xp: Any) -> tuple[Any, Any, Any]:
    """Factors P and Q of the projection P Pᵀ M, where P spans M times the basis, and the basis for the next step.

    The next basis spans Q. Both are orthonormal also where M has a smaller rank, so no direction is lost for good.
    """
    left, _ = xp.linalg.qr(matrix @ basis)
    right = matrix.T @ left
    after, _ = xp.linalg.qr(right)
    return left, right, after


def orthonormal(columns: Array, spare: Array | None = None) -> Array:
    """Orthonormal columns that span these, and a `spare` one in place of each that depends on those before it.

    Gram-Schmidt, with elementwise operations and sums in pairs alone: the bits do not depend on the machine, as those
    of a QR decomposition do.
    """
    rows = np.array(columns.T, order="C")  # a copy: the columns may be others' too
    for i in range(len(rows)):
        row = _orthogonal(rows[i], rows[:i])
        if row is None and spare is not None:
            row = _orthogonal(np.ascontiguousarray(spare[:, i]), rows[:i])
        rows[i] = 0 if row is None else row
    return np.ascontiguousarray(rows.T)


def _orthogonal(row: Array, others: Array) -> Array | None:
    """The part of a row that is orthogonal to others, of length 1; None if it is nothing but rounding errors."""
    largest = np.max(np.abs(row), initial=0)
    if largest == 0:
        return None
    row = row / largest  # its square does not overflow
    size = _length(row)
    for _ in range(2):  # the second time for what rounding has left
        for other in others:
            row = row - other * _dot(other, row)
    left = _length(row)
    return None if left <= 64 * np.finfo(row.dtype).eps * size else row / left


def _dot(a: Array, b: Array) -> Any:
    return _sums((a * b)[None], np)[0]


def _length(row: Array) -> Any:
    return np.sqrt(_dot(row, row))


def outer_product(left: Array, right: Array) -> Array:
    """The matrix of two factors, added up column by column: the bits do not depend on the machine."""
    total = left[:, :1] * right[:, 0]
    for i in range(1, left.shape[1]):
        total += left[:, i : i + 1] * right[:, i]
    return total


def product(left: Any, right: Any, *, xp: Any) -> Any:
    """The matrix of two factors."""
    return xp.matmul(left, right.T)


def most_rank(shape: tuple[int, ...]) -> int:
    """The largest rank with which the factors of an array are smaller than it; 0 if there is none."""
    rows, columns = _matrix(shape)
    return max(0, (rows * columns - 1) // (rows + columns))


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
    missing = rows * width - flat.size
    return (xp.pad(flat, (0, missing)) if missing else flat).reshape(rows, width)


def _counts(size: int, shape: tuple[int, int]) -> Array:
    """The number of elements in each row."""
    rows, width = shape
    return np.minimum(np.full(rows, width), size - np.arange(rows) * width).astype(np.float32)


def _sums(rows: Any, xp: Any) -> Any:
    """The sum of each row, added up in pairs: the order does not depend on who adds."""
    while rows.shape[1] > 1:
        width = rows.shape[1]
        rows = rows if width % 2 == 0 else xp.pad(rows, ((0, 0), (0, 1)))
        half = rows.shape[1] // 2
        rows = rows[:, :half] + rows[:, half:]
    return rows[:, 0]
