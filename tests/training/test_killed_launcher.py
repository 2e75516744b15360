"""The launcher of a cluster is killed in the middle of a fit, or the coordinator while it has a worker replaced.

All processes of a launcher end with it. If another is started with the same state and token within a minute, the
driver finds it, and its fit goes on from the snapshot in the driver's memory. A coordinator that is started again has a
worker replaced that the one before did not, and none is replaced twice.

The launcher has no part in a step, so its points are those of the driver: the moment before or after the driver sends
or takes a message. All workers end at that moment, wherever they are.

`make kills` does this at each point under four policies, and `make test` at one each.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import flowml as fm
from flowml_runtime import wire
from flowml_runtime.launch.coordinating import CoordinatorProcess
from flowml_runtime.launch.launched import LaunchedCluster
from flowml_runtime.membership.member import Membership
from flowml_runtime.transport.ending import Ending
from tests.conftest import wait_until
from tests.tools.conftest import started
from tests.training.test_kills import ALL, EVERY_POLICY, EXACT, TAKEOVER_S, check, count, points
from tests.training.test_lost_and_replaced import REPLICAS, STEPS, fit

pytestmark = pytest.mark.filterwarnings("ignore:worker.+ (was|were) lost")

POINTS = points("""
    after send LoadPlan 2
    before take Loaded 3
    after send StartTraining 2
    after send Source 4
    before send Grant 3
    before take Report 20
    after take Settled 18
    after take Paused 2
    after send Export 3
    before take Exported 2
    after take Buffers 20
    before take Buffers 41
    before send Hold 9
    after take Report 120
    after take Report 128
    before take StoreValue 2
    after take Retired 2
""")
"""Before the first read, in a step, in the middle of a snapshot, and while the fit ends."""
LAUNCHER = [(policy, at) for policy in EVERY_POLICY for at in POINTS]
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
SLOW = {f"worker:{number}": 0.03 for number in range(REPLICAS)}


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


def train(cluster: fm.Cluster, policy: str, path: Path | None, **options: Any) -> fm.TrainingResult:
    return (fit if policy in EXACT else count)(cluster, policy, path, on_loss="replace", **options)


class Killing:
    """Kills a process at a point of the messages of an endpoint in this one."""

    def __init__(self, endpoint: Any, at: Ending, pid: int) -> None:
        self.done = threading.Event()
        self._at, self._pid, self._left = at, pid, at.number
        self._lock = threading.Lock()
        self._endpoint, self._were = endpoint, (endpoint.send, endpoint._on_message)
        send, take = self._were
        if at.verb == "send":
            endpoint.send = self._watched(send)
        else:
            endpoint._on_message = self._watched(take)

    def __enter__(self) -> Killing:
        return self

    def __exit__(self, *_: object) -> None:
        self._endpoint.send, self._endpoint._on_message = self._were

    def _watched(self, process: Callable[..., None]) -> Callable[..., None]:
        def watched(peer: str, message: wire.Wire, *more: Any) -> None:
            here = self._is_here(message)
            if here and self._at.when == "before":
                self._kill()
            process(peer, message, *more)
            if here and self._at.when == "after":
                self._kill()

        return watched

    def _is_here(self, message: wire.Wire) -> bool:
        with self._lock:
            self._left -= type(message).__name__ == self._at.message
            return self._left == 0 and type(message).__name__ == self._at.message

    def _kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        self.done.set()


@pytest.mark.parametrize(
    ("policy", "at"), LAUNCHER if ALL else LAUNCHER[10:11], ids=lambda value: str(value).replace(" ", "-")
)
def test_a_kill_of_the_launcher(policy: str, at: Ending, tmp_path: Path) -> None:
    with ExitStack() as stack:
        first, address = stack.enter_context(launched(tmp_path))
        cluster = stack.enter_context(fm.Cluster.connect(address, tmp_path / "token"))
        whole = {policy: fit(cluster, policy)} if policy in EXACT else {}
        processes = psutil.Process(first.pid).children(recursive=True)
        killing = stack.enter_context(Killing(cluster.endpoint, at, first.pid))

        def start_another() -> None:
            assert killing.done.wait(60), f"it has not come to the point {at}"
            assert psutil.wait_procs(processes, 10)[1] == [], "all processes end with their launcher"
            assert stack.enter_context(launched(tmp_path))[1] == address

        with ThreadPoolExecutor(1) as pool:
            started = pool.submit(start_another)
            # slow enough that the workers, which end a moment later, do not come to the end of the fit
            found = train(cluster, policy, tmp_path / "checkpoints", delays=SLOW)
            started.result()
        ends = policy == "quorum" and at.number >= STEPS * round(0.75 * REPLICAS)  # late replicas need not report
        if not ends and at.message not in ("LoadPlan", "Loaded", "StoreValue", "Retired"):
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


def launcher_of(launched: LaunchedCluster) -> Membership:
    """The launcher's own membership."""
    coordinator = launched._coordinator  # pyright: ignore
    assert isinstance(coordinator, CoordinatorProcess)
    assert coordinator._membership is not None  # pyright: ignore
    return coordinator._membership  # pyright: ignore


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
    before, launcher = with_spare.processes.coordinator, launcher_of(with_spare)
    welcome = launcher._welcome  # pyright: ignore
    with_spare.end_coordinator(at)
    wait_until(lambda: with_spare.processes.coordinator not in (0, before), "it is there again", TAKEOVER_S)
    pid = with_spare.processes.coordinator
    # Else the coordinator may miss the worker itself before it could be told, and takes no report.
    wait_until(lambda: launcher._welcome is not welcome, "the launcher has joined", TAKEOVER_S)  # pyright: ignore

    def kill(record: dict[str, Any]) -> None:
        if record["step"] == STEPS // 3:
            os.kill(with_spare.pids[VICTIM], signal.SIGKILL)

    found = train(connected, policy, tmp_path, callbacks=[kill])
    wait_until(lambda: with_spare.processes.coordinator not in (0, pid), f"it has come to the point {at}", TAKEOVER_S)
    assert [loss.workers for loss in found.losses] == [(VICTIM,)]
    check(found, policy, tmp_path, whole)
    assert len(connected.devices) == REPLICAS


