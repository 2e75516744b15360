"""Faults of dataflow steps: each surfaces as one typed error that says where, and the next call works."""

from __future__ import annotations

import functools
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import flowml as fm
from flowml.errors import ClusterError, DeadlineError, WorkerError, WorkerLostError
from flowml_runtime import wire
from flowml_runtime.driver.loaded_plan import LoadedPlan
from flowml_runtime.driver.session import Session
from flowml_runtime.launch.launched import LaunchedCluster
from tests.conftest import wait_until
from tests.network import Network
from tests.plans import Gate, callback_then_double, chain, gated, never_sent, one_device

X = np.arange(4, dtype=np.float32)
NoLeaks = Callable[[], AbstractContextManager[None]]


def refuse_negative(x: Any) -> Any:
    if x.min() < 0:
        raise ValueError("the input is negative\nand this is a second line")
    return x


def test_a_stuck_transfer_names_its_edge_both_devices_and_the_step() -> None:
    with Network() as network:
        stuck = network.load(never_sent(), deadline_s=0.2)
        fine = network.session.load(chain())
        for step in range(2):
            with pytest.raises(DeadlineError) as caught:
                network.session.submit(stuck, [X]).result(timeout=30)
            error = caught.value
            assert (error.worker, error.step) == ("worker:1", step)
            assert error.node == "worker:0/cpu:0 -> worker:1/cpu:0 (h)"
            assert str(error).startswith(
                f"step {step} of plan 'stuck': worker:1/cpu:0 waited 0.2 s for worker:0/cpu:0 -> worker:1/cpu:0 (h)"
            )
        assert network.session.submit(fine, [X]).exception(timeout=30) is None


@pytest.mark.parametrize("local", [False, True])
def test_an_exception_in_a_callback_brings_its_traceback_and_the_next_call_works(local: bool) -> None:
    with Network(local=local) as network:
        handle = network.session.load(callback_then_double(refuse_negative))
        futures = [network.session.submit(handle, [x]) for x in (X, X - 1, X)]
        with pytest.raises(WorkerError) as caught:
            futures[1].result(timeout=30)
        error = caught.value
        assert (error.worker, error.step, error.node) == ("worker:0", 1, "callback")
        assert error.args[0] == (
            "ValueError: the input is negative and this is a second line "
            "(in 'callback' on worker:0, step 1 of 'with_callback')"
        )
        assert error.remote_traceback is not None
        assert 'raise ValueError("the input is negative' in error.remote_traceback
        assert "host/executor.py" not in error.remote_traceback
        for good in (futures[0], futures[2], network.session.submit(handle, [X])):
            np.testing.assert_array_equal(good.result(timeout=30)[0], X * 2)
        assert network.held_values() == 0


def test_an_exception_on_the_callers_own_thread_is_the_same_error() -> None:
    from tests.plans import VECTOR, W0, Feed, Fetch, PlanBuilder, Run, fetched

    build = PlanBuilder()
    check = build.python("check", lambda x: [refuse_negative(x)], [VECTOR], [VECTOR])
    build.program(W0, Feed((0,), (0,)), Run(check, (0,), (1,)), Fetch((0,), (1,)))
    with Network(local=True) as network:
        handle = network.session.load(build.build([VECTOR], [fetched()]))
        with pytest.raises(WorkerError, match="ValueError: the input is negative") as caught:
            network.session.call(handle, [X - 1])
        assert caught.value.node == "check"
        assert "refuse_negative" in (caught.value.remote_traceback or "")
        np.testing.assert_array_equal(network.session.call(handle, [X])[0], X)


def test_a_callback_that_returns_something_else_than_declared() -> None:
    with Network() as network:
        handle = network.session.load(callback_then_double(lambda x: x[:2]))
        with pytest.raises(WorkerError, match=r"'callback' returned float32\[2\], but was declared .*float32\[4\]"):
            network.session.submit(handle, [X]).result(timeout=30)


