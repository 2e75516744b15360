"""Calls and fits after the loss of a worker: which one, why, and what to do; and what still succeeds."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.errors import PlacementError, WorkerLostError
from flowml_runtime import wire
from flowml_runtime.driver.session import Session
from flowml_runtime.protocol.training.actions import Received
from flowml_runtime.protocol.training.driver import Fail, WorkerLost
from tests.conftest import wait_until
from tests.network import Network
from tests.plans import chain, one_device
from tests.protocol.test_driver import IDS, PLACES, driver, retired, value

X = jnp.arange(4, dtype=jnp.float32)


def kill(cluster: fm.Cluster, *workers: str) -> None:
    """Kill worker processes, and wait until the cluster knows."""
    for worker in workers:
        os.kill(cluster.pids[worker], signal.SIGKILL)
    wait_until(lambda: not {d.worker for d in cluster.devices} & set(workers), "the workers are known to be lost", 30)


def test_a_call_that_needs_a_lost_worker_names_it_and_why() -> None:
    with fm.Cluster.local(workers=2) as cluster:
        kill(cluster, "worker:1")
        named = fm.dataflow(lambda x: x + 1, placement=lambda graph, _: dict.fromkeys(_ids(graph), "worker:1"))
        with pytest.raises(
            WorkerLostError, match=r"worker:1 was lost \(.+\), so '<lambda>' cannot be placed"
        ) as caught:
            named(X)
        assert caught.value.worker == "worker:1"
        assert "start it again with cluster.bring_back(cluster.lost)" in str(caught.value)

        def pinned(x: Any) -> Any:
            with fm.device("worker:1"):
                return x + 1

        with pytest.raises(WorkerLostError, match=r"worker:1 was lost \(.+\), so 'pinned' cannot be placed"):
            fm.dataflow(pinned)(X)
        np.testing.assert_array_equal(fm.dataflow(lambda x: x + 1)(X), X + 1)  # the other one serves
        kill(cluster, "worker:0")
        with pytest.raises(WorkerLostError, match=r"worker:0 was lost .*worker:1 was lost .*no worker is left"):
            fm.dataflow(lambda x: x + 2)(X)
        trainer = fm.Trainer(lambda p, x: jnp.mean((x @ p) ** 2), optax.sgd(0.1))
        with pytest.raises(WorkerLostError, match=r"worker:0 was lost .*no worker is left to run it"):
            trainer.fit(jnp.ones(4), np.ones((8, 4), np.float32), batch_size=8, steps=1)


def _ids(graph: Any) -> list[int]:
    return [node.id for node in graph.nodes]


def test_a_device_that_never_was_is_still_an_error_of_the_placement() -> None:
    with Network() as network:
        session = network.session
        session.devices = session.devices[:1]
        session.on_lost("worker:1", "its connection broke")
        with pytest.raises(PlacementError, match="worker:9"):
            session.load(one_device(device="worker:9/cpu:0"))
        with pytest.raises(WorkerLostError, match=r"worker:1 was lost \(its connection broke\)"):
            session.load(chain())


def test_a_worker_that_is_back_is_not_called_lost() -> None:
    with Network() as network:
        session: Session = network.session
        devices = session.devices
        session.devices = devices[:1]
        session.on_lost("worker:1", "its connection broke")
        session.devices = devices
        assert session.load(chain()) is not None


def test_a_worker_that_owes_nothing_may_be_lost_once_all_stages_have_retired() -> None:
    machine = driver()
    for replica, stages in enumerate(PLACES.stages):
        for stage in range(len(stages)):
            machine.step(retired(replica, stage))
    machine.step(value(0, "a0", 1))
    assert machine.step(WorkerLost("a0", "it died")) == []
    owing = WorkerLost("a1", "it died")
    assert machine.step(owing) == [Fail(owing, 7)]
    assert machine.unfinished("a1") == (1,)


def test_a_worker_is_needed_until_all_stages_have_retired() -> None:
    """Also one that has finished: others may wait for its word."""
    machine = driver()
    for stage in (0, 1):
        machine.step(retired(0, stage))
    machine.step(value(0, "a0", 1))
    lost = WorkerLost("a0", "it died")
    assert machine.step(lost) == [Fail(lost, 4)]
    assert machine.step(Received("b0", wire.Retired(**IDS, replica=1, stage=0))) == []


@pytest.mark.parametrize("victim", ["worker:0", "worker:1"])
def test_a_worker_killed_at_the_last_record_leaves_a_result_or_says_what_is_lost(victim: str) -> None:
    x = np.ones((16, 4), np.float32)
    with closing(fm.Cluster.local(workers=2)) as cluster:

        def at_the_end(record: Any) -> None:
            if record["step"] == 3:
                os.kill(cluster.pids[victim], signal.SIGKILL)

        trainer = fm.Trainer(lambda p, x: jnp.mean((x @ p) ** 2), optax.sgd(0.1), cluster=cluster, replicas=2)
        try:
            result = trainer.fit(jnp.ones(4), x, batch_size=8, steps=4, callbacks=[at_the_end])
        except WorkerLostError as error:
            assert error.worker == victim
            assert f"{victim} was lost after the last step, before it had sent its part of the result" in str(error)
        else:
            assert len(result.history) == 4
            assert np.isfinite(result.params).all()
