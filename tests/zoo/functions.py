"""The functions of the zoo: one JAX feature each, in layers named by scopes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import flowml as fm
from tests.zoo import models

Function = Callable[..., Any]
Made = tuple[Function, tuple[Any, ...]]


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    mean: jax.Array
    spread: jax.Array
    unit: str = dataclasses.field(metadata={"static": True}, default="mm")


def vector(n: int = 8) -> jax.Array:
    return jnp.linspace(-1.0, 1.0, n)


def matrix(rows: int, columns: int, seed: int = 0) -> jax.Array:
    return models.normal(seed, rows, columns)


def scopes() -> Made:
    def fn(x: jax.Array, w: jax.Array) -> jax.Array:
        with fm.layer("enc"):
            with fm.layer("inner"):
                x = jnp.tanh(x @ w)
            x = x * 2
        with fm.layer("dec"):
            return jnp.sin(x @ w.T)

    return fn, (matrix(4, 8), matrix(8, 8, 1))


def no_cut_edge() -> Made:
    """Two computations that share nothing: no value crosses between devices."""

    def fn(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        with fm.layer("left"):
            a = jnp.sin(x).sum()
        with fm.layer("right"):
            b = jnp.cos(y) * 3
        return a, b

    return fn, (vector(), vector(5))


def tied_weights() -> Made:
    def fn(embedding: jax.Array, tokens: jax.Array) -> jax.Array:
        with fm.layer("embed"):
            x = embedding[tokens]
        with fm.layer("body"):
            x = jnp.tanh(x).mean(0)
        with fm.layer("unembed"):
            return x @ embedding.T

    return fn, (matrix(11, 6), jnp.arange(7) % 5)


def tied_weights_gradient() -> Made:
    fn, args = tied_weights()
    return jax.value_and_grad(lambda e, t: jnp.sum(fn(e, t) ** 2)), args


def skip_connections() -> Made:
    """A U: every value made on the way down is used again on the way up."""

    def fn(weights: list[jax.Array], x: jax.Array) -> jax.Array:
        kept: list[jax.Array] = []
        for i in range(2):
            with fm.layer(f"down{i}"):
                x = jnp.tanh(x @ weights[i])
                kept.append(x)
        for i in range(2):
            with fm.layer(f"up{i}"):
                x = jnp.tanh((x + kept.pop()) @ weights[2 + i])
        return x

    return fn, ([matrix(8, 8, i) for i in range(4)], matrix(3, 8, 9))


def while_loop() -> Made:
    def fn(x: jax.Array) -> tuple[Any, jax.Array]:
        with fm.layer("loop"):
            steps, x = lax.while_loop(lambda s: s[1].sum() < 50, lambda s: (s[0] + 1, s[1] * 1.5), (0, jnp.abs(x)))
        with fm.layer("after"):
            return steps, jnp.log1p(x)

    return fn, (vector(),)


def fori_loop() -> Made:
    def fn(x: jax.Array) -> jax.Array:
        with fm.layer("loop"):
            x = lax.fori_loop(0, 5, lambda i, v: v.at[i].add(v.sum() / (i + 1)), x)
        with fm.layer("after"):
            return x - x.mean()

    return fn, (vector(),)


def cond() -> Made:
    def fn(x: jax.Array, scale: jax.Array) -> jax.Array:
        with fm.layer("test"):
            positive = x.sum() > -1
        with fm.layer("branch"):
            return lax.cond(positive, lambda v: v * scale, jnp.exp, x)

    return fn, (vector(), jnp.float32(3))


def switch() -> Made:
    def fn(index: jax.Array, x: jax.Array) -> jax.Array:
        with fm.layer("pick"):
            index = jnp.clip(index + 1, 0, 2)
        with fm.layer("branch"):
            return lax.switch(index, [jnp.sin, jnp.cos, lambda v: v * v], x)

    return fn, (jnp.int32(1), vector())


def custom_vjp() -> Made:
    @jax.custom_vjp
    def clipped(x: jax.Array) -> jax.Array:
        return x * 2

    clipped.defvjp(lambda x: (clipped(x), x), lambda x, g: (jnp.clip(g, -0.5, 0.5) + 0 * x,))

    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        with fm.layer("one"):
            h = clipped(x @ w)
        with fm.layer("two"):
            return jnp.sum(jnp.tanh(h) ** 2)

    return jax.value_and_grad(fn), (matrix(6, 4), matrix(3, 6, 1))


def custom_jvp() -> Made:
    @jax.custom_jvp
    def soft(x: jax.Array) -> jax.Array:
        return jnp.log1p(jnp.exp(x))

    soft.defjvps(lambda t, _, x: t * jax.nn.sigmoid(x))

    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        with fm.layer("one"):
            h = soft(x @ w)
        with fm.layer("two"):
            return jnp.mean(soft(h))

    return jax.value_and_grad(fn), (matrix(6, 4), matrix(3, 6, 1))


def remat() -> Made:
    @jax.checkpoint
    def block(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sin(jnp.tanh(x @ w))

    def fn(weights: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
        with fm.layer("one"):
            x = block(weights[0], x)
        with fm.layer("two"):
            return jnp.sum(block(weights[1], x))

    return jax.value_and_grad(fn), ((matrix(6, 6), matrix(6, 6, 1)), matrix(3, 6, 2))


def keys() -> Made:
    """Typed keys in and out, alone and in arrays."""

    def fn(key: jax.Array, many: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        with fm.layer("split"):
            first, second = jax.random.split(key)
        with fm.layer("draw"):
            noise = jax.vmap(lambda k: jax.random.uniform(k, (2,)))(many)
        return jax.random.fold_in(first, 3), jax.random.split(second, 3), noise

    return fn, (jax.random.key(7), jax.random.split(jax.random.key(8), 4))


def rbg_keys() -> Made:
    def fn(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        with fm.layer("split"):
            key, sub = jax.random.split(key)
        with fm.layer("draw"):
            return key, jax.random.bits(sub, (4,))

    return fn, (jax.random.key(7, impl="rbg"),)


def dropout() -> Made:
    def fn(w: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
        with fm.layer("one"):
            x = jnp.tanh(x @ w)
        with fm.layer("drop"):
            x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x / 0.5, 0.0)
        with fm.layer("two"):
            return jnp.sum((x @ w) ** 2)

    return jax.value_and_grad(fn), (matrix(8, 8), matrix(4, 8, 1), jax.random.key(3))


def many_dtypes() -> Made:
    def fn(x: jax.Array, n: jax.Array) -> dict[str, jax.Array]:
        with fm.layer("cast"):
            half = x.astype(jnp.bfloat16) * 2
            small = n.astype(jnp.int8) + jnp.int8(1)
        with fm.layer("use"):
            return {
                "bool": x > 0,
                "bfloat16": jnp.sin(half),
                "float16": half.astype(jnp.float16) + 1,
                "int8": small * small,
                "uint32": n.astype(jnp.uint32) << 2,
                "complex64": x + 1j * jnp.cos(x),
            }

    return fn, (vector(), jnp.arange(5))


def donated() -> Made:
    """A training step by hand: parameters and momentum are given up."""

    def fn(w: jax.Array, momentum: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def loss(w: jax.Array) -> jax.Array:
            with fm.layer("one"):
                h = jnp.tanh(x @ w)
            with fm.layer("two"):
                return jnp.mean(h**2)

        momentum = 0.9 * momentum + jax.grad(loss)(w)
        return w - 0.1 * momentum, momentum

    return fn, (matrix(6, 6), jnp.zeros((6, 6)), matrix(4, 6, 1))


def trees_with_none() -> Made:
    def fn(tree: dict[str, Any]) -> dict[str, Any]:
        with fm.layer("one"):
            x = tree["a"] * 2
        with fm.layer("two"):
            return {"none": None, "list": [x.sum(), None, (tree["b"][1] + 1,)], "empty": ()}

    return fn, ({"a": vector(), "b": [None, jnp.int32(4)], "c": None},)


def records() -> Made:
    """A named tuple goes in; a dataclass with a static field comes out within another."""

    def fn(pair: Pair) -> Pair:
        with fm.layer("one"):
            mean = (pair.first + pair.second).mean()
        with fm.layer("two"):
            return Pair(Statistics(mean, jnp.std(pair.first)), pair.second - mean)

    return fn, (Pair(vector(), vector() * 3),)


def zero_size() -> Made:
    def fn(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        with fm.layer("one"):
            x = jnp.concatenate([x, x]) * 2
        with fm.layer("two"):
            return x, y + x.sum()

    return fn, (jnp.zeros((0, 3)), vector())


def literals_out() -> Made:
    """Python scalars, and arrays that depend on nothing, as results."""

    def fn(x: jax.Array) -> tuple[Any, ...]:
        with fm.layer("one"):
            y = x + 1
        return 3, 2.5, True, jnp.arange(4), np.float32(7), y

    return fn, (vector(),)


def inputs_out() -> Made:
    def fn(x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        with fm.layer("one"):
            z = x * 2
        return y, x, z, y

    return fn, (vector(), jnp.arange(3))


def captured_constant() -> Made:
    """The function closes over an array too big for a literal."""
    table = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)

    def fn(x: jax.Array) -> jax.Array:
        with fm.layer("one"):
            x = x @ table
        with fm.layer("two"):
            return jnp.tanh(x) @ table.T

    return fn, (matrix(3, 64),)


def duplicated_outputs() -> Made:
    def fn(x: jax.Array) -> dict[str, jax.Array]:
        with fm.layer("one"):
            y = jnp.sin(x)
        with fm.layer("two"):
            z = jnp.cos(y)
        return {"a": y, "b": z, "c": y, "d": z}

    return fn, (vector(),)


def unused_inputs() -> Made:
    def fn(x: jax.Array, unused: dict[str, jax.Array], y: jax.Array) -> jax.Array:
        with fm.layer("one"):
            a = x * 2
        with fm.layer("two"):
            return a + y

    return fn, (vector(), {"big": matrix(16, 16), "key": jax.random.key(0)}, vector())


def weak_types() -> Made:
    def fn(x: Any, y: jax.Array, z: Any) -> tuple[Any, ...]:
        with fm.layer("one"):
            a = x * 2
        with fm.layer("two"):
            return a, y * x, z + 1, jnp.bfloat16(1) * a

    return fn, (3.0, jnp.arange(4), 2)


def static_arguments() -> Made:
    def fn(x: jax.Array, power: int, mode: str) -> jax.Array:
        with fm.layer("one"):
            for _ in range(power):
                x = x * x
        with fm.layer("two"):
            return jnp.sin(x) if mode == "sin" else x

    return fn, (vector(), 2, "sin")


def keyword_arguments() -> Made:
    def fn(x: jax.Array, *, scale: Any, shift: dict[str, Any] | None = None) -> jax.Array:
        with fm.layer("one"):
            x = x * scale
        with fm.layer("two"):
            return x + shift["by"] if shift else x

    return fn, (vector(),)


def vmapped() -> Made:
    def one(w: jax.Array, x: jax.Array) -> jax.Array:
        with fm.layer("one"):
            h = jnp.tanh(w @ x)
        with fm.layer("two"):
            return h / jnp.linalg.norm(h)

    return jax.vmap(one, in_axes=(None, 0)), (matrix(6, 6), matrix(5, 6, 1))


def nested_jit() -> Made:
    @jax.jit
    def inner(x: jax.Array) -> jax.Array:
        with fm.layer("deep"):
            return jax.jit(jnp.tanh)(x) * 2

    def fn(x: jax.Array) -> jax.Array:
        with fm.layer("outer"):
            x = inner(x) + 1
        return inner(x)

    return fn, (vector(),)


def fft() -> Made:
    def fn(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        with fm.layer("spectrum"):
            z = jnp.fft.rfft(x)
        with fm.layer("back"):
            return jnp.fft.irfft(z * jnp.conj(z)), z

    return fn, (vector(16),)


def sorting() -> Made:
    def fn(x: jax.Array) -> tuple[jax.Array, ...]:
        with fm.layer("sort"):
            order = jnp.argsort(jnp.sin(9 * x))
        with fm.layer("top"):
            values, places = lax.top_k(x[order], 3)
            return jnp.sort(x), order, values, places, jnp.median(x)

    return fn, (vector(9),)


def decompositions() -> Made:
    """QR, Cholesky, solve and the singular values; factors are compared through their products."""

    def fn(a: jax.Array) -> tuple[jax.Array, ...]:
        with fm.layer("qr"):
            q, r = jnp.linalg.qr(a)
            spd = a.T @ a + 3 * jnp.eye(a.shape[1])
        with fm.layer("cholesky"):
            factor = jnp.linalg.cholesky(spd)
            solved = jnp.linalg.solve(spd, jnp.ones(a.shape[1]))
        with fm.layer("svd"):
            return q @ r, factor, solved, jnp.linalg.svd(a, compute_uv=False)

    return fn, (matrix(6, 4),)


def scatter_gather() -> Made:
    def fn(x: jax.Array, places: jax.Array) -> tuple[jax.Array, jax.Array]:
        with fm.layer("scatter"):
            y = jnp.zeros(10).at[places].add(x).at[0].max(0.5)
        with fm.layer("gather"):
            return jnp.take(y, places), jax.ops.segment_sum(x, places % 3, num_segments=3)

    return fn, (vector(), jnp.array([1, 3, 3, 9, 0, 2, 2, 2]))


def hessian() -> Made:
    """Differentiated twice: forward over reverse."""

    def fn(x: jax.Array) -> jax.Array:
        with fm.layer("one"):
            h = jnp.sin(x)
        with fm.layer("two"):
            return jnp.prod(h + 2)

    return jax.hessian(fn), (vector(5),)
