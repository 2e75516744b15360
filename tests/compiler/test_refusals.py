"""What the compiler refuses names the user's line, the construct, and the loops and branches around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

X = jnp.ones(4)
HERE = r"test_refusals\.py:\d+ \("


def host(x: Any) -> Any:
    return np.asarray(x)


def scanned(x: jax.Array) -> jax.Array:
    def update(carry: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        jax.debug.callback(host, carry)
        return carry + row, None

    return jax.lax.scan(update, x[0], x)[0]


def branched(x: jax.Array) -> jax.Array:
    def print_it(v: jax.Array) -> jax.Array:
        jax.debug.print("{}", v)
        return v

    def body(_: Any, v: jax.Array) -> jax.Array:
        return jax.lax.cond(v[0] > 0, print_it, jnp.sin, v)

    return jax.lax.fori_loop(0, 3, body, x)


def ordered(x: jax.Array) -> Any:
    with fm.layer("loud"):
        return jax.experimental.io_callback(host, X, x, ordered=True)


def looped(x: jax.Array) -> jax.Array:
    return jax.lax.while_loop(lambda v: v[0] < 3, lambda v: jax.pure_callback(host, X, v) + 1, x)


def rematerialised(x: jax.Array) -> jax.Array:
    return jax.grad(lambda v: jax.checkpoint(scanned)(v).sum())(x)


REFUSALS: dict[str, tuple[Callable[..., Any], str]] = {
    "callback in a scan": (
        scanned,
        rf"^scanned uses debug_callback \(jax\.debug\.callback\) inside scan at \S*{HERE}.*update\)",
    ),
    "print in a branch in a loop": (
        branched,
        rf"^branched uses debug_\w+ .* inside cond inside scan at \S*{HERE}.*print_it\)",
    ),
    "ordered": (
        ordered,
        rf"^ordered in layer 'loud' uses io_callback \(jax\.experimental\.io_callback\) at \S*{HERE}ordered\)",
    ),
    "pure callback in a loop": (
        looped,
        rf"^looped calls jax\.pure_callback inside while at \S*{HERE}.*\); move the callback out",
    ),
    "callback in a remat body": (rematerialised, rf"debug_callback .* inside .*{HERE}.*update\)"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_the_refusal_names_line_and_construct(name: str) -> None:
    fn, expected = REFUSALS[name]
    for call in (lambda: fm.compile(fn, X, devices=["worker:0"]), lambda: fm.dataflow(fn).plan(X)):
        with fm.Cluster.threads(workers=1), pytest.raises(fm.UnsupportedError, match=expected) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_loss_is_refused_in_the_same_words() -> None:
    def loss(params: Any, batch: Any) -> jax.Array:
        jax.debug.print("{}", params["w"])
        return jnp.mean(batch @ params["w"])

    trainer_args = {"w": np.ones((3, 2), np.float32)}, np.ones((8, 3), np.float32)
    with fm.Cluster.threads(workers=1), pytest.raises(fm.UnsupportedError, match=rf"^loss uses debug_\w+ .*{HERE}"):
        fm.Trainer(loss, optax.sgd(0.1)).plan(*trainer_args)


def test_training_without_jit_is_refused() -> None:
    with fm.Cluster.threads(workers=1), jax.disable_jit(), pytest.raises(fm.UnsupportedError, match="disable_jit"):
        trainer = fm.Trainer(lambda p, b: jnp.mean(b @ p), optax.sgd(0.1))
        trainer.fit(np.ones((3, 2), np.float32), np.ones((8, 3), np.float32), batch_size=8, steps=1)
