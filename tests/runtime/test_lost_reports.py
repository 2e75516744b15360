"""A report that is lost on a connection that works: the driver asks after its deadline, and does not wait for ever."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optax
import pytest

import flowml as fm
from flowml.errors import WorkerError
from flowml.instructions import Feed, Fetch, Free, Run
from flowml.plan import Plan
from flowml_runtime import wire
from tests.conftest import wait_until
from tests.network import Network
from tests.plans import VECTOR, W0, Gate, PlanBuilder, chain, fetched, through_gate
from tests.training.reference import BATCH, data, mlp
from tests.training.test_faults import checked_loss

X = np.arange(4, dtype=np.float32)
WAIT_S = 30.0


def refuse(x: Any) -> Any:
    raise ValueError("no such example")


def lose_the_next(network: Network, kind: type[wire.Wire]) -> list[wire.Wire]:
    """The driver never hears of the next message of a kind. Gives the lost ones."""
    take, lost = network.receivers["driver"], list[wire.Wire]()

    def receive(peer: str, message: wire.Wire, arrays: Sequence[Any]) -> None:
        if isinstance(message, kind) and not lost:
            lost.append(message)
        else:
            take(peer, message, arrays)

    network.receivers["driver"] = receive
    return lost


def one_callback(callback: Callable[[Any], Any]) -> Plan:
    """x -> callback(x) as Python on worker 0."""
    build = PlanBuilder("one_callback")
    python = build.python("callback", lambda x: [callback(x)], [VECTOR], [VECTOR])
    build.program(W0, Feed((0,), (0,)), Run(python, (0,), (1,)), Fetch((0,), (1,)), Free((0, 1)))
    return build.build([VECTOR], [fetched()])


def test_a_lost_report_of_a_failed_step() -> None:
    with Network(1, deadline_s=0.2) as network:
        handle = network.load(one_callback(refuse), WAIT_S)
        lost = lose_the_next(network, wire.StepFailed)
        future = network.session.submit(handle, [X])
        with pytest.raises(WorkerError, match=r"worker:0/cpu:0 does not run this step any more"):
            future.result(timeout=WAIT_S)
        assert len(lost) == 1


def test_a_lost_result() -> None:
    with Network(deadline_s=0.2) as network:
        handle = network.load(chain(), WAIT_S)
        lost = lose_the_next(network, wire.Value)
        future = network.session.submit(handle, [X])
        with pytest.raises(WorkerError, match=r"worker:1/cpu:0 does not run this step any more.*never came") as caught:
            future.result(timeout=WAIT_S)
        assert len(lost) == 1
        assert (caught.value.worker, caught.value.step) == ("worker:1", 0)
        np.testing.assert_array_equal(network.session.submit(handle, [X]).result(timeout=WAIT_S)[0], (X + 1) * 2)


def test_a_plan_that_its_worker_has_forgotten() -> None:
    with Network(deadline_s=0.2) as network:
        handle = network.load(chain(), WAIT_S)
        network.workers[1].unload(handle.plan_id)
        with pytest.raises(WorkerError, match="worker:1/cpu:0 does not run this step any more"):
            network.session.submit(handle, [X]).result(timeout=WAIT_S)


def test_a_computation_that_takes_longer_than_the_deadline_is_asked_for_and_goes_on() -> None:
    gate = Gate("asked for")
    with Network(1, deadline_s=0.05) as network:
        handle = network.load(one_callback(functools.partial(through_gate, "asked for")), WAIT_S)
        future = network.session.submit(handle, [X])
        wait_until(lambda: sum(isinstance(m, wire.StepCheck) for _, m in network.driver.sent) >= 3, "it is asked for")
        assert not future.done()
        gate.opened.set()
        np.testing.assert_array_equal(future.result(timeout=WAIT_S)[0], X)


def test_a_lost_report_of_a_failed_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with fm.Cluster.threads(workers=2, deadline_s=1.0) as cluster:
        endpoint: Any = cluster.endpoint
        take, lost = endpoint._on_message, list[wire.Wire]()

        def receive(peer: str, message: wire.Wire, arrays: Sequence[Any]) -> None:
            if isinstance(message, wire.StepFailed) and len(lost) < 2:
                lost.append(message)
            else:
                take(peer, message, arrays)

        monkeypatch.setattr(endpoint, "_on_message", receive)
        trainer = fm.Trainer(checked_loss, optax.sgd(0.1), cluster=cluster, replicas=2, placement=fm.Pipeline(1))
        bad = np.zeros(96, bool)
        bad[BATCH * 2] = True  # the first item of step 2, which is replica 0's
        with pytest.raises(fm.FlowmlError, match=r"example 0 of the share is marked|waited 1 s for"):
            trainer.fit(mlp(), {**data(), "bad": bad}, batch_size=BATCH, steps=4, shuffle=False)
        assert len(lost) == 2
