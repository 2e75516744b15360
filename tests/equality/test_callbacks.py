"""Python callbacks give what they give under jit."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback

import flowml as fm
from flowml.envelope import seal
from flowml.lowering.pickling import copied_state
from flowml.plan import FORMAT
from tests.training.reference import assert_same


def double(x: np.ndarray) -> np.ndarray:
    return x * 2


def test_one_function_serves_callbacks_of_several_shapes_and_dtypes(threads_cluster: fm.Cluster) -> None:
    def doubled(leaf: Any) -> Any:
        return jax.pure_callback(double, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), leaf)

    def step(tree: Any) -> Any:
        return jax.tree.map(doubled, tree)

    tree = {"a": jnp.ones((3, 2)), "b": jnp.ones(2), "c": jnp.arange(2), "d": jnp.ones(2, jnp.bfloat16)}
    assert_same(fm.dataflow(step, cluster=threads_cluster, placement=fm.Pipeline(1))(tree), jax.jit(step)(tree))


SEEN: list[float] = []
"""What the callbacks of this module were called with."""


class Log:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def tell(self, value: Any) -> None:
        self.told.append(float(value))


def counted(value: Any) -> np.ndarray:
    SEEN.append(float(value))
    return np.asarray(value) + 1


def everywhere(log: Log, lists: list[list[float]]) -> Callable[[jax.Array], jax.Array]:
    """Calls Python alone, in order, in a loop and in a branch. The functions of `lists` have one pickled form."""

    def keep_in(one: list[float]) -> Callable[[Any], None]:
        return lambda value: one.append(float(value))

    def body(_: int, x: jax.Array) -> jax.Array:
        jax.debug.callback(log.tell, x, ordered=True)
        return x + 1

    def step(x: jax.Array) -> jax.Array:
        for one in lists:
            jax.debug.callback(keep_in(one), x)
        x = io_callback(counted, jax.ShapeDtypeStruct((), jnp.float32), x, ordered=True)
        x = jax.lax.fori_loop(0, 2, body, x)
        return jax.lax.cond(x > 0, lambda v: (jax.debug.callback(log.tell, -v, ordered=True), v)[1], lambda v: v, x)

    return step


def test_workers_in_this_process_call_the_functions_themselves(threads_cluster: fm.Cluster) -> None:
    def run(wrap: Callable[..., Any]) -> Any:
        SEEN.clear()
        log, lists = Log(), [[], []]
        step, x = wrap(everywhere(log, lists)), jnp.float32(0)
        for _ in range(3):
            x = step(x)
        jax.effects_barrier()
        return float(x), log.told, lists, list(SEEN)

    with_jit = run(jax.jit)
    assert with_jit[2] == [[0, 3, 6], [0, 3, 6]]
    assert run(lambda f: fm.dataflow(f, cluster=threads_cluster)) == with_jit
    cut = run(lambda f: fm.dataflow(f, cluster=threads_cluster, placement=fm.Pipeline(2)))
    assert cut == with_jit


def test_functions_in_a_loss_are_called_themselves(threads_cluster: fm.Cluster) -> None:
    log = Log()

    def loss(params: jax.Array, batch: jax.Array) -> jax.Array:
        jax.debug.callback(log.tell, batch.sum())
        return ((params - batch) ** 2).mean()

    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=threads_cluster, replicas=2)
    source = np.arange(6, dtype=np.float32).repeat(2).reshape(6, 2)
    trainer.fit(jnp.zeros(2), source, batch_size=2, steps=3, shuffle=False)
    assert sorted(log.told) == [0, 2, 4, 6, 8, 10]


def test_a_function_is_freed_with_its_program(threads_cluster: fm.Cluster) -> None:
    freed = threading.Event()

    def run() -> None:
        log = Log()
        weakref.finalize(log, freed.set)

        def step(x: jax.Array) -> jax.Array:
            jax.debug.callback(log.tell, x)
            return x + 1

        program = fm.dataflow(step, cluster=threads_cluster)
        assert program(jnp.float32(1)) == 2
        assert log.told == [1]
        del program

    run()
    jax.clear_caches()  # JAX's own memory of what it has traced
    gc.collect()
    assert freed.wait(60)


def test_a_plan_that_was_sent_has_no_functions_of_its_sender(threads_cluster: fm.Cluster) -> None:
    log = Log()

    def step(x: jax.Array) -> jax.Array:
        jax.debug.callback(log.tell, x)
        return x

    plan = fm.dataflow(step, cluster=threads_cluster).plan(jnp.float32(1))
    sent = fm.Plan.decode(plan.encode())
    assert sent == plan
    assert [t.own.call is None for t in plan.tasks] == [False]
    assert [t.own.call is None for t in sent.tasks] == [True]
    forged = plan.encode().replace(b"\xa3own\xc0", b"\xa3own\x07")
    body = forged[forged.index(b"flowml-plan\x00") + 32 :]
    with pytest.raises(fm.PlanError, match="no functions of a process"):
        fm.Plan.decode(seal(body, FORMAT))


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Has nothing to change."""

    scale: float

    def tell(self, value: Any) -> None:
        print(self.scale * value)


def test_what_a_copy_would_change_is_found() -> None:
    seen: list[Any] = []
    table, name, log = np.ones(3), "x", Log()
    table.flags.writeable = False

    def helper(value: Any) -> None:
        seen.append(value)

    for function, found in (
        (lambda v: seen.append(v + 1), "'seen', of type list"),
        (lambda v: helper(v + 1), "'seen', of type list"),
        (partial(lambda s, v: s.append(v), seen), "an argument, of type list"),
        (seen.append, "the bound method list.append"),
        (log.tell, "the bound method Log.tell"),
        (lambda v: log.tell(v + 1), "'log', of type Log"),
        (lambda v: print(name, table * v), ""),
        (Frozen(2.0).tell, ""),
        (np.sin, ""),
        (print, ""),
        (counted, ""),
    ):
        assert copied_state(function) == found


def test_process_workers_warn_once_of_what_they_change_copies_of() -> None:
    log, lists = Log(), [[0.0]]
    step = everywhere(log, lists)

    def pure(x: jax.Array) -> jax.Array:
        jax.debug.print("x {}", x)
        return jax.pure_callback(lambda v: v + len(lists), jax.ShapeDtypeStruct((), jnp.float32), x)

    with fm.Cluster.local(workers=1, allow_python=True) as cluster:
        program = fm.dataflow(step, cluster=cluster)
        with pytest.warns(
            fm.FlowmlWarning, match=r"step: what jax.debug.callback at .* a copy of 'one', of type list"
        ) as said:
            program(jnp.float32(0))
        assert [w.filename for w in said] == [__file__]
        program(jnp.float32(0))  # no second warning, which would be an error here
        fm.dataflow(pure, cluster=cluster)(jnp.float32(1))
    assert (log.told, lists) == ([], [[0.0]])
