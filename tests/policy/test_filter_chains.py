"""Chains of filters: error feedback loses nothing, bytes are as stated, and a receiver believes no length."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowml.errors import PolicyError
from flowml.policy import filters as f

Array = np.ndarray[Any, Any]

FLOAT = np.dtype(np.float32)
CHAINS: list[tuple[f.Filter, ...]] = [
    (f.top_k(0.1),),
    (f.top_k(1.0),),
    (f.top_k(0.05), f.quantise(4)),
    (f.top_k(0.1), f.key_cache(), f.compress()),
    (f.top_k(0.5), f.top_k(0.5)),
    (f.random_k(0.2), f.quantise(8, stochastic=True)),
    (f.random_skip(0.3), f.quantise(2)),
    (f.low_rank(2), f.quantise(8)),
    (f.low_rank(1), f.top_k(0.5), f.quantise(4), f.compress()),
    (f.quantise(8),),
    (f.quantise(4, stochastic=True), f.compress()),
    (f.sign(),),
    (f.significance(0.5), f.key_cache(), f.quantise(4), f.compress()),
    (f.significance(0.5), f.top_k(0.3)),
    (f.kkt(0.3), f.random_k(0.5), f.compress()),
    (f.kkt(0.3), f.random_skip(0.5), f.sign()),
]
LOSSLESS: list[tuple[f.Filter, ...]] = [(f.compress(),), (f.compress(9),), ()]
SHAPES = [(), (1,), (40,), (23, 17), (3, 3, 4, 8), (0, 5)]


def normal(seed: int, *shape: int) -> Array:
    return np.asarray(np.random.default_rng(seed).normal(size=shape), np.float32)


def parameter_of(value: Array) -> Array:
    parameter = np.ones(value.size, np.float32)
    parameter[::2] = 0
    return parameter.reshape(value.shape)


def with_feedback(chain: tuple[f.Filter, ...]) -> tuple[f.Filter, ...]:
    return (chain[0].with_error_feedback(), *chain[1:])


def text(chain: Any) -> str:
    return ", ".join(getattr(f, "__name__", str(f)) for f in chain) if isinstance(chain, tuple) else str(chain)


class Link:
    """A sender and a receiver of one array, with the buffers of both."""

    def __init__(self, chain: f.Chain, form: f.Form) -> None:
        self.chain, self.form, self.clock = f.check_chain(chain), form, 0
        self.sender: f.State = {}
        self.receiver: f.State = {}

    def send(self, value: Array) -> tuple[Array, list[Array]]:
        context = f.Context(seed=(1, self.clock), clock=self.clock, parameter=parameter_of(value))
        wire, self.sender = f.encode(self.chain, value, self.sender, context)
        for array in wire:
            array.flags.writeable = False  # what is sent must not change any more
        arrays = iter(wire)
        decoded, self.receiver = f.decode(self.chain, arrays, self.form, self.receiver)
        assert next(arrays, None) is None
        assert (decoded.shape, decoded.dtype) == (value.shape, value.dtype)
        self.clock += 1
        return decoded, wire


@pytest.mark.parametrize("chain", CHAINS, ids=text)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [FLOAT, np.dtype(ml_dtypes.bfloat16), np.dtype(np.float64)], ids=str)
def test_error_feedback_loses_nothing(
    chain: tuple[f.Filter, ...], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    link = Link(with_feedback(chain), f.Form(shape, dtype))
    given, arrived = np.zeros(shape), np.zeros(shape)
    for step in range(12):
        value = normal(step, *shape).astype(dtype)
        decoded, _ = link.send(value)
        given += value.astype(np.float64)
        arrived += decoded.astype(np.float64)
        residual = np.asarray(link.sender.get(f.RESIDUAL, np.zeros(shape)), np.float64)
        np.testing.assert_allclose(arrived + residual, given, rtol=0, atol=2e-5)


@pytest.mark.parametrize("chain", CHAINS, ids=text)
def test_what_is_held_back_arrives_once_nothing_new_comes(chain: tuple[f.Filter, ...]) -> None:
    link = Link(with_feedback(chain), f.Form((23, 17), FLOAT))
    value = normal(0, 23, 17)
    arrived = link.send(value)[0].copy()
    for _ in range(400):
        arrived += link.send(np.zeros_like(value))[0]
    assert np.abs(arrived - value)[~stays(chain)].max() < np.abs(value).max() / 10


def stays(chain: tuple[f.Filter, ...]) -> Array:
    """The elements that the penalty of a KKT filter cancels, which never leave."""
    value = normal(0, 23, 17)
    kkt = isinstance(chain[0], f.KKT)
    return (parameter_of(value) == 0) & (np.abs(value) <= 0.5) if kkt else np.zeros(value.shape, bool)


@pytest.mark.parametrize("chain", [*CHAINS, *LOSSLESS], ids=text)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_as_stated(chain: tuple[f.Filter, ...], shape: tuple[int, ...]) -> None:
    form = f.Form(shape, FLOAT)
    link, forms = Link(chain, form), f.wire_forms(chain, form)
    for step in range(4):
        _, wire = link.send(normal(step, *shape))
        if all(w.size for w in wire):  # nothing more is made of an empty part
            for array, stated in zip(wire, forms, strict=True):
                assert array.dtype == stated.dtype
                assert array.nbytes == stated.nbytes if stated.exact else array.nbytes <= stated.nbytes
        sent, stated = sum(w.nbytes for w in wire), f.nbytes(chain, form)
        assert sent <= f.most_bytes(chain, form)
        assert stated in (sent, None)


def test_the_sizes_that_the_papers_state() -> None:
    form = f.Form((1000, 1000), FLOAT)
    assert f.nbytes([f.top_k(0.01)], form) == 10_000 * (4 + 4)
    assert f.nbytes([f.top_k(0.1)], form) == 1_000_000 // 8 + 100_000 * 4
    assert f.nbytes([f.random_k(0.01)], form) == 8 + 10_000 * 4
    assert f.nbytes([f.low_rank(4)], form) == 4 * 2000 * 4
    assert f.nbytes([f.quantise(8, block=0)], form) == 1_000_000 + 4
    assert f.nbytes([f.quantise(4)], form) == 500_000 + 4 * 3907
    assert f.nbytes([f.sign()], form) == 125_000 + 4
    assert f.nbytes([f.top_k(0.01), f.quantise(2, block=0)], form) == 40_000 + 2500 + 4
    assert f.nbytes([f.compress()], form) is None
    assert f.nbytes([f.significance(0.1)], form) is None


@pytest.mark.parametrize("chain", LOSSLESS, ids=text)
@pytest.mark.parametrize("dtype", [FLOAT, np.dtype(np.int32), np.dtype(np.complex64)], ids=str)
def test_lossless_filters_keep_every_bit(chain: tuple[f.Filter, ...], dtype: np.dtype[Any]) -> None:
    link = Link(chain, f.Form((9, 31), dtype))
    for step in range(3):
        value = (normal(step, 9, 31) * 100).astype(dtype)
        assert link.send(value)[0].tobytes() == value.tobytes()


def test_everything_of_top_k_is_equal() -> None:
    link = Link((f.top_k(1.0), f.key_cache(), f.compress()), f.Form((9, 31), FLOAT))
    for step in range(3):
        np.testing.assert_array_equal(link.send(normal(step, 9, 31))[0], normal(step, 9, 31))


@pytest.mark.parametrize("chain", CHAINS, ids=text)
def test_equal_seeds_give_equal_bytes(chain: tuple[f.Filter, ...]) -> None:
    runs = [Link(chain, f.Form((40, 20), FLOAT)) for _ in range(2)]
    for step in range(3):
        first, second = (run.send(normal(step, 40, 20))[1] for run in runs)
        assert [a.tobytes() for a in first] == [a.tobytes() for a in second]


def test_an_encoder_changes_neither_value_nor_state() -> None:
    for chain in map(with_feedback, CHAINS):
        value, context = normal(0, 20, 30), f.Context(parameter=parameter_of(normal(0, 20, 30)))
        _, state = f.encode(chain, value, {}, context)
        before = value.tobytes(), {k: v.tobytes() for k, v in state.items()}
        f.encode(chain, value, state, context)
        assert before == (value.tobytes(), {k: v.tobytes() for k, v in state.items()})


def corrupted(draw: np.random.Generator, wire: list[Array]) -> list[Array]:
    """The arrays with one of them cut, lengthened, retyped, exchanged, missing, or with other bytes."""
    arrays = [a.copy() for a in wire]
    i = int(draw.integers(len(arrays)))
    match int(draw.integers(7)):
        case 0:
            arrays[i] = arrays[i].reshape(-1)[: int(draw.integers(arrays[i].size + 1))]
        case 1:
            arrays[i] = np.concatenate([arrays[i].reshape(-1)] * 2)
        case 2:
            arrays[i] = arrays[i].astype(np.float64)
        case 3:
            arrays = arrays[::-1]
        case 4:
            del arrays[i]
        case 5:
            arrays[i] = arrays[i].reshape(1, *arrays[i].shape)
        case _:
            raw = bytearray(arrays[i].tobytes())
            for _ in range(3 if raw else 0):
                raw[int(draw.integers(len(raw)))] = int(draw.integers(256))
            arrays[i] = np.frombuffer(bytes(raw), arrays[i].dtype).reshape(arrays[i].shape)
    return arrays


@given(st.integers(0, 2**32 - 1), st.sampled_from([*CHAINS, *LOSSLESS]), st.sampled_from([(23, 17), (40,)]))
def test_a_receiver_takes_a_value_of_its_form_or_raises(seed: int, chain: f.Chain, shape: tuple[int, ...]) -> None:
    value, form, draw = normal(seed % 99, *shape), f.Form(shape, FLOAT), np.random.default_rng(seed)
    wire, _ = f.encode(chain, value, {}, f.Context(parameter=parameter_of(value)))
    try:
        with np.errstate(all="ignore"):
            decoded, _ = f.decode(chain, iter(corrupted(draw, wire)), form, {})
    except f.EncodingError:
        return
    assert (decoded.shape, decoded.dtype) == (shape, FLOAT)


def test_a_bomb_is_not_unpacked() -> None:
    chain = [f.compress()]
    (bomb,), _ = f.encode(chain, np.zeros(10_000_000, np.float32), {}, f.Context())
    assert bomb.nbytes < 500_000
    with pytest.raises(f.EncodingError):
        f.decode(chain, iter([bomb[:400]]), f.Form((99,), FLOAT), {})
    small = f.Form((200_000,), FLOAT)
    with pytest.raises(f.EncodingError, match="do not end within 800000 bytes"):
        f.decode(chain, iter([bomb]), small, {})


@pytest.mark.parametrize(
    ("chain", "why"),
    [
        ((f.quantise(8), f.top_k(0.1)), "has no effect"),
        ((f.sign(), f.quantise(8)), "has no effect"),
        ((f.compress(), f.quantise(8)), "has no effect"),
        ((f.compress(), f.compress()), "has no effect"),
        ((f.compress(), f.key_cache()), "has no effect"),
        ((f.key_cache(),), r"key_cache\(\) has no effect, because no filter before it sends keys .* put top_k, "),
        ((f.random_k(0.1), f.key_cache()), "no filter before it sends keys"),
        ((f.top_k(0.1), f.key_cache(), f.key_cache()), r"and key_cache\(\) once"),
        ((f.top_k(0.1), f.low_rank(2)), "so it is the first filter"),
        ((f.top_k(0.1), f.significance(0.1)), "so it is the first filter"),
        ((f.low_rank(2), f.kkt(0.1)), "so it is the first filter"),
        ((f.top_k(0.1), f.quantise(4).with_error_feedback()), r"give it to top_k\(0.1\), where it covers"),
        (("zip",), "'zip' is not a filter"),
        ((f.top_k,), "is not a filter"),
    ],
    ids=text,
)
def test_a_filter_at_a_wrong_place_is_refused(chain: tuple[Any, ...], why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        f.check_chain(chain)


def test_arrays_that_a_chain_cannot_filter_are_refused() -> None:
    for dtype in (np.int32, np.bool_, np.complex64, np.uint8):
        with pytest.raises(PolicyError, match=r"'fc/w' has elements of .* works on real floating-point numbers"):
            f.check_array([f.top_k(0.1)], f.Form((4,), np.dtype(dtype)), "fc/w")
        f.check_array([f.compress()], f.Form((4,), np.dtype(dtype)), "fc/w")
    with pytest.raises(PolicyError, match=r"top_k\(9\) asks for 9 elements of 'fc/b', which has 4"):
        f.check_array([f.top_k(9)], f.Form((4,), FLOAT), "fc/b")
    for dtype in (ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn):
        f.check_array([f.top_k(4)], f.Form((4,), np.dtype(dtype)), "fc/b")
