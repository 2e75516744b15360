"""Filters that send some elements of an array: top-k, random-k, random skip, significance, KKT.

`top_k`, `significance` and `kkt` choose by value, so they send *keys* beside the chosen values: 32-bit positions in
ascending order, or a bit for each element where that takes less. The receiver tells them apart by their length.
`random_k` and `random_skip` choose by a seed, which the receiver repeats.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np

from flowml.errors import PolicyError
from flowml.policy.filters.base import (
    Added,
    Array,
    Context,
    EncodingError,
    Filter,
    Form,
    Role,
    Run,
    magnitudes,
    on_numpy,
    real,
    share,
    wide,
)
from flowml.policy.wording import is_one_of

_WORD = np.dtype(np.uint32)
_SEED = np.dtype(np.uint64)
_ROUNDING = 1e-9  # a third of three elements is one, although binary fractions are not exact


def kept(share: int | float, size: int) -> int:
    """How many of `size` elements a count or a share, rounded up, keeps: at least one."""
    count = share if isinstance(share, int) else math.ceil(share * size - _ROUNDING)
    return min(max(count, 1), size)


def words(size: int) -> int:
    """The number of 32-bit words of a bit for each of `size` elements."""
    return -(-size // 32)


def largest(flat: Any, *, count: int, xp: Any) -> Any:
    """The positions of the `count` elements of largest magnitude, in ascending order.

    NaN counts as infinite. Of equal magnitudes those at lower positions are taken.
    """
    infinite, least = map(magnitudes, np.array((np.inf, np.finfo(flat.dtype).tiny), flat.dtype))
    order = xp.minimum(magnitudes(flat), infinite)
    order = xp.where(order >= least, order, 0)
    if xp is not np:
        return xp.sort(xp.top_k(order.view(flat.dtype), count)[1])
    limit = np.partition(order, flat.size - count)[flat.size - count]
    chosen = order > limit
    equal = np.flatnonzero(order == limit)
    chosen[equal[: count - int(np.count_nonzero(chosen))]] = True
    return np.flatnonzero(chosen)


def pack_keys(positions: Array, size: int) -> Array:
    """Ascending positions below `size`, as themselves or as bits, whichever is shorter."""
    if positions.size < words(size):
        return positions.astype(_WORD)
    mask = np.zeros(words(size) * 32, np.bool_)
    mask[positions] = True
    return np.packbits(mask).view(_WORD)


def unpack_keys(keys: Array, size: int) -> Array:
    """The positions that `pack_keys` has packed. Raises EncodingError if they are not ascending and below `size`."""
    if keys.size < words(size):
        positions = keys.astype(np.int64)
        if positions.size and (positions[-1] >= size or bool((np.diff(positions) <= 0).any())):
            raise EncodingError(f"keys are not ascending positions in an array of {size} elements")
        return positions
    positions = np.flatnonzero(np.unpackbits(np.ascontiguousarray(keys).view(np.uint8)))
    if positions.size and positions[-1] >= size:
        raise EncodingError(f"keys name an element beyond the {size} of the array")
    return positions


def _gather(flat: Array, positions: Array, form: Form) -> list[Array]:
    return [pack_keys(np.asarray(positions), form.size), flat[positions].astype(form.dtype, copy=False)]


def _scatter(positions: Array, values: Array, form: Form, run: Run = on_numpy) -> Array:
    if positions.size != values.size:
        raise EncodingError(f"{values.size} values came for {positions.size} elements")
    return run(scattered, positions, values, size=form.size).astype(form.dtype, copy=False).reshape(form.shape)


def scattered(positions: Any, values: Any, *, size: int, xp: Any) -> Any:
    """Zeros, and the values at their positions."""
    whole = xp.zeros(size, values.dtype)
    if xp is not np:
        return whole.at[positions].set(values)
    whole[positions] = values
    return whole


class TopK(Filter, frozen=True):
    """Sends the elements of largest magnitude (Aji & Heafield, 2017; Lin et al., *Deep gradient compression*, 2018)."""

    share: int | float
    counted: bool = False
    """Makes top_k(1), one element, differ from top_k(1.0), all of them. Set by `share`."""

    call: ClassVar[str] = "top_k"
    gives: ClassVar[frozenset[Role]] = frozenset({"keys", "values"})

    def __post_init__(self) -> None:
        super().__post_init__()
        msgspec.structs.force_setattr(self, "share", share(self.call, self.share))
        msgspec.structs.force_setattr(self, "counted", isinstance(self.share, int))

    def layout(self, form: Form) -> tuple[Form, ...] | None:
        if not form.size:
            return None
        count = kept(self.share, form.size)
        keys = Form((min(count, words(form.size)),), _WORD, "keys", form.exact)
        return keys, Form((count,), form.dtype, "values", form.exact)

    def encode(self, value: Array, state: Array | None, context: Context) -> tuple[list[Array], Array | None]:
        flat, form = wide(value).reshape(-1), Form(value.shape, value.dtype)
        return _gather(flat, context.run(largest, flat, count=kept(self.share, flat.size)), form), None

    def decode(self, parts: Sequence[Array], form: Form, run: Run = on_numpy) -> Array:
        return _scatter(unpack_keys(parts[0], form.size), parts[1], form, run)

    def count(self, parts: Sequence[Array], form: Form) -> int:
        return kept(self.share, form.size)


class _Compared(Filter, frozen=True):
    """Base of the filters that compare each element with its parameter, and send as many as are chosen."""

    gives: ClassVar[frozenset[Role]] = frozenset({"keys", "values"})
    first: ClassVar[bool] = True
    compares: ClassVar[bool] = True

    def chosen(self, flat: Array, parameter: Array, context: Context) -> Array:
        """Whether to send each element."""
        raise NotImplementedError

    def layout(self, form: Form) -> tuple[Form, ...] | None:
        if not form.size:
            return None
        return Form((words(form.size),), _WORD, "keys", exact=False), Form((form.size,), form.dtype, exact=False)

    def encode(self, value: Array, state: Array | None, context: Context) -> tuple[list[Array], Array | None]:
        if context.parameter is None or context.parameter.shape != value.shape:
            raise ValueError(f"{self} compares with the parameter, which has to have the shape {value.shape}")
        flat, parameter = wide(value).reshape(-1), wide(context.parameter).reshape(-1)
        positions = np.flatnonzero(np.asarray(self.chosen(flat, parameter, context)))
        return _gather(np.asarray(flat), positions, Form(value.shape, value.dtype)), None

    def decode(self, parts: Sequence[Array], form: Form, run: Run = on_numpy) -> Array:
        return _scatter(unpack_keys(parts[0], form.size), parts[1], form)

    def count(self, parts: Sequence[Array], form: Form) -> int:
        return int(unpack_keys(parts[0], form.size).size)


def significant(flat: Any, parameter: Any, limit: Any, *, xp: Any) -> Any:
    """Whether each element is larger than `limit` times its parameter."""
    size = xp.abs(flat)
    return (size > limit * xp.abs(parameter)) & (size >= np.finfo(flat.dtype).tiny)


def uncancelled(flat: Any, parameter: Any, limit: Any, *, xp: Any) -> Any:
    """Whether a parameter is not zero, or its gradient larger than `limit`."""
    least, size = np.finfo(flat.dtype).tiny, xp.abs(flat)
    return (xp.abs(parameter) >= least) | ((size > limit) & (size >= least))


class Significance(_Compared, frozen=True):
    """Sends the elements that are large relative to their parameter (Hsieh et al., *Gaia*, NSDI 2017).

    At a `threshold` of 0 these are all elements but zeros.
    """

    threshold: float
    decay: Literal["sqrt"] | None = "sqrt"

    call: ClassVar[str] = "significance"

    def __post_init__(self) -> None:
        super().__post_init__()
        threshold = real(self.call, self.threshold, "a threshold such as 0.01")
        if threshold < 0:
            raise PolicyError(f"significance({threshold}): a relative change is not negative; give a threshold above 0")
        if not is_one_of(self.decay, ("sqrt", None)):
            raise PolicyError(f"significance(decay={self.decay!r}): give decay='sqrt' or decay=None")
        msgspec.structs.force_setattr(self, "threshold", threshold)

    def chosen(self, flat: Array, parameter: Array, context: Context) -> Array:
        limit = self.threshold / math.sqrt(context.clock + 1) if self.decay else self.threshold
        return context.run(significant, flat, parameter, flat.dtype.type(limit * context.weight))


class KKT(_Compared, frozen=True):
    """Leaves out gradients that an L1 penalty cancels (Li et al., *Parameter Server*, OSDI 2014)."""

    l1: float

    of_gradients = True
    call: ClassVar[str] = "kkt"

    def __post_init__(self) -> None:
        super().__post_init__()
        l1 = real(self.call, self.l1, "the weight of the L1 penalty")
        if l1 < 0:
            raise PolicyError(f"kkt({l1}): the weight of an L1 penalty is not negative; give a number above 0")
        if l1 == 0:
            raise PolicyError("kkt(0): without a penalty no gradient is cancelled; give a weight above 0, or no filter")
        msgspec.structs.force_setattr(self, "l1", l1)

    def chosen(self, flat: Array, parameter: Array, context: Context) -> Array:
        return context.run(uncancelled, flat, parameter, flat.dtype.type(self.l1 * context.weight))


class _Seeded(Filter, frozen=True):
    """Base of the filters that choose by a seed. What they send is scaled so that its expectation is the array."""

    of_factors = True
    gives: ClassVar[frozenset[Role]] = frozenset({"codes", "values"})

    def positions(self, draws: Array) -> Array:
        """The chosen positions in ascending order, by a random word for each element."""
        raise NotImplementedError

    def kept_of(self, size: int) -> int | None:
        """How many of `size` elements are chosen; None if that is random."""
        raise NotImplementedError

    def layout(self, form: Form) -> tuple[Form, ...] | None:
        if not form.size:
            return None
        count = self.kept_of(form.size)
        exact = form.exact and count is not None
        return Form((1,), _SEED, "codes"), Form((form.size if count is None else count,), form.dtype, exact=exact)

    def encode(self, value: Array, state: Array | None, context: Context) -> tuple[list[Array], Array | None]:
        seed = _seed(context)
        return [seed, self._chosen(value, self.positions(_draws(seed, value.size)), context)], None

    def _chosen(self, value: Array, positions: Array, context: Context) -> Array:
        chosen = wide(value).reshape(-1)[positions]
        chosen = chosen if context.feedback else chosen * self.scale(value.size)
        return chosen.astype(value.dtype, copy=False)

    def add_up(self, value: Array, state: Array | None, context: Context) -> Generator[Array, Array, Added]:
        positions, form = self.positions(_draws(_seed(context), value.size)), Form(value.shape, value.dtype)
        own = self._chosen(value, positions, context)
        total = yield own
        return Added(partial(_scatter, positions, own, form), partial(_scatter, positions, total, form))

    def scale(self, size: int) -> float:
        raise NotImplementedError

    def decode(self, parts: Sequence[Array], form: Form, run: Run = on_numpy) -> Array:
        return _scatter(self.positions(_draws(parts[0], form.size)), parts[1], form)

    def count(self, parts: Sequence[Array], form: Form) -> int:
        count = self.kept_of(form.size)
        return int(self.positions(_draws(parts[0], form.size)).size) if count is None else count


class RandomK(_Seeded, frozen=True):
    """Sends a fixed number of elements chosen at random (Stich et al., *Sparsified SGD with memory*, 2018)."""

    share: int | float
    counted: bool = False
    """Makes random_k(1), one element, differ from random_k(1.0), all of them. Set by `share`."""

    call: ClassVar[str] = "random_k"
    additive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        msgspec.structs.force_setattr(self, "share", share(self.call, self.share))
        msgspec.structs.force_setattr(self, "counted", isinstance(self.share, int))

    def positions(self, draws: Array) -> Array:
        count = kept(self.share, draws.size)
        return np.sort(np.argpartition(draws, count - 1)[:count])

    def kept_of(self, size: int) -> int | None:
        return kept(self.share, size)

    def scale(self, size: int) -> float:
        return size / kept(self.share, size)


class RandomSkip(_Seeded, frozen=True):
    """Sends each element with probability `share` (Li et al., *Communication efficient distributed machine learning
    with the parameter server*, 2014)."""

    share: float

    call: ClassVar[str] = "random_skip"

    def __post_init__(self) -> None:
        super().__post_init__()
        probability = real(self.call, self.share, "a share in (0, 1] such as 0.1")
        if not 0 < probability <= 1:
            raise PolicyError(f"random_skip({probability}): a share lies in (0, 1]")
        msgspec.structs.force_setattr(self, "share", probability)

    def positions(self, draws: Array) -> Array:
        return np.flatnonzero(draws <= np.uint64(min(int(self.share * 2.0**64), 2**64 - 1)))

    def kept_of(self, size: int) -> int | None:
        return None

    def scale(self, size: int) -> float:
        return 1 / self.share


def _seed(context: Context) -> Array:
    return np.random.SeedSequence(context.seed).generate_state(1, np.uint64)


def _draws(seed: Array, size: int) -> Array:
    """`size` random words. NumPy keeps the raw stream of a bit generator the same in all its versions, so sender and
    receiver agree."""
    return np.random.Philox(key=int(seed[0])).random_raw(size)
