"""Messages for a fit that has not begun on a worker: kept up to a bound, beyond which the fit is told to end."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import jax
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.plan import ArraySpec
from flowml_runtime import wire
from flowml_runtime.driver.loading import messages
from flowml_runtime.protocol.training import early as machine
from flowml_runtime.transport.endpoint import ThreadHub
from flowml_runtime.worker.worker import Worker
from tests.training.reference import BATCH, data, mlp, mlp_loss

WAIT_S = 20.0
PLAN = "training"
ROW = np.zeros(1024, np.float32)
ROW_SPEC = (ArraySpec((1024,), "float32"),)

Send = Callable[..., None]


@pytest.fixture
def loaded(threads_cluster: fm.Cluster) -> Iterator[tuple[Send, queue.SimpleQueue[Any]]]:
    """A worker with a training plan loaded: how its driver sends to it, and what the driver hears from it."""
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster)
    batch = jax.tree_util.tree_map(lambda x: x[:BATCH], data())
    plan = trainer.plan(mlp(), batch)
    hub, heard = ThreadHub(), queue.SimpleQueue[Any]()
    with ExitStack() as stack:
        driver, endpoint = hub.endpoint("driver"), hub.endpoint("worker:0")
        worker = Worker("worker:0", {plan.devices[0]: jax.devices()[0]}, endpoint)
        for closing in (driver, endpoint, worker):
            stack.callback(closing.close)
        driver.start(lambda _peer, message, _arrays: heard.put(message), lambda *_: None)
        endpoint.start(worker.on_message, worker.on_lost)
        for message, piece in messages(PLAN, plan, "worker:0", (), WAIT_S, {}):
            driver.send("worker:0", message, [piece])
        assert isinstance(heard.get(timeout=WAIT_S), wire.Loaded)
        yield lambda message, arrays=(): driver.send("worker:0", message, arrays), heard


def commit(run: int) -> wire.Commit:
    return wire.Commit(plan_id=PLAN, run=run, clock=0)


def test_more_messages_than_are_kept_end_their_fit(loaded: tuple[Send, queue.SimpleQueue[Any]]) -> None:
    send, heard = loaded
    for _ in range(machine.MAX_EARLY + 1):
        send(commit(7))
    failed = heard.get(timeout=WAIT_S)
    assert isinstance(failed, wire.StepFailed)
    assert failed.step == 7
    assert f"worker:0 has been sent {machine.MAX_EARLY} messages" in failed.error
    assert "fit that has not begun" in failed.error


def test_more_bytes_than_are_kept_end_their_fit(
    loaded: tuple[Send, queue.SimpleQueue[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "MAX_EARLY_BYTES", 10 * ROW.nbytes)
    send, heard = loaded
    for _ in range(11):
        send(wire.Source(plan_id=PLAN, run=7, slots=(0,), specs=ROW_SPEC), [ROW])
    failed = heard.get(timeout=WAIT_S)
    assert isinstance(failed, wire.StepFailed)
    assert failed.step == 7
    assert f"with {10 * ROW.nbytes} bytes for a fit" in failed.error


def test_what_came_for_a_fit_that_never_began_is_let_go(
    loaded: tuple[Send, queue.SimpleQueue[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these fits ends before it begins here; together they send more than is kept."""
    monkeypatch.setattr(machine, "MAX_EARLY", 16)
    send, heard = loaded
    for run in range(10):
        for _ in range(10):
            send(commit(run))
        send(wire.StopTraining(plan_id=PLAN, run=run))
    for _ in range(17):
        send(commit(100))
    failed = heard.get(timeout=WAIT_S)
    assert isinstance(failed, wire.StepFailed)
    assert failed.step == 100
