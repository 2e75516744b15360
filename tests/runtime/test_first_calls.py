"""What the first call of a function costs: what is compiled for it, where, and how often."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flowml as fm

COMPILED = "/jax/core/compile/backend_compile_duration"


TRACED = "/jax/core/compile/jaxpr_trace_duration"
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"


@contextmanager
def compiled(*counted: str) -> Generator[list[str]]:
    """What this process compiles meanwhile, or other events."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in (counted or (COMPILED,)):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_driver_compiles_nothing(process_cluster: fm.Cluster) -> None:
    def results(x: Any, key: jax.Array) -> tuple[Any, ...]:
        return x + 1, jnp.sum(x), 2.0, jnp.int8(3) * 2, jax.random.split(key), x, jnp.sum(x)

    program, x, key = fm.dataflow(results, cluster=process_cluster), np.arange(6, dtype=np.float32), jax.random.key(3)
    jax.block_until_ready(key)
    with compiled() as events:
        got = program(x, key)
    assert not events
    for mine, expected in zip(got, jax.jit(results)(x, key), strict=True):
        assert (mine.dtype, mine.shape) == (expected.dtype, expected.shape)
        assert getattr(mine, "weak_type", None) == getattr(expected, "weak_type", None)
        assert not mine.committed
    np.testing.assert_array_equal(jax.random.key_data(got[4]), jax.random.key_data(jax.random.split(key)))
    kept = fm.dataflow(lambda x: x * 2, cluster=process_cluster, keep=0)(x)
    with compiled() as events:
        np.testing.assert_array_equal(np.asarray(kept), x * 2)
    assert not events


def test_workers_compile_the_modules_of_a_plan_without_tracing_or_lowering_again() -> None:
    def results(x: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.linalg.qr(x)[0], jax.random.split(key)

    x, key = np.arange(6, dtype=np.float32).reshape(3, 2), jax.random.key(3)
    with fm.Cluster.threads(workers=1) as cluster:
        fm.dataflow(lambda x: x + 1, cluster=cluster)(x)
        plan = fm.dataflow(results, cluster=cluster).plan(x, key)
        with compiled(TRACED, LOWERED, COMPILED) as events:
            cluster.session.load(plan)
    assert events == [COMPILED]


def test_the_driver_compiles_for_a_fit_only_what_checks_the_loss(process_cluster: fm.Cluster) -> None:
    def loss(params: dict[str, jax.Array], batch: jax.Array) -> jax.Array:
        return jnp.mean((batch @ params["w"]) ** 2)

    def fit() -> None:
        trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=process_cluster, replicas=2)
        trainer.fit({"w": np.ones((4, 2), np.float32)}, np.ones((16, 4), np.float32), batch_size=8, steps=1)

    jax.clear_caches()
    with compiled() as events:
        fit()
    assert len(events) == 2  # for a whole batch and for each half
