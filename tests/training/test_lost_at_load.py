"""A worker that is lost while the plan of a fit is loaded is a loss like any other: a warning, and in the result."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import optax
import pytest

import flowml as fm
from tests.conftest import wait_until
from tests.training.reference import BATCH, data, mlp, mlp_loss


@pytest.fixture
def loses_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[fm.Cluster]:
    """A cluster that loses worker:1 just when the first plan is to be loaded."""
    with closing(fm.Cluster.threads(workers=3)) as cluster:
        session, load = cluster.session, cluster.session.load

        def lose_and_load(*args: Any, **options: Any) -> Any:
            monkeypatch.undo()
            cluster.end_worker("worker:1")
            wait_until(lambda: "worker:1" not in {d.worker for d in cluster.devices}, "the loss is known", 30)
            return load(*args, **options)

        monkeypatch.setattr(session, "load", lose_and_load)
        yield cluster


@pytest.mark.parametrize(("on_loss", "how"), [("shrink", "left out with its replica"), ("replace", "replaced within")])
def test_a_loss_while_the_plan_is_loaded_is_told(loses_one: fm.Cluster, on_loss: Any, how: str) -> None:
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=loses_one, replicas=3)
    options: dict[str, Any] = {"batch_size": BATCH, "steps": 3, "progress": False, "on_loss": on_loss}
    with pytest.warns(fm.FlowmlWarning, match=rf"worker:1 was lost at step 0 .* and was {how}.*goes on from step 0"):
        result = trainer.fit(mlp(), data(), **options)
    (loss,) = result.losses
    assert (loss.workers, loss.step, loss.resumed_at) == (("worker:1",), 0, 0)
    assert result.ledger.outstanding == 0
    assert [record["step"] for record in result.history] == [0, 1, 2]


def test_a_fit_that_a_loss_ends_writes_the_newest_snapshot_in_memory(tmp_path: Path) -> None:
    """The driver is there and has it, so the fit can go on from it, however long ago the last checkpoint was."""
    heard = list[int]()
    with closing(fm.Cluster.threads(workers=2)) as cluster:
        began = time.monotonic()

        def lose(record: dict[str, Any]) -> None:
            heard.append(record["step"])
            if time.monotonic() - began > 3 and len(cluster.devices) == 2:
                cluster.end_worker("worker:1")

        delays = {"worker:0": 0.05}
        trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=cluster, replicas=2, delays=delays)
        options: dict[str, Any] = {"batch_size": BATCH, "steps": 2000, "progress": False, "on_loss": "shrink"}
        checkpoint = fm.Checkpoint(tmp_path, every_s=3600)
        with pytest.raises(fm.WorkerLostError, match=r"1 of 2 replicas are left, and the fit needs 2"):
            trainer.fit(mlp(), data(), checkpoint=checkpoint, min_replicas=2, callbacks=[lose], **options)
    found = fm.restore(tmp_path)
    assert 0 < found.step <= heard[-1] + 1
    with closing(fm.Cluster.threads(workers=2)) as cluster:
        trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=cluster, replicas=2)
        steps = {**options, "steps": found.step + 2, "checkpoint": checkpoint, "resume": "auto"}
        assert trainer.fit(mlp(), data(), **steps).history[0]["step"] == found.step
