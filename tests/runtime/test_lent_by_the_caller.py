"""What a caller hands over may be changed by the caller afterwards, on every kind of cluster and transport."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.transport.arrays import aligned_empty, own_copy

ROWS, COLUMNS, BATCH = 4096, 64, 512
X = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32)
PARAMS = {"w": np.ones((COLUMNS, 8), np.float32)}


@pytest.fixture(params=["threads_cluster", "process_cluster", "grpc_cluster"])
def cluster(request: pytest.FixtureRequest) -> fm.Cluster:
    return request.getfixturevalue(request.param)


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch["x"] @ params["w"]) ** 2)


def aligned(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """An array that XLA can use without a copy."""
    return aligned_empty(4 * int(np.prod(shape))).view(np.float32).reshape(shape)


class Reusing:
    """A source that hands out the same buffer each time."""

    def __init__(self) -> None:
        self._buffer = aligned((ROWS, COLUMNS))

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, indices: Any) -> dict[str, np.ndarray[Any, Any]]:
        batch = self._buffer[: len(indices)]
        np.take(X, indices, 0, out=batch)
        return {"x": batch}


def fit(cluster: fm.Cluster, source: Any, callback: Callable[[Any], Any] = lambda _: None) -> np.ndarray[Any, Any]:
    trainer = fm.Trainer(loss, optax.sgd(1e-3), cluster=cluster, replicas=2, placement=fm.Pipeline(1))
    return np.asarray(trainer.fit(PARAMS, source, batch_size=BATCH, epochs=3, callbacks=[callback]).params["w"])


def test_a_source_may_hand_out_the_same_buffer_again(cluster: fm.Cluster) -> None:
    expected = fit(cluster, {"x": X})
    for _ in range(3):
        np.testing.assert_array_equal(fit(cluster, Reusing()), expected)


def test_a_source_of_arrays_may_be_changed_during_the_fit(cluster: fm.Cluster) -> None:
    """Workers have the data of the beginning, whether they hold a copy or are in this process."""
    expected = fit(cluster, {"x": X})
    changing = aligned(X.shape)
    changing[...] = X
    np.testing.assert_array_equal(fit(cluster, {"x": changing}, lambda _: changing.fill(np.nan)), expected)


class Wrapped:
    """An array of another library: NumPy sees its memory."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.shape, self.dtype, self._array = array.shape, array.dtype, array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return self._array


def memories() -> Iterator[tuple[Any, np.ndarray[Any, Any]]]:
    """Arrays, and the memory that their owner may write to."""
    memory = aligned((16, 16))
    yield memory, memory
    yield memory[3], memory
    yield memory[:, ::2], memory
    yield memory.T, memory
    yield memory.reshape(()) if memory.size == 1 else memory[:1, 0].reshape(()), memory
    yield memory.view(np.matrix), memory
    yield Wrapped(memory), memory


@pytest.mark.parametrize("number", range(7))
def test_an_own_copy_shares_no_memory(number: int) -> None:
    array, memory = list(memories())[number]
    memory[...] = 1
    shape = np.asarray(array).shape
    copy = own_copy(array, np.float32)
    memory[...] = 2
    np.testing.assert_array_equal(copy, np.ones(shape))
    assert copy.shape == shape
    assert copy.flags.c_contiguous


def test_an_own_copy_of_what_must_be_converted_is_made_once() -> None:
    assert own_copy([[1, 2], [3, 4]], np.float32).tolist() == [[1, 2], [3, 4]]
    assert own_copy(np.arange(3), np.float32).tolist() == [0, 1, 2]
    assert own_copy(2.5, np.float32).shape == ()
