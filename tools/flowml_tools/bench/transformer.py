"""The model that `training` and `pipeline` train: a small transformer over bytes, in plain JAX and optax.

flowml and the peers run the same step on the same batches of the same text (the source of Python's standard library)
from the same parameters. So their losses must agree, and differences in time come from the systems that run the step.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Params = dict[str, dict[str, Any]]

BLOCKS, WIDTH, HEADS, TOKENS = 8, 256, 8, 128
VOCABULARY = 256
BATCH = 16
"""The number of texts in a global batch."""

TEXTS = 32 * BATCH
LEARNING_RATE = 1e-3

LAYERS, SIDE = 8, 128
"""The size of the other model, in which every layer is small."""


def optimizer() -> optax.GradientTransformation:
    return optax.adam(LEARNING_RATE)


def texts() -> np.ndarray:
    """uint8[TEXTS, TOKENS + 1]: windows of the standard library's modules, in the order of their names."""
    needed = TEXTS * (TOKENS + 1)
    content = b""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        content += path.read_bytes()
        if len(content) >= needed:
            break
    return np.frombuffer(content[:needed], np.uint8).reshape(TEXTS, TOKENS + 1)


def batch(number: int) -> np.ndarray:
    """The global batch of a step, as `fit` takes it from `texts` without shuffling."""
    start = number * BATCH % TEXTS
    return texts()[start : start + BATCH]


def init_params(blocks: int = BLOCKS) -> Params:
    """The initial parameters, which are always the same: embed, block0 and so on, head."""
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(scale=rows**-0.5, size=(rows, columns)).astype(np.float32)

    params: Params = {"embed": {"byte": matrix(VOCABULARY, WIDTH), "place": matrix(TOKENS, WIDTH)}}
    for i in range(blocks):
        params[f"block{i}"] = {
            "qkv": matrix(WIDTH, 3 * WIDTH),
            "mix": matrix(WIDTH, WIDTH),
            "up": matrix(WIDTH, 4 * WIDTH),
            "down": matrix(4 * WIDTH, WIDTH),
        }
    return params | {"head": {"w": matrix(WIDTH, VOCABULARY)}}


def init_layers() -> Params:
    """LAYERS square layers of 64 KiB each."""
    rng = np.random.default_rng(0)
    return {
        f"layer{i}": {"w": rng.normal(scale=SIDE**-0.5, size=(SIDE, SIDE)).astype(np.float32)} for i in range(LAYERS)
    }


def rows() -> np.ndarray:
    """float32[TEXTS, SIDE]"""
    return np.random.default_rng(1).normal(size=(TEXTS, SIDE)).astype(np.float32)


def layers_optimizer() -> optax.GradientTransformation:
    return optax.sgd(LEARNING_RATE)


def layers_loss(params: Params, x: Any) -> jax.Array:
    """The mean square of the output of all layers for `x`."""
    for layer in params.values():
        x = jnp.tanh(x @ layer["w"])
    return jnp.mean(x**2)


def loss(params: Params, text: Any) -> jax.Array:
    """The mean cross entropy in nats per byte, given the bytes before it. `text`: uint8[n, TOKENS + 1]."""
    codes = jnp.asarray(text, jnp.int32)
    x = params["embed"]["byte"][codes[:, :-1]] + params["embed"]["place"]
    for i in range(len(params) - 2):
        x = _block(params[f"block{i}"], x)
    scores = jax.nn.log_softmax(_normalise(x) @ params["head"]["w"])
    return -jnp.take_along_axis(scores, codes[:, 1:, None], axis=-1).mean()


def _block(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Causal attention, then a feed-forward layer, each added to its input."""
    n, length, width = x.shape
    qkv = (_normalise(x) @ params["qkv"]).reshape(n, length, 3, HEADS, width // HEADS)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / (width // HEADS) ** 0.5
    weights = jax.nn.softmax(jnp.where(jnp.tri(length, dtype=bool), scores, -1e9))
    x = x + jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(n, length, width) @ params["mix"]
    return x + jax.nn.gelu(_normalise(x) @ params["up"]) @ params["down"]


def _normalise(x: jax.Array) -> jax.Array:
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def step(params: Params, state: Any, text: Any) -> tuple[Params, Any, jax.Array]:
    """A training step as a user of plain JAX writes it: new parameters, new optimizer state, loss."""
    value, gradients = jax.value_and_grad(loss)(params, text)
    updates, state = optimizer().update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value  # pyright: ignore[reportReturnType]