@pytest.mark.parametrize("policy", EVERY_POLICY if ALL else EVERY_POLICY[:1])
def test_a_kill_of_the_process_that_starts_workers(
    with_spare: LaunchedCluster, connected: fm.Cluster, whole: dict[str, fm.TrainingResult], policy: str, tmp_path: Path
) -> None:
    """All workers, the spare and the coordinator end with it, and the launcher starts them again."""
    children = psutil.Process().children
    zygotes = [process for process in children() if process.name() == "flowml:zygote"]
    (zygote,) = [z for z in zygotes if with_spare.processes.coordinator in (child.pid for child in z.children())]
    killed: list[psutil.Process] = []

    def kill(record: dict[str, Any]) -> None:
        if record["step"] == STEPS // 3:
            killed.extend(zygote.children(recursive=True))
            zygote.kill()

    found = train(connected, policy, tmp_path, callbacks=[kill], delays=SLOW)
    assert psutil.wait_procs(killed, 10)[1] == [], "all processes end with the one that has started them"
    assert len(found.losses) >= 1
    check(found, policy, tmp_path, whole)
    wait_until(lambda: connected.spares == 1, "a spare is ready again", 30)
    assert len(connected.devices) == REPLICAS


def test_a_local_cluster_goes_on_without_the_process_that_started_its_workers() -> None:
    with fm.Cluster.local(workers=2) as cluster:
        parents = {psutil.Process(pid).ppid() for pid in cluster.pids.values()}
        (zygote,) = map(psutil.Process, parents)
        zygote.kill()
        wait_until(lambda: len(cluster.lost) == 2, "all workers have ended with it")
        cluster.bring_back(cluster.lost)
        wait_until(lambda: len(cluster.devices) == 2, "they are there again", 30)
        assert len(train(cluster, "synchronous", None, replicas=2).history) == STEPS
        assert {psutil.Process(pid).ppid() for pid in cluster.pids.values()}.isdisjoint(parents)
