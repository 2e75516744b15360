"""The models of the zoo: each returns a function and its arguments, small enough to compile in well under a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

import flowml as fm

Made = tuple[Callable[..., Any], tuple[Any, ...]]
Tree = dict[str, Any]


def normal(seed: int, *shape: int) -> jax.Array:
    """Normal numbers by NumPy, which compiles nothing."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dense(seed: int, inputs: int, outputs: int) -> Tree:
    return {"w": normal(seed, inputs, outputs) / inputs**0.5, "b": jnp.zeros(outputs)}


def _mlp_params() -> Tree:
    return {f"l{i}": dense(i, n, m) for i, (n, m) in enumerate(((6, 16), (16, 16), (16, 3)))}


def _mlp(params: Tree, x: jax.Array) -> jax.Array:
    """No scopes: labels come from the parameters' paths."""
    for name in ("l0", "l1"):
        x = jax.nn.relu(x @ params[name]["w"] + params[name]["b"])
    return x @ params["l2"]["w"] + params["l2"]["b"]


def _mlp_loss(params: Tree, batch: Tree) -> jax.Array:
    return jnp.mean((_mlp(params, batch["x"]) - batch["y"]) ** 2)


def _batch(features: int = 6, outputs: int = 3) -> Tree:
    return {"x": normal(11, 8, features), "y": normal(12, 8, outputs)}


def mlp() -> Made:
    return _mlp, (_mlp_params(), _batch()["x"])


def mlp_gradient() -> Made:
    return jax.value_and_grad(_mlp_loss), (_mlp_params(), _batch())