@pytest.mark.parametrize("fatal", [SystemExit, KeyboardInterrupt])
def test_a_callback_cannot_end_the_executor(fatal: type[BaseException]) -> None:
    def leave(x: Any) -> Any:
        if x.min() < 0:
            raise fatal
        return x

    with Network() as network:
        handle = network.session.load(callback_then_double(leave))
        with pytest.raises(WorkerError, match=fatal.__name__):
            network.session.submit(handle, [X - 1]).result(timeout=30)
        assert network.session.submit(handle, [X]).exception(timeout=30) is None


def test_a_lost_worker_fails_what_is_in_flight_and_what_comes_later() -> None:
    gate = Gate("lost")
    with Network() as network:
        handle = network.session.load(gated("lost"))
        alone = network.session.load(one_device())
        futures = [network.session.submit(handle, [X]) for _ in range(3)]
        assert gate.entered.acquire(timeout=30)
        network.lose("worker:1")
        for step, future in enumerate(futures):
            error = future.exception(timeout=5)
            assert isinstance(error, WorkerLostError)
            assert (error.worker, error.step) == ("worker:1", step)
            assert "worker:1 was lost, and step" in str(error)
        with pytest.raises(WorkerLostError, match="worker:1 was lost"):
            network.session.submit(handle, [X])
        gate.opened.set()
        assert network.session.submit(alone, [X]).exception(timeout=30) is None
        assert network.held_values() == 0


def test_a_worker_that_vanishes_unnoticed_is_found_by_whoever_sends_to_it() -> None:
    with Network() as network:
        handle = network.session.load(chain())
        del network.receivers["worker:1"]  # nobody was told
        with pytest.raises(WorkerLostError) as caught:
            network.session.submit(handle, [X]).result(timeout=30)
        assert caught.value.worker == "worker:1"


def test_a_worker_that_leaves_while_its_plan_is_loaded_again_is_lost_and_not_unknown() -> None:
    """The word that a connection broke comes before the word that the worker is gone."""
    with Network() as network:
        session = network.session
        handle = session.load(chain())
        told = wire.Unreachable(
            plan_id=handle.plan_id, worker="worker:0", peer="worker:1", reason="its connection broke", heard=True
        )
        session.on_message("worker:0", told, [])
        unload = session.unload

        def unload_and_lose(handle: LoadedPlan) -> None:
            unload(handle)
            session.devices = session.devices[:1]

        session.unload = unload_and_lose  # type: ignore[method-assign]
        again = session.reload(handle)
        with pytest.raises(WorkerLostError, match=r"worker:1 was lost.*worker:0 cannot reach it: its connection broke"):
            session.submit(again, [X])


def report(plan_id: str, worker: str, peer: str) -> wire.Unreachable:
    return wire.Unreachable(plan_id=plan_id, worker=worker, peer=peer, reason="its connection broke")


def refused(session: Session, handle: LoadedPlan) -> bool:
    try:
        session.submit(handle, [X]).result(timeout=30)
    except WorkerLostError:
        return True
    return False


def test_what_a_worker_says_that_hears_nobody_counts_for_nothing() -> None:
    """Only the way to worker:0 is cut: it says that it cannot reach worker:1, and the driver hears that."""
    with Network() as network:
        session = network.session
        handle = session.load(chain())
        plan_id = handle.plan_id
        reach, asked = network.receivers["worker:0"], list[wire.Wire]()
        network.receivers["worker:0"] = lambda _, message, __: asked.append(message)
        session.on_message("worker:0", report(plan_id, "worker:0", "worker:1"), [])
        assert asked == [report(plan_id, "worker:0", "worker:1")], "it is asked whether it hears anybody"
        network.receivers["worker:0"] = reach
        assert not session.submit(handle, [X]).exception(timeout=30), "both take part until one of them is found lost"
        session.on_message("worker:1", report(plan_id, "worker:1", "worker:0"), [])
        wait_until(lambda: refused(session, handle), "worker:1 answers that it hears the driver")
        again = msgspec.structs.replace(report(plan_id, "worker:0", "worker:1"), heard=True)
        session.on_message("worker:0", again, [])
        with pytest.raises(WorkerLostError, match=r"worker:0 was lost.*worker:1 cannot reach it"):
            session.submit(handle, [X])


