"""Loops of models of sequences and graphs: transformers, recurrent nets, differential equations, graph networks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import flowml as fm
from tests.zoo.loop import ROWS, STEPS, Made, Supervised, apply, cross_entropy, dense, normal, rows, tokens

WORDS, WIDTH, LENGTH = 11, 8, 6


def _dropout(key: Any, x: Any, rate: float = 0.1) -> Any:
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def gpt() -> Supervised:
    """A language model: causal attention of two heads, dropout, tied embeddings, decay of weights only."""

    def block(p: Any, x: Any, key: Any) -> Any:
        one, two = jax.random.split(key)
        q, k, v = jnp.einsum("blw,nwhd->nblhd", jax.nn.standardize(x), p["qkv"].reshape(3, WIDTH, 2, -1))
        x = x + _dropout(one, jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ p["o"])
        return x + _dropout(two, apply(p["down"], jax.nn.gelu(apply(p["up"], jax.nn.standardize(x)))))

    def loss(params: Any, text: Any, rng: Any) -> Any:
        keys = jax.random.split(rng, 3)
        with fm.layer("embed"):
            x = params["embed"]["words"][text[:, :-1]] + params["embed"]["places"]
            x = _dropout(keys[2], x)
        for i in range(2):
            with fm.layer(f"block{i}"):
                x = block(params[f"block{i}"], x, keys[i])
        with fm.layer("head"):
            return cross_entropy(jax.nn.standardize(x) @ params["embed"]["words"].T, text[:, 1:])

    def weights(seed: int) -> Any:
        heads = {
            "qkv": jnp.asarray(normal(seed, 3, WIDTH, WIDTH) / 3),
            "o": jnp.asarray(normal(seed + 1, WIDTH, WIDTH)),
        }
        return {**heads, "up": dense(seed + 5, WIDTH, 16), "down": dense(seed + 6, 16, WIDTH)}

    embed = {"words": jnp.asarray(normal(0, WORDS, WIDTH)), "places": jnp.asarray(normal(1, LENGTH, WIDTH) / 10)}
    params = {"embed": embed, "block0": weights(10), "block1": weights(20)}
    decayed = jax.tree.map(lambda x: x.ndim > 1, params)
    optimizer = optax.adamw(1e-2, b2=0.95, weight_decay=0.1, mask=decayed)
    return Supervised(loss, optimizer, params, tokens(2, STEPS * ROWS, LENGTH + 1), rng=True)


def _cell(p: Any, h: Any, x: Any) -> Any:
    """A gated recurrent unit."""
    z, r = jnp.split(jax.nn.sigmoid(x @ p["x"] + h @ p["h"]), 2, -1)
    return (1 - z) * h + z * jnp.tanh(x @ p["in"] + (r * h) @ p["again"])


def _unit(seed: int) -> Any:
    shapes = {"x": (WIDTH, 2 * WIDTH), "h": (WIDTH, 2 * WIDTH), "in": (WIDTH, WIDTH), "again": (WIDTH, WIDTH)}
    return {name: jnp.asarray(normal(seed + i, *shape) / 3) for i, (name, shape) in enumerate(shapes.items())}


def seq2seq() -> Supervised:
    """An encoder and a decoder with attention; the decoder is given the right words."""

    def loss(params: Any, batch: Any) -> Any:
        with fm.layer("encoder"):
            p, start = params["encoder"], jnp.zeros((len(batch["source"]), WIDTH))

            def read(h: Any, x: Any) -> Any:
                h = _cell(p["unit"], h, x)
                return h, h

            last, seen = lax.scan(read, start, p["words"][batch["source"]].swapaxes(0, 1))
        with fm.layer("decoder"):
            d = params["decoder"]

            def write(h: Any, x: Any) -> Any:
                h = _cell(d["unit"], h, x)
                weights = jax.nn.softmax(jnp.einsum("bw,tbw->bt", h, seen))
                return h, apply(d["out"], jnp.concatenate([h, jnp.einsum("bt,tbw->bw", weights, seen)], -1))

            _, logits = lax.scan(write, last, d["words"][batch["target"][:, :-1]].swapaxes(0, 1))
            return cross_entropy(logits, batch["target"][:, 1:].T)

    words = [jnp.asarray(normal(i, WORDS, WIDTH)) for i in range(2)]
    encoder = {"words": words[0], "unit": _unit(10)}
    decoder = {"words": words[1], "unit": _unit(20), "out": dense(3, 2 * WIDTH, WORDS)}
    source = {"source": tokens(4, STEPS * ROWS, LENGTH), "target": tokens(5, STEPS * ROWS, LENGTH)}
    return Supervised(loss, optax.adam(1e-2), {"encoder": encoder, "decoder": decoder}, source)


def char_rnn() -> Made:
    """Truncated backpropagation: the hidden state of a batch goes on into the next one."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(1e-2))

    def loss(params: Any, h: Any, text: Any) -> Any:
        with fm.layer("embed"):
            x = params["embed"][text[:, :-1]].swapaxes(0, 1)
        with fm.layer("unit"):
            h, seen = lax.scan(lambda h, x: (_cell(params["unit"], h, x),) * 2, h, x)
        with fm.layer("out"):
            return cross_entropy(apply(params["out"], seen), text[:, 1:].T), h

    def step(state: Any, text: Any) -> Any:
        params, moments, h = state
        (value, h), gradients = jax.value_and_grad(loss, has_aux=True)(params, h, text)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments, lax.stop_gradient(h)), jnp.exp(value)

    params = {"embed": jnp.asarray(normal(0, WORDS, WIDTH)), "unit": _unit(1), "out": dense(9, WIDTH, WORDS)}
    return Made(step, (params, optimizer.init(params), jnp.zeros((ROWS, WIDTH))), list(tokens(1, STEPS, ROWS, LENGTH)))


