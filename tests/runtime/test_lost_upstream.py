"""A call whose values have all arrived ends well although the worker that sent them dies; one that misses any fails."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flowml as fm
from flowml.instructions import Feed, Fetch, Free, Recv, Run, Send
from flowml.plan import Plan
from tests.conftest import wait_until
from tests.plans import VECTOR, W0, W1, PlanBuilder, fetched
from tests.stalls import stop

WAIT_S = 30.0
"""A tenth of the deadline of a step."""
X = np.arange(4, dtype=np.float32)


def waits_for(path: str) -> Plan:
    """x -> x + 1 on worker 0 -> the same on worker 1, which first waits until the file `path` exists."""

    def wait(h: Any) -> list[Any]:
        end = time.monotonic() + WAIT_S
        Path(f"{path}.begun").touch()
        while not os.path.exists(path) and time.monotonic() < end:
            os.sched_yield()
        return [np.asarray(h)]

    build = PlanBuilder("waits")
    add = build.xla("add", lambda x: (x + 1,), [VECTOR], [VECTOR])
    last = build.python("last", wait, [VECTOR], [VECTOR])
    edge = build.message(W0, W1)
    build.program(W0, Feed((0,), (0,)), Run(add, (0,), (1,)), Send(edge, (1,)), Free((0, 1)))
    build.program(W1, Recv(edge, (0,)), Run(last, (0,), (1,)), Fetch((0,), (1,)), Free((0, 1)))
    return build.build([VECTOR], [fetched()])


@pytest.mark.parametrize("transport", ["auto", "grpc"])
def test_a_worker_that_has_sent_its_last_value_may_die(transport: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with fm.Cluster.local(workers=2, allow_python=True, transport=transport) as cluster:
        session = cluster.session
        handle = session.load(waits_for(str(gate)))
        first = session.submit(handle, [X])
        wait_until(lambda: os.path.exists(f"{gate}.begun"), "worker 1 has the value", WAIT_S)
        stop(cluster.pids["worker:0"])
        second = session.submit(handle, [X + 1])  # worker 0 never runs it
        os.kill(cluster.pids["worker:0"], signal.SIGKILL)
        wait_until(lambda: len(cluster.devices) == 1, "the loss is known", WAIT_S)
        with pytest.raises(fm.WorkerLostError, match="worker:0 was lost, and step"):
            session.submit(handle, [X]).result(timeout=WAIT_S)  # raised by `submit` if it knows
        assert not first.done()
        gate.touch()
        np.testing.assert_array_equal(first.result(timeout=WAIT_S)[0], X + 1)
        with pytest.raises(fm.WorkerLostError, match=r"worker:0 was lost, and step 1 of 'waits' needs it"):
            second.result(timeout=WAIT_S)


def test_a_step_that_waits_for_a_lost_worker_fails_at_once(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    with fm.Cluster.local(workers=2, allow_python=True) as cluster:
        session = cluster.session
        handle = session.load(waits_for(str(gate)))
        session.submit(handle, [X]).result(timeout=WAIT_S)
        stop(cluster.pids["worker:0"])
        futures = [session.submit(handle, [X]) for _ in range(3)]
        os.kill(cluster.pids["worker:0"], signal.SIGKILL)
        for future in futures:
            with pytest.raises(fm.WorkerLostError, match="worker:0 was lost, and step"):
                future.result(timeout=WAIT_S)