def test_a_submit_that_waits_for_room_is_woken_by_the_loss() -> None:
    gate = Gate("full-lost")
    outcome: list[BaseException] = []
    with Network(in_flight=1) as network:
        handle = network.session.load(gated("full-lost"))
        network.session.submit(handle, [X])
        assert gate.entered.acquire(timeout=30)

        def submit() -> None:
            try:
                network.session.submit(handle, [X])
            except WorkerLostError as error:
                outcome.append(error)

        waiting = threading.Thread(target=submit)
        waiting.start()
        network.lose("worker:1")
        waiting.join(30)
        assert [type(e) for e in outcome] == [WorkerLostError]
        gate.opened.set()


def test_a_worker_lost_while_loading_ends_the_load() -> None:
    with Network() as network:
        network.receivers["worker:1"] = lambda *_: network.session.on_lost("worker:1", "connection closed")
        with pytest.raises(WorkerLostError, match="while it compiled plan 'chain'"):
            network.session.load(chain())
        assert network.session.load(one_device()) is not None


def test_a_failed_step_is_dropped_by_the_other_workers() -> None:
    gate = Gate("dropped")
    with Network(deadline_s=60) as network:
        handle = network.session.load(gated("dropped"))
        future = network.session.submit(handle, [X])
        assert gate.entered.acquire(timeout=30)
        failed = wire.StepFailed(
            plan_id=handle.plan_id, step=0, worker="worker:0", node="callback", kind="error", error="made up"
        )
        network.session.on_message("worker:0", failed, [])
        with pytest.raises(WorkerError, match="made up"):
            future.result(timeout=5)
        gate.opened.set()  # the callback ends, its value is for a step that nobody wants
        np.testing.assert_array_equal(network.session.submit(handle, [X]).result(timeout=30)[0], X * 2)
        wait_until(lambda: network.held_values() == 0, "values of the failed step are dropped")


def test_closing_fails_what_is_outstanding(no_leaks: NoLeaks) -> None:
    gate = Gate("closing")
    with no_leaks(), Network() as network:
        handle = network.session.load(gated("closing"))
        future = network.session.submit(handle, [X])
        assert gate.entered.acquire(timeout=30)
        network.session.close()
        with pytest.raises(ClusterError, match="the cluster is closed"):
            future.result(timeout=5)
        with pytest.raises(ClusterError, match="the cluster is closed"):
            network.session.submit(handle, [X])
        with pytest.raises(ClusterError, match="the cluster is closed"):
            network.session.load(one_device())
        gate.opened.set()


def test_interrupting_a_wait_leaves_the_session_usable() -> None:
    gate = Gate("interrupt")
    main = threading.main_thread().ident
    assert main is not None
    with Network() as network:
        handle = network.session.load(gated("interrupt"))
        future = network.session.submit(handle, [X])

        def interrupt() -> None:
            assert gate.entered.acquire(timeout=30)
            signal.pthread_kill(main, signal.SIGINT)

        thread = threading.Thread(target=interrupt)

        def wait() -> None:
            thread.start()
            future.result(timeout=30)

        with pytest.raises(KeyboardInterrupt):
            wait()
        thread.join(30)
        gate.opened.set()
        np.testing.assert_array_equal(future.result(timeout=30)[0], X * 2)
        np.testing.assert_array_equal(network.session.submit(handle, [X]).result(timeout=30)[0], X * 2)


def test_only_the_driver_of_a_plan_may_feed_or_end_it() -> None:
    from flowml_runtime import wire

    with Network() as network:
        handle = network.session.load(chain())
        stray = wire.Value(plan_id=handle.plan_id, step=0, kind="feed", index=0, device="worker:0/cpu:0", slots=(0,))
        network.workers[0].on_message("worker:1", stray, [X - 9])
        network.workers[0].on_message("worker:1", wire.Unload(plan_id=handle.plan_id), [])
        np.testing.assert_array_equal(network.session.submit(handle, [X]).result(timeout=30)[0], (X + 1) * 2)


def wait_for_a_kill(path: str, x: Any) -> Any:
    """Says that it has begun, then never ends by itself."""
    if x.min() < 0:
        Path(path).touch()
        threading.Event().wait()
    return x


