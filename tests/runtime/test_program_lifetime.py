"""Programs on the workers: freed with their object, bounded in number, one thread a device for all of them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
import pytest

import flowml as fm
from flowml.errors import DeadlineError
from tests.conftest import wait_until
from tests.network import Network
from tests.plans import Gate, chain, gated, never_sent, through_gate

X = jnp.arange(4, dtype=jnp.float32)
NoLeaks = Callable[[], AbstractContextManager[None]]


@pytest.fixture(params=["threads", "local"], scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[fm.Cluster]:
    with closing(getattr(fm.Cluster, request.param)(workers=2)) as made:
        yield made


def threads_of(cluster: fm.Cluster) -> int:
    """Of the driver and of its workers."""
    return psutil.Process().num_threads() + sum(psutil.Process(p).num_threads() for p in cluster.pids.values())


def plans_of(cluster: fm.Cluster) -> int:
    return len(cluster.session._plans)  # pyright: ignore[reportPrivateUsage]


def all_freed(cluster: fm.Cluster) -> bool:
    gc.collect()  # each time: at the first a thread may still hold what ends with a cycle
    return plans_of(cluster) == 0


def across(number: int) -> Callable[[Any], Any]:
    def step(x: Any) -> Any:
        with fm.device("worker:0"):
            h = jnp.sin(x) + number
        with fm.device("worker:1"):
            return h * 2

    return step


def test_many_functions_leave_threads_and_plans_as_they_were(cluster: fm.Cluster) -> None:
    def call(number: int) -> None:
        result = fm.dataflow(across(number), cluster=cluster)(X)
        np.testing.assert_allclose(result, (jnp.sin(X) + number) * 2, rtol=1e-6)

    for number in range(3):
        call(number)
    wait_until(lambda: all_freed(cluster), "the first programs are freed")
    threads = threads_of(cluster)
    for number in range(80):
        call(number)
    wait_until(lambda: all_freed(cluster), "all programs are freed")
    wait_until(lambda: threads_of(cluster) <= threads + 2, f"no more than {threads} threads, and two of pools")


def test_no_more_programs_stay_than_the_bound_and_any_of_them_runs_again(cluster: fm.Cluster) -> None:
    before = cluster.max_programs
    cluster.max_programs = 4
    try:
        programs = [fm.dataflow(across(n), cluster=cluster) for n in range(12)]
        for _ in range(2):
            for number, program in enumerate(programs):
                np.testing.assert_array_equal(program(X), jax.jit(across(number))(X))
                assert plans_of(cluster) <= 4
        for number, program in enumerate(programs):
            np.testing.assert_array_equal(program.submit(X).result(timeout=60), jax.jit(across(number))(X))
    finally:
        cluster.max_programs = before


def test_one_function_of_many_shapes_is_bounded_too(cluster: fm.Cluster) -> None:
    before, cluster.max_programs = cluster.max_programs, 2
    try:
        program = fm.dataflow(across(1), cluster=cluster)
        for _ in range(2):
            for length in range(1, 6):
                x = jnp.ones(length)
                np.testing.assert_array_equal(program(x), jax.jit(across(1))(x))
        assert plans_of(cluster) <= 2
    finally:
        cluster.max_programs = before


def test_the_program_used_longest_ago_makes_room(cluster: fm.Cluster) -> None:
    before, cluster.max_programs = cluster.max_programs, 2
    try:
        first, second, third = (fm.dataflow(across(n), cluster=cluster) for n in range(3))
        for program in (first, second, first):
            program(X)
        third(X)
        held = [list(p.programs_on(cluster).values()) for p in (first, second, third)]
        stopped = [all(q.handle is not None and q.handle.steps.stopped for q in programs) for programs in held]
        assert stopped == [False, True, False]
    finally:
        cluster.max_programs = before


def test_a_program_that_was_loaded_again_is_freed_with_its_function(cluster: fm.Cluster) -> None:
    wait_until(lambda: all_freed(cluster), "programs of other tests are freed")
    before, cluster.max_programs = cluster.max_programs, 1
    try:
        programs = [fm.dataflow(across(n), cluster=cluster) for n in range(2)]
        plans = [program.plan(X) for program in programs]
        for number in (0, 1, 0, 1, 0):
            np.testing.assert_array_equal(programs[number](X), jax.jit(across(number))(X))
        assert programs[0].plan(X) is plans[0], "it was compiled from the start"
    finally:
        cluster.max_programs = before
    del programs
    wait_until(lambda: all_freed(cluster), "what was loaded last is freed")


def test_the_bound_is_a_positive_number(cluster: fm.Cluster) -> None:
    with pytest.raises(ValueError, match="max_programs=0: give at least 1"):
        cluster.max_programs = 0


def test_programs_that_evict_each_other_from_several_threads_stay_right(cluster: fm.Cluster) -> None:
    before, cluster.max_programs = cluster.max_programs, 1
    programs = [fm.dataflow(across(n), cluster=cluster) for n in range(3)]

    def call(number: int) -> bool:
        return all(np.array_equal(programs[number](X), jax.jit(across(number))(X)) for _ in range(8))

    try:
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(call, range(3)))
    finally:
        cluster.max_programs = before


def gated_function(gate: str) -> Callable[[Any], Any]:
    def step(x: Any) -> Any:
        with fm.device("worker:0"):
            h = jax.pure_callback(lambda v: np.asarray(through_gate(gate, v)), x, x)
        with fm.device("worker:1"):
            return h * 2

    return step


def test_a_program_is_freed_once_its_calls_in_flight_are_over() -> None:
    gate = Gate("freed in flight")
    with fm.Cluster.threads(workers=2) as cluster:
        program = fm.dataflow(gated_function("freed in flight"))
        futures = [program.submit(X + n) for n in range(4)]
        assert gate.entered.acquire(timeout=60)
        del program
        gc.collect()
        other = fm.dataflow(lambda x: x + 1)
        assert plans_of(cluster) == 1
        gate.opened.set()
        for n, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(timeout=60), (X + n) * 2)
        wait_until(lambda: plans_of(cluster) == 0, "the program is freed")
        np.testing.assert_array_equal(other(X), X + 1)


def test_calls_in_flight_are_not_evicted() -> None:
    gate = Gate("not evicted")
    with fm.Cluster.threads(workers=2) as cluster:
        cluster.max_programs = 1
        program = fm.dataflow(gated_function("not evicted"))
        future = program.submit(X)
        assert gate.entered.acquire(timeout=60)
        other = fm.dataflow(across(1), placement={"*": "worker:1"})
        elsewhere = other.submit(X)
        gate.opened.set()
        np.testing.assert_array_equal(future.result(timeout=60), X * 2)
        np.testing.assert_array_equal(elsewhere.result(timeout=60), jax.jit(across(1))(X))


def test_a_trainer_takes_its_plans_with_it(cluster: fm.Cluster) -> None:
    def fit() -> None:
        trainer = fm.Trainer(lambda p, x: jnp.mean((x @ p) ** 2), optax.sgd(0.1), cluster=cluster, replicas=2)
        trainer.fit(jnp.ones(4), np.ones((16, 4), np.float32), batch_size=8, steps=2)

    wait_until(lambda: all_freed(cluster), "programs of other tests are freed")
    fit()
    wait_until(lambda: all_freed(cluster), "the training plan is freed")


def test_plans_that_cross_each_other_never_wait_for_each_other() -> None:
    """Each device takes the steps of two plans in the order in which they come, which may differ from device to device:
    one that waited with a step in hand would wait for ever."""

    def there_and_back(first: str, second: str) -> Callable[[Any], Any]:
        def step(x: Any) -> Any:
            for _ in range(3):
                with fm.device(first):
                    x = jnp.sin(x) + 1
                with fm.device(second):
                    x = jnp.cos(x) * 2
            return x

        return step

    with fm.Cluster.threads(workers=2, deadline_s=20) as cluster:
        places = (("worker:0", "worker:1"), ("worker:1", "worker:0"))
        programs = [fm.dataflow(there_and_back(*p), cluster=cluster) for p in places]
        expected = [np.asarray(p(X)) for p in programs]

        def call(which: int) -> bool:
            futures = [programs[which].submit(X) for _ in range(40)]
            return all(np.array_equal(f.result(timeout=60), expected[which]) for f in futures)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(call, [0, 1, 0, 1]))


def test_a_callback_that_never_returns_holds_up_its_device_until_its_plan_is_unloaded() -> None:
    gate = Gate("never returns")
    with Network() as network:
        stuck, fine = network.session.load(gated("never returns")), network.session.load(chain())
        network.session.submit(stuck, [np.asarray(X)])
        assert gate.entered.acquire(timeout=30)
        waits = network.session.submit(fine, [np.asarray(X)])
        network.session.unload(stuck)
        np.testing.assert_array_equal(waits.result(timeout=30)[0], (X + 1) * 2)
        gate.opened.set()


def test_a_value_that_does_not_come_is_late_also_while_its_device_is_busy() -> None:
    gate = Gate("busy")
    with Network() as network:
        late, busy = network.load(never_sent(), deadline_s=0.4), network.session.load(gated("busy"))
        waits = network.session.submit(late, [np.asarray(X)])
        network.session.submit(busy, [np.asarray(X)])
        assert gate.entered.acquire(timeout=30)
        with pytest.raises(DeadlineError, match=r"waited 0\.4 s for worker:0/cpu:0 -> worker:1/cpu:0"):
            waits.result(timeout=30)
        gate.opened.set()


def test_all_plans_of_a_device_share_its_thread(no_leaks: NoLeaks) -> None:
    before = set(threading.enumerate())  # another cluster in this process has threads of the same names
    with no_leaks(), Network() as network:
        handles = [network.session.load(chain()) for _ in range(5)]
        for handle in handles:
            np.testing.assert_array_equal(network.session.submit(handle, [np.asarray(X)]).result()[0], (X + 1) * 2)
        names = [t.name for t in threading.enumerate() if t not in before]
        assert [names.count(f"worker:{n}/cpu:0") for n in (0, 1)] == [1, 1]
