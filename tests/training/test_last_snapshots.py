"""The snapshot at the end of a fit is written, although homes and replicas may be done before its buffers arrive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optax

import flowml as fm
from flowml_runtime import wire
from flowml_runtime.protocol.training.actions import Received
from flowml_runtime.protocol.training.driver import Begin, Fail, Over, TrainingDriver, WorkerLost
from flowml_runtime.protocol.training.ledger import Work
from flowml_runtime.protocol.training.snapshot import Rhythm, Save
from flowml_runtime.protocol.training.terms import Terms
from tests.protocol.test_driver import EVERYONE, IDS, MIXED, PLACES, retired, value
from tests.training.reference import BATCH, data, mlp, mlp_loss


def machine() -> TrainingDriver:
    ids: dict[str, Any] = {**IDS, "seed": 0, "shuffle": False, "examples": 1, "source": "fed"}
    start, terms = wire.StartTraining(**ids, total_clocks=2), Terms(2, 2, 1, MIXED, 2)
    return TrainingDriver(start, terms, Work(2, 4, 8, 2, aligned=True), PLACES, Rhythm())


def test_a_fit_is_not_over_while_its_last_snapshot_is_under_way() -> None:
    driver = machine()
    driver.step(Begin())
    for replica, first in enumerate(("a0", "b0")):
        driver.step(Received(first, wire.Paused(**IDS, replica=replica, hold=2, clock=2)))
    told = [retired(r, s) for r in range(2) for s in range(2)] + [value(0, "a0"), value(0, "b0"), value(1, "a1")]
    assert not any(isinstance(action, Over) for event in told for action in driver.step(event))
    assert not driver.over
    assert any(isinstance(action, Fail) for action in driver.step(WorkerLost("b1", "it was killed")))
    exported = [Received(worker, wire.Exported(**IDS, stages=(), stores=(), buffers=0)) for worker in EVERYONE]
    actions = [action for event in exported for action in driver.step(event)]
    assert [type(action) for action in actions if isinstance(action, Save | Over)] == [Save, Over]
    assert driver.over


def test_the_last_snapshot_of_summed_gradients_is_written(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / str(number)
        policies = fm.policies.all_reduce()
        trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster, replicas=4, policies=policies)
        trainer.fit(mlp(), data(), batch_size=BATCH, steps=4, checkpoint=fm.Checkpoint(path), progress=False)
        assert fm.restore(path).step == 4