def test_a_killed_process_surfaces_at_once_and_leaves_nothing(tmp_path: Path, no_leaks: NoLeaks) -> None:
    begun = tmp_path / "begun"
    with no_leaks(), fm.Cluster.local(workers=2, allow_python=True) as cluster:
        session = cluster.session
        handle = session.load(callback_then_double(functools.partial(wait_for_a_kill, str(begun))))
        np.testing.assert_array_equal(session.submit(handle, [X]).result(timeout=30)[0], X * 2)
        alone = session.load(one_device(device="worker:1/cpu:0"))
        futures = [session.submit(handle, [X - 1]) for _ in range(2)]
        wait_until(begun.exists, "worker 0 is in the middle of a step")
        os.kill(cluster.pids["worker:0"], signal.SIGKILL)
        for step, future in enumerate(futures, start=1):
            error = future.exception(timeout=30)
            assert isinstance(error, WorkerLostError)
            assert (error.worker, error.step) == ("worker:0", step)
            assert "heartbeat" not in str(error), "that would take 5 s"
        with pytest.raises(WorkerLostError, match="worker:0 was lost"):
            session.submit(handle, [X])
        assert session.submit(alone, [X]).exception(timeout=30) is None


def test_a_callback_in_another_process_brings_its_traceback_over() -> None:
    with fm.Cluster.local(workers=2, allow_python=True) as cluster:
        handle = cluster.session.load(callback_then_double(refuse_negative))
        with pytest.raises(WorkerError, match="ValueError: the input is negative") as caught:
            cluster.session.submit(handle, [X - 1]).result(timeout=30)
        assert 'raise ValueError("the input is negative' in (caught.value.remote_traceback or "")
        np.testing.assert_array_equal(cluster.session.submit(handle, [X]).result(timeout=30)[0], X * 2)


STUCK_S = 30.0
"""Far above the deadlines below: whoever waits this long did not heed them."""


@pytest.mark.parametrize("make", [fm.Cluster.threads, fm.Cluster.local], ids=["threads", "local"])
def test_the_deadline_of_a_cluster_is_its_users_and_travels_with_the_plan(make: Callable[..., fm.Cluster]) -> None:
    with make(workers=2, deadline_s=0.2) as cluster:
        began = time.monotonic()
        with pytest.raises(DeadlineError, match=r"waited 0\.2 s for worker:0/cpu:0 -> worker:1/cpu:0 \(h\)"):
            cluster.session.submit(cluster.session.load(never_sent()), [X]).result(timeout=STUCK_S)
        assert time.monotonic() - began < STUCK_S


@pytest.mark.parametrize("seconds", [0, -1.0, math.inf, math.nan, 1e12])
def test_a_deadline_that_is_none_is_refused(seconds: float, no_leaks: NoLeaks) -> None:
    for make in (fm.Cluster.threads, fm.Cluster.local, functools.partial(fm.Cluster.connect, "127.0.0.1:1", "t")):
        with no_leaks(), pytest.raises(ClusterError, match=f"deadline_s={seconds}: give seconds above 0, at most"):
            make(deadline_s=seconds)


def test_a_lost_worker_comes_with_advice_that_can_be_followed() -> None:
    with fm.Cluster.local(workers=2) as cluster:
        f = fm.dataflow(_across, cluster=cluster)
        f(X)
        os.kill(cluster.pids["worker:1"], signal.SIGKILL)
        with pytest.raises(
            WorkerLostError,
            match=r"; start it again with cluster.bring_back\(cluster.lost\), or start another cluster$",
        ):
            while True:
                f(X)
    with (
        closing(LaunchedCluster(workers=2)) as launched,
        fm.Cluster.connect(launched.address, launched.token) as cluster,
    ):
        f = fm.dataflow(_across, cluster=cluster)
        f(X)
        os.kill(launched.pids["worker:1"], signal.SIGKILL)
        command = f"`flowml worker {launched.address} --token-file FILE`"
        with pytest.raises(WorkerLostError, match=f"; start another with {command}$"):
            while True:
                f(X)


def _across(x: Any) -> Any:
    with fm.device("worker:0"):
        h = x + 1
    with fm.device("worker:1"):
        return h * 2
