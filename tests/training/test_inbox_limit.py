"""The inbox of a worker's training thread is bounded: one that is stuck ends the fit and does not fill the memory."""

from __future__ import annotations

import queue
from typing import Any

import jax
import optax
import pytest

import flowml as fm
from flowml_runtime import wire
from flowml_runtime.driver.loading import messages
from flowml_runtime.transport.endpoint import ThreadHub
from flowml_runtime.worker.training import host as module
from flowml_runtime.worker.training.host import TrainingHost
from flowml_runtime.worker.worker import Worker
from tests.training.reference import BATCH, data, mlp, mlp_loss

WAIT_S = 20.0
PLAN = "training"
LIMIT = 16


def test_more_messages_than_wait_for_a_stuck_thread_end_the_fit_once(
    threads_cluster: fm.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_INBOX", LIMIT)
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster)
    plan = trainer.plan(mlp(), jax.tree_util.tree_map(lambda x: x[:BATCH], data()))
    hub, heard = ThreadHub(), queue.SimpleQueue[Any]()
    driver, endpoint = hub.endpoint("driver"), hub.endpoint("worker:0")
    hosts: list[TrainingHost] = []

    class Kept(TrainingHost):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            hosts.append(self)

    monkeypatch.setattr(module, "TrainingHost", Kept)
    worker = Worker("worker:0", {plan.devices[0]: jax.devices()[0]}, endpoint)
    try:
        driver.start(lambda _peer, message, _arrays: heard.put(message), lambda *_: None)
        endpoint.start(worker.on_message, worker.on_lost)
        for message, piece in messages(PLAN, plan, "worker:0", (), WAIT_S, {}):
            driver.send("worker:0", message, [piece])
        assert isinstance(heard.get(timeout=WAIT_S), wire.Loaded)
        with hosts[0].changed:  # the thread takes one message in and is stuck there
            for _ in range(LIMIT + 4):
                driver.send("worker:0", wire.Commit(plan_id=PLAN, run=7, clock=0))
            failed = heard.get(timeout=WAIT_S)
        assert isinstance(failed, wire.StepFailed)
        assert (failed.step, failed.worker) == (7, "worker:0")
        assert f"{LIMIT} messages wait for the training thread of worker:0, and Commit from driver" in failed.error
        driver.send("worker:0", wire.StepCheck(plan_id=PLAN, step=7, device="worker:0"))
        assert heard.get(timeout=WAIT_S) == failed  # told again, and nothing in between
        assert heard.empty()
    finally:
        for closing in (driver, endpoint, worker):
            closing.close()
