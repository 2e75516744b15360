"""Effects happen as under jit: each once for a call, in order where JAX promises it, in loops and branches, on every
placement. What they print is compared as text, and what callbacks do by a file that they write."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback

import flowml as fm
from tests.training.reference import assert_close, assert_same

X = jnp.arange(4.0)
BARRIERS: list[threading.Barrier] = []
"""What calls in this process wait for."""


def host_sin(v: Any) -> Any:
    return np.sin(np.asarray(v))


def say(v: Any) -> None:
    print("say", float(np.sum(np.asarray(v))))


def counted(v: Any) -> Any:
    print("ordered", float(np.sum(np.asarray(v))))
    return np.asarray(v) + 1


def like(x: jax.Array) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def refuse_together(v: Any) -> Any:
    if v >= 0:
        BARRIERS[0].wait(60)  # another call is here too
        raise ValueError(f"of {int(v)}")
    return np.asarray(v)


def plain(x: jax.Array) -> jax.Array:
    with fm.layer("a"):
        y = jnp.sin(x)
        jax.debug.print("y {y}", y=y.sum())
        jax.debug.callback(say, y)
    with fm.layer("b"):
        z = io_callback(counted, like(y), y, ordered=True)
        jax.debug.print("then {}", z.max(), ordered=True)
        return io_callback(counted, like(z), z * 2, ordered=True) + jax.pure_callback(host_sin, like(x), x)


def unused(x: jax.Array) -> jax.Array:
    io_callback(counted, like(x), x)  # its result is not used
    jax.debug.print("constant")
    return x + 1


def looped(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    def step(carry: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        jax.debug.print("then {}", carry, ordered=True)
        more = io_callback(counted, like(carry), carry, ordered=True)
        return more * 2, jax.pure_callback(host_sin, like(row), row)

    return jax.lax.scan(step, jnp.float32(1), x, reverse=True)


def until(x: jax.Array) -> jax.Array:
    def again(v: jax.Array) -> jax.Array:
        jax.debug.print("then test {}", v[0], ordered=True)
        return v[0] < 3

    def body(v: jax.Array) -> jax.Array:
        return io_callback(counted, like(v), v, ordered=True)

    jax.debug.print("then before", ordered=True)
    last = jax.lax.while_loop(again, body, x)
    jax.debug.print("then after {}", last[0], ordered=True)
    return last


def branched(x: jax.Array) -> jax.Array:
    def loud(v: jax.Array) -> jax.Array:
        jax.debug.print("loud {}", v[1])
        return io_callback(counted, like(v), v, ordered=True)

    def body(i: jax.Array, v: jax.Array) -> jax.Array:
        return jax.lax.switch(i, (jnp.cos, loud, jnp.sin), v)

    return jax.lax.fori_loop(0, 3, body, x)


def nested(x: jax.Array) -> jax.Array:
    @jax.jit
    def outer(c: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        return jax.lax.scan(lambda d, r: (jax.debug.print("in {}", d), (d * r, None))[1], c, row), None

    def over(c: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        (found, _), _ = outer(c, row)
        return found, None

    return jax.lax.scan(over, jnp.float32(1), x.reshape(2, 2) + 1)[0]


def gradient(x: jax.Array) -> jax.Array:
    @jax.checkpoint
    def block(v: jax.Array) -> jax.Array:
        jax.debug.print("block {}", v.sum())
        return jnp.sin(v) * v

    def loss(v: jax.Array) -> jax.Array:
        last, _ = jax.lax.scan(lambda c, _: (block(c), None), v, None, length=3)
        return (block(v) + last).sum()

    return jax.grad(loss)(x)


@jax.custom_vjp
def with_rule(x: jax.Array) -> jax.Array:
    jax.debug.print("primal")
    return jax.pure_callback(host_sin, like(x), x)


def forwards(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    jax.debug.print("forwards {}", x[0])
    return with_rule(x), x


def backwards(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    jax.debug.print("backwards {}", g[0])
    return (g * jnp.cos(x),)


with_rule.defvjp(forwards, backwards)


def ruled(x: jax.Array) -> jax.Array:
    return with_rule(x) + jax.grad(lambda v: with_rule(v).sum())(x)


def mapped(x: jax.Array) -> jax.Array:
    def one(v: jax.Array) -> jax.Array:
        jax.debug.print("row {}", v)
        return jax.pure_callback(host_sin, like(v), v, vmap_method="sequential")

    return jax.vmap(one)(x)


def with_refs(x: jax.Array) -> jax.Array:
    with fm.layer("enc"):
        total = jax.new_ref(jnp.zeros_like(x))

        def add(i: jax.Array, _: None) -> None:
            total[...] = total[...] * 2 + x
            jax.debug.print("total {}", total[0])

        jax.lax.fori_loop(0, 3, add, None)
    with fm.layer("dec"):
        total[0] = 7.0
        return jax.freeze(total) + x


def keys(x: jax.Array) -> jax.Array:
    def step(key: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        key, own = jax.random.split(key)
        jax.debug.print("drawn {}", jax.random.uniform(own))
        return key, jax.random.normal(own) + row

    return jax.lax.scan(step, jax.random.key(1), x)[1]


def narrow(x: jax.Array) -> Any:
    half = x.astype(jnp.bfloat16)

    def step(c: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.pure_callback(lambda v: np.asarray(v) * 2, like(c), c), None

    return jax.lax.scan(step, half, None, length=2)[0], jnp.arange(3) > 1


FUNCTIONS = (
    *(plain, unused, looped, until, branched, nested, gradient, ruled, mapped),
    *(with_refs, keys, narrow),
)


def apart(graph: Any, devices: Any) -> Any:
    """Every node on another device than the one before it."""
    return {node.id: devices[i % len(devices)] for i, node in enumerate(graph.nodes)}


def said(capsys: pytest.CaptureFixture[str]) -> tuple[Counter[str], list[str], list[str]]:
    """What was printed since the last call: all lines, and those of ordered callbacks and prints in their order.

    JAX orders the callbacks among themselves, and the prints.
    """
    jax.effects_barrier()
    lines = capsys.readouterr().out.splitlines()
    return Counter(lines), *([line for line in lines if line.startswith(kind)] for kind in ("ordered", "then"))


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_effects_are_those_of_jit(
    fn: Callable[..., Any], threads_cluster: fm.Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = jax.block_until_ready(jax.jit(fn)(X))
    wanted = said(capsys)
    for placement in (lambda _, devices: {}, apart):
        program = fm.dataflow(fn, cluster=threads_cluster, placement=placement)
        for _ in range(2):  # the second call is one that was seen before
            assert_close(program(X), expected)
            assert said(capsys) == wanted


def test_calls_in_flight_keep_the_order_also_of_two_programs(
    threads_cluster: fm.Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    def first(x: jax.Array) -> jax.Array:
        return io_callback(counted, like(x), x, ordered=True)

    def second(x: jax.Array) -> jax.Array:
        jax.debug.print("then second {}", x[0], ordered=True)
        with fm.device("worker:2"):
            jax.debug.print("then third {}", x[0], ordered=True)
        return x

    one, two = (fm.dataflow(f, cluster=threads_cluster, placement=fm.Pipeline(1)) for f in (first, second))
    futures = [f.submit(X + i) for i in range(3) for f in (one, two)]
    for future in futures:
        future.result(60)
    lines = list(said(capsys)[0])  # each is printed once, so that they are in the order of printing
    assert lines == [
        text for i in range(3) for text in (f"ordered {6 + 4 * i:.1f}", f"then second {i}.0", f"then third {i}.0")
    ]


def test_effects_of_a_call_whose_results_stay_on_the_workers(
    threads_cluster: fm.Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    program = fm.dataflow(plain, cluster=threads_cluster, keep=0, placement={"a": "worker:1", "b": "worker:2"})
    value: Any = program(X)
    value.block_until_ready()  # which waits for the whole call
    expected = jax.jit(plain)(X)
    assert said(capsys)[0].total() == 10
    assert_close(value.fetch(), expected)


def test_an_exception_in_a_loop_is_the_users_and_the_next_call_works(threads_cluster: fm.Cluster) -> None:
    def check(v: Any) -> Any:
        if v < 0:
            raise ValueError(f"no such luck: {v}")
        return np.asarray(v)

    def step(c: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        io_callback(check, None, row)
        return c + row, None

    program = fm.dataflow(lambda x: jax.lax.scan(step, jnp.float32(0), x)[0], cluster=threads_cluster)
    assert program(X) == 6
    for _ in range(2):
        with pytest.raises(fm.WorkerError, match=r"^ValueError: no such luck: -1\.0 \(in 'task\d:scan' on ") as caught:
            program(X - 1)
        assert caught.value.remote_traceback is not None and "in check" in caught.value.remote_traceback
        assert program(X) == 6


def test_an_exception_whose_result_nobody_uses_ends_the_call(threads_cluster: fm.Cluster) -> None:
    def fail(v: Any) -> None:
        raise KeyError("gone")

    def fn(x: jax.Array) -> jax.Array:
        jax.lax.cond(x[0] > 0, lambda: jax.debug.callback(fail, x), lambda: None)
        return x

    program = fm.dataflow(fn, cluster=threads_cluster)
    assert_same(program(X), X)
    with pytest.raises(fm.WorkerError, match=r"^KeyError: 'gone'"):
        program(X + 1)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_call_that_returns_its_argument_ends_after_its_effects(threads_cluster: fm.Cluster, ordered: bool) -> None:
    def fail(v: Any) -> None:
        raise ValueError(f"no {v}")

    def fn(x: jax.Array) -> tuple[jax.Array, float]:
        io_callback(fail, None, x[0], ordered=ordered)
        return x, 1.0

    with fm.Cluster.local(workers=1, allow_python=True) as processes:
        for cluster in (threads_cluster, processes):
            program = fm.dataflow(fn, cluster=cluster)
            for _ in range(3):
                with pytest.raises(fm.WorkerError, match=r"^ValueError: no "):
                    program(X)


def test_equinox_error_if_raises_the_users_message(
    threads_cluster: fm.Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    def fn(x: jax.Array) -> jax.Array:
        x = eqx.error_if(x, x[0] < 0, "x must be positive")

        def body(i: jax.Array, v: jax.Array) -> jax.Array:
            return eqx.error_if(v * 2, v.max() > 50, "v has grown")

        return jax.lax.fori_loop(0, 3, body, x)

    program = fm.dataflow(fn, cluster=threads_cluster)
    assert_same(program(X), X * 8)
    for bad, message in ((X - 1, "x must be positive"), (X * 10, "v has grown"), (X - 2, "x must be positive")):
        with pytest.raises(fm.WorkerError, match=message):
            program(bad)
    assert_same(program(X), X * 8)
    assert not caplog.records, "JAX logs what is raised"


def test_a_loss_prints_for_each_microbatch_and_replica(
    threads_cluster: fm.Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    def loss(params: Any, batch: Any) -> jax.Array:
        @jax.checkpoint
        def block(h: jax.Array) -> jax.Array:
            jax.debug.print("block of {}", h.shape[0])
            return jnp.tanh(h @ params["a"])

        def step(c: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
            jax.debug.callback(say, row * 0)
            return c + (row @ params["b"]) ** 2, None

        return jax.lax.scan(step, jnp.float32(0), block(batch))[0] / len(batch)

    params = {"a": np.full((3, 3), 0.1, np.float32), "b": np.ones(3, np.float32)}
    source = np.random.default_rng(0).random((16, 3), np.float32)
    options: dict[str, Any] = {"batch_size": 8, "steps": 2, "shuffle": False}
    alone = fm.Trainer(loss, optax.sgd(0.1), cluster=threads_cluster).fit(params, source, **options)
    assert said(capsys)[0] == Counter({"block of 8": 4, "say 0.0": 16})
    divided = fm.Trainer(
        loss, optax.sgd(0.1), cluster=threads_cluster, replicas=2, microbatches=2, placement=fm.Pipeline(2)
    ).fit(params, source, **options)
    assert said(capsys)[0] == Counter({"block of 2": 16, "say 0.0": 16})
    assert_close(divided.params, alone.params)


def test_processes_run_effects_where_python_is_allowed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "seen")

    def note(v: Any) -> Any:
        with open(path, "a") as file:
            print(float(v), file=file)
        return np.asarray(v)

    def fn(x: jax.Array) -> jax.Array:
        with fm.device("worker:0"):
            last = jax.lax.fori_loop(0, 3, lambda i, v: io_callback(note, like(v), v, ordered=True) + 1, x[0])
        with fm.device("worker:1"):
            jax.debug.print("last {}", last)
            return io_callback(note, like(last), eqx.error_if(last, last > 4, "too large"), ordered=True)

    with fm.Cluster.local(workers=2, allow_python=True) as cluster:
        program = fm.dataflow(fn, cluster=cluster)
        assert program(X) == 3
        assert Path(path).read_text().split() == ["0.0", "1.0", "2.0", "3.0"]
        with pytest.raises(fm.WorkerError, match="too large"):
            program(X + 2)
        assert program(X + 1) == 4
    assert Counter(capfd.readouterr().out.splitlines())["last 3.0"] == 1


def test_errors_of_calls_on_several_threads_are_not_mixed_up() -> None:
    def fn(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 2, lambda i, v: io_callback(refuse_together, like(v), v) + 1, x)

    BARRIERS[:] = [threading.Barrier(2)]
    with fm.Cluster.threads(workers=1) as cluster:
        program = fm.dataflow(fn, cluster=cluster)
        assert program(np.float32(-3)) == -1
        with ThreadPoolExecutor(2) as pool:
            found = [pool.submit(program, np.float32(n)) for n in (10, 20)]
        for future, n in zip(found, (10, 20), strict=True):
            with pytest.raises(fm.WorkerError, match=f"^ValueError: of {n} "):
                future.result(60)


def test_equinox_loops_with_checks_are_differentiated(
    threads_cluster: fm.Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    def fn(x: jax.Array) -> Any:
        def body(carry: tuple[Any, Any]) -> tuple[Any, Any]:
            i, v = carry
            jax.debug.print("step {}", i)
            return i + 1, eqx.error_if(jnp.sin(v) * 1.5, v[0] > 9, "v is too large")

        def loss(v: jax.Array) -> jax.Array:
            start = (jnp.int32(0), v)
            loop: Any = eqx.internal.while_loop
            return loop(lambda c: c[0] < 3, body, start, kind="checkpointed", max_steps=4)[1].sum()

        return jax.value_and_grad(loss)(x)

    expected = jax.jit(fn)(X)
    wanted = said(capsys)
    program = fm.dataflow(fn, cluster=threads_cluster)
    assert_close(program(X), expected)
    assert said(capsys) == wanted
    with pytest.raises(fm.WorkerError, match="v is too large"):
        program(X + 10)
