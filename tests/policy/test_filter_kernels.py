"""The kernels of filters with NumPy and as JAX tasks: equal bits for every dtype, shape and odd value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowml.errors import ClusterError
from flowml.policy import filters as f
from flowml.policy.filters.dense import pack, power_step, product, quantised, unpack
from flowml.policy.filters.sparse import largest
from flowml_runtime.execution import kernels
from flowml_runtime.execution.kernels import Kernels

Array = np.ndarray[Any, Any]

CPU = jax.local_devices(backend="cpu")[0]
JAX, NUMPY = Kernels(CPU, "jax"), Kernels(CPU, "numpy")
DTYPES = [np.dtype(t) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
ODD = (0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1e-39, -1e-42, 1e-30, 3e38)
SHAPES = [(), (0, 5), (300,), (3, 4, 8)]  # few, because each is compiled
CHAINS: list[tuple[f.Filter, ...]] = [
    (f.top_k(0.1),),
    (f.top_k(7).with_error_feedback(), f.quantise(4)),
    (f.significance(0.5),),
    (f.kkt(0.3),),
    (f.random_k(0.2), f.quantise(8, stochastic=True)),
    (f.quantise(8),),
    (f.quantise(4, block=3),),
    (f.quantise(2, stochastic=True, block=64).with_error_feedback(),),
    (f.quantise(1, stochastic=True).with_error_feedback(),),
    (f.quantise(4, stochastic=True, block=0).with_error_feedback(),),
    (f.quantise(1, stochastic=True),),
    (f.quantise(1),),
    (f.sign().with_error_feedback(),),
]


def text(chain: Any) -> str:
    return ", ".join(map(str, chain)) if isinstance(chain, tuple) else str(chain)


def odd_values(seed: int, shape: tuple[int, ...], dtype: Any) -> Array:
    """Numbers of all sizes, many of them equal, some of them odd."""
    rng = np.random.default_rng(seed)
    value = np.asarray(rng.normal(size=shape) * 10.0 ** rng.integers(-12, 3), np.float64)
    value = np.where(rng.random(shape) < 0.2, np.sign(value), value)
    if seed % 2:
        value = np.where(rng.random(shape) < 0.05, rng.choice(ODD, shape), value)
    with np.errstate(over="ignore"):
        return np.asarray(value, dtype)


def steps(run: f.Run, chain: f.Chain, values: list[Array]) -> list[bytes]:
    """The bytes of all that is sent, and of all that is decoded, in several pushes."""
    sender: f.State = {}
    receiver: f.State = {}
    found: list[bytes] = []
    form = f.Form(values[0].shape, values[0].dtype)
    parameter = np.where(np.arange(form.size) % 2, 1.0, 0.0).reshape(form.shape).astype(form.dtype)
    with np.errstate(all="ignore"):
        for clock, value in enumerate(values):
            context = f.Context((3, clock), clock, 2.0, parameter, run=run)
            wire, sender = f.encode(chain, value, sender, context)
            decoded, receiver = f.decode(chain, iter(wire), form, receiver, run)
            found += [a.tobytes() for a in (*wire, decoded)]
    return found


@pytest.mark.parametrize("chain", CHAINS, ids=text)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(SHAPES), dtype=st.sampled_from(DTYPES))
def test_both_ways_give_equal_bits(chain: f.Chain, seed: int, shape: tuple[int, ...], dtype: Any) -> None:
    if f.Form(shape, dtype).size in range(1, 8):
        chain = [f.top_k(1) if x == f.top_k(7).with_error_feedback() else x for x in chain]
    values = [odd_values(seed + i, shape, dtype) for i in range(2)]
    assert steps(JAX, chain, values) == steps(NUMPY, chain, values)


@pytest.mark.parametrize("chain", CHAINS, ids=text)
def test_both_ways_give_equal_bits_of_large_arrays(chain: f.Chain) -> None:
    """A compiler divides the work on them, and uses other instructions."""
    value = odd_values(1, (70_001,), np.dtype(np.float32))
    assert steps(JAX, chain, [value]) == steps(NUMPY, chain, [value])


@pytest.mark.parametrize("chain", CHAINS, ids=text)
def test_arrays_stay_on_the_device_that_holds_them(chain: f.Chain) -> None:
    """On an accelerator values, residuals and results are JAX arrays."""

    def on_device(kernel: f.Kernel, *arrays: Any, exact: bool = True, **numbers: Any) -> Any:
        return jax.tree.map(jax.numpy.asarray, JAX(kernel, *arrays, exact=exact, **numbers))

    values = [np.random.default_rng(i).normal(size=(23, 17)).astype(np.float32) for i in range(2)]
    held: list[Any] = list(map(jax.numpy.asarray, values))
    assert steps(on_device, chain, held) == steps(NUMPY, chain, values)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 5, 64, 300]))
def test_largest_takes_lower_positions_of_equal_ones(seed: int, count: int) -> None:
    value = odd_values(seed, (300,), np.float32)
    size = [np.inf if np.isnan(x) else abs(x) if abs(x) >= np.finfo(np.float32).tiny else 0.0 for x in value.tolist()]
    naive = sorted(sorted(range(300), key=lambda i: (-size[i], i))[:count])
    assert NUMPY(largest, value, count=count).tolist() == naive
    assert JAX(largest, value, count=count).tolist() == naive


@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 4, 2, 1]))
def test_stochastic_rounding_follows_its_noise(seed: int, bits: int) -> None:
    """Against whole numbers: up where the rest is more than what the noise leaves."""
    rng = np.random.default_rng(seed)
    value, noise = rng.normal(size=64).astype(np.float32), rng.integers(0, 2**16, 64, np.uint16)
    packed, scales = NUMPY(quantised, value, noise, bits=bits, block=64)
    levels = max(2 ** (bits - 1) - 1, 1)
    exact = value.astype(np.float64) / float(np.abs(value).max()) * levels
    for code, x, draw in zip(unpack(packed, bits, 64).tolist(), exact.tolist(), noise.tolist(), strict=True):
        share, draw = (x + 1) / 2 if bits == 1 else x - np.floor(x), draw / 2**16
        expected = (draw < share) if bits == 1 else np.floor(x) + levels + (draw >= 1 - share)
        assert code == expected or abs(draw - (share if bits == 1 else 1 - share)) < 1e-4
    assert scales[0] == np.abs(value).max() * np.float32(1 / levels)


@given(st.integers(0, 2**32 - 1), st.integers(0, 70), st.sampled_from([8, 4, 2, 1]))
def test_codes_come_back(seed: int, size: int, bits: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, size, np.uint8)
    np.testing.assert_array_equal(unpack(pack(codes, bits), bits, size), codes)


def test_factors_agree_within_rounding() -> None:
    rng = np.random.default_rng(0)
    matrix, basis = rng.normal(size=(50, 20)).astype(np.float32), rng.normal(size=(20, 3)).astype(np.float32)
    ours, theirs = (run(product, *run(power_step, matrix, basis, exact=False)[:2], exact=False) for run in (NUMPY, JAX))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_who_runs_a_kernel_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = list[str]()

    def pace(run: Callable[[], Any]) -> float:
        run()
        measured.append(run.func.__name__)  # pyright: ignore[reportFunctionMemberAccess]
        return float(run.func.__name__ == "_numpy")  # pyright: ignore[reportFunctionMemberAccess]

    monkeypatch.setattr(kernels, "fastest", pace)
    monkeypatch.delenv("FLOWML_FILTERS", raising=False)
    monkeypatch.setattr(kernels, "_chosen", {})
    small, large = np.ones(100, np.float32), np.ones(kernels.SMALL, np.float32)
    for _ in range(2):
        for value in (small, large):
            Kernels(CPU)(quantised, value, None, bits=8, block=0)
    assert measured == ["_numpy", "_jax"]
    assert list(kernels.choices().values()) == ["jax"]
    Kernels(CPU)(product, large.reshape(-1, 4), large.reshape(-1, 4)[:4], exact=False)
    assert len(kernels.choices()) == 1, "inexact kernels are not measured, because that would change a fit"


def test_a_mode_is_given_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWML_FILTERS", "numpy")
    assert kernels.filters_mode() == "numpy"
    monkeypatch.setenv("FLOWML_FILTERS", "cuda")
    with pytest.raises(ClusterError, match="FLOWML_FILTERS='cuda' is not a mode; use 'measure', 'numpy', 'jax'"):
        kernels.filters_mode()
