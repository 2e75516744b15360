"""A worker that is to leave gives notice, hands over, and goes: by SIGTERM, by the command, and by the driver."""

from __future__ import annotations

import signal
from contextlib import closing
from pathlib import Path

import jax.numpy as jnp
import psutil
import pytest

import flowml as fm
from flowml_runtime.launch.launched import LaunchedCluster
from flowml_runtime.transport.security import write_token
from flowml_runtime.worker.leaving import HANDED_OVER
from flowml_tools.main import main
from tests.conftest import wait_until


def workers(cluster: fm.Cluster) -> list[str]:
    return sorted({device.worker for device in cluster.devices})


def test_a_worker_without_work_goes_at_once_and_ends_well() -> None:
    with fm.Cluster.local(workers=2) as cluster:
        process = psutil.Process(cluster.pids["worker:1"])
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: workers(cluster) == ["worker:0"], "it has left")
        wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "it has ended")
        assert cluster.leaving == frozenset()
        assert fm.dataflow(lambda x: x + 1, cluster=cluster)(1.0) == 2.0


@pytest.mark.parametrize("make", [fm.Cluster.local, fm.Cluster.threads])
def test_kept_values_stay_until_they_are_not_needed(make) -> None:
    with make(workers=2) as cluster:
        kept = fm.put(jnp.arange(3.0), cluster, {"*": "worker:1"})
        assert kept.fetch().tolist() == [0.0, 1.0, 2.0]
        cluster.end_worker("worker:1", notice=True)
        wait_until(lambda: cluster.leaving == {"worker:1"}, "it has given notice")
        assert kept.fetch().tolist() == [0.0, 1.0, 2.0]
        kept.delete()
        wait_until(lambda: workers(cluster) == ["worker:0"], "it has left")


def test_the_others_are_told_why_and_it_comes_back_under_its_name() -> None:
    with fm.Cluster.local(workers=2) as cluster:
        cluster.end_worker("worker:0", notice=True)
        wait_until(lambda: workers(cluster) == ["worker:1"], "it has left")
        with pytest.raises(fm.WorkerLostError, match="it left after it had given notice"):
            fm.dataflow(lambda x: x + 1, cluster=cluster, placement={"*": "worker:0"})(1.0)
        cluster.bring_back(["worker:0"])
        assert workers(cluster) == ["worker:0", "worker:1"]
        assert cluster.leaving == frozenset()


def test_the_command_says_if_a_worker_ended_before_others_had_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(LaunchedCluster(workers=2, notice_s=0.2)) as launched:
        write_token(tmp_path / "token", launched.token)
        with fm.Cluster.connect(launched.address, launched.token) as cluster:
            kept = fm.put(jnp.arange(3.0), cluster, {"*": "worker:1"})
            leave = ["worker", launched.address, "--token-file", str(tmp_path / "token"), "--leave"]
            assert main([*leave, "worker:1"]) == 1
            out, err = capsys.readouterr()
            assert "has left" not in out
            assert "worker:1 has ended, and its work may be lost: it left before others had taken over, 0.2 s" in err
            del kept


def test_a_worker_that_has_left_is_not_waited_for_if_a_spare_has_its_name() -> None:
    """As the command that has a worker leave waits: the name is there all the time."""
    with fm.Cluster.threads(workers=1) as cluster:
        cluster.told["worker:0"] = HANDED_OVER
        cluster.notice("worker:0", None, cluster.told)
        assert workers(cluster) == ["worker:0"]


def test_a_worker_that_is_not_there_cannot_leave() -> None:
    with (
        fm.Cluster.threads(workers=2) as cluster,
        pytest.raises(fm.ClusterError, match=r"worker:7.*worker:0, worker:1"),
    ):
        cluster.end_worker("worker:7", notice=True)
