"""Steps that run on the thread that brings what they wait for: parked, taken up again, given up, too late."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowml.errors import DeadlineError
from flowml_runtime import wire
from flowml_runtime.driver.loaded_plan import LoadedPlan
from flowml_runtime.execution import executor
from tests.conftest import wait_until
from tests.network import Network
from tests.plans import W1, callback_then_double, chain


def vector(start: float = 0.0) -> np.ndarray:
    return np.arange(4, dtype=np.float32) + np.float32(start)


@pytest.fixture
def always_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is today, a step counts as quick."""
    monkeypatch.setattr(executor, "QUICK_S", float("inf"))


def warm_up(network: Network, handle: LoadedPlan) -> int:
    """Run steps until every executor is past its probation. Returns the number of the next step."""
    for n in range(executor.PROBATION + 1):
        result = network.session.submit(handle, [vector(n)]).result(timeout=30)
        np.testing.assert_array_equal(result[0], (vector(n) + 1) * 2)
    return executor.PROBATION + 1


def park(network: Network, handle: LoadedPlan, step: int) -> None:
    """Begin a step on worker 1 alone, which then waits for an edge without a thread that waits."""
    feed = wire.Value(plan_id=handle.plan_id, step=step, kind="feed", index=0, device=W1)
    network.workers[1].on_message("driver", feed, [])


def edge(handle: LoadedPlan, step: int) -> wire.Value:
    return wire.Value(plan_id=handle.plan_id, step=step, kind="edge", index=0, device=W1)


@pytest.mark.usefixtures("always_quick")
def test_quick_steps_run_on_the_threads_that_bring_their_values() -> None:
    ran: list[int] = []
    with Network() as network:
        deliver = network.receivers["driver"]

        def spy(peer: str, message: object, arrays: object) -> None:
            ran.append(threading.get_ident())
            deliver(peer, message, arrays)  # type: ignore[arg-type]

        network.receivers["driver"] = spy
        handle = network.session.load(chain())
        warm_up(network, handle)
        ran.clear()
        for n in range(5):
            result = network.session.submit(handle, [vector(n)]).result(timeout=30)
            np.testing.assert_array_equal(result[0], (vector(n) + 1) * 2)
        assert set(ran) == {threading.get_ident()}  # this network delivers on the sender's thread
        assert network.held_values() == 0


def test_callbacks_never_run_on_a_receiving_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "QUICK_S", float("inf"))
    me = threading.get_ident()
    with Network() as network:
        handle = network.session.load(callback_then_double(lambda x: x + (threading.get_ident() == me)))
        for _ in range(executor.PROBATION + 3):
            result = network.session.submit(handle, [vector()]).result(timeout=30)
            np.testing.assert_array_equal(result[0], vector() * 2)


@pytest.mark.usefixtures("always_quick")
def test_a_parked_step_that_is_given_up_makes_room_for_the_next() -> None:
    with Network() as network:
        handle = network.session.load(chain())
        step = warm_up(network, handle)
        park(network, handle, step)
        over = wire.StepFailed(plan_id=handle.plan_id, step=step, worker="driver", node="", kind="cancelled", error="")
        network.workers[1].on_message("driver", over, [])
        network.workers[1].on_message("worker:0", edge(handle, step), [vector()])  # too late
        handle.steps.skip()
        assert network.session.submit(handle, [vector()]).exception(timeout=30) is None
        assert network.held_values() == 0


@pytest.mark.usefixtures("always_quick")
def test_what_a_parked_step_waited_for_dies_with_it() -> None:
    """And not when the garbage collector comes by: shared memory would be in use until then, and be made anew."""
    with Network() as network:
        handle = network.session.load(chain())
        step = warm_up(network, handle)
        gc.collect()
        gc.disable()
        try:
            park(network, handle, step)
            value = vector()
            died = weakref.ref(value)
            network.workers[1].on_message("worker:0", edge(handle, step), [value])
            del value
            handle.steps.skip()
            network.session.submit(handle, [vector()]).result(timeout=30)  # XLA lets go of arrays at its next call
            wait_until(lambda: died() is None, "the value is freed")
        finally:
            gc.enable()


@pytest.mark.usefixtures("always_quick")
def test_a_parked_step_fails_at_its_deadline_naming_the_edge() -> None:
    with Network() as network:
        handle = network.load(chain(), deadline_s=1.0)
        warm_up(network, handle)
        network.receivers["worker:0"] = lambda *_: None  # it takes feeds in and never answers
        future = network.session.submit(handle, [vector()])
        with pytest.raises(DeadlineError, match=r"waited 1 s for worker:0/cpu:0 -> worker:1/cpu:0"):
            future.result(timeout=30)
        network.receivers["worker:0"] = network.workers[0].on_message
        assert network.session.submit(handle, [vector()]).exception(timeout=30) is None


@pytest.mark.usefixtures("always_quick")
def test_steps_that_come_while_one_is_parked_run_after_it_in_order() -> None:
    with Network() as network:
        handle = network.session.load(chain())
        step = warm_up(network, handle)
        sent = network.workers[1].endpoint.sent  # type: ignore[attr-defined]
        sent.clear()
        for n in range(3):
            park(network, handle, step + n)
        for n in (2, 1, 0):
            network.workers[1].on_message("worker:0", edge(handle, step + n), [vector(n)])
        for _ in range(3):
            handle.steps.skip()
        assert network.session.submit(handle, [vector()]).exception(timeout=30) is None
        assert [m.step for _, m in sent] == [step, step + 1, step + 2, step + 3]


@pytest.mark.usefixtures("always_quick")
def test_closing_with_a_parked_step_leaves_nothing(no_leaks: Callable[[], AbstractContextManager[None]]) -> None:
    with no_leaks(), Network() as network:
        handle = network.session.load(chain())
        park(network, handle, warm_up(network, handle))


@given(st.lists(st.sampled_from([0.0, float("inf")]), min_size=1, max_size=12))
def test_results_do_not_depend_on_which_thread_runs_a_step(limits: list[float]) -> None:
    """Executors that go from quick to slow and back while several steps are in flight."""
    before = executor.QUICK_S
    try:
        with Network(in_flight=3) as network:
            handle = network.session.load(chain())
            futures = []
            for n, limit in enumerate(limits * 3):
                executor.QUICK_S = limit
                futures.append(network.session.submit(handle, [vector(n)]))
            for n, future in enumerate(futures):
                np.testing.assert_array_equal(future.result(timeout=30)[0], (vector(n) + 1) * 2)
            assert network.held_values() == 0
    finally:
        executor.QUICK_S = before
