"""A driver is lost soon after a worker. The snapshot from which its fit had gone on is still whole on the workers."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import optax
import pytest

import flowml as fm
from flowml_runtime.driver.training import saving
from flowml_runtime.environment import checkpoints
from flowml_runtime.launch.launched import LaunchedCluster
from tests.conftest import wait_until
from tests.training.reference import BATCH, assert_same, data, mlp, mlp_loss
from tests.training.test_lost_and_replaced import REPLICAS, STEPS, fit
from tests.training.test_lost_before import connected

LOST_AT = 20
OPTIONS: dict[str, dict[str, Any]] = {
    "replace": {"on_loss": "replace"},
    "shrink": {"on_loss": "shrink"},
    "elastic": {"replicas": "elastic"},
}


def train(cluster: fm.Cluster, path: Path, **options: Any) -> fm.TrainingResult:
    """A fit that writes no checkpoint before its end."""
    trainer = fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=cluster, replicas=REPLICAS)
    more: dict[str, Any] = {"batch_size": BATCH, "steps": STEPS, "seed": 3, "progress": False, **options}
    return trainer.fit(mlp(), data(), checkpoint=fm.Checkpoint(path), **more)


def lose(launched: LaunchedCluster, worker: str, monkeypatch: pytest.MonkeyPatch, path: Path, **options: Any) -> None:
    """A worker is lost, and its driver is soon after: before the next snapshot."""
    monkeypatch.setattr(saving, "LEAST_PAUSE_S", 0.0)
    monkeypatch.setattr(saving, "MOST_SHARE", 1.0)
    lost: list[int] = []

    def callback(record: dict[str, Any]) -> None:
        if record["step"] == LOST_AT and not lost:
            monkeypatch.setattr(saving, "LEAST_PAUSE_S", 1e9)
            lost.append(launched.pids[worker])
            os.kill(launched.pids[worker], signal.SIGKILL)
        elif record["step"] > STEPS - 5:
            raise KeyError("it ends here")

    with (
        connected(launched) as cluster,
        pytest.warns(fm.FlowmlWarning, match=f"{worker} was lost at step"),
        pytest.raises(KeyError, match="it ends here"),
    ):
        train(cluster, path, callbacks=[callback], **options)
    assert not checkpoints.snapshots(path)


@pytest.mark.parametrize("worker", ["worker:0", "worker:2"])
@pytest.mark.parametrize("mode", OPTIONS)
@pytest.mark.filterwarnings("ignore:worker.+ was lost before this fit")
def test_the_snapshot_from_which_a_fit_has_gone_on_outlives_its_driver(
    mode: str, worker: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with closing(LaunchedCluster(workers=REPLICAS)) as launched:
        with connected(launched) as cluster:
            whole = fit(cluster, "synchronous")
        lose(launched, worker, monkeypatch, tmp_path, **OPTIONS[mode])
        monkeypatch.undo()
        with connected(launched) as cluster:
            found = train(cluster, tmp_path, resume="auto", **OPTIONS[mode])
    assert 0 < found.resumed_at <= LOST_AT + 1
    assert [record["step"] for record in found.history] == list(range(found.resumed_at, STEPS))
    if mode == "replace":
        assert_same((found.params, found.opt_state), (whole.params, whole.opt_state))
        assert found.ledger == whole.ledger


def test_a_fit_says_that_the_workers_keep_only_a_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with closing(LaunchedCluster(workers=REPLICAS, spares=1)) as launched:
        lose(launched, "worker:1", monkeypatch, tmp_path, on_loss="replace")
        os.kill(launched.pids["worker:3"], signal.SIGKILL)
        with connected(launched) as cluster:
            wait_until(lambda: cluster.lost == ("worker:3",), "its loss is known")
            with pytest.warns(
                fm.FlowmlWarning, match=r"keep only a part of the snapshot of step \d+, .* so the fit begins anew"
            ):
                found = train(cluster, tmp_path, resume="auto", on_loss="replace")
    assert found.resumed_at == 0
    assert len(found.history) == STEPS
