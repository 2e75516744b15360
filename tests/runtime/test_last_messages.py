"""What a worker has written before it dies is taken in before its loss is told."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import flowml as fm
from flowml.errors import WorkerLostError
from flowml.instructions import Feed, Fetch, Free, Recv, Run, Send
from flowml.plan import Plan
from flowml_runtime import wire
from flowml_runtime.transport import arrivals
from flowml_runtime.transport.arrivals import Arrivals
from flowml_runtime.transport.endpoint import MAX_QUEUED_BYTES
from tests.conftest import wait_until
from tests.plans import VECTOR, W0, W1, PlanBuilder, fetched

WAIT_S = 30.0
X = np.arange(4, dtype=np.float32)


def dies_at_negative() -> Plan:
    """x -> x + 1 on worker 0 -> the same on worker 1, which kills itself where the first element is negative."""

    def die(h: Any) -> list[Any]:
        if np.asarray(h)[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return [h]

    build = PlanBuilder("dies")
    add = build.xla("add", lambda x: (x + 1,), [VECTOR], [VECTOR])
    last = build.python("last", die, [VECTOR], [VECTOR])
    edge = build.message(W0, W1)
    build.program(W0, Feed((0,), (0,)), Run(add, (0,), (1,)), Send(edge, (1,)), Free((0, 1)))
    build.program(W1, Recv(edge, (0,)), Run(last, (0,), (1,)), Fetch((0,), (1,)), Free((0, 1)))
    return build.build([VECTOR], [fetched()])


def test_calls_whose_results_were_sent_before_the_worker_died_succeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is in the middle of the first result while two more arrive, the worker dies and its loss is known."""
    monkeypatch.setattr(arrivals, "DRAIN_S", WAIT_S)  # this machine may be busy
    with fm.Cluster.local(workers=2, allow_python=True) as cluster:
        session = cluster.session
        handle = session.load(dies_at_negative())
        take, held, go_on = session.on_message, threading.Event(), threading.Event()

        def slowly(peer: str, message: wire.Wire, arrays: Sequence[Any]) -> None:
            if peer == "worker:1" and isinstance(message, wire.Value) and not held.is_set():
                held.set()
                go_on.wait(WAIT_S)
            take(peer, message, arrays)

        monkeypatch.setattr(session, "on_message", slowly)
        futures = [session.submit(handle, [X + n]) for n in range(3)]
        assert held.wait(WAIT_S)
        fatal = session.submit(handle, [X - 10])
        peers = cluster.endpoint._peers  # type: ignore[attr-defined]
        wait_until(lambda: bool(peers["worker:1"].lost), "the driver knows of the loss")
        go_on.set()
        for n, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(timeout=WAIT_S)[0], X + n + 1)
        with pytest.raises(WorkerLostError, match="worker:1"):
            fatal.result(timeout=WAIT_S)


def on_its_thread(run: Any) -> tuple[Arrivals, threading.Thread]:
    """The arrivals of a stream whose thread runs `run(arrivals)`."""
    made: list[Arrivals] = []
    there = threading.Event()

    def serve() -> None:
        made.append(Arrivals())
        there.set()
        run(made[0])

    thread = threading.Thread(target=serve)
    thread.start()
    assert there.wait(WAIT_S)
    return made[0], thread


def test_a_peer_that_goes_on_sending_is_not_listened_to_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "DRAIN_S", 0.3)
    over = threading.Event()

    def serve(stream: Arrivals) -> None:
        while not over.is_set():
            stream.taken += 1

    stream, thread = on_its_thread(serve)
    stream.begin_drain()
    assert stream.admits(8)
    began = time.monotonic()
    stream.drain()
    assert time.monotonic() - began < WAIT_S
    assert not stream.admits(8)
    over.set()
    thread.join()


def test_a_lost_peer_is_listened_to_up_to_a_number_of_bytes() -> None:
    stream = Arrivals()
    assert not stream.admits(1)  # it is lost by word of a new one of that name, and nothing is awaited from it
    stream.begin_drain()
    assert stream.admits(2 * MAX_QUEUED_BYTES)  # one message may be larger than all that may be in flight
    assert not stream.admits(1)


def test_the_thread_that_takes_messages_in_does_not_wait_for_itself() -> None:
    stream = Arrivals()
    stream.busy = True
    stream.begin_drain()
    began = time.monotonic()
    stream.drain()
    assert time.monotonic() - began < arrivals.DRAIN_S
