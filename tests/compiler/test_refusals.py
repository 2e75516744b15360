"""What is refused where workers run no Python names the user's line, the construct, and the loops and branches around
it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

X = jnp.ones(4)
LAN = fm.sim.Network(latency_s=1e-4, bytes_per_s=1e9)
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


def checked(x: jax.Array) -> jax.Array:
    def body(v: jax.Array) -> jax.Array:
        return eqx.error_if(v, v[0] > 9, "too large")  # equinox compiles the callback by itself

    return jax.lax.cond(x[0] > 0, body, jnp.sin, eqx.error_if(x, x[0] < 0, "negative"))


REFUSALS: dict[str, tuple[Callable[..., Any], str]] = {
    "callback in a scan": (
        scanned,
        rf"^scanned uses jax\.debug\.callback inside scan at \S*{HERE}.*update\)",
    ),
    "print in a branch in a loop": (
        branched,
        rf"^branched uses jax\.debug\.print inside cond inside scan at \S*{HERE}.*print_it\)",
    ),
    "ordered": (
        ordered,
        rf"^ordered in layer 'loud' uses jax\.experimental\.io_callback at \S*{HERE}ordered\), .*allow_python=True$",
    ),
    "pure callback in a loop": (
        looped,
        rf"^looped uses jax\.pure_callback inside while at \S*{HERE}.*\), which calls Python",
    ),
    "callback of a library": (
        checked,
        rf"^checked uses jax\.pure_callback inside cond at \S*{HERE}checked\), which calls Python",
    ),
    "callback of a library in a branch": (
        lambda x: jax.lax.scan(lambda c, _: (checked(c), None), x, length=2),
        rf"uses jax\.pure_callback inside cond .*inside scan at \S*{HERE}.*(checked|body)\), which calls Python",
    ),
    "callback in a remat body": (
        rematerialised,
        rf"debug\.callback inside scan .*at .*{HERE}.*update\), .* effects=\"drop\"$",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_the_refusal_names_line_and_construct(name: str, process_cluster: fm.Cluster) -> None:
    fn, expected = REFUSALS[name]
    with pytest.raises(fm.UnsupportedError, match=expected) as caught:
        fm.dataflow(fn, cluster=process_cluster).plan(X)
    assert "\n" not in str(caught.value)


def test_a_loss_is_refused_in_the_same_words(process_cluster: fm.Cluster) -> None:
    def loss(params: Any, batch: Any) -> jax.Array:
        jax.debug.print("{}", params["w"])
        return jnp.mean(batch @ params["w"])

    arguments = {"w": np.ones((3, 2), np.float32)}, np.ones((8, 3), np.float32)
    with pytest.raises(fm.UnsupportedError, match=rf"^loss uses jax\.debug\.print at \S*{HERE}"):
        fm.Trainer(loss, optax.sgd(0.1), cluster=process_cluster).plan(*arguments)


def printing(x: jax.Array) -> Any:
    def body(_: Any, v: jax.Array) -> jax.Array:
        jax.debug.print("in {}", v)
        return jax.lax.cond(v[0] > 0, lambda u: (jax.debug.callback(host, u), u)[1], jnp.sin, v) + 1

    jax.debug.print("before", ordered=True)
    return jax.lax.fori_loop(0, 3, body, x), jax.grad(lambda v: jax.checkpoint(scanned)(v).sum())(x)


def test_what_debugging_does_is_left_out_with_one_warning(process_cluster: fm.Cluster) -> None:
    program = fm.dataflow(printing, cluster=process_cluster, effects="drop")
    told = rf"^printing runs without jax\.debug\.print at \S*{HERE}.*\) and \d more, because of effects=\"drop\"$"
    with pytest.warns(fm.FlowmlWarning, match=told) as warned:
        found, _ = [program(x) for x in (X, X[:2])]
    assert len(warned) == 1
    assert warned[0].filename == __file__
    jax.tree.map(np.testing.assert_allclose, found, jax.jit(printing)(X))
    assert all(task.kind == "xla" for task in program.plan(X).tasks)

    mixed = fm.dataflow(lambda x: (jax.debug.print("{}", x), ordered(x))[1], cluster=process_cluster, effects="drop")
    with pytest.raises(fm.UnsupportedError, match="io_callback"):  # an effect that is no debugging is never left out
        mixed(X)


def test_a_trainer_leaves_out_debugging_with_one_warning() -> None:
    def loss(params: Any, batch: Any) -> jax.Array:
        jax.debug.print("{}", params["w"])
        return jnp.mean(batch @ params["w"])

    trainer = fm.Trainer(loss, optax.sgd(0.1), effects="drop", cluster=fm.SimulatedCluster(2, fm.sim.Constant(1), LAN))
    with pytest.warns(fm.FlowmlWarning, match=r"^loss runs without jax\.debug\.print at ") as warned:
        plans = [trainer.plan({"w": np.ones((3, 2), np.float32)}, np.ones((n, 3), np.float32)) for n in (8, 4)]
    assert len(warned) == 1
    assert all(task.kind == "xla" for plan in plans for task in plan.tasks)


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="effects='ignore' is unknown; give 'run' or 'drop'"):
        fm.dataflow(printing, effects="ignore")  # pyright: ignore


def test_what_cannot_be_pickled_is_named() -> None:
    lock = threading.Lock()

    def locked(v: Any) -> Any:
        with lock:
            return v

    def fn(x: jax.Array) -> Any:
        return jax.pure_callback(locked, x, x)

    with pytest.raises(fm.UnsupportedError, match=rf"^jax\.pure_callback at \S*{HERE}\S*fn\) cannot be sent .* pickle"):
        fm.compile(fn, X, devices=["worker:0"])


def test_an_unbound_axis_says_what_to_write() -> None:
    def averaged(x: jax.Array) -> jax.Array:
        return jax.lax.pmean(x, "batch")

    wanted = r"^averaged uses the axis 'batch', .*fm\.dataflow\(jax\.vmap\(averaged, axis_name='batch'\)\)"
    with pytest.raises(fm.UnsupportedError, match=wanted):
        fm.compile(averaged, X, devices=["worker:0"])
    with pytest.raises(fm.UnsupportedError, match=r"was made by jax\.pmap, .*jax\.vmap"):
        fm.compile(jax.pmap(averaged, axis_name="batch"), X, devices=["worker:0"])


def test_training_without_jit_is_refused() -> None:
    with fm.Cluster.threads(workers=1), jax.disable_jit(), pytest.raises(fm.UnsupportedError, match="disable_jit"):
        trainer = fm.Trainer(lambda p, b: jnp.mean(b @ p), optax.sgd(0.1))
        trainer.fit(np.ones((3, 2), np.float32), np.ones((8, 3), np.float32), batch_size=8, steps=1)
