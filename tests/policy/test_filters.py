"""Each filter against a deliberately naive version of itself, and what its authors promise of it."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flowml.errors import PolicyError
from flowml.policy import Policy
from flowml.policy import filters as f
from flowml.policy.filters.sparse import kept, pack_keys, unpack_keys
from flowml.policy.kinds import read

Array = np.ndarray[Any, Any]

DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 400)


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def there_and_back(chain: f.Chain, value: Array, **known: Any) -> Array:
    wire, _ = f.encode(chain, value, {}, f.Context(**known))
    arrays = iter(wire)
    decoded, _ = f.decode(chain, arrays, f.Form(value.shape, value.dtype), {})
    assert next(arrays, None) is None
    return decoded


def nonzero(array: Array) -> list[int]:
    return [i for i, x in enumerate(array.ravel().tolist()) if x != 0]


@given(SEEDS, SIZES, st.floats(0.001, 1))
def test_top_k_keeps_the_largest(seed: int, size: int, share: float) -> None:
    value = normal(seed, size)
    count = max(1, math.ceil(share * size - 1e-9))
    order = sorted(range(size), key=lambda i: -abs(value[i]))
    expected = np.zeros_like(value)
    for i in order[:count]:
        expected[i] = value[i]
    np.testing.assert_array_equal(there_and_back([f.top_k(share)], value), expected)


def test_a_count_is_a_number_of_elements() -> None:
    value = normal(0, 7, 5)
    assert len(nonzero(there_and_back([f.top_k(3)], value))) == 3
    assert len(nonzero(there_and_back([f.random_k(4)], value))) == 4
    assert kept(1, 9) == 1
    assert kept(1.0, 9) == 9


@given(SEEDS, SIZES, st.floats(0, 1))
def test_keys_come_back_and_take_the_fewer_bytes(seed: int, size: int, share: float) -> None:
    chosen = np.flatnonzero(np.random.default_rng(seed).random(size) < share)
    keys = pack_keys(chosen, size)
    np.testing.assert_array_equal(unpack_keys(keys, size), chosen)
    assert keys.nbytes == min(4 * len(chosen), 4 * math.ceil(size / 32))


@given(SEEDS, st.integers(1, 60), st.floats(0, 3), st.sampled_from(["sqrt", None]), st.integers(0, 50))
def test_significance_is_relative_to_the_parameter(
    seed: int, size: int, threshold: float, decay: Any, clock: int
) -> None:
    value, parameter = normal(seed, size), normal(seed + 1, size)
    parameter[: size // 3] = 0
    limit = threshold / math.sqrt(clock + 1) if decay else threshold
    expected = [v if abs(v) > np.float32(limit) * abs(p) else 0 for v, p in zip(value, parameter, strict=True)]
    found = there_and_back([f.significance(threshold, decay)], value, clock=clock, parameter=parameter)
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


@given(SEEDS, st.integers(1, 60), st.floats(0, 2, exclude_min=True), st.integers(1, 8))
def test_kkt_leaves_out_what_the_penalty_cancels(seed: int, size: int, l1: float, weight: int) -> None:
    value, parameter = normal(seed, size) * weight, normal(seed + 1, size)
    parameter[::2] = 0
    expected = value.copy()
    for i in range(size):
        if parameter[i] == 0 and abs(value[i]) <= np.float32(l1 * weight):
            expected[i] = 0
    np.testing.assert_array_equal(there_and_back([f.kkt(l1)], value, weight=weight, parameter=parameter), expected)


@pytest.mark.parametrize("chosen", [f.random_k(0.25), f.random_skip(0.25), f.random_k(5)], ids=str)
def test_random_choices_are_unbiased(chosen: f.Filter) -> None:
    value, runs = normal(3, 20), 6000
    total = sum(there_and_back([chosen], value, seed=(7, i)) for i in range(runs))
    deviation = np.abs(value) * math.sqrt(3 / runs)  # each is kept with probability 1/4 and multiplied by 4
    assert (np.abs(total / runs - value) < 5 * deviation).all()


def test_random_choices_are_not_multiplied_under_feedback() -> None:
    value = normal(3, 40)
    for chosen in (f.random_k(0.25), f.random_skip(0.25)):
        found = there_and_back([chosen.with_error_feedback()], value)
        assert 0 < len(nonzero(found)) < 40
        assert all(found[i] == value[i] for i in nonzero(found))


def test_random_k_keeps_exactly_k_and_follows_its_seed() -> None:
    value = normal(0, 1000)
    first, same, other = (there_and_back([f.random_k(0.1)], value, seed=(s,)) for s in (1, 1, 2))
    assert len(nonzero(first)) == 100
    np.testing.assert_array_equal(first, same)
    assert nonzero(first) != nonzero(other)


def naive_quantised(value: Array, bits: int, block: int) -> Array:
    out: list[float] = []
    for start in range(0, len(value), block):
        row = value[start : start + block]
        if bits == 1:
            size = np.float32(np.abs(row).sum() / np.float32(len(row)))
            out += [size if x >= 0 else -size for x in row]
        else:
            step = np.float32(np.abs(row).max() / (2 ** (bits - 1) - 1))
            out += [np.float32(np.rint(x / step)) * step if step else 0 for x in row]
    return np.array(out, np.float32)


@given(SEEDS, SIZES, st.sampled_from([8, 4, 2, 1]), st.sampled_from([2, 3, 64, 256]))
def test_quantisation_is_the_nearest_level(seed: int, size: int, bits: int, block: int) -> None:
    value = normal(seed, size)
    found = there_and_back([f.quantise(bits, block=block)], value)
    np.testing.assert_allclose(found, naive_quantised(value, bits, block), rtol=1e-6, atol=1e-7)


@example(264, 282, 8, False)  # rounding to float32 adds to half a step
@given(SEEDS, SIZES, st.sampled_from([8, 4, 2]), st.booleans())
def test_the_error_of_quantisation_is_bounded(seed: int, size: int, bits: int, stochastic: bool) -> None:
    value = normal(seed, size)
    found = there_and_back([f.quantise(bits, stochastic, block=32)], value, seed=(seed,))
    for start in range(0, size, 32):
        row = value[start : start + 32]
        step = np.abs(row).max() / (2 ** (bits - 1) - 1)
        rounded = 2 * np.spacing(np.abs(row).max())  # the step, and its product with a code, are float32
        limit = (step if stochastic else step / 2) + rounded
        assert (np.abs(found[start : start + 32] - row) <= limit).all()


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_stochastic_rounding_is_unbiased(bits: int) -> None:
    value, runs = normal(5, 24), 6000
    total = sum(there_and_back([f.quantise(bits, stochastic=True)], value, seed=(i,)) for i in range(runs))
    step = np.abs(value).max() / max(2 ** (bits - 1) - 1, 0.5)
    assert (np.abs(total / runs - value) < 5 * (step / 2) / math.sqrt(runs) + 1e-6).all()


def test_levels_stand_for_themselves_and_zeros_stay() -> None:
    levels = np.arange(-7, 8, dtype=np.float32)
    np.testing.assert_array_equal(there_and_back([f.quantise(4)], levels), levels)
    zeros = np.zeros(300, np.float32)
    for bits in (8, 4, 2, 1):
        for stochastic in (False, True):
            np.testing.assert_array_equal(there_and_back([f.quantise(bits, stochastic)], zeros), zeros)


def test_a_sign_has_the_mean_magnitude() -> None:
    value = np.array([[3, -1], [0.5, -1.5]], np.float32)
    np.testing.assert_allclose(there_and_back([f.sign()], value), np.sign(value) * 1.5)


@given(SEEDS, st.integers(1, 3), st.integers(8, 30), st.integers(8, 30))
def test_low_rank_is_exact_up_to_its_rank(seed: int, rank: int, rows: int, columns: int) -> None:
    value = normal(seed, rows, rank) @ normal(seed + 1, rank, columns)
    found = there_and_back([f.low_rank(rank)], value, seed=(seed,))
    np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-3 * np.abs(value).max())


def test_low_rank_descends_to_the_best_approximation() -> None:
    value, state, errors = normal(0, 40, 30), dict[str, Array](), list[float]()
    for _ in range(60):
        wire, after = f.encode([f.low_rank(3)], value, state, f.Context())
        state = dict(after)
        decoded, _ = f.decode([f.low_rank(3)], iter(wire), f.Form(value.shape, value.dtype), {})
        errors.append(float(np.linalg.norm(value - decoded)))
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors))
    best = math.sqrt(float((np.linalg.svd(value, compute_uv=False)[3:] ** 2).sum()))
    assert errors[0] > best * 1.05
    assert errors[-1] == pytest.approx(best, rel=1e-2)


def test_a_basis_survives_a_matrix_of_zeros() -> None:
    chain, value, state = [f.low_rank(2)], normal(0, 12, 2) @ normal(1, 2, 9), dict[str, Array]()
    for matrix in (np.zeros_like(value), value[:, :1] @ np.ones((1, 9), np.float32), value):
        wire, after = f.encode(chain, matrix, state, f.Context())
        state = dict(after)
        decoded, _ = f.decode(chain, iter(wire), f.Form(value.shape, value.dtype), {})
    wire, _ = f.encode(chain, value, state, f.Context())
    decoded, _ = f.decode(chain, iter(wire), f.Form(value.shape, value.dtype), {})
    np.testing.assert_allclose(decoded, value, rtol=1e-3, atol=1e-3)


def test_low_rank_takes_a_kernel_as_a_matrix_of_its_last_dimension() -> None:
    value = np.einsum("abc,d->abcd", normal(0, 3, 3, 4), normal(1, 16))
    wire, _ = f.encode([f.low_rank(1)], value, {}, f.Context())
    assert [w.shape for w in wire] == [(36, 1), (16, 1)]
    np.testing.assert_allclose(there_and_back([f.low_rank(1)], value), value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(), (5,), (3, 3), (1, 100)], ids=str)
def test_arrays_that_low_rank_would_not_make_smaller_pass_unchanged(shape: tuple[int, ...]) -> None:
    value = normal(0, *shape)
    wire, state = f.encode([f.low_rank(2).with_error_feedback()], value, {}, f.Context())
    assert [w is value for w in wire] == [True]
    assert not state


@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype(np.int32), np.dtype(np.uint8), np.dtype(np.bool_)], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 30)], ids=str)
def test_compress_keeps_every_bit(dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    value = (normal(1, *shape) * 50).astype(dtype)
    found = there_and_back([f.compress()], value)
    assert (found.dtype, found.shape) == (dtype, shape)
    assert found.tobytes() == value.tobytes()


def test_compress_is_never_much_larger_and_small_for_regular_bytes() -> None:
    chain, form = [f.compress()], f.Form((50000,), np.dtype(np.float32))
    random = np.random.default_rng(0).integers(0, 2**32, 50000, np.uint32).view(np.float32)
    (wire,), _ = f.encode(chain, random, {}, f.Context())
    assert wire.nbytes <= random.nbytes + 1 == f.most_bytes(chain, form)
    regular = normal(0, 50000)
    (wire,), _ = f.encode(chain, regular, {}, f.Context())
    assert wire.nbytes < len(zlib.compress(regular.tobytes(), 1)) < regular.nbytes


def test_a_key_cache_sends_the_same_keys_once() -> None:
    chain, form = [f.top_k(0.1), f.key_cache()], f.Form((1000,), np.dtype(np.float32))
    value, sender, receiver, sizes = normal(0, 1000), dict[str, Array](), dict[str, Array](), list[int]()
    for scale in (1, 2, 3):
        for array in (value * scale, value * scale, -value[::-1]):
            wire, after = f.encode(chain, array, sender, f.Context())
            decoded, memory = f.decode(chain, iter(wire), form, receiver)
            sender, receiver = dict(after), dict(memory)
            np.testing.assert_array_equal(decoded, there_and_back([f.top_k(0.1)], array))
            sizes.append(sum(w.nbytes for w in wire))
    keys, values = 4 * 32, 4 * 100
    assert sizes == [keys + 8 + values, 8 + values, keys + 8 + values] * 3


def test_the_sender_may_fall_back_to_older_keys() -> None:
    """A sender whose push was dropped may forget what it cached. Keys that are sent again are new to no receiver."""
    chain, form = [f.top_k(2), f.key_cache()], f.Form((99,), np.dtype(np.float32))
    wire, after = f.encode(chain, normal(0, 99), {}, f.Context())
    _, memory = f.decode(chain, iter(wire), form, {})
    again, _ = f.encode(chain, normal(0, 99), {}, f.Context())
    assert [w.nbytes for w in again] == [w.nbytes for w in wire]
    f.decode(chain, iter(again), form, memory)
    hit, _ = f.encode(chain, normal(0, 99), after, f.Context())
    with pytest.raises(f.EncodingError, match="have not been sent before"):
        f.decode(chain, iter(hit), form, {})


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: f.top_k(0),
        lambda: f.top_k(0.0),
        lambda: f.top_k(1.5),
        lambda: f.top_k(-0.1),
        lambda: f.top_k(float("nan")),
        lambda: f.top_k(True),
        lambda: f.top_k("all"),  # pyright: ignore[reportArgumentType]
        lambda: f.random_k(0),
        lambda: f.random_k(2.0),
        lambda: f.random_skip(0),
        lambda: f.random_skip(1.01),
        lambda: f.significance(-1),
        lambda: f.significance(float("inf")),
        lambda: f.significance(0.1, decay="linear"),  # pyright: ignore[reportArgumentType]
        lambda: f.kkt(-0.5),
        lambda: f.low_rank(0),
        lambda: f.low_rank(1.5),  # pyright: ignore[reportArgumentType]
        lambda: f.quantise(3),
        lambda: f.quantise(16),
        lambda: f.quantise(8, block=-1),
        lambda: f.compress(0),
        lambda: f.compress(10),
        lambda: f.compress().with_error_feedback(),
        lambda: f.key_cache().with_error_feedback(),
    ],
)
def test_values_out_of_range_are_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(PolicyError):
        wrong()


def every_filter() -> list[f.Filter]:
    return [
        f.significance(0.1),
        f.kkt(0.5),
        f.top_k(0.1),
        f.top_k(3),
        f.random_k(0.2).with_error_feedback(),
        f.random_skip(0.3),
        f.low_rank(2).with_error_feedback(),
        f.quantise(4, stochastic=True),
        f.sign(),
        f.key_cache(),
        f.compress(),
    ]


def test_filters_travel_as_values_and_say_how_they_are_made() -> None:
    for chosen in every_filter():
        data = msgspec.msgpack.encode(chosen)
        assert msgspec.msgpack.decode(data, type=f.AnyFilter, dec_hook=read) == chosen
        assert eval(str(chosen), {name: getattr(f, name) for name in f.__all__}) == chosen
    assert str(f.top_k(0.01).with_error_feedback()) == "top_k(0.01).with_error_feedback()"
    assert str(f.sign()) == "quantise(1, block=0)"


def test_a_filter_with_a_bad_field_is_not_decoded() -> None:
    data = msgspec.msgpack.encode({"type": "TopK", "share": 3.5})
    with pytest.raises(msgspec.ValidationError, match="a share lies in"):
        msgspec.msgpack.decode(data, type=f.AnyFilter, dec_hook=read)


@pytest.mark.parametrize("make", [f.top_k, f.random_k])
def test_one_element_is_not_all_of_them(make: Any) -> None:
    one, every = make(1), make(1.0)
    assert one != every
    assert Policy(filters=(one,)) != Policy(filters=(every,))
    assert (str(one), str(every)) == (f"{one.call}(1)", f"{one.call}(1.0)")
    assert one.with_error_feedback() == make(1).with_error_feedback()
    assert msgspec.json.decode(msgspec.json.encode(one), type=type(one)) == one