def rnn() -> Supervised:
    """Classifies sequences of different lengths by the state at their ends."""

    def loss(params: Any, batch: Any) -> Any:
        with fm.layer("unit"):

            def advance(carry: Any, x: Any) -> Any:
                t, h = carry
                new = _cell(params["unit"], h, x)
                return (t + 1, jnp.where((t < batch["length"])[:, None], new, h)), None

            start = jnp.int32(0), jnp.zeros((len(batch["x"]), WIDTH))
            (_, h), _ = lax.scan(advance, start, batch["x"].swapaxes(0, 1))
        with fm.layer("head"):
            return cross_entropy(apply(params["head"], h), batch["label"])

    source = {"x": normal(0, STEPS * ROWS, LENGTH, WIDTH), "label": tokens(1, STEPS * ROWS, most=3)}
    source["length"] = 1 + tokens(2, STEPS * ROWS, most=LENGTH)
    return Supervised(loss, optax.adagrad(0.1), {"unit": _unit(3), "head": dense(8, WIDTH, 3)}, source)


def neural_ode() -> Supervised:
    """A differential equation, solved by Runge and Kutta's method in a scan, between an encoder and a decoder."""

    def loss(params: Any, batch: Any) -> Any:
        def slope(h: Any) -> Any:
            return apply(params["field"]["out"], jnp.tanh(apply(params["field"]["in"], h)))

        def advance(h: Any, dt: Any) -> Any:
            a = slope(h)
            b = slope(h + dt / 2 * a)
            c = slope(h + dt / 2 * b)
            return h + dt / 6 * (a + 2 * b + 2 * c + slope(h + dt * c)), None

        with fm.layer("encoder"):
            h = apply(params["encoder"], batch["x"])
        with fm.layer("field"):
            h, _ = lax.scan(advance, h, jnp.full(5, 0.2))
        with fm.layer("decoder"):
            return jnp.mean((apply(params["decoder"], h) - batch["y"]) ** 2)

    field = {"in": dense(1, 4, 16), "out": dense(2, 16, 4)}
    return Supervised(
        loss, optax.adabelief(1e-2), {"encoder": dense(0, 6, 4), "field": field, "decoder": dense(3, 4, 3)}, rows(4)
    )


