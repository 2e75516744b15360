"""Handles of values that stay: how they look, and what NumPy and JAX make of them."""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowml as fm
from flowml.errors import ClusterError, WorkerError, WorkerLostError
from tests.conftest import wait_until
from tests.stalls import stop


@pytest.fixture(params=["threads_cluster", "process_cluster"])
def cluster(request: pytest.FixtureRequest) -> fm.Cluster:
    return request.getfixturevalue(request.param)


def test_numpy_copies_a_handle_as_it_copies_an_array(cluster: fm.Cluster) -> None:
    array = jnp.zeros(3)
    held = fm.put(array, cluster)
    for copied in (np.array(held), np.array(held, copy=True), np.array(held, np.int32), held.__array__(copy=True)):
        copied[0] = 1  # the caller may write to a copy
    assert np.asarray(held).tolist() == [0, 0, 0]
    assert np.asarray(held).flags.writeable == np.asarray(array).flags.writeable
    with pytest.raises(ValueError, match="copy"):
        held.__array__(np.int32, copy=False)


def test_device_get_brings_handles_of_numbers_and_of_keys(cluster: fm.Cluster) -> None:
    tree = {"key": jax.random.key(3), "keys": jax.random.split(jax.random.key(1), 2), "x": jnp.ones(3)}
    got, want = jax.device_get(fm.put(tree, cluster)), jax.device_get(tree)
    assert type(got["x"]) is np.ndarray
    for name in ("key", "keys"):
        assert (type(got[name]), got[name].dtype) == (type(want[name]), want[name].dtype)
        np.testing.assert_array_equal(jax.random.key_data(got[name]), jax.random.key_data(want[name]))


@pytest.mark.parametrize("value", [jnp.ones(3), jax.random.key(3)], ids=["numbers", "key"])
def test_repeated_calls_of_jit_bring_a_handle_once_each(
    threads_cluster: fm.Cluster, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, brought = fm.put(value, threads_cluster), list[str]()
    fetch = fm.Remote.fetch
    monkeypatch.setattr(fm.Remote, "fetch", lambda remote: brought.append("") or fetch(remote))
    same = jax.jit(lambda x: x)
    for _ in range(3):
        brought.clear()
        assert same(held).dtype == value.dtype
    assert len(brought) == 1
    held.delete()
    with pytest.raises(ClusterError, match="was deleted by delete"):
        same(held)


@pytest.mark.parametrize(
    "outputs",
    [lambda x: (x, x + 1), lambda x: (x, x.sum()), lambda x: ({"x": x, "y": x * 2}, x.sum()), lambda x: (2.0, x)],
    ids=["argument", "argument and sum", "argument and product", "constant"],
)
def test_an_output_that_nothing_computes_stays_too(cluster: fm.Cluster, outputs: Any) -> None:
    program = fm.dataflow(outputs, cluster=cluster, keep=0)
    for _ in range(3):
        kept, _ = program(jnp.ones(3))
        for leaf, want in zip(jax.tree.leaves(kept), jax.tree.leaves(outputs(jnp.ones(3))[0]), strict=True):
            assert type(leaf) is fm.Remote
            np.testing.assert_array_equal(leaf.fetch(), want)


def test_a_handle_shows_that_its_value_cannot_be_used() -> None:
    with fm.Cluster.threads(workers=1) as cluster:
        deleted, donated, there = fm.put([np.ones(3, "f")] * 3, cluster)
        step = fm.dataflow(lambda x: x + 1, cluster=cluster, keep=0, donate_argnums=0)
        deleted.delete()
        result = step(donated)
        assert "'0' was deleted by delete() at " in repr(deleted)
        assert "'1' was donated to " in repr(donated) and "test_handles.py" in repr(donated)
        assert repr(there) == "Remote(float32[3] '2' on worker:0/cpu:0)"
        assert f"{result}" == "Remote(float32[3] 'result' on worker:0/cpu:0)"
    assert repr(there) == "Remote(float32[3] '2' is gone: its cluster is closed)"


PLACE = {"a": "worker:0", "b": "worker:1"}
CALLED = threading.Event()
"""All calls of the test are in flight."""


def exchange(state: Any) -> Any:
    """Each worker needs what the other one has."""
    with fm.layer("a"):
        a = state["a"] + state["b"]
    with fm.layer("b"):
        b = state["b"] - state["a"]
    return {"a": a, "b": b}


def increment(x: Any) -> Any:
    return x + 1


def fail(value: Any) -> Any:
    assert CALLED.wait(60)
    raise ZeroDivisionError("no such quotient")


def divide(x: Any) -> Any:
    return jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32), x)


