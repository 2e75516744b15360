"""A future is an argument: the next program takes its values where they are, and only `result` brings them here."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowml as fm
from flowml_runtime.driver.remote import Remote
from tests.training.reference import assert_same

X = jnp.arange(6.0).reshape(2, 3)


def first(x: jax.Array) -> dict[str, Any]:
    with fm.device("worker:1"):
        return {"y": jnp.sin(x), "same": x, "key": jax.random.key(3), "n": jnp.float32(2) * 3, "weak": x.sum() * 0 + 1}


def second(state: dict[str, Any]) -> jax.Array:
    return state["y"] * state["n"] + state["same"] + jax.random.uniform(state["key"]) + state["weak"]


def test_values_stay_where_they_are_once_a_future_was_an_argument(process_cluster: fm.Cluster) -> None:
    one, two = fm.dataflow(first, cluster=process_cluster), fm.dataflow(second, cluster=process_cluster)
    expected = jax.jit(second)(jax.jit(first)(X))
    assert_same(two(one.submit(X)), expected)  # the first argument tells it
    before = set(one.programs_on(process_cluster))
    future = one.submit(X)
    assert_same(two.submit(future).result(60), expected)
    (new,) = [p for k, p in one.programs_on(process_cluster).items() if k not in before]
    assert "fetch" not in {o.kind for o in new.plan.outputs}, "a value is sent to the driver"
    handles: Any = future.as_argument()
    assert {type(handles[n]) for n in ("y", "n")} == {Remote}
    assert handles["y"].device == "worker:1/cpu:0"
    assert_same(future.result(60), jax.jit(first)(X))  # brought here on request
    assert_same(future.result(60), jax.jit(first)(X))


def test_a_chain_of_futures_runs_without_the_driver(threads_cluster: fm.Cluster) -> None:
    step = fm.dataflow(lambda x: jnp.cos(x) + 1, cluster=threads_cluster)
    x: Any = X
    for _ in range(6):
        x = step.submit(x)
    expected = X
    for _ in range(6):
        expected = jax.jit(lambda x: jnp.cos(x) + 1)(expected)
    np.testing.assert_allclose(x.result(60), expected, rtol=1e-6)


def test_an_error_of_the_first_call_reaches_the_second(threads_cluster: fm.Cluster) -> None:
    def check(v: Any) -> Any:
        if v[0, 0] < 0:
            raise ValueError("negative")
        return np.asarray(v)

    one = fm.dataflow(lambda x: jax.pure_callback(check, x, x) + 1, cluster=threads_cluster)
    two = fm.dataflow(jnp.sin, cluster=threads_cluster)
    for _ in range(2):  # sent to the driver, then kept
        with pytest.raises(fm.FlowmlError, match="ValueError: negative"):
            two(one.submit(X - 1))
        np.testing.assert_allclose(two(one.submit(X)), jnp.sin(X + 1), rtol=1e-6)
    with pytest.raises(fm.FlowmlError, match="ValueError: negative"):
        one.submit(X - 1).result(60)
