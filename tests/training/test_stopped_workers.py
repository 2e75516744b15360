"""Fits on processes of which one is stopped for a while, or slow: what it costs, and what speculation makes of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from typing import Any

import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import BATCH, assert_close, data, mlp, mlp_loss, optax_loop

STEPS = 16
REPLICAS = 4
STOPPED_S = 0.6
SOURCE = data()
STEADY = {f"worker:{i}": 0.01 for i in range(REPLICAS)}
HOME, NO_HOME = "worker:1", "worker:3"
"""The model has three layers, so three workers hold one each."""


@pytest.fixture(scope="module")
def workers() -> Iterator[fm.Cluster]:
    with closing(fm.Cluster.local(workers=REPLICAS)) as cluster:
        yield cluster


class Stop:
    """A callback that stops a worker's process soon after a step, for a while. `seconds` is how long that was."""

    def __init__(self, pid: int, step: int, after_s: float = 0.0) -> None:
        self._pid = pid
        self._step = step
        self._stop = threading.Timer(after_s, self.stop)
        self._go_on = threading.Timer(after_s + STOPPED_S, self.go_on)
        self.seconds = 0.0

    def __call__(self, record: dict[str, Any]) -> None:
        if record["step"] == self._step:
            self._stop.start()
            self._go_on.start()

    def stop(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)
        self.seconds -= time.monotonic()

    def go_on(self) -> None:
        os.kill(self._pid, signal.SIGCONT)
        self.seconds += time.monotonic()

    def __enter__(self) -> Stop:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.cancel()
        self._go_on.cancel()
        os.kill(self._pid, signal.SIGCONT)


def fit(
    cluster: fm.Cluster, policy: fm.Policy, *callbacks: Any, delays: Any = STEADY, steps: int = STEPS
) -> fm.TrainingResult:
    trainer = fm.Trainer(
        mlp_loss,
        optax.adam(0.01),
        cluster=cluster,
        replicas=REPLICAS,
        policies=policy,
        placement=fm.Pipeline(1),
        delays=delays,
    )
    return trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=steps, progress=False, callbacks=callbacks)


def check_serial(result: fm.TrainingResult) -> None:
    """The update of each step is that of the whole batch, whoever computed it."""
    expected = optax_loop(mlp_loss, mlp(), optax.adam(0.01), SOURCE, STEPS, items=1)
    assert_close(result.params, expected.params, 1e-5)
    np.testing.assert_allclose([r["loss"] for r in result.history], expected.losses, rtol=1e-5)


@pytest.mark.parametrize("policy", [fm.Policy(), fm.policies.gossip("ring")], ids=["home", "gossip"])
def test_a_stopped_process_costs_the_time_for_which_it_is_stopped(workers: fm.Cluster, policy: fm.Policy) -> None:
    """It is stopped in the middle of its own pause, in which it waits for no other."""
    slower = STEADY | {HOME: 0.16}
    with Stop(workers.pids[HOME], step=2, after_s=0.06) as stop:
        result = fit(workers, policy, stop, delays=slower, steps=8)
    worst = result.stragglers()[0]
    assert (worst.replica, worst.workers) == (1, (HOME,))
    true = stop.seconds + 8 * 0.15
    assert 0.8 * true < worst.cost_s < min(1.3 * true, result.seconds)
    assert str(result.stragglers()).startswith("worker:1 (replica 1) was late at ")


def test_others_compute_the_portion_of_a_stopped_process(workers: fm.Cluster) -> None:
    steady = dict.fromkeys(STEADY, 0.02)
    with Stop(workers.pids[NO_HOME], step=6) as stop:
        result = fit(workers, fm.policies.speculate(1), stop, delays=steady)
    check_serial(result)
    ledger = result.ledger
    assert (ledger.used, ledger.outstanding, ledger.dropped) == (REPLICAS * STEPS, 0, 0)
    assert ledger.replicas[3].used < STEPS, "whether or not it had begun the portion in which it was stopped"
    ends = [record["seconds"] for record in result.history]
    longest = max(b - a for a, b in pairwise(ends))
    assert longest < 0.8 * stop.seconds, "a step takes its portion, a wait of as long, and the copy"


def test_a_slow_process_computes_fewer_portions_and_is_named(workers: fm.Cluster) -> None:
    slow = fm.sim.Straggler(fm.sim.Constant(0.01), 20, workers=(3,))
    result = fit(workers, fm.policies.speculate(3), delays=slow)
    check_serial(result)
    done = [replica.used for replica in result.ledger.replicas]
    assert done[3] < 0.6 * min(done[:3])
    worst = result.stragglers()[0]
    assert worst.replica == 3 and worst.late > STEPS / 2
    assert 0 < worst.cost_s < result.seconds
    assert worst.items.copied > 0, "whichever of the two came first"
    assert "that it had begun" in str(result.stragglers())
