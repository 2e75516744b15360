"""Clusters of real processes: they start, work, lose members and end, and nothing outlives them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import psutil
import pytest

import flowml as fm
from flowml_runtime.cluster import current_cluster
from flowml_runtime.environment.machine import share_cores
from flowml_runtime.launch.launched import LaunchedCluster
from tests.conftest import wait_until
from tests.stalls import stop

NoLeaks = Callable[[], AbstractContextManager[None]]
NOTICED_S = 4.0
"""A second is the goal on a machine with nothing else to do; what is not noticed at once takes the timeout of 5 s."""


def net(x: Any) -> Any:
    with fm.layer("a"):
        h = jnp.sin(x)
    with fm.layer("b"):
        return jnp.cos(h)


def two_workers(cluster: fm.Cluster) -> Any:
    return fm.dataflow(net, cluster=cluster, placement={"a": "worker:0", "b": "worker:1"})


def call_until_it_fails(f: Any) -> None:
    while True:
        f(jnp.ones(3))


def python(code: str, *arguments: str, folder: Path | None = None) -> subprocess.Popen[str]:
    """An owner of a cluster in a process of its own, with a folder of its own for temporary files."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    if folder is not None:
        environment["TMPDIR"] = str(folder)
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr and process.stderr.read()
    return line


def assert_gone(processes: list[psutil.Process], within_s: float) -> None:
    assert psutil.wait_procs(processes, timeout=within_s)[1] == []


@pytest.fixture(scope="module")
def launched() -> Iterator[LaunchedCluster]:
    cluster = LaunchedCluster(workers=1)
    yield cluster
    cluster.close()