def test_a_value_that_was_not_made_raises_the_kind_of_error_of_its_call(threads_cluster: fm.Cluster) -> None:
    CALLED.set()
    value = fm.dataflow(divide, cluster=threads_cluster, keep=0)(np.float32(1))
    with pytest.raises(WorkerError, match="was not made: ZeroDivisionError: no such quotient"):
        value.fetch()
    assert repr(value) == "Remote(float32[] 'result' was not made)"


def test_values_of_a_call_that_loses_a_worker_are_lost_wherever_they_are() -> None:
    with fm.Cluster.local(workers=2) as cluster:
        step = fm.dataflow(lambda s: {k: v + 1 for k, v in s.items()}, cluster=cluster, placement=PLACE, keep=0)
        state = jax.block_until_ready(step({"a": jnp.ones(3), "b": jnp.ones(3)}))
        stop(cluster.pids["worker:1"])
        state = step(step(state))  # in flight
        cluster.end_worker("worker:1")
        wait_until(lambda: len(cluster.devices) == 1, "the loss is known", 30)
        for use in (state["a"].fetch, state["b"].fetch, lambda: step(state)):
            with pytest.raises(WorkerLostError, match="worker:1 was lost") as raised:
                use()
            assert raised.value.worker == "worker:1"
        assert "was not made" in repr(state["a"]) and "is lost with worker:1" in repr(state["b"])


def test_a_chain_of_values_that_were_not_made_names_the_first_cause(threads_cluster: fm.Cluster) -> None:
    swap = fm.dataflow(exchange, cluster=threads_cluster, placement=PLACE, keep=0)
    bad = fm.dataflow(divide, cluster=threads_cluster, keep=0)
    add = fm.dataflow(increment, cluster=threads_cluster, keep=0)
    ones = fm.put({"a": np.float32(1), "b": np.float32(1)}, threads_cluster, PLACE)
    jax.block_until_ready((swap(ones), add(ones["a"])))  # what follows is called while `fail` waits
    CALLED.clear()
    state = swap(swap({"a": bad(ones["a"]), "b": ones["b"]}))
    last = add(add(state["b"]))
    CALLED.set()
    for value, lacks in ((state["a"], "input '[ab]'"), (state["b"], "input '[ab]'"), (last, "the input")):
        cause = "has no value: ZeroDivisionError: no such quotient"
        with pytest.raises(WorkerError, match=f"was not made: {lacks} {cause} .* step") as raised:
            value.fetch()
        assert str(raised.value).count("no value") == 1


def test_values_that_follow_from_a_lost_one_are_lost_with_its_worker() -> None:
    with fm.Cluster.local(workers=2) as cluster:
        swap = fm.dataflow(exchange, cluster=cluster, placement=PLACE, keep=0)
        add = fm.dataflow(increment, cluster=cluster, keep=0)
        state = swap(fm.put({"a": np.float32(1), "b": np.float32(1)}, cluster, PLACE))
        jax.block_until_ready((state, add(state["a"])))
        stop(cluster.pids["worker:1"])
        following = add(add(swap(state)["a"]))  # on worker:0 only
        cluster.end_worker("worker:1")
        with pytest.raises(WorkerLostError, match=r"worker:1 was lost, and step .* of 'increment' needs it:") as raised:
            following.fetch()
        assert raised.value.worker == "worker:1"
        assert str(raised.value).count("was lost") == 1
        np.testing.assert_array_equal(add(state["a"]), 3)  # the worker that stays goes on
