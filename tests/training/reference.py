"""What training must equal: the usual loop, and small models to train.

`optax_loop` takes value_and_grad, update and apply_updates over the batches that `flowml.data.epoch_order` gives. The
gradient and the update are two executables, as in a plan: some versions of XLA round differently if one holds both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowml.data import epoch_order

Loss = Callable[..., Any]

EXAMPLES = 96
FEATURES = 12
BATCH = 24


def data(examples: int = EXAMPLES, seed: int = 0) -> dict[str, np.ndarray]:
    """A regression that a small model learns: y is a smooth function of x."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, FEATURES)).astype(np.float32)
    y = np.stack([x[:, :4].sum(1), np.sin(x[:, 4])], axis=1).astype(np.float32)
    return {"x": x, "y": y}


def mlp(widths: tuple[int, ...] = (16, 16), seed: int = 0, dtype: Any = jnp.float32) -> dict[str, dict[str, jax.Array]]:
    """Parameters of `mlp_loss`: layers fc0, fc1, … with a kernel and a bias each."""
    sizes = (FEATURES, *widths, 2)
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    return {
        f"fc{i}": {
            "kernel": (jax.random.normal(keys[i], (m, n)) / np.sqrt(m)).astype(dtype),
            "bias": jnp.zeros(n, dtype),
        }
        for i, (m, n) in enumerate(pairwise(sizes))
    }


def predict(params: Mapping[str, Any], x: Any) -> Any:
    for i in range(len(params)):
        layer = params[f"fc{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = jnp.tanh(x) if i + 1 < len(params) else x
    return x


def mlp_loss(params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
    return jnp.mean((predict(params, batch["x"]) - batch["y"]) ** 2)


GATE = threading.Event()


def hold_marked(x: Any, held: Any) -> Any:
    """A callback that holds up whoever computes on an example that is marked, until GATE is set."""
    if np.asarray(held).any():
        assert GATE.wait(60), "nobody went on without the one that is held up"
    return x


@dataclass(frozen=True)
class Reference:
    params: Any
    opt_state: Any
    losses: list[float]


def optax_loop(
    loss: Loss,
    params: Any,
    optimizer: Any,
    source: Any,
    steps: int,
    *,
    batch_size: int = BATCH,
    seed: int = 0,
    shuffle: bool = True,
    opt_state: Any = None,
    items: int = 1,
    microbatches: int = 1,
    takes_key: bool = False,
) -> Reference:
    """The plain loop. With `items` or `microbatches` the gradient is the mean over so many shares of the batch, each
    with a key of its own where the loss takes one: `fold_in(key(seed), item)`, and that folded with the microbatch."""
    value_and_grad = jax.value_and_grad(loss)
    count = items * microbatches
    rows = batch_size // count

    @jax.jit
    def gradient(params: Any, shares: Any) -> tuple[Any, Any]:
        found = [value_and_grad(params, *share) for share in shares]
        return jax.tree.map(lambda *xs: sum(xs[1:], xs[0]) / count if count > 1 else xs[0], *found)

    @jax.jit
    def update(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params) if opt_state is None else opt_state
    examples = len(jax.tree.leaves(source)[0])
    per_epoch = examples // batch_size
    losses: list[float] = []
    for number in range(steps):
        order = epoch_order(examples, seed, number // per_epoch, shuffle=shuffle)
        batch = order[number % per_epoch * batch_size :][:batch_size]
        shares: list[tuple[Any, ...]] = []
        for i in range(count):
            share = _rows(source, batch[i * rows : (i + 1) * rows])
            key = jax.random.fold_in(jax.random.key(seed), number * items + i // microbatches)
            key = jax.random.fold_in(key, i % microbatches) if microbatches > 1 else key
            shares.append((share, key) if takes_key else (share,))
        value, gradients = gradient(params, shares)
        params, state = update(params, state, gradients)
        losses.append(float(value))
    return Reference(params, state, losses)


def _rows(source: Any, indices: np.ndarray) -> Any:
    return jax.tree.map(lambda leaf: leaf[indices], source)


def assert_same(actual: Any, expected: Any) -> None:
    """Equal to the bit, of the same dtypes and structure."""
    _assert_alike(actual, expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(_plain(a), _plain(e))


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance`, relative to the largest value of each array; of the same dtypes and structure."""
    _assert_alike(actual, expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = _plain(a), _plain(e)
        scale = float(np.max(np.abs(e), initial=1e-3))
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * scale)


def _assert_alike(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    kinds = [[(x.shape, x.dtype) for x in map(jnp.asarray, jax.tree.leaves(t))] for t in (actual, expected)]
    assert kinds[0] == kinds[1]


def _plain(array: Any) -> np.ndarray:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    array = np.asarray(array)
    return array if array.dtype.kind in "iub" else array.astype(np.float64)


def refuse_marked(x: Any, bad: Any) -> Any:
    """A callback that raises for an example that is marked."""
    found = np.flatnonzero(np.asarray(bad))
    if len(found):
        raise ValueError(f"example {found[0]} of the share is marked")
    return x
