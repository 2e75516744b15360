"""Workers were lost before a driver came. A fit that needs them has them again, or does without."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import optax
import pytest

import flowml as fm
from flowml.errors import WorkerLostError
from flowml_runtime.launch.launched import LaunchedCluster
from tests.conftest import wait_until
from tests.training.reference import BATCH, assert_same, data, mlp, mlp_loss
from tests.training.test_lost_and_replaced import REPLICAS, STEPS, fit

STOP_AT = 22


@pytest.fixture(params=[0, 1], ids=["without-spares", "with-a-spare"])
def launched(request: pytest.FixtureRequest) -> Iterator[LaunchedCluster]:
    with closing(LaunchedCluster(workers=REPLICAS, spares=request.param)) as launched:
        yield launched


def connected(launched: LaunchedCluster) -> closing[fm.Cluster]:
    return closing(fm.Cluster.connect(launched.address, launched.token))


def lose_driver_and_worker(launched: LaunchedCluster, path: Path, worker: str) -> None:
    """A fit ends in the middle, and a worker is killed when no driver is there."""

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == STOP_AT:
            raise KeyError("it ends here")

    with connected(launched) as cluster, pytest.raises(KeyError, match="it ends here"):
        fit(cluster, "synchronous", path, callbacks=[stop])
    os.kill(launched.pids[worker], signal.SIGKILL)
    with connected(launched) as cluster:
        wait_until(lambda: worker in cluster.lost, "its loss is known")


@pytest.mark.parametrize("worker", ["worker:0", "worker:3"])
def test_a_resumed_fit_has_the_worker_again_that_was_lost_with_its_driver(
    launched: LaunchedCluster, worker: str, tmp_path: Path
) -> None:
    with connected(launched) as cluster:
        assert cluster.lost == ()
        whole = fit(cluster, "synchronous")
    lose_driver_and_worker(launched, tmp_path, worker)
    with connected(launched) as cluster:
        assert cluster.lost == (worker,)
        with pytest.raises(
            WorkerLostError, match=rf"{worker} was lost .*there are 3.*cluster.bring_back\(cluster.lost"
        ) as e:
            fit(cluster, "synchronous", tmp_path, resume="auto")
        assert ("1 spare worker waits" in str(e.value)) == bool(cluster.spares)
        resumed = fit(cluster, "synchronous", tmp_path, resume="auto", on_loss="replace")
        assert cluster.lost == ()
    assert resumed.history[0]["step"] > 0
    assert_same((resumed.params, resumed.opt_state), (whole.params, whole.opt_state))
    assert resumed.ledger == whole.ledger


def test_a_resumed_fit_shrinks_as_it_would_have_with_its_driver(tmp_path: Path) -> None:
    with closing(LaunchedCluster(workers=REPLICAS)) as launched:
        lose_driver_and_worker(launched, tmp_path, "worker:1")
        with connected(launched) as cluster:
            with pytest.warns(fm.FlowmlWarning, match="worker:1 was lost before this fit has begun"):
                shrunk = fit(cluster, "synchronous", tmp_path, resume="auto", on_loss="shrink")
            assert cluster.lost == ("worker:1",)
            assert {record["replicas"] for record in shrunk.history} == {REPLICAS - 1}
            first = shrunk.history[0]["step"]
            assert 0 < first <= STOP_AT + 1
            assert shrunk.ledger.used == first * REPLICAS + (STEPS - first) * (REPLICAS - 1)
            cluster.bring_back(cluster.lost)
            assert (cluster.lost, len(cluster.devices)) == ((), REPLICAS)


def test_a_lost_worker_comes_back_only_for_a_fit_that_needs_it() -> None:
    with closing(LaunchedCluster(workers=3)) as launched:
        os.kill(launched.pids["worker:2"], signal.SIGKILL)
        with connected(launched) as cluster:
            wait_until(lambda: cluster.lost == ("worker:2",), "its loss is known")
            found = fit(cluster, "synchronous", replicas=2, on_loss="replace")
            assert len(found.history) == STEPS
            assert cluster.lost == ("worker:2",)
            named = {"fc0": "worker:2", "*": "worker:0"}
            trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=cluster, replicas=1, placement=named)
            with pytest.raises(WorkerLostError, match=r"worker:2 was lost .*placement pattern 'fc0' names"):
                trainer.fit(mlp(), data(), batch_size=BATCH, steps=2, progress=False)
            trainer.fit(mlp(), data(), batch_size=BATCH, steps=2, progress=False, on_loss="replace")
            assert cluster.lost == ()


def test_delays_may_name_a_worker_that_was_lost() -> None:
    """It need not be there, and who mistypes a name is told."""
    with closing(fm.Cluster.threads(workers=3)) as cluster:
        delays = {"worker:2": 0.001}
        fit(cluster, "synchronous", replicas=2, delays=delays)
        cluster.end_worker("worker:2")
        wait_until(lambda: cluster.lost == ("worker:2",), "its loss is known")
        for on_loss in ("raise", "shrink"):
            assert len(fit(cluster, "synchronous", replicas=2, delays=delays, on_loss=on_loss).history) == STEPS
        with pytest.raises(fm.FlowmlError, match="delays names 'worker:22', which does not exist"):
            fit(cluster, "synchronous", replicas=2, delays={"worker:22": 0.001}, on_loss="shrink")
