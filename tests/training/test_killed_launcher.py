"""The launcher of a cluster is killed in the middle of a fit, or the coordinator while it has a worker replaced.

All processes of a launcher end with it. If another is started with the same state and token within a minute, the
driver finds it, and its fit goes on from the snapshot in the driver's memory. A coordinator that is started again has a
worker replaced that the one before did not, and none is replaced twice.

`make kills` does this at each point under four policies, and `make test` at one each.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import flowml as fm
from flowml_runtime.launch.launched import LaunchedCluster
from flowml_runtime.transport.ending import Ending
from tests.conftest import wait_until
from tests.tools.conftest import started
from tests.training.test_kills import ALL, EVERY_POLICY, EXACT, TAKEOVER_S, check, count, points
from tests.training.test_lost_and_replaced import REPLICAS, STEPS, fit

pytestmark = pytest.mark.filterwarnings("ignore:worker.+ (was|were) lost")

STEPS_OF_KILLS = (2, STEPS // 2, STEPS - 8)
"""The workers are a few steps ahead of the driver, so that they are anywhere in a step."""
LAUNCHER = [(policy, step) for policy in EVERY_POLICY for step in STEPS_OF_KILLS]
REPLACING = points("""
    before after take Exited 1
    before after soon take Replace 1
    before after send Replace 1
    before after soon take Join 8
    before after send Welcome 8
    before after send Members 9
    before after send Members 15
""")
"""Workers, a spare, the launcher and the driver are seven members, which join each coordinator first."""
COORDINATOR = [(policy, at) for policy in EVERY_POLICY for at in REPLACING]
VICTIM = "worker:2"


@contextmanager
def launched(folder: Path) -> Generator[tuple[subprocess.Popen[str], str]]:
    """`flowml launch` where it was before: its process and address."""
    with started(folder, "launch", "-n", str(REPLICAS), "--state", "state", "--token-file", "token") as process:
        assert process.stdout is not None
        said = ""
        while "Ctrl-C stops it." not in said:
            said += (line := process.stdout.readline())
            assert line, "it has ended"
        found = re.search(r"cluster at (\S+),", said)
        assert found is not None
        yield process, found[1]


def train(cluster: fm.Cluster, policy: str, path: Path, **options: Any) -> fm.TrainingResult:
    return (fit if policy in EXACT else count)(cluster, policy, path, on_loss="replace", **options)


@pytest.mark.parametrize(("policy", "step"), LAUNCHER if ALL else LAUNCHER[1:2])
def test_a_kill_of_the_launcher(policy: str, step: int, tmp_path: Path) -> None:
    with ExitStack() as stack:
        first, address = stack.enter_context(launched(tmp_path))
        cluster = stack.enter_context(fm.Cluster.connect(address, tmp_path / "token"))
        whole = {policy: fit(cluster, policy)} if policy in EXACT else {}

        def kill(record: dict[str, Any]) -> None:
            if record["step"] == step:
                processes = psutil.Process(first.pid).children(recursive=True)
                first.send_signal(signal.SIGKILL)
                assert psutil.wait_procs(processes, 10)[1] == [], "all processes end with their launcher"
                assert stack.enter_context(launched(tmp_path))[1] == address

        found = train(cluster, policy, tmp_path / "checkpoints", callbacks=[kill])
        assert len(found.losses) >= 1
        check(found, policy, tmp_path / "checkpoints", whole)


@pytest.fixture(scope="module")
def with_spare() -> Iterator[LaunchedCluster]:
    with closing(LaunchedCluster(workers=REPLICAS, spares=1, state="")) as launched:
        yield launched


@pytest.fixture(scope="module")
def connected(with_spare: LaunchedCluster) -> Iterator[fm.Cluster]:
    with closing(fm.Cluster.connect(with_spare.address, with_spare.token)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def whole(connected: fm.Cluster) -> dict[str, fm.TrainingResult]:
    return {policy: fit(connected, policy) for policy in EXACT}


@pytest.mark.parametrize(
    ("policy", "at"), COORDINATOR if ALL else COORDINATOR[3:4], ids=lambda value: str(value).replace(" ", "-")
)
def test_a_kill_of_the_coordinator_while_a_worker_is_replaced(
    with_spare: LaunchedCluster,
    connected: fm.Cluster,
    whole: dict[str, fm.TrainingResult],
    policy: str,
    at: Ending,
    tmp_path: Path,
) -> None:
    wait_until(lambda: connected.spares == 1, "a spare is ready", 30)
    before = with_spare.processes.coordinator
    with_spare.end_coordinator(at)
    wait_until(lambda: with_spare.processes.coordinator not in (0, before), "it is there again", TAKEOVER_S)
    pid = with_spare.processes.coordinator

    def kill(record: dict[str, Any]) -> None:
        if record["step"] == STEPS // 3:
            os.kill(with_spare.pids[VICTIM], signal.SIGKILL)

    found = train(connected, policy, tmp_path, callbacks=[kill])
    wait_until(lambda: with_spare.processes.coordinator not in (0, pid), f"it has come to the point {at}", TAKEOVER_S)
    assert [loss.workers for loss in found.losses] == [(VICTIM,)]
    check(found, policy, tmp_path, whole)
    assert len(connected.devices) == REPLICAS