def mlp_adam() -> Made:
    """A whole training step: gradient, optimizer, new parameters."""
    optimizer = optax.adam(1e-2)

    def step(params: Tree, state: Any, batch: Tree) -> tuple[Tree, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(_mlp_loss)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss  # pyright: ignore[reportReturnType]

    params = _mlp_params()
    return step, (params, optimizer.init(params), _batch())


class _Cnn(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(4, (3, 3), name="conv1")(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(6, (3, 3), name="conv2")(x))
        return nn.Dense(3, name="fc")(x.reshape(x.shape[0], -1))


def linen_cnn() -> Made:
    model = _Cnn()
    images = normal(2, 2, 8, 8, 1)
    return model.apply, (_filled(jax.eval_shape(model.init, jax.random.key(0), images)), images)


def linen_cnn_gradient() -> Made:
    apply, (params, images) = linen_cnn()
    return jax.value_and_grad(lambda p, x: jnp.sum(apply(p, x) ** 2)), (params, images)


def _filled(tree: Any) -> Any:
    """Arrays for shapes: every leaf other random numbers."""
    leaves, structure = jax.tree_util.tree_flatten(tree)
    return structure.unflatten([normal(i, *leaf.shape) / 3 for i, leaf in enumerate(leaves)])


class _Normed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(8, name="dense")(x)
        return nn.relu(nn.BatchNorm(use_running_average=False, name="norm")(x))


def linen_batch_norm() -> Made:
    """State that is not a parameter goes in and comes out changed."""
    model = _Normed()
    x = _batch()["x"]

    def fn(variables: Any, x: jax.Array) -> Any:
        return model.apply(variables, x, mutable=["batch_stats"])

    return fn, (_filled(jax.eval_shape(model.init, jax.random.key(0), x)), x)


class _NnxMlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(6, 12, rngs=rngs)
        self.second = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(jax.nn.gelu(self.first(x)))


def nnx_mlp() -> Made:
    graph, state = nnx.split(_NnxMlp(nnx.Rngs(0)))

    def fn(state: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(x)

    return fn, (state, _batch()["x"])


def equinox_mlp() -> Made:
    model = eqx.nn.MLP(6, 3, 12, 1, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_array)

    def fn(arrays: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(arrays, static))(x)

    return fn, (arrays, _batch()["x"])


def _attend(params: Tree, x: jax.Array, heads: int = 2) -> jax.Array:
    """Causal self-attention of one sequence, float32[length, width]."""
    length, width = x.shape
    with fm.layer("qkv"):
        q, k, v = ((x @ params[n]).reshape(length, heads, -1) for n in ("q", "k", "v"))
    with fm.layer("scores"):
        scores = jnp.einsum("qhd,khd->hqk", q, k) / (width // heads) ** 0.5
        weights = jax.nn.softmax(jnp.where(jnp.tri(length, dtype=bool), scores, -1e9))
    with fm.layer("out"):
        return jnp.einsum("hqk,khd->qhd", weights, v).reshape(length, width) @ params["o"]


def _attention_params(seed: int, width: int) -> Tree:
    return {name: normal(seed + i, width, width) / width**0.5 for i, name in enumerate("qkvo")}


def attention() -> Made:
    return _attend, (_attention_params(0, 8), normal(9, 5, 8))


def _transformer_params(vocabulary: int = 13, width: int = 8) -> Tree:
    params: Tree = {"embed": {"table": normal(0, vocabulary, width)}}
    for i in range(2):
        params[f"block{i}"] = {
            "attention": _attention_params(10 * i + 1, width),
            "up": dense(10 * i + 5, width, 16),
            "down": dense(10 * i + 6, 16, width),
        }
    return params | {"head": dense(30, width, vocabulary)}


def _norm(x: jax.Array) -> jax.Array:
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def _block(params: Tree, x: jax.Array) -> jax.Array:
    x = x + _attend(params["attention"], _norm(x))
    h = jax.nn.gelu(_norm(x) @ params["up"]["w"] + params["up"]["b"])
    return x + h @ params["down"]["w"] + params["down"]["b"]


def _transformer(params: Tree, tokens: jax.Array) -> jax.Array:
    """Logits float32[batch, length, vocabulary] of tokens int32[batch, length]."""
    with fm.layer("embed"):
        x = params["embed"]["table"][tokens]
    for i in range(2):
        with fm.layer(f"block{i}"):
            x = jax.vmap(_block, in_axes=(None, 0))(params[f"block{i}"], x)
    with fm.layer("head"):
        return _norm(x) @ params["head"]["w"] + params["head"]["b"]


def _tokens() -> jax.Array:
    return jnp.asarray(np.random.default_rng(5).integers(0, 13, (3, 6)), jnp.int32)


def transformer() -> Made:
    return _transformer, (_transformer_params(), _tokens())


def transformer_gradient() -> Made:
    def loss(params: Tree, tokens: jax.Array) -> jax.Array:
        logits = _transformer(params, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return jax.value_and_grad(loss), (_transformer_params(), _tokens())


def _lstm(params: Tree, tokens: jax.Array) -> jax.Array:
    """Last prediction of an LSTM over int32[length]."""
    with fm.layer("embed"):
        inputs = params["embed"]["table"][tokens]

    def cell(carry: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        h, c = carry
        i, f, g, o = jnp.split(x @ params["cell"]["w"] + h @ params["cell"]["u"] + params["cell"]["b"], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    with fm.layer("cell"):
        (h, _), _ = lax.scan(cell, (jnp.zeros(8), jnp.zeros(8)), inputs)
    with fm.layer("head"):
        return h @ params["head"]["w"] + params["head"]["b"]


def _lstm_params() -> Tree:
    cell = dense(0, 6, 32) | {"u": normal(1, 8, 32) / 3}
    return {"embed": {"table": normal(2, 13, 6)}, "cell": cell, "head": dense(3, 8, 13)}


def lstm() -> Made:
    return _lstm, (_lstm_params(), _tokens()[0])


def lstm_gradient() -> Made:
    return jax.value_and_grad(lambda p, t: jnp.sum(_lstm(p, t) ** 2)), (_lstm_params(), _tokens()[0])


def stacked_scan_gradient() -> Made:
    """Layers stacked in one array and scanned over, and the gradient through the scan."""

    def loss(params: Tree, x: jax.Array) -> jax.Array:
        with fm.layer("stack"):
            x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"]["w"])
        with fm.layer("head"):
            return jnp.mean((x @ params["head"]["w"]) ** 2)

    params = {"stack": {"w": normal(0, 4, 8, 8) / 3}, "head": dense(1, 8, 2)}
    return jax.value_and_grad(loss), (params, normal(2, 3, 8))


def unlabelled() -> Made:
    """Neither scopes nor a tree of parameters: only the cost model can place it."""

    def fn(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.tanh(x @ w) @ v).sum(0) + jnp.arange(4.0)

    return fn, (normal(0, 3, 5), normal(1, 5, 6), normal(2, 6, 4))
