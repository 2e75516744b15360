"""What can befall an edge between two processes, over each transport: a typed error that names it, and that is all."""

from __future__ import annotations

import contextlib
import queue
import resource
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing
from typing import Any

import jax
import jax.numpy as jnp
import psutil
import pytest

import flowml as fm
from flowml.errors import DeadlineError, FlowmlError, WorkerError, WorkerLostError
from flowml_runtime.execution.executor import PROBATION
from tests.stalls import stopped

DEADLINE_S = 2.0
"""Less than a silent worker takes to count as lost."""
LENGTH = 2**22
"""16 MiB of float32, in slots or in several pieces."""

NoLeaks = Callable[[], AbstractContextManager[None]]


def large_edge(x: Any, times: int = 1) -> jax.Array:
    with fm.layer("make"):
        y = x + jnp.arange(times * LENGTH, dtype=jnp.float32)
    with fm.layer("take"):
        return y[::1000] * 2


def small_edge(x: Any) -> jax.Array:
    with fm.layer("make"):
        y = x + 1
    with fm.layer("take"):
        return y * 2


@pytest.fixture(scope="module", params=["auto", "grpc"])
def cluster(request: pytest.FixtureRequest) -> Iterator[fm.Cluster]:
    checked = request.param == "grpc"  # and the other way without, so that both are run
    made = fm.Cluster.local(workers=2, transport=request.param, deadline_s=DEADLINE_S, checksum=checked)
    with closing(made) as cluster:
        yield cluster


def program(cluster: fm.Cluster, fn: Callable[[Any], jax.Array]) -> Callable[[Any], jax.Array]:
    return fm.dataflow(fn, cluster=cluster, placement={"make": "worker:0", "take": "worker:1"})


def worker_process(cluster: fm.Cluster, name: str) -> psutil.Process:
    return psutil.Process(cluster.pids[name])


@pytest.mark.parametrize("fn", [small_edge, large_edge])
def test_a_producer_that_stands_still_is_a_deadline_that_names_the_edge(
    cluster: fm.Cluster, fn: Callable[[Any], jax.Array]
) -> None:
    """Whoever waits says so, be it a thread or a step without one; afterwards the same program works."""
    run = program(cluster, fn)
    for n in range(PROBATION + 1):
        run(jnp.float32(n))
    expected = run(jnp.float32(7))
    producer = cluster.pids["worker:0"]
    with stopped(producer), pytest.raises(DeadlineError, match=r"worker:0/cpu:0 -> worker:1/cpu:0 \(make\)") as caught:
        run(jnp.float32(1))
    assert caught.value.worker == "worker:1"
    assert jnp.array_equal(run(jnp.float32(7)), expected)


def test_a_consumer_that_stands_still_holds_up_nobody_for_longer_than_the_deadline(cluster: fm.Cluster) -> None:
    run = fm.dataflow(large_edge, cluster=cluster, placement={"make": "worker:0", "take": "worker:1"})
    expected = run(jnp.float32(3))
    with stopped(cluster.pids["worker:1"]):
        futures = [run.submit(jnp.float32(3)) for _ in range(16)]
        errors: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        for future in futures:
            future.add_done_callback(lambda f: errors.put(f.exception() or AssertionError("it has a result")))
        error = errors.get(timeout=30)
    assert isinstance(error, DeadlineError)
    assert "waited 2 s for worker:1/cpu:0 to take earlier values of worker:0/cpu:0 -> worker:1" in str(error)
    for future in futures:
        with contextlib.suppress(DeadlineError):  # those that the producer gave up
            assert jnp.array_equal(future.result(timeout=30), expected)
    assert jnp.array_equal(run(jnp.float32(3)), expected)


@contextlib.contextmanager
def no_more_memory(process: psutil.Process) -> Generator[None]:
    """The process cannot make a file of more than a megabyte, and so no memfd."""
    _, hard = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (2**20, hard))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY if hard < 0 else hard, hard))


@pytest.mark.parametrize("cluster", ["auto"], indirect=True)  # gRPC needs no shared memory
def test_no_memory_for_an_edge_is_found_when_the_plan_is_loaded(cluster: fm.Cluster) -> None:
    run = program(cluster, lambda x: large_edge(x, times=3))
    with (
        no_more_memory(worker_process(cluster, "worker:0")),
        pytest.raises(WorkerError, match=r"worker:0/cpu:0 -> worker:1/cpu:0 \(make\): no shared memory for") as caught,
    ):
        run(jnp.float32(1))
    assert caught.value.worker == "worker:0"
    assert run(jnp.float32(1)).shape == (3 * LENGTH // 1000 + 1,)


@pytest.mark.parametrize("cluster", ["auto"], indirect=True)
def test_no_memory_for_a_result_fails_its_step_and_no_other(cluster: fm.Cluster) -> None:
    def result(x: Any) -> jax.Array:
        with fm.layer("take"):
            return x + jnp.arange(5 * LENGTH, dtype=jnp.float32)

    run = fm.dataflow(result, cluster=cluster, placement={"take": "worker:1"})
    run.plan(jnp.float32(1))
    with (
        no_more_memory(worker_process(cluster, "worker:1")),
        pytest.raises(WorkerError, match=r"no shared memory for .*in 'fetch' on worker:1"),
    ):
        run(jnp.float32(1))
    assert run(jnp.float32(1)).shape == (5 * LENGTH,)


@pytest.mark.parametrize("transport", ["auto", "grpc"])
@pytest.mark.parametrize("victim", ["worker:0", "worker:1"])
def test_a_process_killed_amid_large_messages_is_named_at_once(transport: str, victim: str, no_leaks: NoLeaks) -> None:
    with no_leaks(), fm.Cluster.local(workers=2, transport=transport) as cluster:
        run = fm.dataflow(large_edge, cluster=cluster, placement={"make": "worker:0", "take": "worker:1"})
        expected = run(jnp.float32(0))
        process = worker_process(cluster, victim)
        flowing = threading.Event()
        results: list[jax.Array] = []
        errors: list[BaseException] = []

        def call() -> None:
            while not errors:
                try:
                    results.append(run(jnp.float32(0)))
                except FlowmlError as error:
                    errors.append(error)
                if len(results) > 3:
                    flowing.set()

        caller = threading.Thread(target=call)
        caller.start()
        assert flowing.wait(30)
        process.kill()
        caller.join(10)
        assert not caller.is_alive()
        assert isinstance(errors[0], WorkerLostError)
        assert errors[0].worker == victim
        assert all(jnp.array_equal(r, expected) for r in results), "a partial array was handed on"
