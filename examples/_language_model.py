"""Defines the model and the data of `pipeline.py`: a small transformer that predicts the next byte of Python source.

The text is the source of this Python's standard library, so nothing is downloaded. The model is plain JAX: parameters
are a dict from layer to arrays, and `fm.layer` gives the operations the same names.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

import flowml as fm

Params = dict[str, dict[str, jax.Array]]

VOCABULARY = 128
"""ASCII. Every other byte is read as "?"."""

LENGTH, WIDTH, HEADS, BLOCKS = 64, 64, 4, 4
TEXT_BYTES = 400_000


def load_text(nbytes: int = TEXT_BYTES) -> npt.NDArray[np.uint8]:
    """Windows uint8[n, LENGTH + 1] of the standard library's modules in the order of their names.

    Each window starts with the last byte of the previous window, because it predicts the bytes after it.
    """
    library = Path(sysconfig.get_path("stdlib"))
    text = b""
    for path in sorted(library.glob("*.py")):
        text += path.read_bytes()
        if len(text) > nbytes:
            break
    codes = np.frombuffer(text[:nbytes], np.uint8)
    codes = np.where(codes < VOCABULARY, codes, ord("?")).astype(np.uint8)
    starts = np.arange(0, len(codes) - LENGTH, LENGTH)
    return codes[starts[:, None] + np.arange(LENGTH + 1)]


def init_params(seed: int = 0) -> Params:
    """Initial parameters, layer by layer: embed, block0 and so on, head."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(rng.normal(size=(rows, columns)) * scale / rows**0.5, jnp.float32)

    params: Params = {"embed": {"byte": matrix(VOCABULARY, WIDTH, 3.0), "place": matrix(LENGTH, WIDTH, 1.0)}}
    for i in range(BLOCKS):
        params[f"block{i}"] = {
            "qkv": matrix(WIDTH, 3 * WIDTH),
            "mix": matrix(WIDTH, WIDTH, 0.3),
            "up": matrix(WIDTH, 4 * WIDTH),
            "down": matrix(4 * WIDTH, WIDTH, 0.3),
        }
    return params | {"head": {"w": matrix(WIDTH, VOCABULARY), "b": jnp.zeros(VOCABULARY)}}


def logits(params: Params, text: jax.Array) -> jax.Array:
    """Scores float32[n, length, VOCABULARY] for the byte after each of text uint8[n, length]."""
    with fm.layer("embed"):
        x = params["embed"]["byte"][text.astype(jnp.int32)] + params["embed"]["place"]
    for i in range(BLOCKS):
        with fm.layer(f"block{i}"):
            x = _block(params[f"block{i}"], x)
    with fm.layer("head"):
        return _normalise(x) @ params["head"]["w"] + params["head"]["b"]


def loss(params: Params, batch: Mapping[str, Any]) -> jax.Array:
    """Mean cross entropy in nats per byte. `batch["text"]`: uint8[n, LENGTH + 1]."""
    text = batch["text"]
    scores = jax.nn.log_softmax(logits(params, text[:, :-1]))
    following = text[:, 1:, None].astype(jnp.int32)
    return -jnp.take_along_axis(scores, following, axis=-1).mean()


def _normalise(x: jax.Array) -> jax.Array:
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def _block(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Causal attention, then a feed-forward layer, each added to its input."""
    n, length, width = x.shape
    qkv = (_normalise(x) @ params["qkv"]).reshape(n, length, 3, HEADS, width // HEADS)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / (width // HEADS) ** 0.5
    weights = jax.nn.softmax(jnp.where(jnp.tri(length, dtype=bool), scores, -1e9))
    x = x + jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(n, length, width) @ params["mix"]
    return x + jax.nn.gelu(_normalise(x) @ params["up"]) @ params["down"]