def gnn() -> Supervised:
    """Graph convolutions by gather and segment sums; each example is a graph with its own edges."""
    nodes, edges = 5, 8

    def convolve(layer: Any, x: Any, batch: Any) -> Any:
        def messages(x: Any, senders: Any, receivers: Any) -> Any:
            degree = jax.ops.segment_sum(jnp.ones(edges), receivers, nodes)
            return jax.ops.segment_sum(x[senders], receivers, nodes) / jnp.maximum(degree, 1)[:, None]

        return jax.nn.relu(apply(layer, x + jax.vmap(messages)(x, batch["senders"], batch["receivers"])))

    def loss(params: Any, batch: Any) -> Any:
        x = batch["nodes"]
        for name in ("first", "second"):
            with fm.layer(name):
                x = convolve(params[name], x, batch)
        with fm.layer("readout"):
            return cross_entropy(apply(params["readout"], x.mean(1)), batch["label"])

    examples = STEPS * ROWS
    source = {"nodes": normal(0, examples, nodes, 4), "label": tokens(1, examples, most=2)}
    source |= {n: tokens(i, examples, edges, most=nodes) for i, n in enumerate(("senders", "receivers"), 2)}
    params = {"first": dense(0, 4, WIDTH), "second": dense(1, WIDTH, WIDTH), "readout": dense(2, WIDTH, 2)}
    return Supervised(loss, optax.yogi(1e-2), params, source)


def scanned_transformer() -> Supervised:
    """Equal blocks stacked in one array, scanned over and recomputed in the backward pass."""

    @jax.checkpoint
    def block(x: Any, p: Any) -> Any:
        scores = jnp.where(jnp.tri(LENGTH, dtype=bool), (x @ p["q"]) @ (x @ p["k"]).mT, -1e9)
        x = x + jax.nn.softmax(scores) @ (x @ p["v"])
        return x + jnp.tanh(jax.nn.standardize(x) @ p["w"]), None

    def loss(params: Any, text: Any) -> Any:
        with fm.layer("embed"):
            x = params["embed"][text[:, :-1]]
        with fm.layer("stack"):
            x, _ = lax.scan(block, x, params["stack"])
        with fm.layer("head"):
            return cross_entropy(apply(params["head"], x), text[:, 1:])

    stack = {n: jnp.asarray(normal(i, 3, WIDTH, WIDTH) / 4) for i, n in enumerate("qkvw")}
    params = {"embed": jnp.asarray(normal(7, WORDS, WIDTH)), "stack": stack, "head": dense(8, WIDTH, WORDS)}
    return Supervised(loss, optax.lion(1e-3), params, tokens(9, STEPS * ROWS, LENGTH + 1))


def word_vectors() -> Made:
    """Skip-grams with negative samples: sparse reads of two tables, and plain gradient descent by scatter."""

    def loss(tables: Any, batch: Any) -> Any:
        with fm.layer("inner"):
            center = tables["inner"][batch["center"]]
        with fm.layer("outer"):
            right = jnp.sum(center * tables["outer"][batch["near"]], -1)
            wrong = jnp.einsum("bw,bnw->bn", center, tables["outer"][batch["far"]])
            return -jnp.mean(jax.nn.log_sigmoid(right) + jax.nn.log_sigmoid(-wrong).sum(-1))

    def step(tables: Any, batch: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(tables, batch)
        return jax.tree.map(lambda p, g: p - 0.5 * g, tables, gradients), value

    tables = {name: jnp.asarray(normal(i, 40, WIDTH)) for i, name in enumerate(("inner", "outer"))}
    draw = np.random.default_rng(3)
    shapes = {"center": (ROWS,), "near": (ROWS,), "far": (ROWS, 4)}
    found = [{n: draw.integers(0, 40, s).astype(np.int32) for n, s in shapes.items()} for _ in range(STEPS)]
    return Made(step, tables, found)