def test_a_local_cluster_starts_computes_and_ends(
    no_leaks: NoLeaks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    jnp.sin(1.0)
    with no_leaks():
        with fm.Cluster.local(workers=2, devices_per_worker=2) as cluster:
            assert [d.name for d in cluster.devices] == [f"worker:{i}/cpu:{j}" for i in range(2) for j in range(2)]
            total = psutil.virtual_memory().total
            assert all(0 < (d.memory_bytes or 0) <= total // 4 for d in cluster.devices)
            assert current_cluster() is cluster
            x = jnp.arange(8.0)
            np.testing.assert_allclose(two_workers(cluster)(x), net(x), rtol=1e-6)
            began = time.monotonic()
        assert time.monotonic() - began < NOTICED_S
        cluster.close()
        assert repr(cluster) == "<Cluster, closed>"
    assert list(tmp_path.iterdir()) == []


def test_workers_have_their_own_cores_and_xla_keeps_to_them(process_cluster: fm.Cluster) -> None:
    cores = sorted(os.sched_getaffinity(0))
    shares = [p.cpu_affinity() for p in map(psutil.Process, process_cluster.pids.values())]
    assert [tuple(s or ()) for s in shares] == share_cores(tuple(cores), 2)
    for pid, share in zip(process_cluster.pids.values(), shares, strict=True):
        names = [Path(f"/proc/{pid}/task/{t.id}/comm").read_text().strip() for t in psutil.Process(pid).threads()]
        assert names.count("tf_XLAEigen") == len(share or ())


@pytest.mark.parametrize(
    ("cores", "workers", "shares"),
    [
        ((0, 1), 2, [(0,), (1,)]),
        ((2, 5, 7), 2, [(2,), (5, 7)]),
        ((0, 1), 4, [(0,), (0,), (1,), (1,)]),
        ((0, 1, 2, 3), 1, [(0, 1, 2, 3)]),
        ((0, 1), 3, [(0,), (0,), (1,)]),
    ],
)
def test_cores_are_shared_out_evenly(cores: tuple[int, ...], workers: int, shares: list[tuple[int, ...]]) -> None:
    assert share_cores(cores, workers) == shares


def test_the_zygote_has_one_thread_when_it_forks(process_cluster: fm.Cluster) -> None:
    (parent,) = {psutil.Process(pid).parent() for pid in process_cluster.pids.values()}
    assert parent is not None
    assert parent.name() == "flowml:zygote"
    assert parent.num_threads() == 1


def test_a_killed_worker_surfaces_at_once() -> None:
    with fm.Cluster.local(workers=2) as cluster:
        f = two_workers(cluster)
        f(jnp.ones(3))
        os.kill(cluster.pids["worker:1"], signal.SIGKILL)
        with pytest.raises(fm.WorkerLostError, match="worker:1") as caught:
            call_until_it_fails(f)
        assert "heartbeat" not in str(caught.value), "that would take 5 s"
        assert caught.value.worker == "worker:1"
        wait_until(lambda: [d.name for d in cluster.devices] == ["worker:0/cpu:0"], "its device is gone", NOTICED_S)
        np.testing.assert_allclose(fm.dataflow(net, cluster=cluster)(jnp.ones(3)), net(jnp.ones(3)), rtol=1e-6)


def test_a_suspended_worker_is_lost_after_the_timeout() -> None:
    with fm.Cluster.local(workers=2) as cluster:
        f = two_workers(cluster)
        f(jnp.ones(3))
        stop(cluster.pids["worker:1"])
        with pytest.raises(fm.WorkerLostError, match="no heartbeat for 5 s"):
            f(jnp.ones(3))


def test_without_the_zygote_all_workers_are_lost_and_say_so(no_leaks: NoLeaks) -> None:
    with no_leaks(), fm.Cluster.local(workers=2) as cluster:
        f = two_workers(cluster)
        f(jnp.ones(3))
        workers = [psutil.Process(pid) for pid in cluster.pids.values()]
        parent = workers[0].parent()
        assert parent is not None
        parent.kill()
        with pytest.raises(fm.WorkerLostError):
            call_until_it_fails(f)
        assert_gone(workers, 5.0)


def test_a_worker_that_cannot_start_is_quoted_and_nothing_is_left(no_leaks: NoLeaks) -> None:
    with no_leaks(), pytest.raises(fm.ClusterError, match="worker:0 did not start: its process") as caught:
        fm.Cluster.local(workers=1, platform="abacus")
    assert "abacus" in str(caught.value)


def test_a_start_that_takes_too_long_is_given_up(no_leaks: NoLeaks) -> None:
    with no_leaks(), pytest.raises(fm.ClusterError, match=r"(within 0\.05 s|not ready in time).*start_timeout_s"):
        fm.Cluster.local(workers=1, start_timeout_s=0.05)


def test_counts_are_checked() -> None:
    for make in (fm.Cluster.local, fm.Cluster.threads, LaunchedCluster):
        with pytest.raises(fm.ClusterError, match="workers=0: give at least 1"):
            make(workers=0)


OWNER = """
import os, sys, threading
import flowml as fm
cluster = fm.Cluster.local(workers=2)
if "fork" in sys.argv and os.fork() == 0:
    threading.Event().wait(60)
    os._exit(0)
print(*cluster.pids.values(), cluster.endpoint.address.rpartition(":")[2], flush=True)
while "end" not in sys.argv:  # not in one go: a signal that comes just before Python goes to sleep would not wake it
    threading.Event().wait(0.1)
"""


@pytest.mark.parametrize("how", ["end", "interrupt", "terminate", "kill", "kill after a fork"])
def test_nothing_outlives_its_owner(how: str, tmp_path: Path) -> None:
    owner = python(OWNER, *how.split(), folder=tmp_path)
    *pids, port = map(int, line_of(owner).split())
    workers = [psutil.Process(pid) for pid in pids]
    started = {p for w in workers for p in [w, w.parent()] if p is not None and p.pid != owner.pid}
    forks = [p for p in psutil.Process(owner.pid).children() if p not in started]
    assert (len(started), len(forks)) == (3, "fork" in how)
    stop = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM}.get(how, signal.SIGKILL)
    if how != "end":
        owner.send_signal(stop)
    _, errors = owner.communicate(timeout=60) if not forks else (owner.wait(60), "")
    assert owner.returncode == (0 if how == "end" else -stop)
    assert_gone(list(started), 5.0)
    assert errors.strip().splitlines()[-1:] == (["KeyboardInterrupt"] if how == "interrupt" else [])
    wait_until(lambda: list(tmp_path.iterdir()) == [], "its temporary files are gone")
    for fork in forks:  # it has what the owner had open, the port too
        fork.kill()
    assert_gone(forks, 5.0)
    listening = {c.laddr.port for c in psutil.net_connections() if c.status == psutil.CONN_LISTEN}
    assert port not in listening
    if owner.stdout is not None and owner.stderr is not None:
        owner.stdout.close()
        owner.stderr.close()


def test_interrupted_while_it_starts_nothing_is_left() -> None:
    owner = python("import flowml as fm, flowml_runtime.cluster; print(0, flush=True); fm.Cluster.local(workers=2)")
    line_of(owner)
    watched = psutil.Process(owner.pid)
    wait_until(lambda: watched.children(recursive=True), "the cluster is starting")
    started = watched.children(recursive=True)
    owner.send_signal(signal.SIGINT)
    _, errors = owner.communicate(timeout=60)
    assert errors.strip().splitlines()[-1] == "KeyboardInterrupt"
    assert_gone(started, 5.0)


FORKER = """
import os, sys
import flowml as fm
with fm.Cluster.local(workers=1) as cluster:
    child = os.fork()
    if child == 0:
        cluster.close()
        sys.exit(3)  # runs what was registered for the end of the program
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    print(fm.dataflow(lambda x: x + 1)(41))
"""


def test_a_fork_of_the_owner_leaves_the_cluster_alone() -> None:
    owner = python(FORKER)
    out, errors = owner.communicate(timeout=60)
    assert (owner.returncode, out) == (0, "42\n"), errors


def test_the_current_cluster_is_that_of_the_innermost_block() -> None:
    with fm.Cluster.threads(workers=1) as outer:
        with fm.Cluster.threads(workers=2) as inner:
            assert current_cluster() is inner
            seen: list[Any] = []
            thread = threading.Thread(target=lambda: seen.append(current_cluster()))
            thread.start()
            thread.join()
            assert seen == [inner]
        assert current_cluster() is outer
    with pytest.raises(fm.ClusterError, match="closed; start another"), outer:
        pass


def test_a_threads_cluster_leaves_nothing_behind(no_leaks: NoLeaks) -> None:
    with no_leaks(), fm.Cluster.threads(workers=3) as cluster:
        assert [d.name for d in cluster.devices] == [f"worker:{i}/cpu:0" for i in range(3)]
        np.testing.assert_allclose(two_workers(cluster)(jnp.ones(3)), net(jnp.ones(3)), rtol=1e-6)


def test_several_drivers_share_a_launched_cluster(launched: LaunchedCluster) -> None:
    with fm.Cluster.connect(launched.address, token=launched.token) as one:
        with fm.Cluster.connect(launched.address, token=launched.token) as two:
            assert one.endpoint.name != two.endpoint.name
            for cluster in (one, two):
                assert [d.name for d in cluster.devices] == ["worker:0/cpu:0"]
                assert fm.dataflow(lambda x: x * 2, cluster=cluster)(21) == 42
        assert fm.dataflow(lambda x: x + 1, cluster=one)(41) == 42


JOINER = """
import sys
from flowml_runtime.worker.process import serve
from flowml_runtime.worker.config import WorkerConfig
config = WorkerConfig(coordinator=sys.argv[1], token=sys.stdin.readline().strip())
print(serve(config, joined=lambda name: print(name, flush=True)))
"""


def joiner(address: str, token: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(
        [sys.executable, "-c", JOINER, address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin is not None
    process.stdin.write(token + "\n")
    process.stdin.flush()
    return process


def test_workers_that_join_by_address_come_go_and_end_with_the_coordinator() -> None:
    launched = LaunchedCluster(workers=1)
    with fm.Cluster.connect(launched.address, token=launched.token) as cluster:
        first, second = (joiner(launched.address, launched.token) for _ in range(2))
        assert {line_of(first), line_of(second)} == {"worker:1\n", "worker:2\n"}
        wait_until(lambda: len(cluster.devices) == 3, "both have joined")
        f = two_workers(cluster)
        np.testing.assert_allclose(f(jnp.ones(3)), net(jnp.ones(3)), rtol=1e-6)
        first.kill()
        wait_until(lambda: len(cluster.devices) == 2, "one is lost", NOTICED_S)
        launched.close()
        out, _ = second.communicate(timeout=30)
        assert re.fullmatch(r"worker:\d ends: its coordinator was lost: .*\n", out)
        first.communicate()
        wait_until(lambda: cluster.devices == (), "the cluster is over", NOTICED_S)
        launched.close()


def test_a_cluster_that_is_not_there_is_said_so() -> None:
    with pytest.raises(fm.ClusterError, match=r"127\.0\.0\.1:9 cannot be joined: .*Connection refused"):
        fm.Cluster.connect("127.0.0.1:9", token="t")
    with pytest.raises(fm.ClusterError, match="'nonsense' is not an address"):
        fm.Cluster.connect("nonsense", token="t")


def test_a_port_in_use_is_said_so(launched: LaunchedCluster, no_leaks: NoLeaks) -> None:
    with no_leaks(), pytest.raises(fm.ClusterError, match="cannot listen on"):
        LaunchedCluster(bind=launched.address, workers=1)


def test_eight_workers_start_with_little_more_work_than_one() -> None:
    """They are forks of one process, which alone imports what all need."""
    spent_s: list[float] = []
    for count in (1, 8):
        with fm.Cluster.local(workers=count) as cluster:
            assert len(cluster.devices) == count
            processes = psutil.Process().children(recursive=True)
            spent_s.append(sum(t.user + t.system for t in (p.cpu_times() for p in processes)))
    assert spent_s[1] < 3 * spent_s[0], "eight that import it would take nearly eight times as long"


def test_workers_share_the_import_of_what_trains() -> None:
    program = "import sys, flowml_runtime.launch.zygote; print('flowml_runtime.worker.training.host' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "True"  # else each worker imports it when it first trains
