"""What goes wrong with values that stay on the workers: each is one error that says why, and what to do."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowml as fm
from flowml.errors import ClusterError, FlowmlError, PlacementError, WorkerLostError
from flowml_runtime import wire
from tests.conftest import wait_until


def test_a_donated_value_is_gone_and_its_error_says_to_which_call(threads_cluster: fm.Cluster) -> None:
    double = fm.dataflow(lambda x: x * 2, cluster=threads_cluster, keep=0, donate_argnums=0)
    value = fm.put(np.ones(3, "f"), threads_cluster)
    result = double(value)
    here = r"test_kept_errors\.py:\d+ \(test_a_donated_value_is_gone_and_its_error_says_to_which_call\)"
    with pytest.raises(
        ClusterError, match=rf"was donated to step \d+ of <lambda> at {here}; use what that call returned"
    ):
        value.fetch()
    with pytest.raises(ClusterError, match="was donated to step"):
        double(value)
    np.testing.assert_array_equal(result, np.full(3, 2))
    array = jnp.ones(3)
    double(array)
    np.testing.assert_array_equal(array, np.ones(3))  # the caller's own arrays are sent, and stay valid
    add = fm.dataflow(lambda a, b: a + b, cluster=threads_cluster, keep=0, donate_argnums=0)
    with pytest.raises(ValueError, match="argument 0 is donated, and the same handle is another argument too"):
        add(result, result)
    np.testing.assert_array_equal(result, np.full(3, 2))


def test_a_call_that_fails_fails_those_that_read_its_results(threads_cluster: fm.Cluster) -> None:
    def divide(x: Any) -> Any:
        def fail(v: Any) -> Any:
            raise ZeroDivisionError("no such quotient")

        return jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32), x)

    bad = fm.dataflow(divide, cluster=threads_cluster, keep=0)
    after = fm.dataflow(lambda x: x + 1, cluster=threads_cluster, keep=0)
    value = bad(np.float32(1))
    try:
        later: Any = after(value)
    except FlowmlError as error:  # the failure was known before the call
        assert "no such quotient" in str(error)
        later = value
    for handle in (value, later):
        with pytest.raises(FlowmlError, match="no such quotient"):
            handle.fetch()


@pytest.fixture
def other_cluster() -> Iterator[fm.Cluster]:
    with closing(fm.Cluster.threads(workers=1)) as cluster:
        yield cluster


def test_handles_of_another_or_a_closed_cluster_are_refused(
    threads_cluster: fm.Cluster, other_cluster: fm.Cluster
) -> None:
    value = fm.put(np.ones(3), other_cluster)
    here = fm.dataflow(lambda x: x + 1, cluster=threads_cluster)
    with pytest.raises(ClusterError, match=r"is on another cluster; pass its value: fetch\(\)"):
        here(value)
    there = fm.dataflow(lambda x: x + 1, cluster=other_cluster)
    there(1.0)
    other_cluster.close()
    with pytest.raises(ClusterError, match="its cluster is closed"):
        value.fetch()
    with pytest.raises(ClusterError, match="its cluster is closed"):
        here(value)
    for program in (there, fm.dataflow(jnp.sin, cluster=other_cluster)):
        with pytest.raises(ClusterError, match=r"^the cluster is closed; start another"):
            program(1.0)


def test_put_refuses_a_value_that_another_transformation_traces(threads_cluster: fm.Cluster) -> None:
    with pytest.raises(
        TypeError, match=r"fm.put: leaf 'x' is traced .*; call fm.put\(\) outside of jit, grad and vmap"
    ):
        jax.jit(lambda x: fm.put({"x": x}, threads_cluster)["x"] + 1)(1.0)


def test_a_handle_without_arguments_is_an_error_and_nothing_else() -> None:
    with pytest.raises(TypeError, match="missing 3 required"):  # its finalizer raises nothing, which would be a warning
        fm.Remote()  # pyright: ignore[reportCallIssue]
    gc.collect()


def test_a_future_that_a_function_closes_over_is_an_error_that_says_what_to_do(threads_cluster: fm.Cluster) -> None:
    double = fm.dataflow(lambda x: x * 2, cluster=threads_cluster)
    future = double.submit(1.0)
    with pytest.raises(TypeError, match=r"a Future is not an array; take its result\(\) first, or pass the Future"):
        fm.dataflow(lambda x: x + future, cluster=threads_cluster)(1.0)
    wrong: dict[str, Callable[[Any], Any]] = {
        "has no parts; take its result": lambda x: x + future["a"],
        "has no parts": lambda x: x + sum(future),
        "has no attribute 'shape'; take its result": lambda x: jnp.zeros(future.shape),
        "is not an array; take its result": lambda x: x + np.asarray(future),
        "is not an array": lambda x: x + np.ones(2) * future,
    }
    for text, function in wrong.items():
        with pytest.raises((TypeError, AttributeError), match=f"step 0 of <lambda>: a Future {text}"):
            fm.dataflow(function, cluster=threads_cluster)(1.0)
    assert fm.dataflow(lambda x, y: x + y, cluster=threads_cluster)(1.0, future) == 3


def test_put_refuses_what_it_cannot_place(threads_cluster: fm.Cluster) -> None:
    with pytest.raises(TypeError, match="put: leaf 'a' is of type object"):
        fm.put({"a": object()}, threads_cluster)
    with pytest.raises(PlacementError, match="put: pattern 'zz' matches no leaf; leaves are a"):
        fm.put({"a": 1}, threads_cluster, {"zz": "worker:0"})
    with pytest.raises(PlacementError, match=r"worker:9.*does not exist"):
        fm.put({"a": 1}, threads_cluster, "worker:9")
    with pytest.raises(PlacementError, match=r"Pipeline\(stages=2\) depends on a program"):
        fm.put({"a": 1}, threads_cluster, fm.Pipeline(stages=2))
    assert fm.put({}, threads_cluster) == {}


def test_a_device_without_room_names_the_largest_values(
    threads_cluster: fm.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = threads_cluster.devices[0].memory_bytes
    assert limit is not None
    large = fm.put({"table": np.ones(1000)}, threads_cluster)
    grow = fm.dataflow(lambda x: jnp.zeros((int(limit * 0.95),), jnp.uint8) + x, cluster=threads_cluster, keep=0)
    with pytest.raises(ClusterError, match=r"would keep [\d,]+ bytes more on worker:0/cpu:0.*largest are 'table'"):
        grow.submit(np.uint8(1))
    del large


def test_a_lost_worker_loses_its_values_and_no_others() -> None:
    with fm.Cluster.local(workers=2) as cluster:
        gone, there = fm.put(np.ones(3, "f"), cluster, "worker:1"), fm.put(np.ones(3, "f"), cluster, "worker:0")
        np.testing.assert_array_equal(gone, np.ones(3))
        os.kill(cluster.pids["worker:1"], signal.SIGKILL)
        wait_until(lambda: len(cluster.devices) == 1, "the loss is known", 30)
        with pytest.raises(WorkerLostError, match="the kept value 'result' of put is lost, because worker:1 was lost"):
            gone.fetch()
        with pytest.raises(WorkerLostError, match="worker:1 was lost"):
            fm.dataflow(lambda x: x + 1)(gone)
        np.testing.assert_array_equal(fm.dataflow(lambda x: x + 1)(there), np.full(3, 2))


def test_a_worker_refuses_names_that_its_driver_never_gave(threads_cluster: fm.Cluster) -> None:
    step = fm.dataflow(lambda x: x + 1, cluster=threads_cluster, keep=0)
    value = step(fm.put(np.float32(1), threads_cluster))
    value.number += 10_000
    with pytest.raises(FlowmlError, match="its driver has freed it"):
        value.fetch()
    value.number -= 10_000
    assert float(value) == 2
    assert wire.decode(wire.encode(wire.Drop(names=(1, 2)))) == wire.Drop(names=(1, 2))
