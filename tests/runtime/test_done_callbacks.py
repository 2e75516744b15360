"""Done callbacks and time limits of futures: a callback may call, in order; a time limit is a real number."""

from __future__ import annotations

import gc
import math
import queue
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import flowml as fm
from flowml.errors import DeadlineError
from flowml_runtime.execution.future import Future

X = jnp.arange(4, dtype=jnp.float32)
WAIT_S = 60.0
NoLeaks = Callable[[], AbstractContextManager[None]]


def across(x: Any) -> Any:
    with fm.device("worker:0"):
        h = jnp.sin(x)
    with fm.device("worker:1"):
        return h * 2


def unfinished(name: str = "a call") -> Future[Any]:
    return Future(name, lambda value: value)


@pytest.mark.parametrize("cluster_name", ["process_cluster", "grpc_cluster", "threads_cluster"])
def test_a_done_callback_may_call_and_wait(request: pytest.FixtureRequest, cluster_name: str) -> None:
    f = fm.dataflow(across, cluster=request.getfixturevalue(cluster_name))
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    expected = f(X)
    for _ in range(20):
        f.submit(X).add_done_callback(lambda done: results.put((f(X), f.submit(done.result()).result())))
        np.testing.assert_array_equal(f(X), expected)
    for _ in range(20):
        once, twice = results.get(timeout=WAIT_S)
        np.testing.assert_array_equal(once, expected)
        np.testing.assert_array_equal(twice, f(expected))


def test_callbacks_run_in_order_on_one_thread_that_ends_after_them(no_leaks: NoLeaks) -> None:
    seen: queue.SimpleQueue[tuple[int, threading.Thread]] = queue.SimpleQueue()
    with no_leaks():
        futures = [unfinished() for _ in range(50)]
        for n, future in enumerate(futures):
            future.add_done_callback(lambda _, n=n: seen.put((2 * n, threading.current_thread())))
            future.add_done_callback(lambda _, n=n: seen.put((2 * n + 1, threading.current_thread())))
        for future in futures:
            future.complete(1)
        calls = [seen.get(timeout=WAIT_S) for _ in range(100)]
    assert [n for n, _ in calls] == list(range(100))
    assert threading.current_thread() not in {thread for _, thread in calls}


def test_a_callback_of_a_done_future_is_called_at_once() -> None:
    future, seen = unfinished(), list[threading.Thread]()
    future.complete(1)
    future.add_done_callback(lambda _: seen.append(threading.current_thread()))
    assert seen == [threading.current_thread()]


def test_a_callback_that_fails_or_exits_does_not_stop_the_next(caplog: pytest.LogCaptureFixture) -> None:
    def leave(_: object) -> None:
        raise SystemExit(3)

    done = threading.Event()
    future = unfinished("step 7 of f")
    future.add_done_callback(lambda _: 1 // 0)
    future.add_done_callback(leave)
    future.add_done_callback(lambda _: done.set())
    future.complete(1)
    assert done.wait(WAIT_S)
    assert caplog.text.count("a done callback of step 7 of f failed") == 2


@pytest.mark.parametrize("timeout", [np.float32(0.01), np.float16(0.01), np.int64(0), Fraction(1, 100), False, -1])
def test_a_time_limit_is_any_real_number(timeout: Any) -> None:
    with pytest.raises(DeadlineError, match=r"a call is not done after 0(\.01\d*)? s"):
        unfinished().result(timeout=timeout)


@pytest.mark.parametrize("timeout", [math.inf, 10**400, np.float32(1e30)])
def test_a_time_limit_may_be_longer_than_threads_can_wait(timeout: Any) -> None:
    future = unfinished()
    ends = threading.Timer(0.05, future.complete, [7])
    ends.start()
    assert future.result(timeout=timeout) == 7
    ends.join()


@pytest.mark.parametrize("completed", [False, True])
def test_anything_else_is_refused_in_plain_words(completed: bool) -> None:
    future = unfinished()
    if completed:
        future.complete(7)
    odd: Any
    for odd in ("x", [1], 1j, np.ones(1)):
        with pytest.raises(TypeError, match=r"timeout=.*: give a number of seconds, or None"):
            future.result(timeout=odd)
    for odd in (math.nan, np.float32("nan")):
        with pytest.raises(ValueError, match=r"timeout=.*nan.*: give a number of seconds, or None"):
            future.exception(timeout=odd)


def test_a_future_that_is_kept_keeps_neither_its_program_nor_its_arguments(process_cluster: fm.Cluster) -> None:
    class Argument(np.ndarray):
        """An array that can be referred to weakly."""

    f = fm.dataflow(across, cluster=process_cluster)
    given = np.arange(4, dtype=np.float32).view(Argument)
    future = f.submit(given)
    np.testing.assert_array_equal(future.result(timeout=WAIT_S), f(X))
    program, argument = weakref.ref(f), weakref.ref(given)
    del f, given
    gc.collect()
    assert (program(), argument()) == (None, None)
    assert future.done()


def test_the_deadline_of_a_cluster_is_any_real_number_too() -> None:
    with fm.Cluster.threads(workers=2, deadline_s=np.float32(20)) as cluster:
        np.testing.assert_array_equal(fm.dataflow(across, cluster=cluster)(X), jnp.sin(X) * 2)
    odd: Any = "x"
    with pytest.raises(fm.ClusterError, match="deadline_s='x': give seconds above 0, at most"):
        fm.Cluster.threads(workers=1, deadline_s=odd)
